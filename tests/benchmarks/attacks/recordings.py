"""Damaged recordings: bits, containers, JSON, columns, and every option, column and field of one in turn."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import math
import os
import pickle
import random
import struct
import time
import zipfile
import zlib
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from gpumem_tui.engine import exports
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.exports.exported_run import named
from gpumem_tui.engine.report import report
from gpumem_tui.tui.board import Board
from gpumem_tui.tui.commands.common import opened
from gpumem_tui.tui.palette import Palette
from gpumem_tui.tui.settings import Settings

from . import HOSTILE, Tally, flipped, places, spoil

WITHIN_S = 5.0
LONGEST_LINE = 300
HERE = Path(__file__).parents[2] / "recordings"
HEAD = "gpumem.json"
IN_JSON = (10**400, *(value for value in HOSTILE if not isinstance(value, float) or math.isfinite(value)))
"""JSON has no nan and no infinity, and whole numbers of any length."""
EXTREMES = (0, 1, -1, 2**7, 2**15, 2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63), 2**64 - 1)
DECLARED = 2**20, 2**32 - 1
Members = dict[str, bytes]


# --- containers ---------------------------------------------------------------------


def members(path: Path) -> Members:
    """What is in a recording."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(parts: Members, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Its inverse."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return file.getvalue()


def bomb(name: str, size: int) -> bytes:
    """A member of so many zeros, and what is packed of them is a thousandth."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)  # refers to nothing before it
    data = piece * (size >> 20) + packer.flush()
    local = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 0, 0, len(data), size & 0xFFFFFFFF, len(name), 0)
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, 8, 0, 0, 0, len(data), size, len(name), 0, 0, 0, 0, 0, 0)
    body = local + name.encode() + data
    directory = entry + name.encode()
    return body + directory + struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 1, 1, len(directory), len(body), 0)


def lying(rnd: random.Random, data: bytes) -> bytes:
    """A container whose directory declares other sizes, methods, flags or places."""
    spoilt = bytearray(data)
    at = [i for i in range(len(spoilt) - 46) if spoilt[i : i + 4] == b"PK\1\2"]
    entry = rnd.choice(at)
    offset, form = rnd.choice(((8, "<H"), (10, "<H"), (20, "<I"), (24, "<I"), (28, "<H"), (42, "<I")))
    values = (0, 1, 8, 12, 14, 93, 99, 0xFFFF) if form == "<H" else (0, 1, *DECLARED)
    struct.pack_into(form, spoilt, entry + offset, rnd.choice(values))
    return bytes(spoilt)


# --- columns --------------------------------------------------------------------------


def column(data: bytes) -> Any:
    """A column of a recording."""
    return np.load(io.BytesIO(data), allow_pickle=False).copy()


def npy(array: Any) -> bytes:
    """Its inverse."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=array.dtype.hasobject)
    return file.getvalue()


def relaid(rnd: random.Random, array: Any) -> Any:
    """A column of another layout or shape."""
    match rnd.randrange(7):
        case 0:
            return array[: len(array) // 2]
        case 1:
            return np.zeros(0, array.dtype)
        case 2:
            return array.view("u1")
        case 3:
            return array.reshape(1, -1)
        case 4:
            return array.astype([(f"{name}_", array.dtype[name]) for name in array.dtype.names])
        case 5:
            return np.array([{"a": print}], dtype=object)
        case _:
            return np.resize(array, len(array) * 2 + 1)


def headed(rnd: random.Random, data: bytes) -> bytes:
    """A column whose header says something else."""
    length = struct.unpack_from("<H", data, 8)[0]
    header = data[10 : 10 + length].decode("latin-1")
    shape = rnd.choice(
        ("(2**60,)", "(1099511627776,)", "(-1,)", "()", "(1,) * 9", "((((((1))))))", "(0.5,)", "(" * 3000)
    )
    other = header[: header.index("'shape': ")] + f"'shape': {shape}, }}\n"
    return data[:8] + struct.pack("<H", len(other)) + other.encode("latin-1") + data[10 + length :]


# --- one thing wrong ------------------------------------------------------------------


def in_turn(parts: Members) -> Iterator[Callable[[], Members]]:
    """Every value of the head's run and of a trace's, every column and every field of one, spoilt or stripped."""
    trace = next(name for name in reversed(parts) if name.endswith(".json") and name != HEAD)
    for name in (HEAD, trace):
        for way in places(json.loads(parts[name])):
            if isinstance(way[-1], int) and way[-1] > 1:  # a list's first two stand for the others
                continue
            for value in (_STRIPPED, None, -1, 2**63 - 1, 10**400, "x", [], {}):
                yield partial(_with_value, parts, name, way, value)
    for name in [name for name in parts if name.startswith(trace.removesuffix(".json") + "/")]:
        yield partial(dict, {other: data for other, data in parts.items() if other != name})
        array = column(parts[name])
        yield partial(dict, parts | {name: npy(array[:0])})
        for field, extreme in itertools.product(array.dtype.names if len(array) else (), EXTREMES):
            yield partial(_with_extreme, parts, name, field, extreme)


def _with_value(parts: Members, name: str, way: tuple[Any, ...], value: object) -> Members:
    holder = plain = json.loads(parts[name])
    *to, last = way
    for key in to:
        holder = holder[key]
    if value is _STRIPPED:
        del holder[last]
    else:
        holder[last] = value
    return parts | {name: json.dumps(plain).encode()}


def _with_extreme(parts: Members, name: str, field: str, extreme: int) -> Members:
    array = column(parts[name])
    info = np.iinfo(array.dtype[field])
    array[field][len(array) // 2 :] = min(max(extreme, int(info.min)), int(info.max))
    return parts | {name: npy(array)}


_STRIPPED = object()


def spoilt(rnd: random.Random, parts: Members) -> bytes:
    """A recording with something wrong in it."""
    parts = dict(parts)
    documents = [name for name in parts if name.endswith(".json")]
    columns = [name for name in parts if name.endswith(".npy")]
    some, where = rnd.choice(columns), rnd.choice((HEAD, HEAD, rnd.choice(documents)))
    match rnd.randrange(12):
        case 0:
            return flipped(rnd, packed(parts, rnd.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))))
        case 1:
            return lying(rnd, packed(parts))
        case 2:
            return packed(parts, rnd.choice((zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)))
        case 3:
            del parts[rnd.choice([*parts])]
        case 4:
            parts[some] = flipped(rnd, parts[some])
        case 5:
            parts[some] = headed(rnd, parts[some])
        case 6:
            parts[some] = npy(relaid(rnd, column(parts[some])))
        case 7:
            parts = _with_extreme(parts, some, rnd.choice(column(parts[some]).dtype.names), rnd.choice(EXTREMES))
        case 8:
            parts[where] = flipped(rnd, parts[where])
        case 9:
            parts[where] = rnd.choice((b"", b"[" * 100_000, b"9" * 5000, b'"\\ud800"', b"nan", b"{}", b"[]", b"null"))
        case _:
            plain = json.loads(parts[where])
            for _ in range(rnd.choice((1, 1, 3))):
                spoil(rnd, plain, IN_JSON)
            parts[where] = json.dumps(plain).encode(errors="surrogatepass")
    return packed(parts)


