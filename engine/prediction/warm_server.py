"""A process that has the libraries loaded, so that predictions of other processes begin at once.

    warm_process   a copy of it, to ask, for a process of the same code, libraries and environment
    start          one of one's own; `gpumem-tui warm` does
    main           it: it predicts once, then forks a copy for each connection, and ends when nobody has asked for long

It is a folder among those of the engines (`engine_registry`), private to its
user, and takes its copies with it when it ends. Loads no torch until it serves.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from select import POLLHUP, POLLRDHUP, poll

import msgspec

from .. import wire
from ..config import UserError
from ..engine_registry import WARM, EngineDir, EngineLock, clean, warm_servers
from .forked_process import can_fork
from .prediction_store import programs
from .questions import (
    ANSWERS,
    LOOK_EVERY_MS,
    QUESTIONS,
    Question,
    Told,
    answer,
    answer_all,
    environment,
    framed,
    give_way,
    read,
)

DECIDES = re.compile(r"(HF|HUGGINGFACE|TRANSFORMERS|PYTORCH|TORCH|BNB)_|(PYTHONPATH|HOME|XDG_CACHE_HOME)$")
"""Names of variables of the environment that libraries may decide by."""
SAY_HELLO_WITHIN_S = 5.0
LOOK_EVERY_S = 1.0
READY = b"ready\n"


class Hello(msgspec.Struct):
    """The first message of a connection.

    Attributes:
        identity: See `identity`; a server of another one answers nothing.
        niceness: The copy gives way to others by so much.
        folder: Where relative paths begin.
    """

    identity: str
    niceness: int
    folder: str


_HELLOS = msgspec.msgpack.Decoder(Hello)


def identity(variables: Mapping[str, str]) -> str:
    """Everything beside the question that decides an answer: code, libraries, interpreter, environment."""
    deciding = {name: value for name, value in sorted(variables.items()) if DECIDES.match(name)}
    return json.dumps([programs(), sys.version, sys.prefix, deciding], sort_keys=True)


# --- who asks --------------------------------------------------------------------


class WarmProcess:
    """A copy of a server, as `subprocess.Popen` has processes.

    Args:
        connection: To it; it has said that it answers.

    Attributes:
        stdin: What is written here it reads.
        stdout: What it writes.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.stdin, self.stdout = connection.makefile("wb"), connection.makefile("rb")

    def kill(self) -> None:
        """End it, from any thread: it does when nobody is at the other end."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def wait(self) -> None:
        """Let go of it: its end is its server's matter."""
        self.kill()
        self._connection.close()


def warm_process(niceness: int = 0) -> WarmProcess | None:
    """A copy of a server that would answer as this process would; None: there is none."""
    servers = warm_servers()
    if not servers:
        return None
    try:
        folder = str(Path.cwd())
    except OSError:  # it has been removed
        return None
    hello = framed(Hello(identity(environment()), niceness, folder))
    return next((found for server in servers if (found := _copy_of(server, hello)) is not None), None)


def _copy_of(server: EngineDir, hello: bytes) -> WarmProcess | None:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(SAY_HELLO_WITHIN_S)
        connection.connect(os.fspath(server.socket))
        if wire.is_ours(connection):
            process = WarmProcess(connection)
            process.stdin.write(hello)
            process.stdin.flush()
            told = read(process.stdout, ANSWERS)
            if told is not None and not told.error:
                connection.settimeout(None)
                return process
    except (OSError, msgspec.MsgspecError):
        pass
    connection.close()
    return None


