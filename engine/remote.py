"""An engine behind a socket, as a `Source`.

One thread asks as often as somebody looks and keeps what it was told, so that
the engine's death takes nothing away: what was seen can still be looked at and
saved.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from . import techniques, wire
from .advice import advice
from .config import UserError, one_line
from .engine_registry import EngineDir
from .feed import Command, Feed, Published, Save, TakeOver, ViewerRole
from .recording import save
from .run import Run
from .run_events import EngineEnded, Refused, RunEvent, placed
from .wire import TAKE_OVER

ASK_EVERY_S = 0.1
ANSWERS_WITHIN_S = 60.0
LISTENS_WITHIN_S = 2.0
LOG_TAIL_BYTES = 8192


@dataclass(frozen=True, slots=True)
class Lost:
    """The end of an engine, or of the connection to it.

    Attributes:
        why: In one line.
        at_s: On the monotonic clock.
        by: Who ended it; empty: nobody did.
        detail: The last of its log, where nobody did.
    """

    why: str
    at_s: float
    by: str = ""
    detail: str = ""


class Remote(Published):
    """A viewer's end of one engine's socket.

    Args:
        engine_dir: Of a running engine.
        take: Command it, whoever does now.
        only_look: Never command it, and do not count among its viewers.
        version: Of this program, for the line about another version's engine.
        ask_every_s: How often the engine is asked.
        after_run: Number of the run that its first follows.
        after_s: The time at which its clock begins.
        on_lost: Called on a thread of its own when the engine has ended.

    Attributes:
        lost: How it ended; None: it has not.
    """

    live = True

    def __init__(
        self,
        engine_dir: EngineDir,
        *,
        take: bool = False,
        only_look: bool = False,
        version: str = "",
        ask_every_s: float = ASK_EVERY_S,
        after_run: int = 0,
        after_s: float = 0.0,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self.engine_dir, self._take, self._only_look, self._version = engine_dir, take, only_look, version
        self._ask_every_s, self._on_lost = ask_every_s, on_lost
        self.lost: Lost | None = None
        self._feed = Feed(engine_dir.name)
        self._welcome: wire.Welcome | None = None
        self._connection: socket.socket | None = None
        self._commands: deque[wire.Do] = deque()
        self._commanding: bool | None = None  # not told yet
        self._taking = self._closing = self._is_up_to_date = False
        self._told = threading.Event()
        self._goodbye: EngineEnded | None = None
        self._since = self._last_trace = self._last_run = 0
        self._run_offset, self._clock_offset_s = after_run, after_s
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._thread: threading.Thread | None = None

    # --- Source -------------------------------------------------------------

    @property
    def role(self) -> ViewerRole:
        """The viewer's role; until the engine has said otherwise, it may command."""
        if self.lost is not None:
            return ViewerRole.GONE
        if self._welcome is not None and self._welcome.kind == "watch":
            return ViewerRole.WATCHING
        only_looks = self._commanding is False and not self._taking
        return ViewerRole.READ_ONLY if only_looks else ViewerRole.ATTACHED

    @property
    def gone(self) -> bool:
        """True if the engine has ended."""
        return self.lost is not None

    def command(self, command: Command) -> None:
        """Pass a command on; saving happens on this side, whoever commands.

        Raises:
            UserError: It is refused at once.
        """
        if isinstance(command, Save):
            threading.Thread(target=self._save, args=(command,), name="save", daemon=True).start()
            return
        role = self.role
        if role is ViewerRole.WATCHING:
            raise UserError(advice(command, self.run))
        if role is ViewerRole.READ_ONLY and not isinstance(command, TakeOver):
            raise UserError("another viewer commands this engine; ! takes over")
        if role is ViewerRole.GONE:
            raise UserError("the engine has gone; s saves what was seen, q quits")
        self._taking |= isinstance(command, TakeOver)  # what is pressed next comes after it
        self._commands.append(wire.pack_command(command))
        self._wake()

    # --- for whoever made it --------------------------------------------------

    def attach(self) -> None:
        """Attach to the engine at `engine_dir`.

        Raises:
            UserError: It is not there, or of another version.
        """
        self._connect(self.engine_dir)
        self._thread = threading.Thread(target=self._main, name="viewer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Detach."""
        self._closing = True
        self._wake()
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        if self._thread is not None and self._thread.is_alive():  # Ctrl-C may have come before it was started
            self._thread.join(10.0)
        self._wake_read.close()
        self._wake_write.close()

    def wait_ended(self, timeout_s: float) -> bool:
        """Wait for the engine to end, after it was told to."""
        if self._thread is not None:
            self._thread.join(timeout_s)
        return self.lost is not None

    def wait_up_to_date(self) -> None:
        """Wait until everything is here that the engine has to show.

        Raises:
            UserError: The engine has ended before.
        """
        self._told.wait()
        if self.lost is not None and not self._is_up_to_date:
            raise UserError(f"{self.engine_dir.name}: {self.lost.why}")

    # --- the thread -----------------------------------------------------------

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_write.send(b"!")

    def _main(self) -> None:
        try:
            self._ask_forever()
        except UserError as error:
            self._lose(str(error))
        except (OSError, EOFError, wire.MalformedError) as error:
            self._lose(f"the connection to the engine broke: {str(error) or 'it was closed'}")
        except Exception as error:  # an answer that decodes and still says what cannot be
            self._lose(f"the engine's answer makes no sense: {one_line(error)}")
        finally:
            self._told.set()
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _connect(self, engine_dir: EngineDir) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(ANSWERS_WITHIN_S)
        try:
            _connect(connection, engine_dir)
            if not wire.is_ours(connection):
                connection.close()
                raise UserError(f"{engine_dir.name}: its socket belongs to somebody else")
            connection.sendall(wire.frame(self._greeting()))
            answer = wire.read_answer(connection, wire.LARGEST_ASK, ANSWERS_WITHIN_S)
        except (OSError, EOFError, wire.MalformedError) as error:
            connection.close()
            raise UserError(f"{engine_dir.name} does not answer: {str(error) or 'it closed the connection'}") from None
        if isinstance(answer, wire.Refused):
            connection.close()
            raise UserError(answer.text)
        if not isinstance(answer, wire.Welcome):
            connection.close()
            raise UserError(f"{engine_dir.name} does not answer: it is no engine")
        self._welcome, self._connection = answer, connection

    def _greeting(self) -> wire.Hello | wire.Look:
        if self._only_look:
            return wire.Look(wire.PROTOCOL, self._version)
        return wire.Hello(wire.PROTOCOL, self._version, self._take)

    def _ask_forever(self) -> None:
        connection = self._connection
        assert connection is not None
        while not self._closing:
            took = False
            while self._commands:
                message = self._commands.popleft()
                took |= message.name == TAKE_OVER
                connection.sendall(wire.frame(message))
            connection.sendall(wire.frame(wire.Ask(self._since, self._last_trace, self._last_run)))
            answer = wire.read_answer(connection)
            if not isinstance(answer, wire.News):
                raise wire.MalformedError("an answer to something else")
            self._take_in(answer)
            self._taking &= not took
            if not answer.more:
                self._is_up_to_date = True
                self._told.set()
            if not answer.more and not self._commands:
                self._pause(connection)

    def _pause(self, connection: socket.socket) -> None:
        """Until it is time to ask again, or there is a command, or the engine has died."""
        select.select([connection, self._wake_read], [], [], self._ask_every_s)
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)

    def _take_in(self, news: wire.News) -> None:
        """Keep what is new, in an order in which a viewer can be told."""
        feed, offset, late_s = self._feed, self._run_offset, self._clock_offset_s
        if news.environment is not None:
            feed.environment = news.environment
        for told in news.runs:
            self._meet(told)
        self._commanding = news.commands
        for event in news.events:
            self._since = event.index + 1
            if isinstance(event, EngineEnded):  # said here, as every other end is, when it has
                self._goodbye = event
                continue
            feed.relay(placed(event, 0, event.time_s + late_s, event.run + offset if event.run else event.run))
        if news.gauge is not None:
            gauge = replace(news.gauge, time_s=news.gauge.time_s + late_s)
            if gauge != feed.gauge:
                feed.publish_gauge(gauge)
        if news.trace is not None:
            run = self._run(news.trace.run + offset)
            if run is not None:
                run.publish_trace(wire.unpack_trace(news.trace))
            self._last_trace = news.trace.number
        if news.refused:
            self._say(Refused(text=news.refused))

    def _meet(self, told: wire.RunTold) -> None:
        """Know of a run, or more of one that is known."""
        self._last_run = told.number
        config, number = techniques.parse_config(told.config, "the engine"), told.id.number + self._run_offset
        run = self._run(number)
        if run is not None:
            run.config = config
        else:
            run = Run(told.id._replace(number=number), config, told.environment, told.kind)
            if told.gauge is not None:
                run.training_gauge = replace(told.gauge, time_s=told.gauge.time_s + self._clock_offset_s)
            self._feed.add_run(run)

    def _run(self, number: int) -> Run | None:
        return next((run for run in reversed(self._feed.runs()) if run.id.number == number), None)

    def _lose(self, why: str) -> None:
        """The engine has gone: say so once, with the last that its log says."""
        if self._closing:
            return
        by = ""
        if self._goodbye is not None:
            by, why = self._goodbye.by, self._goodbye.text
        elif self._welcome is not None:
            why = f"the engine's process {self._welcome.pid} has ended"
        self.lost = Lost(why, time.monotonic(), by, "" if by else self._last_words())
        self._feed.gauge = None  # nobody reads it any more
        what = "s saves what was seen, q quits" if self._feed.run is not None else "q quits"
        self._say(EngineEnded(text=f"{why}; {what}", by=by, detail=self.lost.detail))
        self._on_lost()

    def _last_words(self) -> str:
        if self._welcome is None:
            return ""
        try:
            with Path(self._welcome.log).open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL_BYTES))
                return log.read().decode(errors="replace")
        except OSError:
            return ""

    def _say(self, event: RunEvent) -> None:
        run = self._feed.run
        self._feed.relay(placed(event, 0, self._latest_s(), run.id.number if run is not None else 0))

    def _latest_s(self) -> float:
        """The engine's clock as far as it is known here."""
        gauge, told = self._feed.gauge, self._feed.events(0)
        return max(gauge.time_s if gauge else 0.0, told[-1].time_s if told else 0.0)

    def _save(self, command: Save) -> None:
        self._say(save(command, self.runs()))


def _connect(connection: socket.socket, engine_dir: EngineDir) -> None:
    """A living engine refuses for a moment: between its socket's bind and listen."""
    until_s = time.monotonic() + LISTENS_WITHIN_S
    while True:
        try:
            connection.connect(os.fspath(engine_dir.socket))
            return
        except ConnectionRefusedError:
            if not engine_dir.alive() or time.monotonic() > until_s:
                raise
            time.sleep(0.01)


def peek(engine_dir: EngineDir, timeout_s: float = 2.0) -> wire.Status | None:
    """A quick look at an engine's state; None if it does not answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(os.fspath(engine_dir.socket))
            connection.sendall(wire.frame(wire.Peek(wire.PROTOCOL)))
            answer = wire.read_answer(connection, wire.LARGEST_ASK, timeout_s)
        except (OSError, EOFError, wire.MalformedError):
            return None
    return answer if isinstance(answer, wire.Status) else None
