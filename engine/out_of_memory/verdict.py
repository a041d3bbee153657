"""The verdict on a refused allocation: from the bytes that were free, and from the steps before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..allocator_settings import SMALL_SEGMENT_BYTES
from ..categories import Category
from .growth import Rise
from .refusal import Refused
from .report import Pool, Verdict, size_text

LARGEST_CONTEXT_BYTES = 2 << 30
"""CUDA's context and libraries are smaller: where NVML tells processes not apart, what is beyond is somebody else's."""
SMALLEST_OTHERS_BYTES = 1 << 30
"""The least of others' bytes that is a reason to name: less is a desktop, or what a context has grown by."""


class Circumstances(NamedTuple):
    """The circumstances that bear on a verdict beside the refusal itself.

    Attributes:
        total_bytes: Of the device.
        outside_bytes: Of the device, neither torch's nor free.
        others_bytes: Of that, other processes'; None: NVML does not tell.
        rise: Of the bytes alive at the same point of every step.
        grows: What rises; empty: not known.
        step: Under way.
        came: Bytes alive since before this step began and not when the one before began, by category.
    """

    total_bytes: int
    outside_bytes: int = 0
    others_bytes: int | None = None
    rise: Rise | None = None
    grows: str = ""
    step: int = 0
    came: Mapping[Category, int] = {}

    @property
    def somebody_elses_bytes(self) -> int:
        """Bytes that are surely other processes', if they are worth naming."""
        others = self.others_bytes
        if others is None:
            others = max(0, self.outside_bytes - LARGEST_CONTEXT_BYTES)
        return others if others >= SMALLEST_OTHERS_BYTES else 0


def judge(refused: Refused, around: Circumstances) -> tuple[Verdict, str]:
    """The verdict, and one sentence of reason.

    What has come since a step that fitted is a better reason than the gaps in which it might have found room.
    """
    asked, needed, free = refused.asked_bytes, refused.needed_bytes, refused.free_bytes
    usable, elsewhere = _by_usability(refused)
    cached = sum(pool.cached_bytes for pool in usable)
    largest = max((pool.largest_free_block_bytes for pool in usable), default=0)
    room = around.total_bytes - around.outside_bytes
    room = room if refused.limit_bytes is None else min(room, refused.limit_bytes)
    if asked > room + around.somebody_elses_bytes:
        text = f"{size_text(asked)} at once are more than the {size_text(room)} that torch could have were it empty"
        return Verdict.TOO_BIG, text
    others_too = any(pool not in usable for pool in refused.pools)
    where = f" in the {_size_class(refused)} pool" * others_too
    said = f"{size_text(cached)} are cached{where} and {size_text(free)} of the device are free"
    taken = _taken(refused)
    little = f"{said}, less than {taken}"
    if cached + free >= needed:
        little = f"{said}, but neither the largest cached piece, {size_text(largest)}, nor what is free holds {taken}"
    lacking, elses = needed - max(free, largest), around.somebody_elses_bytes
    if around.rise is not None and around.rise.bytes * around.rise.steps >= lacking:
        what = f" ({around.grows})" if around.grows else ""
        return Verdict.GROWN, f"with every step {size_text(around.rise.bytes)} more stay alive{what}; {little}"
    stranded = sum(pool.cached_bytes for pool in elsewhere)
    whole = next((pool for pool in elsewhere if pool.largest_free_block_bytes >= asked), None)
    if whole is not None or cached + free < needed <= cached + free + stranded:
        return Verdict.STRANDED, f"{_elsewhere(refused, whole or elsewhere[0], stranded)}; for this one {said}"
    if sum(around.came.values()) >= lacking:
        text = f"step {around.step - 1} fitted; new since then, and there to stay: {_come(around)}; {little}"
        return Verdict.MOVED, text
    if cached + free >= needed and not _is_small(refused):  # of less than a segment there are always pieces
        text = f"{said}, together enough for {taken}, but the largest cached piece is {size_text(largest)}"
        return Verdict.FRAGMENTED, text
    if elses >= lacking:
        text = f"other processes hold {size_text(elses)}, without which it would have fitted; {little}"
        return Verdict.SOMEBODY_ELSES, text
    return Verdict.FULL, little


def _taken(refused: Refused) -> str:
    """The bytes that have to be free on the device, in words: a whole segment, which may be more than was asked for."""
    asked, needed = size_text(refused.asked_bytes), size_text(refused.needed_bytes)
    return f"the {asked} asked for" if needed == asked else f"the segment of {needed} that torch takes for {asked}"


def _elsewhere(refused: Refused, pool: Pool, stranded: int) -> str:
    where = f"stream {pool.stream:#x}" if pool.stream != refused.stream else f"the pool {pool.pool}"
    largest = size_text(pool.largest_free_block_bytes)
    return f"{size_text(stranded)} are cached for another, {largest} of them in one piece for {where}"


def _come(around: Circumstances) -> str:
    largest = sorted(around.came.items(), key=lambda item: -item[1])[:2]
    return " and ".join(f"{category.info.title} ({size_text(size)})" for category, size in largest)


def _is_small(refused: Refused) -> bool:
    """True if it was to come from the small pool, which alone takes segments of that size."""
    return refused.needed_bytes <= SMALL_SEGMENT_BYTES


def _size_class(refused: Refused) -> str:
    return "small" if _is_small(refused) else "large"


def _by_usability(refused: Refused) -> tuple[list[Pool], list[Pool]]:
    """The pools that the request could be served from, and those that hold pieces of its size class for others."""
    size_class = _size_class(refused)
    alike = [pool for pool in refused.pools if pool.pool.split(" ")[0] == size_class]
    usable = [pool for pool in alike if pool.stream == refused.stream and pool.pool == size_class]
    return usable, [pool for pool in alike if pool not in usable]
