"""An allocation that is being refused, as whoever saw it tells: figures only, no tensor and no frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..events import Phase
from .report import Pool


@dataclass(frozen=True, slots=True)
class Refused:
    """A refused allocation, as a recorder knows it.

    Attributes:
        asked_bytes: Asked for.
        needed_bytes: What the allocator would take from the device for it: a whole segment.
        reserved_bytes: By the allocator, from the device.
        free_bytes: Of the device, that nobody has; within the limit if there is one.
        outside_bytes: Of the device, neither free nor torch's.
        limit_bytes: That torch may reserve; None: all that is free.
        pools: What the allocator holds free.
        stream: That asked.
        expandable_segments: Whether the allocator's segments can grow.
        operator: That asked; empty: not known.
        dtype: Of the tensor it was for; empty: not known.
        shape: Of that tensor.
    """

    asked_bytes: int
    needed_bytes: int
    reserved_bytes: int
    free_bytes: int
    outside_bytes: int = 0
    limit_bytes: int | None = None
    pools: tuple[Pool, ...] = ()
    stream: int = 0
    expandable_segments: bool = False
    operator: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()


OnRefused = Callable[[Refused], None]
"""Called on the allocating thread, before its stack unwinds. Must not raise."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """The same, with where the loop was.

    Attributes:
        refused: What the recorder knows.
        allocated_bytes: By the allocator.
        step: Under way, from 1; 0: loading.
        phase: Of the loop.
        micro_batch: From 0.
        module: That was running; empty: none, or not known.
        traced: Whether the step's allocations were recorded.
    """

    refused: Refused
    allocated_bytes: int
    step: int
    phase: Phase
    micro_batch: int
    module: str
    traced: bool
