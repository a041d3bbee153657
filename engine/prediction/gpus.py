"""The GPUs that can be asked about: `gpus.toml`, a table of names, memory and architecture."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..config import UserError

TABLE = Path(__file__).parent / "gpus.toml"


@dataclass(frozen=True, slots=True)
class Gpu:
    """A GPU, as far as it decides what fits.

    Attributes:
        name: As `--gpu` takes it.
        memory_bytes: As the CUDA runtime reports it, a little less than on the box.
        capability: CUDA compute capability.
        multiprocessors: Streaming multiprocessors.
        threads: Resident threads per multiprocessor.
        context_bytes: CUDA context and libraries, which no allocator counts; 758 to
            836 MiB in 33 runs on an H200, on others not measured.
    """

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    multiprocessors: int
    threads: int
    context_bytes: int = 850 << 20


@cache
def gpus() -> dict[str, Gpu]:
    """The table by name."""
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))["gpu"]
    return {
        row["name"]: Gpu(
            row["name"],
            row["memory_mib"] << 20,
            (row["capability"] // 10, row["capability"] % 10),
            row["multiprocessors"],
            THREADS.get(row["capability"], 2048),
        )
        for row in rows
    }


THREADS = {75: 1024, 86: 1536, 89: 1536, 120: 1536}
"""Threads a multiprocessor holds, where they are not 2048 (CUDA C programming guide, table of capabilities)."""


def gpu(name: str) -> Gpu:
    """A GPU by its name; upper and lower case, spaces and dashes do not matter.

    Raises:
        UserError: There is none of this name.
    """
    known = {_plain(known): found for known, found in gpus().items()}
    if _plain(name) in known:
        return known[_plain(name)]
    longer = [found for plain, found in known.items() if _plain(name) and _plain(name) in plain]
    if len(longer) == 1:
        return longer[0]
    close = [g.name for g in longer] or [known[k].name for k in difflib.get_close_matches(_plain(name), known, 3, 0.4)]
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UserError(f"--gpu {name}: not a GPU known here; {hint}known: {', '.join(gpus())}")


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
