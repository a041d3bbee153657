"""The engine's side of the socket: any source, served to any number of viewers.

One thread, one selector. Every viewer has at most one answer on its way, and
is not read from meanwhile: nothing queues up for a slow one, and the engine's
thread never waits for any.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import selectors
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from . import wire
from .config import RunConfig, UserError, one_line
from .engine_registry import EngineInfo
from .events import StepTrace
from .feed import Command, End, Source
from .forks import in_child
from .run import Run
from .run_events import Loaded, Paused, Refused, Resumed, RunEnded, RunStarted, StepEnded
from .techniques import label

log = logging.getLogger("gpumem_tui.server")

EVENTS_A_TIME = 2_000
VIEWERS_MAX = 64
SAY_HELLO_WITHIN_S = 10.0
FIRST_VIEWER_WITHIN_S = 60.0
"""Time for the viewer that started an engine to come; until then the engine does not count as alone."""
ANSWER_A_TIME = 1 << 16
OUT_OF_DESCRIPTORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
ACCEPT_AGAIN_S = 1.0


@dataclass(eq=False)
class _Viewer:
    """One connection.

    Attributes:
        attached: It has said hello and may ask.
        only_looks: It never commands, and is not counted.
        take: It wants to command as soon as it has said hello.
        answer: What has not been sent yet of the answer on its way.
        closing: It ends when that is sent.
        refused: Why its last command did nothing; told once.
        heard_s: On the monotonic clock, when it last sent anything.
    """

    connection: socket.socket
    since_s: float
    inbox: wire.Inbox = field(default_factory=wire.Inbox)
    attached: bool = False
    only_looks: bool = False
    answer: memoryview = field(default_factory=lambda: memoryview(b""))
    closing: bool = False
    refused: str = ""
    heard_s: float = 0.0

    @property
    def counts(self) -> bool:
        """True if the engine goes on for it."""
        return self.attached and not self.only_looks


class Server:
    """Serves a source on a Unix socket.

    Args:
        source: Asked on the serving thread; commands go to it.
        info: Who it is.
        path: Of the socket; its folder is private already.
        log: Told to the viewers, who read its end when the engine has died.
        on_end: Called when a viewer that commands ends the engine; None: it cannot be ended from here.

    Attributes:
        alone_since_s: On the monotonic clock, when the last viewer left; None while there is one.
    """

    def __init__(
        self, source: Source, info: EngineInfo, path: Path, log: Path, on_end: Callable[[], None] | None
    ) -> None:
        self.source, self.info, self.log, self._on_end = source, info, log, on_end
        self.alone_since_s: float | None = time.monotonic() + FIRST_VIEWER_WITHIN_S
        self._selector = selectors.DefaultSelector()
        self._viewers: list[_Viewer] = []
        self._commander: _Viewer | None = None
        self._parting = False
        self._accept_again_s: float | None = None
        self._runs, self._traces = _NumberedRuns(), _NumberedTraces()
        self._wake_read, self._wake_write = socket.socketpair()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            before = os.umask(0o177)
            try:
                self._listener.bind(os.fspath(path))
            finally:
                os.umask(before)
            self._listener.listen(VIEWERS_MAX)
        except OSError:
            self.close()
            raise
        for each in (self._listener, self._wake_read, self._wake_write):
            each.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        in_child(self._forget_in_child)

    @property
    def viewers(self) -> int:
        """Number of viewers attached."""
        return sum(viewer.counts for viewer in self._viewers)

    def wake(self) -> None:
        """Have `serve` return soon; from any thread or signal handler."""
        with contextlib.suppress(OSError):
            self._wake_write.send(b"!")

    def serve(self, timeout_s: float) -> None:
        """Answer whoever has asked, or wait that long for somebody to."""
        for key, events in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fileobj is self._wake_read:
                with contextlib.suppress(BlockingIOError):
                    self._wake_read.recv(4096)
            elif key.data in self._viewers:  # it has not made room for another
                self._attend(key.data, events)
        self._drop_silent()
        if self._accept_again_s is not None and time.monotonic() >= self._accept_again_s:
            self._selector.register(self._listener, selectors.EVENT_READ, None)
            self._accept_again_s = None

    def part(self, within_s: float) -> None:
        """Tell every viewer what it has not heard yet, and end its connection with that."""
        self._parting, until_s = True, time.monotonic() + within_s
        while self.viewers and (left_s := until_s - time.monotonic()) > 0:
            self.serve(left_s)

    def close(self) -> None:
        """End all connections."""
        for viewer in self._viewers:
            viewer.connection.close()
        self._viewers.clear()
        for each in (self._listener, self._wake_read, self._wake_write):
            each.close()
        self._selector.close()

    def _forget_in_child(self) -> None:
        """A data loader's worker holds no connection open that its parent has lost."""
        with contextlib.suppress(OSError, RuntimeError):
            self.close()

    # --- connections ------------------------------------------------------------

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError as error:
            if error.errno in OUT_OF_DESCRIPTORS:  # it would be there again at once, and for as long as that lasts
                self._selector.unregister(self._listener)
                self._accept_again_s = time.monotonic() + ACCEPT_AGAIN_S
            return
        if not wire.is_ours(connection):
            connection.close()
            return
        if len(self._viewers) >= VIEWERS_MAX:  # whoever is silent makes room
            self._drop(min(self._viewers, key=lambda v: (v.attached, v.heard_s)))
        connection.setblocking(False)
        now_s = time.monotonic()
        viewer = _Viewer(connection, now_s, heard_s=now_s)
        self._viewers.append(viewer)
        self._selector.register(connection, selectors.EVENT_READ, viewer)

    def _attend(self, viewer: _Viewer, events: int) -> None:
        try:
            if events & selectors.EVENT_READ:
                data = viewer.connection.recv(1 << 16)
                if not data:
                    raise EOFError
                viewer.inbox.add(data)
                viewer.heard_s = time.monotonic()
            self._answer(viewer)
        except BlockingIOError:
            pass
        except (OSError, EOFError, wire.MalformedError):
            self._drop(viewer)
        except Exception as error:  # a fault in answering one viewer ends no run and no other connection
            log.warning("gpumem-tui: a viewer could not be answered: %s", one_line(error))
            log.debug("its request", exc_info=True)
            self._drop(viewer)

    def _answer(self, viewer: _Viewer) -> None:
        """Send what is on its way, then answer the next request, if it is there."""
        while True:
            while viewer.answer:
                try:
                    sent = viewer.connection.send(viewer.answer[:ANSWER_A_TIME])
                except BlockingIOError:
                    # Until that has gone nothing more is read: it is the viewer's turn.
                    self._selector.modify(viewer.connection, selectors.EVENT_WRITE, viewer)
                    return
                viewer.answer = viewer.answer[sent:]
            if viewer.closing:
                raise EOFError
            request = viewer.inbox.next()
            if request is None:
                self._selector.modify(viewer.connection, selectors.EVENT_READ, viewer)
                return
            answer = self._reply(viewer, request)
            if answer is not None:
                viewer.answer = memoryview(wire.frame(answer))

    def _drop(self, viewer: _Viewer) -> None:
        self._selector.unregister(viewer.connection)
        viewer.connection.close()
        self._viewers.remove(viewer)
        if self._commander is viewer:
            self._commander = None
        if viewer.counts and not self.viewers:
            self.alone_since_s = time.monotonic()

    def _drop_silent(self) -> None:
        latest = time.monotonic() - SAY_HELLO_WITHIN_S
        for viewer in [v for v in self._viewers if not v.attached and v.since_s < latest]:
            self._drop(viewer)

    # --- requests ------------------------------------------------------------------

    def _reply(self, viewer: _Viewer, request: wire.Request) -> wire.Answer | None:
        match request:
            case wire.Hello() | wire.Look():
                return self._welcome(viewer, request)
            case wire.Peek():
                return self._status()
            case _ if not viewer.attached:
                raise wire.MalformedError("said no hello")
            case wire.Ask():
                return self._news(viewer, request)
            case wire.Do() if viewer.only_looks:
                raise wire.MalformedError("it only looks")
            case wire.Do():
                self._do(viewer, request)
        return None

    def _welcome(self, viewer: _Viewer, hello: wire.Hello | wire.Look) -> wire.Answer:
        if hello.protocol != wire.PROTOCOL:
            viewer.closing = True
            return wire.Refused(version_problem(self.info, hello.version))
        viewer.attached, viewer.only_looks = True, isinstance(hello, wire.Look)
        if isinstance(hello, wire.Hello):
            self.alone_since_s = None
            if hello.take or self._commander is None:
                self._commander = viewer
        info = self.info
        return wire.Welcome(wire.PROTOCOL, info.version, info.name, info.kind, info.pid, str(self.log))

    def _do(self, viewer: _Viewer, request: wire.Do) -> None:
        viewer.refused = ""
        if request.name == wire.TAKE_OVER:
            self._commander = viewer
            return
        try:
            if viewer is not self._commander:
                raise UserError("another viewer commands this engine")
            self._carry_out(wire.unpack_command(request))
        except UserError as error:
            viewer.refused = one_line(error)

    def _carry_out(self, command: Command) -> None:
        if not isinstance(command, End):
            self.source.command(command)
        elif self._on_end is None:
            raise UserError("this is somebody's own script: it cannot be ended from here")
        else:
            self._on_end()

    def _news(self, viewer: _Viewer, ask: wire.Ask) -> wire.News:
        source = self.source
        runs = source.runs()
        told = self._runs.after(ask.runs, runs)
        events = source.events(ask.since)
        # A run's events tell of it before its traces come.
        whole = len(events) <= EVENTS_A_TIME
        numbered = self._traces.after(ask.trace, runs) if whole else []
        refused, viewer.refused = viewer.refused, ""
        more = not whole or len(numbered) > 1 or len(source.runs()) != len(runs)
        viewer.closing = self._parting and not more
        return wire.News(
            runs=[wire.pack_run(number, run) for number, run in told],
            environment=source.environment(),
            gauge=source.gauge(),
            events=list(events[:EVENTS_A_TIME]),  # type: ignore[arg-type]
            trace=wire.pack_trace(*numbered[0]) if numbered else None,
            more=more,
            commands=viewer is self._commander,
            viewers=self.viewers,
            refused=refused,
        )

    def _status(self) -> wire.Status:
        runs, environment, info = self.source.runs(), self.source.environment(), self.info
        config, gauge = runs[-1].config if runs else None, self.source.gauge()
        return wire.Status(
            info.name,
            info.kind,
            info.pid,
            model=config.model if config else "",
            techniques=label(config) if config else "",
            device=environment.device if environment else "",
            step=gauge.step if gauge else 0,
            allocated_bytes=gauge.allocated_bytes if gauge else 0,
            age_s=time.time() - info.started_s,
            viewers=self.viewers,
            state=state_of(self.source),
        )


