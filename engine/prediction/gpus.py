"""The GPUs that can be asked about: `gpus.toml`, a table of names, memory and architecture."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

from ..config import UserError
from ..events import Environment

TABLE = Path(__file__).parent / "gpus.toml"
WITHOUT_A_GPU = "H100 80GB"
"""The GPU to predict for where there is none, unless one is named."""


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
        unmodelled_share: Of the peak, what it may allocate beyond the model of it (cuDNN's and cuBLAS'
            workspaces of other versions, a reduction's scratch): under 1 % in every run measured.
        unmodelled_bytes: The same, whatever the peak.
        count: Of them in the machine.
    """

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    multiprocessors: int
    threads: int
    context_bytes: int = 850 << 20
    unmodelled_share: float = 0.015
    unmodelled_bytes: int = 4 << 20
    count: int = 1

    def safe_bound_bytes(self, peak_bytes: int) -> int:
        """A figure the measured peak stays under; at most 2 % above the predicted one from 1 GiB on."""
        return peak_bytes + int(peak_bytes * self.unmodelled_share) + self.unmodelled_bytes

    @property
    def available_bytes(self) -> int:
        """Bytes that the allocator can have."""
        return self.memory_bytes - self.context_bytes

    def limited(self, limit_bytes: int) -> Gpu:
        """The same with no more memory than this."""
        return replace(self, memory_bytes=min(self.memory_bytes, limit_bytes))

    def beside(self, outside_bytes: int) -> Gpu:
        """The same with so much more taken outside of torch."""
        return replace(self, context_bytes=self.context_bytes + outside_bytes)


class Understood(NamedTuple):
    """A GPU by the name that was typed.

    Attributes:
        gpu: The GPU.
        said: How the name was understood, a line; empty where it was plain.
    """

    gpu: Gpu
    said: str = ""


THREADS = {75: 1024, 86: 1536, 89: 1536, 120: 1536}
"""Threads a multiprocessor holds, where they are not 2048 (CUDA C programming guide, table of capabilities)."""

NOISE = frozenset(
    ("nvidia", "geforce", "tesla", "quadro", "generation", "gpu", "pcie", "sxm", "sxm2", "sxm4", "sxm5",
     "hbm2", "hbm2e", "hbm3", "hbm3e")
)  # fmt: skip
"""Words of a driver's names that tell no two of the table apart."""

_SEVERAL = re.compile(r"\s*(?P<count>[1-9]\d{0,4})\s*[x×]\s*(?P<name>.+)", re.IGNORECASE)
_WORD = re.compile(r"(?P<size>\d+(?:\.\d+)?)\s*gi?b?\b|(?P<word>[a-z0-9]+)")


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


def gpu(name: str) -> Gpu:
    """The GPU meant by a name (`understand`)."""
    return understand(name).gpu


def understand(wanted: str) -> Understood:
    """The GPU that somebody means.

    Upper and lower case, spaces, dashes and the words that drivers add do not
    matter. Of several that a name fits it is the one with the least memory. A
    size alone is a GPU of that size, of the newest generation that has one. A
    size after a colon is how much memory there is, whatever the card has; a
    number before an x how many of them there are.

    Args:
        wanted: `RTX 4090 24GB`, `a100`, `NVIDIA A100-SXM4-80GB`, `24GB`, `RTX 4090:20GiB`, `8 x H100`.

    Raises:
        UserError: No GPU known here is meant by it.
    """
    several = _SEVERAL.match(wanted)
    if several:
        found = understand(several["name"])
        return Understood(replace(found.gpu, count=int(several["count"])), found.said)
    name, colon, limit = wanted.partition(":")
    found = _named(wanted, name)
    if not colon:
        return found
    words, sizes = _words(limit)
    if words or len(sizes) != 1 or not 1 < sizes[0] < 1 << 12:
        raise UserError(f"--gpu {wanted}: after the colon comes how much memory there is, such as 20GiB")
    return Understood(_with_memory(found.gpu, sizes[0]), found.said)


def _named(wanted: str, name: str) -> Understood:
    whole = next((one for known, one in gpus().items() if _plain(known) == _plain(name)), None)
    if whole is not None:
        return Understood(whole)
    words, sizes = _words(name)
    if len(sizes) > 1 or not (words or sizes) or name.lstrip().startswith("-"):
        raise _unknown(wanted, name)
    if not words:
        return _of_size(wanted, sizes[0])
    found = _called(words)
    if not found:
        raise _unknown(wanted, name)
    if sizes:
        return _of_these(wanted, found, sizes[0])
    smallest = min(found, key=lambda one: one.memory_bytes)
    others = ", ".join(one.name for one in found)
    return Understood(smallest, f"{wanted}: taken for the {smallest.name}, the smallest of {others}" * (len(found) > 1))


