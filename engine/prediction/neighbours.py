"""The requests of a run of another batch or sequence to the allocator, told from runs that are known.

What operators allocate grows along a line with the batch and along a parabola with the sequence, block
by block, and blocks come and go in the same order. So from two or three predictions follows every other
between and near them, and the allocator alone says whether it goes through. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..allocator_settings import MIN_BLOCK_BYTES
from ..events import StepTrace
from .caching_allocator import CachingAllocator, OutOfMemoryError
from .gpus import Gpu
from .outcome import Prediction
from .steady_state import once_more

Ints = npt.NDArray[np.int64]

POINTS = 3
"""Predictions through which a parabola goes."""

TILES_BYTES = 64 << 10
"""Error of an expectation, at the most, at any moment: kernels round some buffers up, which is on no line."""

CLIMB, STEP_BITS = 4, 9
"""Tries above one that fits, one part in 512 apart: where gaps decide, one may fit and a smaller one not."""


class _Asked(NamedTuple):
    """The requests of a run.

    Attributes:
        blocks: Numbers, in the order in which they are taken and given back.
        sizes: Bytes of each; negative: given back.
        rows: How many of them are the run's; what follows is one more step, which the allocator alone sees.
        unsure: Bytes that kernels may take on top of the peak.
    """

    blocks: Ints
    sizes: Ints
    rows: int
    unsure: int

    def agrees_with(self, other: _Asked) -> bool:
        """True if both ask for the same, but for what a kernel rounds up to its tiles."""
        if self.rows != other.rows or not np.array_equal(self.blocks, other.blocks):
            return False
        apart = int(np.abs(np.cumsum(self.sizes - other.sizes)).max(initial=0))
        return apart + abs(self.unsure - other.unsure) <= TILES_BYTES


class _Played(NamedTuple):
    """The most bytes that a run allocates, and the most that are reserved."""

    peak: int
    reserved: int


class Neighbours:
    """Predictions of one run that differ in one number: the `Expectation` of a search.

    Args:
        gpu: For which they are.
        available: Bytes that it has for the allocator.
    """

    def __init__(self, gpu: Gpu, available: int) -> None:
        self._gpu, self._available = gpu, available
        self._known: dict[int, _Asked] = {}
        self._came_to: dict[int, _Played] = {}
        self._foretold: set[int] = set()
        self._told: int | None = None
        self._gaps_end_it = False

    def learn(self, n: int, prediction: Prediction) -> None:
        """Know the run at n."""
        if n in self._known:
            return
        asked, near = _asked(prediction), self._near(n)
        if near and self._expected(n, near).agrees_with(asked):
            self._foretold.add(n)
        self._known[n] = asked
        self._came_to[n] = _Played(prediction.peak_bytes, prediction.reserved_bytes)

    def largest_between(self, low: int, high: int) -> int | None:
        """The largest number that is expected to fit, from low on and below high; None: too little is known.

        Args:
            low: Known to fit.
            high: Known not to.
        """
        if low == self._told and low in self._foretold:
            return low  # nothing new has been learnt from what came as expected
        near = self._near(low, high)
        if not near:
            return None
        most = _last(low, high, lambda n: self._fits_without_gaps(n, near))
        found = most if self._fits(most, near) else _last(low, most, lambda n: self._fits(n, near))
        step, tried = 1 + (found >> STEP_BITS), 0
        while tried < CLIMB and found < most:
            tried += 1
            if found + tried * step < most and self._fits(found + tried * step, near):
                found, tried = found + tried * step, 0
        self._told, self._gaps_end_it = found, found < most
        return found

    def is_confirmed(self, n: int) -> bool:
        """True if n was foretold to the byte, and so were its gaps if they are what ends behind it."""
        if n != self._told or n not in self._foretold:
            return False
        return not self._gaps_end_it or _played(self._known[n]) == self._came_to[n]

    def _near(self, *ends: int) -> list[int]:
        """The known numbers nearest to these that do the same; none if there are less than two."""
        by_distance = sorted(self._known, key=lambda n: min(abs(n - end) for end in ends))
        alike: dict[bytes, list[int]] = {}
        for n in by_distance:
            alike.setdefault(self._known[n].blocks.tobytes(), []).append(n)
        return next((some[:POINTS] for some in alike.values() if len(some) > 1), [])

    def _expected(self, n: int, near: list[int]) -> _Asked:
        shares = [(_share(n, at, near), self._known[at]) for at in near]
        sizes: Ints = np.rint(np.sum([share * one.sizes for share, one in shares], axis=0)).astype(np.int64)
        unsure = round(sum(share * one.unsure for share, one in shares))
        return self._known[near[0]]._replace(sizes=sizes, unsure=unsure)

    def _capacity(self, peak: int, unsure: int) -> int:
        """Bytes that there are for a run with such a peak: the same is taken off as for the verdict on it."""
        return self._available - (self._gpu.safe_bound_bytes(peak + unsure) - peak)

    def _fits_without_gaps(self, n: int, near: list[int]) -> bool:
        expected = self._expected(n, near)
        peak = _least_peak(expected)
        return peak - TILES_BYTES <= self._capacity(peak, expected.unsure)

    def _fits(self, n: int, near: list[int]) -> bool:
        expected = self._expected(n, near)
        most = self._capacity(_least_peak(expected), expected.unsure)
        played = _played(expected, most)
        if played is None:
            return False
        capacity = self._capacity(played.peak, expected.unsure)
        return played.peak <= capacity and (played.reserved <= capacity or _played(expected, capacity) is not None)


def _last(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The last of the numbers from low on and below high that fits, if those that fit come first; low does."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _least_peak(asked: _Asked) -> int:
    """The most that a run allocates at once, if every block is as small as the allocator makes it."""
    sizes = asked.sizes[: asked.rows]
    rounded = -(-np.abs(sizes) // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES
    return int(np.cumsum(np.sign(sizes) * rounded).max())


def _played(asked: _Asked, capacity: int | None = None) -> _Played | None:
    """Have the allocator serve requests; None: it does not go through with so much."""
    allocator, held, peak, allocated = CachingAllocator(capacity), {}, 0, 0
    rows = list(zip(asked.blocks.tolist(), asked.sizes.tolist(), strict=True))
    try:
        for part in (rows[: asked.rows], rows[asked.rows :]):
            most = 0
            for block, size in part:
                if size > 0:
                    held[block] = allocator.allocate(size)
                    allocated += held[block].size
                    most = max(most, allocated)
                elif block in held:  # what is expected to be of no size has no block
                    allocated -= held[block].size
                    allocator.free(held.pop(block))
            peak = peak or most
    except OutOfMemoryError:
        return None
    return _Played(peak, allocator.peak_reserved_bytes)


def _share(n: int, at: int, points: list[int]) -> float:
    """Lagrange's coefficient of a point."""
    share = 1.0
    for other in points:
        if other != at:
            share *= (n - other) / (at - other)
    return share


