"""The verdict on a refused allocation: from the bytes that were free, and from the steps before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ..events import Category
from ..tracing.block_layout import SMALL_SEGMENT_BYTES
from .growth import Rise
from .refusal import Refused
from .report import Pool, Verdict, size_text

LARGEST_CONTEXT_BYTES = 2 << 30
"""CUDA's context and libraries are smaller: where NVML tells processes not apart, what is beyond is somebody else's."""


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
        """Bytes that are surely other processes'."""
        if self.others_bytes is not None:
            return self.others_bytes
        return max(0, self.outside_bytes - LARGEST_CONTEXT_BYTES)


def judge(refused: Refused, around: Circumstances) -> tuple[Verdict, str]:
    """The verdict, and one sentence of reason."""
    asked, needed, free = refused.asked_bytes, refused.needed_bytes, refused.free_bytes
    usable, elsewhere = _by_usability(refused)
    cached = sum(pool.cached_bytes for pool in usable)
    stranded = sum(pool.cached_bytes for pool in elsewhere)
    largest = max((pool.largest_free_block_bytes for pool in usable), default=0)
    said = f"{size_text(cached)} are cached and {size_text(free)} of the device are free"
    little = f"{said}, less than the {size_text(asked)} asked for"
    if cached + free >= asked:
        little = f"{said}, in pieces too small, and for {size_text(asked)} torch takes {size_text(needed)} at once"
    room = around.total_bytes - around.outside_bytes
    room = room if refused.limit_bytes is None else min(room, refused.limit_bytes)
    if asked > room + around.somebody_elses_bytes:
        text = f"{size_text(asked)} at once are more than the {size_text(room)} that torch could have were it empty"
        return Verdict.TOO_BIG, text
    whole = next((pool for pool in elsewhere if pool.largest_free_block_bytes >= asked), None)
    if whole is not None or cached + free < needed <= cached + free + stranded:
        pool = whole or elsewhere[0]
        where = f"stream {pool.stream:#x}" if pool.stream != refused.stream else f"the pool {pool.pool}"
        text = (
            f"{size_text(stranded)} are cached for another, {size_text(pool.largest_free_block_bytes)} of them "
            f"in one piece for {where}; for this one {said}"
        )
        return Verdict.STRANDED, text
    if cached + free >= needed and not _is_small(refused):  # of less than a segment there are always pieces
        text = f"{said}, together enough for the {size_text(asked)}, but the largest piece is {size_text(largest)}"
        return Verdict.FRAGMENTED, text
    return _full(needed - free, little, around)


def _full(lacking: int, said: str, around: Circumstances) -> tuple[Verdict, str]:
    """The verdict where all is taken: by whom, or since when."""
    rise, elses, came = around.rise, around.somebody_elses_bytes, sum(around.came.values())
    if rise is not None and rise.bytes * rise.steps >= lacking:
        what = f" ({around.grows})" if around.grows else ""
        return Verdict.GROWN, f"with every step {size_text(rise.bytes)} more stay alive{what}; {said}"
    if elses >= lacking:
        text = f"other processes hold {size_text(elses)}, without which it would have fitted; {said}"
        return Verdict.SOMEBODY_ELSES, text
    if came >= lacking:
        largest = sorted(around.came.items(), key=lambda item: -item[1])
        what = " and ".join(f"{category.info.title} ({size_text(size)})" for category, size in largest[:2])
        return Verdict.MOVED, f"step {around.step - 1} fitted; since then {what} have come and stay; {said}"
    return Verdict.FULL, said


def _is_small(refused: Refused) -> bool:
    """True if it was to come from the small pool, which alone takes segments of that size."""
    return refused.needed_bytes <= SMALL_SEGMENT_BYTES


def _by_usability(refused: Refused) -> tuple[list[Pool], list[Pool]]:
    """The pools that the request could be served from, and those that hold pieces of its size class for others."""
    size_class = "small" if _is_small(refused) else "large"
    alike = [pool for pool in refused.pools if pool.pool.split(" ")[0] == size_class]
    usable = [pool for pool in alike if pool.stream == refused.stream and pool.pool == size_class]
    return usable, [pool for pool in alike if pool not in usable]