def start(first: Question, idle_s: float) -> EngineDir:
    """Start a server; returns when it is ready.

    Args:
        first: A question that it answers itself: what that loads, its copies have.
        idle_s: It ends when nobody has asked for so long.

    Raises:
        UserError: It cannot serve.
    """
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", f"from {__name__} import main; main({idle_s})"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env=environment(),
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        with process.stdin, process.stdout:
            process.stdin.write(framed(first))
            process.stdin.flush()
            said = process.stdout.readline()
    except BaseException:
        _end(process)
        raise
    for server in warm_servers():
        if said == READY and (info := server.info()) is not None and info.pid == process.pid:
            process.returncode = 0  # no warning about a child that is still running
            return server
    _end(process)
    raise UserError(f"nothing can be kept warm: {said.decode(errors='replace').strip() or 'its process has ended'}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    clean()  # its folder is there already


# --- the server ------------------------------------------------------------------


def main(idle_s: float) -> None:
    """The process: answer the question on standard input, say that it is ready, and serve."""
    before = identity(os.environ)
    ready = os.fdopen(os.dup(1), "wb")
    try:
        server = _Server(before, idle_s)
    except (OSError, UserError) as error:
        with ready:
            ready.write(f"{error}\n".encode())
        return
    try:
        with ready:
            ready.write(server.load(read(sys.stdin.buffer, QUESTIONS)))
        server.serve()
    finally:
        server.close()
    os._exit(0)  # with its folder it is gone: an interpreter that takes leave of its libraries takes its time


class _Server:
    """The socket and the copies.

    Args:
        identity: Of this process; see `identity`.
        idle_s: It ends when there has been no copy for so long.
    """

    def __init__(self, identity: str, idle_s: float) -> None:
        from ..service import version

        self._identity, self._idle_s = identity, idle_s
        self._copies: set[int] = set()
        self._ended = False
        self._life, self._alive = os.pipe()  # its copies see that end when it does, however it does
        self._wake, wakes = socket.socketpair()
        for each in (self._wake, wakes):
            each.setblocking(False)
        self._wakes = wakes
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._end)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakes.fileno(), warn_on_full_buffer=False)
        self._lock = EngineLock(WARM, WARM, wire.PROTOCOL, version())
        log = os.open(self._lock.engine_dir.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)
        try:
            self._listener.bind(os.fspath(self._lock.engine_dir.socket))
        finally:
            os.umask(before)

    def _end(self, *_: object) -> None:
        self._ended = True

    def load(self, first: Question | None) -> bytes:
        """Load what predictions need, by making one; whatever becomes of it, what it has loaded is there.

        Returns:
            `READY`, or a line that says why there can be no copies.
        """
        from .libraries_loading import libraries_loading

        with libraries_loading():
            from .predict import predict
        if first is not None:
            answer(first, predict)
        if not can_fork():
            self._ended = True
            return b"a library has started a thread, of which a copy would know nothing\n"
        os.chdir("/")
        self._listener.listen()
        self._listener.setblocking(False)
        return READY

    def serve(self) -> None:
        """Fork a copy for whoever connects, until it is time to end."""
        used_s = time.monotonic()
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            selector.register(self._wake, selectors.EVENT_READ)
            while not self._ended:
                ready = [key.fileobj for key, _ in selector.select(min(LOOK_EVERY_S, self._idle_s))]
                if self._wake in ready:
                    self._wake.recv(4096)
                if self._listener in ready:
                    self._fork()
                self._reap()
                if self._copies:
                    used_s = time.monotonic()
                elif time.monotonic() - used_s >= self._idle_s:
                    return

    def close(self) -> None:
        """End its copies, and leave nothing."""
        for pid in self._copies:
            os.kill(pid, signal.SIGKILL)
        for pid in self._copies:
            os.waitpid(pid, 0)
        self._lock.release()

    def _reap(self) -> None:
        """Take notice of copies that have ended."""
        self._copies -= {pid for pid in self._copies if os.waitpid(pid, os.WNOHANG)[0]}

    def _fork(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has thought better of it, or there are no descriptors
            return
        with connection:
            if not wire.is_ours(connection):
                return
            pid = os.fork()
            if pid == 0:
                self._be_the_copy(connection)
            self._copies.add(pid)

    def _be_the_copy(self, connection: socket.socket) -> None:
        """Answer one process's questions, and end without what this process would do at its end."""
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
                signal.signal(number, signal.SIG_DFL)
            for each in (self._listener, self._wake, self._wakes):
                each.close()
            os.close(self._alive)
            threading.Thread(target=_end_with, args=(connection.fileno(), self._life), daemon=True).start()
            questions, answers = connection.makefile("rb"), connection.makefile("wb")
            hello = read(questions, _HELLOS)
            if hello is None or hello.identity != self._identity:
                answers.write(framed(Told(error="another version, or another environment")))
                answers.flush()
                return
            os.chdir(hello.folder)
            if hello.niceness:
                give_way(hello.niceness)
            answers.write(framed(Told()))
            answers.flush()
            answer_all(questions, answers)
        finally:
            os._exit(0)


def _end_with(connection: int, life: int) -> None:
    """End this process when nobody is at the other end of either any more."""
    ends = poll()
    ends.register(connection, POLLRDHUP)
    ends.register(life, POLLHUP)
    while not ends.poll(LOOK_EVERY_MS):
        continue
    os._exit(0)