class _NumberedRuns:
    """Runs by numbers that grow with every run and every change of one's configuration."""

    def __init__(self) -> None:
        self._known: dict[Run, tuple[int, RunConfig]] = {}
        self._next = 1

    def after(self, number: int, runs: Sequence[Run]) -> list[tuple[int, Run]]:
        """Runs that the viewer does not know as they are now, in order."""
        known = {run: self._known[run] for run in runs if run in self._known}
        for run in runs:
            config = run.config
            if run not in known or known[run][1] is not config:
                known[run] = (self._next, config)
                self._next += 1
        self._known = known
        return sorted(((n, run) for run, (n, _) in known.items() if n > number), key=lambda pair: pair[0])


class _NumberedTraces:
    """The traces that runs have, by numbers that grow: a viewer asks for what follows its last."""

    def __init__(self) -> None:
        self._known: list[tuple[int, int, StepTrace]] = []
        self._next = 1

    def after(self, number: int, runs: Sequence[Run]) -> list[tuple[int, int, StepTrace]]:
        """Number, run and trace of those that are still kept and that the viewer has not seen, in order."""
        there = [(run.id.number, trace) for run in runs for trace in (*run.traces(), run.latest) if trace is not None]
        kept = {id(trace) for _, trace in there}
        self._known = [known for known in self._known if id(known[2]) in kept]
        seen = {id(trace) for _, _, trace in self._known}
        for run, trace in there:
            if id(trace) not in seen:
                seen.add(id(trace))
                self._known.append((self._next, run, trace))
                self._next += 1
        return [known for known in self._known if known[0] > number]


def state_of(source: Source) -> str:
    """One word for what it is doing, from its latest events."""
    for event in reversed(source.events(0)):
        match event:
            case RunEnded():
                return event.reason
            case StepEnded() | Loaded() | Resumed():
                return "training"
            case RunStarted():
                return "loading"
            case Paused():
                return "held"
            case Refused():
                return "refused"
    return "starting"


def version_problem(info: EngineInfo, theirs: str) -> str:
    """One clear line for a viewer and an engine that do not understand each other."""
    return (
        f"{info.name} was started by gpumem-tui {info.version}, this is {theirs}: use that version, "
        f"or end it: gpumem-tui stop {info.name}"
    )
