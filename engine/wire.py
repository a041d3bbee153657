"""What travels between an engine's process and its viewers: typed, versioned, limited in length.

A message is four bytes of length and that many of MessagePack, decoded by
msgspec into the types below and nothing else; no pickle anywhere. The viewer
asks and the engine answers, one answer at a time: a viewer that does not ask
costs nothing, and one that asks seldom gets what is latest.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_type_hints

import msgspec
import numpy as np

from . import techniques
from .config import UserError, one_line
from .events import Environment, Gauge, Milestone, StepTrace
from .feed import Command, End, Pause, Start, Stop, TakeOver
from .recording import COLUMNS

PROTOCOL = 1
"""Grows with every change of the messages. `Hello`, `Peek` and `Refused` stay as they are for ever."""
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


class Peek(msgspec.Struct, tag="peek"):
    """Instead of `Hello`: only say how it is going."""

    protocol: int


class Ask(msgspec.Struct, tag="ask"):
    """For what is new: milestones from an index on, a trace after a number, readings of the run."""

    since: int
    trace: int
    config: int


class Do(msgspec.Struct, tag="do"):
    """A command; its configuration is parsed once it is known that the viewer commands."""

    name: Literal["start", "pause", "stop", "end", "take over"]
    config: dict[str, Any] | None = None
    paused: bool = False


class Welcome(msgspec.Struct, tag="welcome"):
    """The answer to `Hello`."""

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
    """A `StepTrace`, its columns as they lie in memory."""

    number: int
    plain: dict[str, Any]
    columns: dict[str, bytes]


class News(msgspec.Struct, tag="news"):
    """The answer to `Ask`.

    Attributes:
        config_number: Grows with every run.
        config: Only if the viewer's is older.
        more: There is more than fitted; ask again at once.
        commands: Whether this viewer's commands have an effect.
        refused: Why the viewer's last command did nothing.
    """

    config_number: int
    config: dict[str, Any] | None
    environment: Environment | None
    gauge: Gauge | None
    milestones: list[Milestone]
    trace: Trace | None
    more: bool
    commands: bool
    viewers: int
    refused: str


Request = Hello | Peek | Ask | Do
Answer = Welcome | Refused | Status | News
Message = TypeVar("Message")

_encoder = msgspec.msgpack.Encoder()
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


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


def read_answer(connection: socket.socket, largest: int = LARGEST_ANSWER) -> Answer:
    """Wait for one answer.

    Args:
        connection: To an engine, or to whatever listens there.
        largest: Bytes it may have.

    Raises:
        OSError: The connection broke.
        EOFError: The other side ended it.
        MalformedError: It is none of ours.
    """
    (length,) = _LENGTH.unpack(_read(connection, _LENGTH.size))
    if length > largest:
        raise MalformedError(f"an answer of {length} bytes")
    return _decoded(_answers, _read(connection, length))


def _decoded(decoder: msgspec.msgpack.Decoder[Message], body: bytes) -> Message:
    """A message from its bytes; msgspec raises more than its own errors, and each means that the bytes are wrong."""
    try:
        return decoder.decode(body)
    except Exception as error:
        raise MalformedError(one_line(error)) from None


def _read(connection: socket.socket, size: int) -> bytes:
    data = bytearray(size)
    view, filled = memoryview(data), 0
    while filled < size:
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
    """Whether the other end is the same user."""
    return peer_uid(connection) == os.getuid()


# --- units to messages and back ---------------------------------------------------

_PLAIN = {name: hint for name, hint in get_type_hints(StepTrace).items() if name not in COLUMNS}


def pack_trace(number: int, trace: StepTrace) -> Trace:
    """A trace as columns, whatever fields it has."""
    columns = {name: np.ascontiguousarray(getattr(trace, name)).tobytes() for name in COLUMNS}
    return Trace(number, {name: getattr(trace, name) for name in _PLAIN}, columns)


def unpack_trace(packed: Trace) -> StepTrace:
    """The inverse of `pack_trace`.

    Raises:
        MalformedError: Columns that do not fit their layout.
    """
    try:
        columns: dict[str, Any] = {name: np.frombuffer(packed.columns[name], dtype) for name, dtype in COLUMNS.items()}
        plain = {name: msgspec.convert(packed.plain[name], hint) for name, hint in _PLAIN.items()}
        return StepTrace(**plain, **columns)
    except (KeyError, ValueError, TypeError) as error:  # msgspec.ValidationError is a ValueError
        raise MalformedError(f"trace {packed.number}: {error}") from None


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