def _of_these(wanted: str, found: Sequence[Gpu], size: float) -> Understood:
    """The one of this size, or the nearest to it with so much memory."""
    sold = [one for one in found if _is_sold_as(one, size)]
    if sold:
        return Understood(sold[0])
    akin = min(found, key=lambda one: abs(one.memory_bytes - size * 2**30))
    return Understood(_with_memory(akin, size), f"{wanted}: taken for {akin.name} with {size:g} GiB")


def _of_size(wanted: str, size: float) -> Understood:
    sold = [one for one in gpus().values() if _is_sold_as(one, size)]
    if sold:
        newest = max(sold, key=_newest)
        return Understood(newest, f"{wanted}: taken for the {newest.name}, the newest generation of this size")
    if size <= 1:
        raise UserError(f"--gpu {wanted}: takes a size above 1 GiB")
    larger = [one for one in gpus().values() if one.memory_bytes > size * 2**30]
    if not larger:
        raise UserError(f"--gpu {wanted}: no GPU known here has this much memory; known: {', '.join(gpus())}")
    # The next size up, give or take what the cards of one size differ by.
    smallest = min(one.memory_bytes for one in larger)
    newest = max((one for one in larger if one.memory_bytes <= 1.1 * smallest), key=_newest)
    return Understood(_with_memory(newest, size), f"{wanted}: taken for {newest.name} with {size:g} GiB")


def _newest(one: Gpu) -> tuple[tuple[int, int], int]:
    return one.capability, one.multiprocessors


def _words(text: str) -> tuple[list[str], list[float]]:
    """A name's words in lower case, and the sizes in it in GiB."""
    found = [*_WORD.finditer(text.lower())]
    return [one["word"] for one in found if one["word"]], [float(one["size"]) for one in found if one["size"]]


def _called(words: Sequence[str]) -> list[Gpu]:
    """The GPUs of exactly this name; if there is none, those of whose name it is a part."""
    bases = {name: _words(name)[0] for name in gpus()}
    telling = {word for base in bases.values() for word in base}
    for noise in (frozenset[str](), NOISE - telling, NOISE):
        joined = "".join(word for word in words if word not in noise)
        whole = [name for name, base in bases.items() if joined == "".join(base)]
        part = [name for name, base in bases.items() if joined in _parts(base)]
        if whole or part:
            return [gpus()[name] for name in whole or part]
    return []


def _parts(words: Sequence[str]) -> set[str]:
    """Runs of the words: some that stand one after the other."""
    return {"".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}


def _is_sold_as(one: Gpu, size: float) -> bool:
    """True if a GPU is of this size on the box: of it, CUDA reports 91 to 99 %."""
    return 0.9 * size <= one.memory_bytes / 2**30 <= 1.02 * size


def _with_memory(one: Gpu, size: float) -> Gpu:
    return replace(one, name=f"{one.name}:{size:g}GiB", memory_bytes=int(size * 2**30))


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _unknown(wanted: str, name: str) -> UserError:
    known = {_plain(one): one for one in gpus()}
    close = [one for plain, one in known.items() if _plain(name) and _plain(name) in plain]
    close = close or [known[k] for k in difflib.get_close_matches(_plain(name), known, 3, 0.4)]
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    if name.lstrip().startswith("-"):
        hint = ""
    elif re.fullmatch(r"\s*\d+(\.\d+)?\s*", name):
        hint = f"did you mean {name.strip()}GB? "
    return UserError(f"--gpu {wanted.strip() or repr(wanted)}: not a GPU known here; {hint}known: {', '.join(gpus())}")


def gpu_of(environment: Environment) -> Gpu:
    """The engine's GPU with the memory it really has; without one, `WITHOUT_A_GPU`."""
    if not environment.on_gpu:
        return gpu(WITHOUT_A_GPU)
    name, memory = environment.device_name, environment.device_total_bytes
    try:
        found = gpu(name.removeprefix("NVIDIA "))
    except UserError:
        major, _, minor = (environment.capability or "8.0").partition(".")
        akin = gpu("A100 80GB" if major == "8" else WITHOUT_A_GPU)
        found = replace(akin, capability=(int(major), int(minor or 0)))
    return replace(found, name=name, memory_bytes=memory, count=environment.gpus)
