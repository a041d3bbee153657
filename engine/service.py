"""The engine's process: the main thread serves viewers, the session's thread trains.

    python -m gpumem_tui.engine.service < {"config": ..., "linger_s": ...}

It is started by `Launcher` in a session of its own and ends when a viewer or
`gpumem-tui stop` ends it, or when nobody has been attached for long enough; or
with the process that started it, if that dies before it has said `STAY`.
Whatever libraries print goes to its log and, line by line, to its viewers.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TextIO

from . import techniques, wire
from .config import RunConfig, UserError, one_line
from .engine_registry import EngineInfo, EngineLock
from .feed import Start
from .launch import ORDER, READY
from .peers import Peers, peers_here
from .run_events import EngineEnded, Output, Refused, RunFailed
from .server import Server, state_of
from .session import Session

LOOK_EVERY_S = 0.25
LINGER_S = 600.0
END_WITHIN_S = 10.0
PART_WITHIN_S = 1.0
"""Viewers ask ten times a second."""
LOG_MAX_BYTES = 16 << 20
LINES_A_TIME = 50
BROKEN_DEVICE = 70
"""Exit code of an engine whose CUDA context is lost: only a new process gets another."""
RANK_FAILED = 71
"""Exit code of a rank whose run has failed: the launcher ends the others for it."""
RANK_ENDS_WITHIN_S = 3.0
"""After SIGTERM, which is also how the launcher ends a rank that waits for one that has died."""
VIEWER = "the viewer that commanded it"
OOM_SCORE = 500
"""If memory runs out, the kernel is to end the engine and not the app beside it."""


def version() -> str:
    """Version of this program as installed."""
    try:
        return metadata.version("gpumem-tui")
    except metadata.PackageNotFoundError:
        return "(not installed)"


class Linger:
    """The time after which an engine that nobody looks at ends.

    Args:
        seconds: After the last viewer has left; None: ten minutes after that
            and after there is nothing to run any more, whichever is later.
    """

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds
        self._idle_since_s: float | None = None

    def over(self, alone_since_s: float | None, idle: bool, now_s: float) -> bool:
        """True if it is time.

        Args:
            alone_since_s: When the last viewer left; None: there is one.
            idle: Whether nothing runs.
            now_s: On the same clock.
        """
        if not idle:
            self._idle_since_s = None
        elif self._idle_since_s is None:
            self._idle_since_s = now_s
        if alone_since_s is None:
            return False
        if self._seconds is not None:
            return now_s - alone_since_s >= self._seconds
        return self._idle_since_s is not None and now_s - max(alone_since_s, self._idle_since_s) >= LINGER_S


class Log:
    """The file behind descriptors 1 and 2, read back for the viewers."""

    def __init__(self, path: Path) -> None:
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._read = 0
        self._rest = b""

    @contextmanager
    def take_output(self) -> Iterator[TextIO]:
        """Send all output of the process here from now on, a crash's last words included.

        Yields:
            What the output was, for whoever started us; told of an error within the context as well.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        with os.fdopen(os.dup(1), "w", encoding="utf-8") as before:
            os.dup2(self._handle, 1)
            os.dup2(self._handle, 2)
            faulthandler.enable(2)
            try:
                yield before
            except Exception as error:
                before.write(f"{one_line(error)}\n")
                raise

    def new_lines(self) -> list[str]:
        """Whole lines printed since the last call; of very many the last are told apart."""
        size = os.fstat(self._handle).st_size
        if size == self._read:
            return []
        begin = max(self._read, size - (1 << 16))
        data = self._rest + os.pread(self._handle, size - begin, begin)
        self._read = size
        if size > LOG_MAX_BYTES:  # written on in append mode, from the start
            os.ftruncate(self._handle, 0)
            self._read = 0
        # A progress bar rewrites its line: the last state of it is the line.
        *whole, self._rest = data.replace(b"\r\n", b"\n").split(b"\n")
        lines = [line.rpartition(b"\r")[2].decode(errors="replace").strip() for line in whole]
        lines = [line for line in lines if line]
        if len(lines) > LINES_A_TIME:
            lines = [f"... {len(lines) - LINES_A_TIME} lines more in the log ...", *lines[-LINES_A_TIME:]]
        return lines


def main() -> int:
    """Run until told to end; returns the exit code."""
    peers = peers_here()
    order = json.loads(os.environ.pop(ORDER) if peers is not None else sys.stdin.readline())
    config = techniques.parse_config(order["config"], "the engine")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _offer_to_the_oom_killer()
    engine_lock = _lock(config, peers, order["job"] if peers is not None else "")
    try:
        log = Log(engine_lock.engine_dir.log)
        info = engine_lock.engine_dir.info()
        assert isinstance(info, EngineInfo)
        with log.take_output() as launcher:  # before the session's thread loads libraries, which print
            session = Session(_device(config, peers), name=info.job or engine_lock.engine_dir.name, peers=peers)
            engine = _Engine(session, info, engine_lock, log, Linger(order["linger_s"]), peers)
            signal.signal(signal.SIGTERM, lambda *_: engine.end("gpumem-tui stop or another SIGTERM"))
            if peers is None:
                launcher.write(f"{READY}{engine_lock.engine_dir.name}\n")
        if peers is None or peers.leads:
            _try_start(session, config)
        return engine.serve()
    finally:
        engine_lock.release()


