"""Attacks: hostile input of every kind, generated from a seed.

    python -m tests.benchmarks.attacks [sockets watched toml recordings lines] [--share 1.0] [--seed 1]

Each attack yields what went wrong, a line each; what was tried and found in
order it only counts. A small share of each runs in the suite.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LONGEST_LINE = 2000


@dataclass
class Tally:
    """What came of an attack.

    Attributes:
        tried: Inputs.
        failed: A line for each that did harm.
    """

    tried: int = 0
    failed: list[str] = field(default_factory=list)


def wrong_line(said: str) -> str | None:
    """Why a refusal is not one line for a person, or None."""
    if not said.isprintable():
        return f"more than a line: {said[:200]!r}"
    return f"{len(said)} characters: {said[:200]}" if len(said) > LONGEST_LINE else None


def flipped(rnd: random.Random, data: bytes) -> bytes:
    """Bytes with a few changed, removed, repeated or put in."""
    spoilt = bytearray(data)
    for _ in range(rnd.choice((1, 1, 2, 4, 16))):
        at = rnd.randrange(len(spoilt) + 1)
        match rnd.randrange(5):
            case 0 if at < len(spoilt):
                spoilt[at] ^= 1 << rnd.randrange(8)
            case 1:
                spoilt[at:at] = rnd.randbytes(rnd.choice((1, 2, 8)))
            case 2:
                del spoilt[at : at + rnd.choice((1, 4, 64, 1 << 20))]
            case 3:
                spoilt[at:at] = spoilt[at : at + rnd.choice((4, 64, 512))]
            case _ if at < len(spoilt):
                spoilt[at] = rnd.choice((0, 0x7F, 0x80, 0xC1, 0xFF))
    return bytes(spoilt)


HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 3, -(2**63), 2**63 - 1, 2**64 - 1, 1.5, -0.0, float("nan"), float("inf"), 1e308,
    "", "x", "x" * 5000, "\x00", "\x1b[2J", "a\nb", "é\u202e\ufeff", "../../etc/passwd", "%s%n", "-3", "1e999",
    "9" * 5000, [], [1], ["x"], {}, {"a": 1}, {"": None}, [[[[[[[[]]]]]]]],
)  # fmt: skip
"""Values that somebody's parser has tripped over."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value in nested containers but the outermost."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, below in items:
        yield (*path, key)
        yield from places(below, (*path, key))


def spoil(rnd: random.Random, value: Any, hostile: tuple[Any, ...] = HOSTILE) -> Any:
    """Plain containers with one thing in them wrong, in place: another value, none, an unknown key, a wrong type."""
    *way, last = rnd.choice([*places(value)])
    other = copy.deepcopy(rnd.choice(hostile))
    holder = value
    for key in way:
        holder = holder[key]
    match rnd.randrange(6):
        case 0:
            del holder[last]
        case 1 if isinstance(holder, dict):
            holder[rnd.choice(("", "unknown", f"{last}\n", "x" * 3000))] = other
        case 2 if isinstance(holder, dict):
            holder[f"{last}_"] = holder.pop(last)
        case _:
            holder[last] = other
    return value


def fresh(folder: Path) -> Path:
    """An empty folder of this name."""
    folder.mkdir(parents=True)
    return folder
