"""Messages to an engine's socket: framed well or badly, from strangers, viewers that look on and one that commands."""

from __future__ import annotations

import copy
import random
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import msgspec

from gpumem_tui.engine import wire
from gpumem_tui.engine.engine_registry import EngineDir
from gpumem_tui.engine.feed import ViewerRole
from gpumem_tui.engine.remote import Remote, peek

from ...conftest import small_run
from . import HOSTILE, Tally, flipped, spoil

ANSWERS_WITHIN_S = 30.0
LOOK_EVERY = 200
HELLO = {"type": "hello", "protocol": wire.PROTOCOL, "version": "attack", "take": False}
MESSAGES: tuple[dict[str, Any], ...] = (
    HELLO,
    {"type": "peek", "protocol": wire.PROTOCOL},
    {"type": "ask", "since": 1 << 40, "trace": 1 << 40, "config": 0},
    {"type": "do", "name": "start", "config": small_run(steps=0).as_dict(), "paused": False},
    {"type": "do", "name": "pause", "config": None, "paused": False},
    {"type": "do", "name": "take over", "config": None, "paused": False},
    {"type": "do", "name": "stop", "config": None, "paused": False},
)
END = {"type": "do", "name": "end", "config": None, "paused": False}
"""Not to be said by whoever commands: it would be obeyed."""
RAW = (
    b"\xa1\xff", b"\xdb\x00\x00\x10\x00", b"\xc1", b"\xd6\xff\x00\x00\x00\x00", b"\xc7\x00\x05", b"\xc4\x02ab",
    b"\xdd\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\x91" * 3000, b"\xcf" + b"\xff" * 8,
    b"\xcb\x7f\xf8" + b"\x00" * 6,
)  # fmt: skip
"""MessagePack that is none, or of a kind that no message has: text that is no UTF-8, timestamps, extensions, bytes."""


def framed(message: Any) -> bytes:
    """With its true length in front."""
    body = message if isinstance(message, bytes) else msgspec.msgpack.encode(message)
    return struct.pack("!I", len(body)) + body


def message(rnd: random.Random, commands: bool) -> bytes:
    """One, as it goes over the socket."""
    plain = copy.deepcopy(rnd.choice(MESSAGES if commands else (*MESSAGES, END)))
    match rnd.randrange(8):
        case 0:
            return rnd.randbytes(rnd.choice((1, 4, 5, 100, 5000)))
        case 1:
            return flipped(rnd, framed(plain))
        case 2:
            return struct.pack("!I", rnd.choice((0, 1, wire.LARGEST_ASK, 0xFFFFFFFF))) + msgspec.msgpack.encode(plain)
        case 3:
            return framed(flipped(rnd, msgspec.msgpack.encode(plain)))
        case _:
            hostile = (*HOSTILE, *(msgspec.Raw(raw) for raw in RAW))
            for _ in range(rnd.choice((1, 1, 1, 3))):
                spoil(rnd, plain, hostile) if plain else plain
            return framed(plain)


@contextmanager
def connected(engine_dir: EngineDir) -> Iterator[socket.socket]:
    """A connection of one's own."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(ANSWERS_WITHIN_S)
        connection.connect(str(engine_dir.socket))
        yield connection


def said(engine_dir: EngineDir, role: str, sent: bytes) -> str | None:
    """Say one thing, and read to the end what the engine says to it; what was wrong with that, or None."""
    take = {"stranger": None, "looks on": False, "commands": True}[role]
    hello = b"" if take is None else framed(HELLO | {"take": take})
    try:
        with connected(engine_dir) as connection:
            with suppress(ConnectionError):  # it has seen enough
                connection.sendall(hello + sent + framed({"type": "peek", "protocol": wire.PROTOCOL}))
                connection.shutdown(socket.SHUT_WR)
            with suppress(EOFError, ConnectionError):
                while True:
                    answer = wire.read_answer(connection)
                    if isinstance(answer, wire.News) and not (
                        answer.refused.isprintable() and len(answer.refused) < 300
                    ):
                        return f"refused with {answer.refused[:200]!r}"
    except (OSError, wire.MalformedError) as error:
        return repr(error)
    return None


@contextmanager
def commanded(engine_dir: EngineDir) -> Iterator[None]:
    """Somebody else commands meanwhile."""
    with connected(engine_dir) as commander:
        commander.sendall(framed(HELLO | {"take": True}))
        wire.read_answer(commander)
        yield


def attack(engine_dir: EngineDir, seed: int, count: int) -> Tally:
    """Send so many messages, a connection each; nothing but those connections may end of it."""
    rnd, tally = random.Random(seed), Tally()
    bystander = Remote(engine_dir)
    bystander.attach()
    while tally.tried < count:
        tally.tried += 1
        role = rnd.choice(("stranger", "looks on", "commands"))
        sent = message(rnd, commands=role == "commands")
        with commanded(engine_dir) if role == "looks on" else nullcontext():
            wrong = said(engine_dir, role, sent)
        if wrong is not None:
            tally.failed.append(f"{role}: {sent[:200]!r}: {wrong}")
        if (wrong or tally.tried % LOOK_EVERY == 0) and peek(engine_dir, ANSWERS_WITHIN_S) is None:
            tally.failed.append(
                f"nothing answers after {tally.tried} messages, the last by one that {role}: {sent[:200]!r}"
            )
            break
    if bystander.role is ViewerRole.GONE:
        tally.failed.append(f"a bystander's connection ended: {bystander.events(0)[-1].text}")
    bystander.close()
    return tally