def _lock(config: RunConfig, peers: Peers | None, job: str) -> EngineLock:
    """The lock of a rank, or of an engine of its own, which ends with whoever started it until it is told to stay."""
    if peers is not None:
        return EngineLock(f"{job}.{peers.rank}", "run", wire.PROTOCOL, version(), job, peers.rank, peers.size)
    engine_lock = EngineLock(Path(config.model).name, "run", wire.PROTOCOL, version())
    threading.Thread(target=_end_unless_told_to_stay, args=(engine_lock,), name="parent", daemon=True).start()
    return engine_lock


def _device(config: RunConfig, peers: Peers | None) -> str:
    """The device wanted; of a rank, the GPU of its place among those of this machine."""
    return config.device if peers is None or config.device == "cpu" else f"cuda:{peers.local_rank}"


def _end_unless_told_to_stay(engine_lock: EngineLock) -> None:
    """The end of standard input is that of whoever started us."""
    if not sys.stdin.readline():
        engine_lock.release()
        os._exit(0)


class _Engine:
    """The main thread of the process."""

    def __init__(
        self,
        session: Session,
        info: EngineInfo,
        engine_lock: EngineLock,
        log: Log,
        linger: Linger,
        peers: Peers | None = None,
    ) -> None:
        self._session, self._log, self._linger, self._engine_lock = session, log, linger, engine_lock
        self._ended_by = ""
        self._told = 0
        self._peers, self._launcher_pid = peers, os.getppid()
        ended = partial(self.end, VIEWER) if self._leads else partial(os.kill, self._launcher_pid, signal.SIGTERM)
        self._server = Server(session, info, engine_lock.engine_dir.socket, engine_lock.engine_dir.log, ended)

    def end(self, by: str) -> None:
        """Have `serve` return.

        Args:
            by: Whoever wants it, for the viewers that are left.
        """
        self._ended_by = by
        self._server.wake()

    @property
    def _leads(self) -> bool:
        return self._peers is None or self._peers.leads

    def serve(self) -> int:
        """Until the end; returns the exit code."""
        code = 0
        look_at_s = 0.0
        while not self._ended_by:
            self._server.serve(LOOK_EVERY_S)
            now_s = time.monotonic()
            if now_s < look_at_s:
                continue
            look_at_s = now_s + LOOK_EVERY_S
            for line in self._log.new_lines():
                self._session.tell(Output(text=line))
            if self._device_is_lost():
                code = BROKEN_DEVICE
                break
            if self._peers is not None and self._job_has_failed():
                code = RANK_FAILED
                break
            idle = self._session.wait(0) or state_of(self._session) == "held"
            if self._leads and self._linger.over(self._server.alone_since_s, idle, now_s):
                break
        if not code:
            alone_or_asked = self._peers is None or self._ended_by == VIEWER
            self._session.close(END_WITHIN_S if alone_or_asked else RANK_ENDS_WITHIN_S)
        # The folder first: who waits for the connection to end finds nothing left.
        self._engine_lock.release()
        if self._ended_by:
            self._session.tell(EngineEnded(text=f"the engine was ended by {self._ended_by}", by=self._ended_by))
            self._server.part(PART_WITHIN_S)
        self._server.close()
        return code

    def _job_has_failed(self) -> bool:
        """True if this rank has failed, or the launcher has gone; when rank 0 has ended, so do the others."""
        if os.getppid() != self._launcher_pid:
            return True
        if self._session.lost:
            self._be_heard()
            return True
        if self._session.over:
            self._ended_by = self._ended_by or "rank 0"
        return False

    def _device_is_lost(self) -> bool:
        """A CUDA error stays: every later call in this process fails with it."""
        events = self._session.events(self._told)
        if not events:
            return False
        self._told = events[-1].index + 1
        lost = any(isinstance(event, RunFailed) and "CUDA error" in event.text for event in events)
        if lost:
            self._be_heard()
        return lost

    def _be_heard(self) -> None:
        """Let the viewers hear of what has just been told."""
        until_s = time.monotonic() + 4 * LOOK_EVERY_S
        while (left_s := until_s - time.monotonic()) > 0:
            self._server.serve(left_s)


def _try_start(session: Session, config: RunConfig) -> None:
    try:
        session.command(Start(config))
    except UserError as error:
        session.tell(Refused(text=str(error)))


def _offer_to_the_oom_killer() -> None:
    try:
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE), encoding="ascii")
    except OSError:  # not everywhere is it there
        return


if __name__ == "__main__":
    try:
        code = main()
    except UserError as error:
        sys.stdout.write(f"{error}\n")
        code = 2
    sys.stdout.flush()
    # A thread deep in a kernel would hold up an orderly end for as long as it likes.
    os._exit(code)
