"""The messages between an engine's process and its viewers: typed, versioned, limited in length.

A message is four bytes of length and that many of MessagePack, decoded by
msgspec into the types below and nothing else; no pickle anywhere. The viewer
asks and the engine answers, one answer at a time: a viewer that does not ask
costs nothing, and one that asks seldom gets what is latest.
"""

from __future__ import annotations

import os
import socket
import struct
import time
import zlib
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

import msgspec
import numpy as np

from . import techniques
from .config import UserError, one_line
from .events import Environment, Gauge, StepTrace
from .feed import Command, End, Pause, Start, Stop, TakeOver
from .recording import TraceHead, head_of, trace_of
from .run import Run, RunId, RunKind
from .run_events import AnyRunEvent
from .trace_check import COLUMNS

PROTOCOL = 5
"""Grows with every change of the messages. `Hello`, `Look`, `Peek` and `Refused` stay as they are for ever."""
TAKE_OVER: Final = "take over"
LARGEST_ASK = 1 << 18
"""Bytes that an engine reads in one message."""
LARGEST_ANSWER = 1 << 30
"""Bytes that a viewer reads in one message."""
_LENGTH = struct.Struct("!I")


class Hello(msgspec.Struct, tag="hello", forbid_unknown_fields=True):
    """A viewer's first message."""

    protocol: int
    version: str
    take: bool = False


class Look(msgspec.Struct, tag="look", forbid_unknown_fields=True):
    """Instead of `Hello`: be told all that a viewer is, and be none: never command, keep no engine alive."""

    protocol: int
    version: str


class Peek(msgspec.Struct, tag="peek"):
    """Instead of `Hello`: only say how it is going."""

    protocol: int


class Ask(msgspec.Struct, tag="ask"):
    """A question for what is new: events from an index on, runs and a trace after a number, the gauge."""

    since: int
    trace: int
    runs: int


class Do(msgspec.Struct, tag="do"):
    """A command; its configuration is parsed once it is known that the viewer commands."""

    name: Literal["start", "pause", "stop", "end", "take over"]
    config: dict[str, Any] | None = None
    paused: bool = False


class Welcome(msgspec.Struct, tag="welcome"):
    """The answer to `Hello` and to `Look`."""

    protocol: int
    version: str
    name: str
    kind: str
    pid: int
    log: str


class Refused(msgspec.Struct, tag="refused"):
    """Instead of `Welcome`; the connection ends with it."""

    text: str


class Status(msgspec.Struct, tag="status"):
    """The answer to `Peek`: a line of `gpumem-tui ps`."""

    name: str
    kind: str
    pid: int
    model: str = ""
    techniques: str = ""
    device: str = ""
    step: int = 0
    allocated_bytes: int = 0
    age_s: float = 0.0
    viewers: int = 0
    state: str = ""


class Trace(msgspec.Struct):
    """A `StepTrace`, its columns as they lie in memory.

    Attributes:
        number: Grows with every trace that the engine sends.
        run: Number of its run.
        head: All but the columns.
        columns: By name.
    """

    number: int
    run: int
    head: TraceHead
    columns: dict[str, bytes]


class RunTold(msgspec.Struct):
    """A run that has begun, or of whose configuration more is known now.

    Attributes:
        number: Grows with every run told, and with every change.
        id: See `Run`; likewise the others.
        gauge: The last reading from within a training step, for a viewer that was not there then.
    """

    number: int
    id: RunId
    kind: RunKind
    config: dict[str, Any]
    environment: Environment
    gauge: Gauge | None = None


class News(msgspec.Struct, tag="news"):
    """The answer to `Ask`.

    Attributes:
        runs: Those that are new to the viewer, in order.
        environment: Where a run would happen; None until the engine has looked.
        trace: The next one that the viewer has not seen.
        more: There is more than fitted; ask again at once.
        commands: Whether this viewer's commands have an effect.
        refused: Why the viewer's last command did nothing.
    """

    runs: list[RunTold]
    environment: Environment | None
    gauge: Gauge | None
    events: list[AnyRunEvent]
    trace: Trace | None
    more: bool
    commands: bool
    viewers: int
    refused: str


class WholeRun(msgspec.Struct):
    """A run that is over, in one piece: how a prediction crosses from the process that predicts."""

    told: RunTold
    events: list[AnyRunEvent]
    traces: list[Trace]


Request = Hello | Look | Peek | Ask | Do
Answer = Welcome | Refused | Status | News
Message = TypeVar("Message")

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
_whole_runs = msgspec.msgpack.Decoder(WholeRun)


class MalformedError(Exception):
    """A message that is none; its connection ends."""


def frame(message: Request | Answer) -> bytes:
    """A message with its length in front."""
    body = _encoder.encode(message)
    return _LENGTH.pack(len(body)) + body


class Inbox:
    """Bytes as they come in, cut into requests.

    Args:
        largest: Bytes a message may have.
    """

    def __init__(self, largest: int = LARGEST_ASK) -> None:
        self._largest = largest
        self._bytes = bytearray()

    def add(self, data: bytes) -> None:
        """Take in what was read."""
        self._bytes += data

    def next(self) -> Request | None:
        """The next whole request, if it is there.

        Raises:
            MalformedError: It is too long or no request.
        """
        if len(self._bytes) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._bytes)
        if length > self._largest:
            raise MalformedError(f"a message of {length} bytes")
        end = _LENGTH.size + length
        if len(self._bytes) < end:
            return None
        body = bytes(self._bytes[_LENGTH.size : end])
        del self._bytes[:end]
        return _decoded(_requests, body)