# --- what becomes of it -----------------------------------------------------------------


def look_at(path: Path) -> None:
    """Open a recording, draw every screen of it, and write it in every format."""
    recording = opened([path])
    board = Board(recording, Settings(None), Palette(mono=True))
    board.state.update(recording, 0.0)
    for index in range(len(board.pages)):
        board.go(index)
        for width, height in ((80, 24), (120, 40)):
            board.page.rows(width, height)  # where the board would say that it cannot be drawn
            board.rows(width, height)
            board.toggle_help()
    for run in recording.runs():
        json.dumps(report(run).as_dict())
    for made in exports.registry().values():
        exports.write(named(recording.runs(), None), made, io.BytesIO())


def problem(act: Callable[[], object]) -> str | None:
    """What is wrong with how something hostile was taken: it is taken, or refused in one line."""
    began_s = time.process_time()
    try:
        act()
    except UserError as error:
        line = str(error)
        if not line.isprintable() or len(line) > LONGEST_LINE:
            return f"no line of {LONGEST_LINE}: {line!r}"
    except BaseException as error:
        return f"{error!r:.300}"
    took_s = time.process_time() - began_s
    return f"took {took_s:.1f} s" if took_s > WITHIN_S else None


def snapshot() -> dict[str, Any]:
    """One of PyTorch's memory snapshots, which are opened as recordings are."""
    file = io.BytesIO()
    exports.write(named(opened([HERE / "lora.gpumem"]).runs(), None), exports.format_named("memory-viz"), file)
    plain: dict[str, Any] = json.loads(file.getvalue())
    return plain


def spoilt_snapshot(rnd: random.Random, plain: dict[str, Any]) -> bytes:
    """A snapshot with something wrong in it, as JSON or as a pickle."""
    if rnd.random() < 0.5:
        return flipped(rnd, rnd.choice((pickle.dumps(plain), json.dumps(plain).encode())))
    changed = spoil(rnd, copy.deepcopy(plain), IN_JSON)
    return rnd.choice((pickle.dumps(changed), json.dumps(changed).encode(errors="surrogatepass")))


def files(seed: int, count: int) -> Generator[bytes]:
    """So many recordings: bombs, then one thing after another of some of them, then at random."""
    rnd, taken = random.Random(seed), snapshot()
    originals = [members(path) for path in sorted(HERE.glob("*.gpumem"))]
    yield from (bomb(name, 1 << 31) for name in (HEAD, "runs/0/0/events.npy")[: count // 1000 + 1])
    turns = [turn for parts in originals for turn in in_turn(parts)]
    yield from (packed(turn()) for turn in rnd.sample(turns, min(len(turns), count // 2)))
    while True:
        yield spoilt_snapshot(rnd, taken) if rnd.random() < 0.1 else spoilt(rnd, rnd.choice(originals))


def odd_paths(folder: Path) -> Iterator[Path]:
    """What is no file."""
    pipe = folder / "pipe.gpumem"
    os.mkfifo(pipe)
    loop = folder / "loop.gpumem"
    loop.symlink_to(loop)
    yield from (
        pipe,
        loop,
        folder,
        folder / ("x" * 300),
        folder / "not there",
        Path("/dev/zero"),
        Path("/proc/self/mem"),
    )
    yield folder / "a\nb\x1b[2J"


def attack(folder: Path, seed: int, count: int) -> Tally:
    """Open so many; each is shown, or refused in one line of at most 300 characters."""
    tally = Tally()
    path = folder / "attack.gpumem"
    for odd in odd_paths(folder):
        tally.tried += 1
        if wrong := problem(lambda odd=odd: look_at(odd)):  # type: ignore[misc]
            tally.failed.append(f"{odd}: {wrong}")
    with contextlib.closing(files(seed, count)) as hostile:
        while tally.tried < count:
            tally.tried += 1
            path.write_bytes(next(hostile))
            if wrong := problem(lambda: look_at(path)):
                kept = folder / f"failed-{tally.tried}.gpumem"
                path.replace(kept)
                tally.failed.append(f"{kept}: {wrong}")
    return tally
