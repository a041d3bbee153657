"""The CUDA recorder: the caching allocator's own trace.

Recorded in C++ at no measurable cost; reading it takes 6 to 16 ms a step of
some 8,000 events on the thread that reads. Nothing here allocates on the GPU.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

from ..events import SEGMENT, AllocatorPool, CacheState
from ..out_of_memory.observer import listen
from ..out_of_memory.pools import pool_of, pools_of
from ..out_of_memory.refusal import OnRefused, Refused
from .block_layout import BlockLayout
from .owners import CUBLAS
from .recorder import Counters, Seen, columns
from .trace_entries import read

# A step of the 1.3B model makes 6,000 to 8,700 entries; the ring must not wrap.
MAX_ENTRIES = 4_000_000

# The counter moves when a free is requested, so that is the event to follow. When the
# block can be handed out again matters only where other streams may still be at it.
SKIPPED = ["free_completed", "snapshot"]
SKIPPED_OF_STREAMS = ["snapshot"]


class Drained(NamedTuple):
    """A part of the allocator's trace.

    Attributes:
        entries: In order.
        deferred: Whether they say when frees are completed.
        private: Identity of the private pool that a segment is of, by its address; the entries do not say it.
    """

    entries: Sequence[dict[str, Any]] = ()
    deferred: bool = False
    private: Mapping[int, tuple[int, int]] = MappingProxyType({})


class AllocatorTrace:
    """The caching allocator of one CUDA device.

    Made before anything else is on the device: what two small matrix products
    leave allocated then are the workspaces of the libraries, known from here on
    by their addresses.

    Attributes:
        workspaces: Names of the libraries' own blocks, by their addresses.
    """

    always_on = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._index = device.index or 0
        _use_cublas(device)
        self._pools: dict[AllocatorPool, int] = {}
        self._layout = BlockLayout(self._snapshot()["segments"], pools=self._pools)
        self.workspaces: dict[int, str] = dict.fromkeys(self._layout.alive()["address"].tolist(), CUBLAS)
        self._recording = self._deferred = False
        self.cache: CacheState | None = None
        self._newest: CacheState | None = None
        self._total_bytes = int(torch.cuda.get_device_properties(device).total_memory)
        self._on_refused: OnRefused | None = None
        self._end_listening: Callable[[], None] = lambda: None

    @property
    def pools(self) -> tuple[AllocatorPool, ...]:
        """Pools by number, as far as they have come up."""
        return tuple(self._pools)

    @property
    def on_refused(self) -> OnRefused | None:
        """Told of every allocation of this device that is refused, while it is."""
        return self._on_refused

    @on_refused.setter
    def on_refused(self, told: OnRefused | None) -> None:
        self._end_listening()
        self._on_refused = told
        self._end_listening = listen(self._index, self._refused) if told is not None else lambda: None

    def start(self) -> list[dict[str, Any]] | None:
        """Begin recording; the segments and blocks of the allocator.

        A recording that was not stopped goes on: the blocks are known (None),
        and reading them all again would cost more than a step's tags.
        """
        if self._recording:
            return None
        self._deferred = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._record("all")
        self._recording = True
        held = self.holding()
        if not self._deferred and _several_streams(held):
            self._deferred = True
            self._record("all")
            held = self.holding()
        return held

    def holding(self) -> list[dict[str, Any]]:
        """The segments and blocks of the allocator."""
        segments: list[dict[str, Any]] = self._snapshot()["segments"]
        return segments

    def drain(self) -> Drained:
        """Read the trace and empty it."""
        snapshot, deferred = self._snapshot(), self._deferred
        self._deferred = deferred or _several_streams(snapshot["segments"])
        self._record("all")
        pools = ((segment["address"], pool_of(segment).private) for segment in snapshot["segments"])
        return Drained(snapshot["trace"], deferred, {address: private for address, private in pools if any(private)})

    def alive(self, started: list[dict[str, Any]] | None) -> Seen:
        """Blocks the allocator holds, and what each pool does."""
        self._newest = None
        if started is not None:
            self._layout = BlockLayout(started, self._deferred, self._pools)
        held = ((-1, pool, size) for pool, size in self._layout.reserved().items())
        return Seen(self._layout.alive(), columns(array("q", chain.from_iterable(held)), SEGMENT))

    def events(self, drained: Drained | None) -> Seen:
        """The trace, with the slack and the pool of every block."""
        dictionaries, self._layout.deferred, private = drained or Drained()
        entries = read(dictionaries, private)
        highest = entries.highest()
        before = self._layout.follow(entries.part(0, highest))
        self._look_at_cache()
        return before.and_then(self._layout.follow(entries.part(highest, len(entries.raw))))

    def _look_at_cache(self) -> None:
        """Keep what the allocator is like if it has handed out more than ever since the trace began."""
        cache = self._layout.cache()
        if self._newest is None or cache.allocated_bytes > self._newest.allocated_bytes:
            self.cache = self._newest = cache

    def _refused(self, needed_bytes: int, allowed_bytes: int, free_bytes: int) -> None:
        """An allocation is being refused on this thread."""
        told = self._on_refused
        if told is None:
            return
        snapshot = self._snapshot()
        segments, entries = snapshot["segments"], snapshot["trace"] if self._recording else ()
        # The trace has what was asked for; without one there is only what CUDA was asked for.
        asked = next((entry["size"] for entry in reversed(entries) if entry["action"] == "oom"), needed_bytes)
        reserved = sum(segment["total_size"] for segment in segments)
        limited = allowed_bytes < self._total_bytes
        told(
            Refused(
                asked_bytes=asked,
                needed_bytes=needed_bytes,
                reserved_bytes=reserved,
                free_bytes=max(0, min(free_bytes, allowed_bytes - reserved)) if limited else free_bytes,
                outside_bytes=max(0, self._total_bytes - free_bytes - reserved),
                limit_bytes=allowed_bytes if limited else None,
                pools=pools_of(segments),
                stream=torch.cuda.current_stream(self._index).cuda_stream,
                expandable_segments=any(segment.get("is_expandable") for segment in segments),
            )
        )

    def _snapshot(self) -> dict[str, Any]:
        snapshot = torch._C._cuda_memorySnapshot(None)
        return {
            "segments": [s for s in snapshot["segments"] if s["device"] == self._index],
            "trace": snapshot["device_traces"][self._index],
        }

    def stop(self) -> None:
        """Stop recording and drop what was recorded."""
        torch.cuda.memory._record_memory_history(None)
        self._recording = False

    def _record(self, enabled: Literal["all"]) -> None:
        torch.cuda.memory._record_memory_history(
            enabled,
            context=None,
            stacks="python",
            max_entries=MAX_ENTRIES,
            clear_history=True,
            skip_actions=SKIPPED_OF_STREAMS if self._deferred else SKIPPED,
        )

    def stamp(self, mark: int) -> None:
        """Tag what this thread allocates and frees from now on (about 1 µs)."""
        torch._C._cuda_setMemoryMetadata(str(mark))

    def address(self, tensor: torch.Tensor) -> int:
        """The storage's data pointer; 0 on another device."""
        return int(tensor.untyped_storage().data_ptr()) if tensor.device == self.device else 0

    def allocated_bytes(self) -> int:
        """`torch.cuda.memory_allocated`, without building its dictionary."""
        return self.counters().allocated_bytes

    def counters(self) -> Counters:
        """`torch.cuda.memory_allocated`, `max_memory_allocated` and `memory_reserved`."""
        said = torch._C._cuda_memoryStats(self._index)
        allocated, reserved = said["allocated_bytes"]["all"], said["reserved_bytes"]["all"]
        return Counters(int(allocated["current"]), int(allocated["peak"]), int(reserved["current"]))

    def reset_peak(self) -> None:
        """`torch.cuda.reset_peak_memory_stats`."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def timer(self) -> EventTimer:
        """Two CUDA events on the current stream."""
        return EventTimer()


class EventTimer:
    """Stopwatch on the GPU's clock; recording an event does not wait for it."""

    def __init__(self) -> None:
        self._began = torch.cuda.Event(enable_timing=True)
        self._ended = torch.cuda.Event(enable_timing=True)
        self._began.record()

    def stop(self) -> None:
        """Mark the end on the stream."""
        self._ended.record()

    def done(self) -> bool:
        """True if the GPU has passed the end."""
        return bool(self._ended.query())

    def ms(self) -> float:
        """Milliseconds; waits until the GPU has passed the end."""
        self._ended.synchronize()
        return float(self._began.elapsed_time(self._ended))


def _several_streams(segments: Sequence[dict[str, Any]]) -> bool:
    """True if blocks of more than one stream are there: only then may a free wait for a stream."""
    return len({segment["stream"] for segment in segments}) > 1


def _use_cublas(device: torch.device) -> None:
    """Have cuBLAS and cuBLASLt take their workspaces, on this thread and on autograd's."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        layer = torch.nn.Linear(64, 64, device=device, dtype=dtype)
        x = torch.ones(64, 64, device=device, dtype=dtype, requires_grad=True)
        # Checkpointed the old way, so that autograd's thread runs a whole forward
        # as well: a product with a bias takes a workspace of cuBLASLt's.
        (checkpoint(layer, x, use_reentrant=True) @ x).sum().backward()
    torch.cuda.synchronize(device)
