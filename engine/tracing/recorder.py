"""The interface of every recorder of allocations."""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from ..events import SEGMENT, AllocatorPool, CacheState
from ..out_of_memory.refusal import OnRefused

Raw = Any
"""A recorder's own form of what it saw: taken on the engine's thread, read on another."""


class Seen(NamedTuple):
    """Rows made of what a recorder saw.

    Attributes:
        rows: dtype BLOCK: what is alive; or dtype EVENT: what has happened.
        segments: dtype SEGMENT: likewise; events are counted from the first of `rows`.
    """

    rows: npt.NDArray[Any]
    segments: npt.NDArray[Any] = np.empty(0, SEGMENT)

    def and_then(self, after: Seen) -> Seen:
        """Rows of two parts of a step, this one and the one that follows it."""
        if not len(self.rows):
            return Seen(after.rows, np.concatenate([self.segments, after.segments]))
        segments = after.segments.copy()
        segments["event"] += len(self.rows)
        return Seen(np.concatenate([self.rows, after.rows]), np.concatenate([self.segments, segments]))


class Counters(NamedTuple):
    """An allocator's own counters, read at one moment.

    Attributes:
        allocated_bytes: In use.
        peak_bytes: The most that was since `reset_peak`.
        reserved_bytes: Held by the caching allocator; None without one.
    """

    allocated_bytes: int
    peak_bytes: int
    reserved_bytes: int | None


class Recorder(Protocol):
    """Allocations of one device, in order.

    Attributes:
        always_on: Recording cannot be switched off between steps (the op
            tracker would lose track of what is alive), so every step is traced.
        workspaces: Names of what libraries hold for themselves, by its addresses.
        cache: The caching allocator at the highest of what was recorded last; None: there is none, or nothing was.
        on_refused: Told of every allocation that is refused, while it is; None: nobody.
    """

    always_on: bool
    workspaces: dict[int, str]
    cache: CacheState | None
    on_refused: OnRefused | None

    @property
    def pools(self) -> tuple[AllocatorPool, ...]:
        """Pools of the caching allocator, by the numbers that rows have; none where there is no such allocator."""
        ...

    def start(self) -> Raw:
        """Begin recording; what is alive, as cheaply as it can be had."""
        ...

    def drain(self) -> Raw:
        """Raw events since `start` or the last drain, as cheaply as they can be had."""
        ...

    def alive(self, started: Raw) -> Seen:
        """Blocks and pools at `start`, made of what it returned; on another thread, in the order taken."""
        ...

    def holding(self) -> Raw:
        """Blocks alive, as `start` returns them, without beginning to record."""
        ...

    def events(self, drained: Raw) -> Seen:
        """Events made of what `drain` returned, `mark` as stamped; on that thread too."""
        ...

    def stop(self) -> None:
        """End recording."""
        ...

    def stamp(self, mark: int) -> None:
        """Tag what this thread allocates and frees from now on."""
        ...

    def address(self, tensor: torch.Tensor) -> int:
        """Identifies the tensor's storage among the living; 0: not on this device."""
        ...

    def allocated_bytes(self) -> int:
        """Bytes allocated by the allocator's own count."""
        ...

    def counters(self) -> Counters:
        """All of its counters; reading one takes as long."""
        ...

    def reset_peak(self) -> None:
        """Forget the peak."""
        ...

    def timer(self) -> Timer:
        """A running stopwatch on the device's own clock."""
        ...


class Timer(Protocol):
    """Measures from its creation to `stop`."""

    def stop(self) -> None:
        """Mark the end without waiting for the device."""
        ...

    def done(self) -> bool:
        """True if the device has passed the mark."""
        ...

    def ms(self) -> float:
        """Milliseconds; waits for the device to pass the mark."""
        ...


def columns(rows: array[int], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A structured array from its rows laid end to end.

    Appending plain numbers to one flat array is the cheapest a recorder can do,
    and turning it into columns is several times faster than from tuples.
    """
    names = dtype.names or ()
    table = np.frombuffer(rows, np.int64).reshape(-1, len(names)) if rows else np.empty((0, len(names)), np.int64)
    made = np.empty(len(table), dtype)
    for index, name in enumerate(names):
        made[name] = table[:, index]
    return made