def read_answer(connection: socket.socket, largest: int = LARGEST_ANSWER, within_s: float | None = None) -> Answer:
    """Wait for one answer.

    Args:
        connection: To an engine, or to whatever listens there.
        largest: Bytes it may have.
        within_s: Seconds that the whole of it may take; None: each part may take the connection's timeout.

    Raises:
        OSError: The connection broke, or it took too long.
        EOFError: The other side ended it.
        MalformedError: It is none of ours.
    """
    deadline_s = None if within_s is None else time.monotonic() + within_s
    (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size, deadline_s))
    if length > largest:
        raise MalformedError(f"an answer of {length} bytes")
    return _decoded(_answers, _read(connection, length, deadline_s))


def _decoded(decoder: msgspec.msgpack.Decoder[Message], body: bytes) -> Message:
    """A message from its bytes; msgspec raises more than its own errors, and each means that the bytes are wrong."""
    try:
        return decoder.decode(body)
    except Exception as error:
        raise MalformedError(one_line(error)) from None


def _read(connection: socket.socket, size: int, deadline_s: float | None) -> bytes:
    data = bytearray(size)
    view, filled = memoryview(data), 0
    while filled < size:
        if deadline_s is not None and time.monotonic() > deadline_s:  # a peer may send a byte at a time
            raise TimeoutError("timed out")
        got = connection.recv_into(view[filled:])
        if not got:
            raise EOFError
        filled += got
    return bytes(data)


def _peer(connection: socket.socket) -> tuple[int, int, int]:
    """Process, user and group at the other end of a Unix socket, by the kernel's word."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", credentials)
    return pid, uid, gid


def peer_uid(connection: socket.socket) -> int:
    """The user at the other end of a Unix socket."""
    return _peer(connection)[1]


def listener_pid(path: Path) -> int | None:
    """The process that listens on a Unix socket; None if none does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(os.fspath(path))
            return _peer(connection)[0]
        except OSError:
            return None


def is_ours(connection: socket.socket) -> bool:
    """True if the other end is the same user."""
    return peer_uid(connection) == os.getuid()


# --- units to messages and back ---------------------------------------------------


def pack_trace(number: int, run: int, trace: StepTrace) -> Trace:
    """A trace as columns, whatever fields it has."""
    columns = {name: np.ascontiguousarray(getattr(trace, name)).tobytes() for name in COLUMNS}
    return Trace(number, run, head_of(trace), columns)


def unpack_trace(packed: Trace) -> StepTrace:
    """The inverse of `pack_trace`.

    Raises:
        MalformedError: Columns that do not fit their layout, or lead nowhere.
    """
    try:
        columns: dict[str, Any] = {name: np.frombuffer(packed.columns[name], dtype) for name, dtype in COLUMNS.items()}
        return trace_of(packed.head, columns)
    except (KeyError, ValueError) as error:
        raise MalformedError(f"trace {packed.number}: {error}") from None


def pack_run(number: int, run: Run) -> RunTold:
    """The description of a run that a viewer needs before its events and traces come."""
    return RunTold(number, run.id, run.kind, run.config.as_dict(), run.environment, run.training_gauge)


def pack_whole_run(run: Run) -> bytes:
    """A run with its events and traces, deflated: of a few traces that resemble each other little is left."""
    traces = [pack_trace(number, run.id.number, trace) for number, trace in enumerate(run.traces())]
    whole = WholeRun(pack_run(0, run), list(run.events()), traces)  # type: ignore[arg-type]
    return zlib.compress(_encoder.encode(whole), 1)


def unpack_whole_run(packed: bytes) -> Run:
    """The inverse of `pack_whole_run`.

    Raises:
        MalformedError: It is none.
    """
    unpacker = zlib.decompressobj()
    try:
        body = unpacker.decompress(packed, LARGEST_ANSWER)
    except zlib.error as error:
        raise MalformedError(str(error)) from None
    if not unpacker.eof:
        raise MalformedError("a run that is cut off, or too large")
    whole = _decoded(_whole_runs, body)
    told = whole.told
    run = Run(told.id, techniques.parse_config(told.config, "the run"), told.environment, told.kind)
    for event in whole.events:
        run.tell(event)
    run.keep([unpack_trace(trace) for trace in whole.traces])
    return run


def pack_command(command: Command) -> Do:
    """A command that an engine carries out."""
    match command:
        case Start(config):
            return Do("start", config.as_dict())
        case Pause(paused):
            return Do("pause", paused=paused)
        case Stop():
            return Do("stop")
        case End():
            return Do("end")
        case TakeOver():
            return Do(TAKE_OVER)
        case _:
            raise UserError(f"an engine cannot be told to {type(command).__name__.lower()} from here")


def unpack_command(message: Do) -> Command:
    """The inverse of `pack_command`.

    Raises:
        UserError: The configuration has keys or values that it cannot have.
    """
    match message.name:
        case "start":
            return Start(techniques.parse_config(message.config or {}, "start"))
        case "pause":
            return Pause(message.paused)
        case "stop":
            return Stop()
        case "end":
            return End()
        case "take over":
            return TakeOver()