class _Numbering:
    """Blocks by number instead of by address, in the order in which they are taken and given back."""

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.sizes: list[int] = []
        self.alive: dict[int, tuple[int, int]] = {}
        self.traces: list[slice] = []
        self._count = 0

    def take(self, address: int, size: int) -> None:
        """A block is taken."""
        self._count += 1
        self.alive[address] = self._count, size
        self.blocks.append(self._count)
        self.sizes.append(size)

    def give_back(self, address: int) -> None:
        """The block at an address is given back."""
        block, size = self.alive.pop(address)
        self.blocks.append(block)
        self.sizes.append(-size)

    def add(self, trace: StepTrace) -> None:
        """Take in a trace: the blocks it finds, which may be newer than the one before, and its events."""
        found = dict(zip(trace.begin["address"].tolist(), trace.begin["bytes"].tolist(), strict=True))
        for address, (_, size) in [*self.alive.items()]:
            if found.get(address) != size:
                self.give_back(address)
        for address, size in found.items():
            if address not in self.alive:
                self.take(address, size)
        begin = len(self.blocks)
        for address, size in zip(trace.events["address"].tolist(), trace.events["bytes"].tolist(), strict=True):
            if size > 0:
                self.take(address, size)
            elif address in self.alive:
                self.give_back(address)
        self.traces.append(slice(begin, len(self.blocks)))


def _asked(prediction: Prediction) -> _Asked:
    numbering = _Numbering()
    for trace in prediction.run.traces():
        numbering.add(trace)
    blocks, sizes = np.array(numbering.blocks, np.int64), np.array(numbering.sizes, np.int64)
    rows, again = once_more(blocks, sizes, *numbering.traces[-2:])
    return _Asked(
        np.concatenate([blocks, again]), np.concatenate([sizes, sizes[rows]]), len(blocks), prediction.unsure_bytes
    )
