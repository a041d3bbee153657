"""The requests of a run of another batch or sequence to the allocator, told from runs that are known.

What operators allocate grows along a line with the batch and along a parabola with the sequence, block
by block, and blocks come and go in the same order. So from two or three predictions follows every other
between and near them, and the allocator alone says whether it goes through. Loads no torch.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..events import StepTrace
from .caching_allocator import CachingAllocator, OutOfMemoryError
from .outcome import Prediction
from .steady_state import successors_of

Ints = npt.NDArray[np.int64]

POINTS = 3
"""Predictions through which a parabola goes."""


class _Asked(NamedTuple):
    """The requests of a run.

    Attributes:
        blocks: Numbers, in the order in which they are taken and given back.
        sizes: Bytes of each; negative: given back.
        margin: Bytes of the GPU that have to stay free.
    """

    blocks: Ints
    sizes: Ints
    margin: int


class Neighbours:
    """Predictions of one run that differ in one number.

    Args:
        available: Bytes that the GPU has for the allocator.
    """

    def __init__(self, available: int) -> None:
        self._available = available
        self._known: dict[int, _Asked] = {}

    def learn(self, n: int, prediction: Prediction) -> None:
        """Know the run at n."""
        if n not in self._known:
            self._known[n] = _asked(prediction)

    def largest_between(self, low: int, high: int) -> int | None:
        """The largest number that is expected to fit, from low on and below high; None: too little is known.

        Args:
            low: Known to fit.
            high: Known not to.
        """
        near = sorted(self._known, key=lambda n: min(abs(n - low), abs(n - high)))[:POINTS]
        if len(near) < 2 or len({self._known[n].blocks.tobytes() for n in near}) > 1:
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._fits(middle, near) else (low, middle)
        return low

    def _fits(self, n: int, near: list[int]) -> bool:
        shares = [_share(n, at, near) for at in near]
        known = [self._known[at] for at in near]
        sizes = np.rint(sum(share * one.sizes for share, one in zip(shares, known, strict=True))).astype(np.int64)
        margin = int(sum(share * one.margin for share, one in zip(shares, known, strict=True)))
        allocator, place = CachingAllocator(self._available - margin), {}
        try:
            for block, size in zip(known[0].blocks.tolist(), sizes.tolist(), strict=True):
                if size > 0:
                    place[block] = allocator.allocate(size)[0]
                elif block in place:
                    allocator.free(place.pop(block))
        except OutOfMemoryError:
            return False
        return True


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
        self.play(trace)

    def play(self, trace: StepTrace) -> None:
        """Take in a trace's events."""
        for address, size in zip(trace.events["address"].tolist(), trace.events["bytes"].tolist(), strict=True):
            if size > 0:
                self.take(address, size)
            elif address in self.alive:
                self.give_back(address)

    def repeat(self, before: StepTrace, last: StepTrace) -> None:
        """One more step, as `steady_state.repeat` plays it."""
        inherited = {address: self.alive.pop(successor) for address, successor in successors_of(before, last).items()}
        self.alive = inherited  # what the step takes anew is at addresses that others may still have
        self.play(last)


def _asked(prediction: Prediction) -> _Asked:
    numbering, traces = _Numbering(), prediction.run.traces()
    for trace in traces:
        numbering.add(trace)
    numbering.repeat(*traces[-2:])
    margin = prediction.safe_bound_bytes - prediction.peak_bytes
    return _Asked(np.array(numbering.blocks, np.int64), np.array(numbering.sizes, np.int64), margin)
