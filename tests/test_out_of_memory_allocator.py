"""The caching allocator when it refuses: who is told, what is free where, and how near the edge is."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gpumem_tui.engine.events import Gauge
from gpumem_tui.engine.out_of_memory import observer
from gpumem_tui.engine.out_of_memory.pools import pools_of
from gpumem_tui.engine.out_of_memory.refusal import Refused
from gpumem_tui.engine.prediction.caching_allocator import CachingAllocator
from gpumem_tui.engine.tracing.allocator_trace import AllocatorTrace, Drained
from gpumem_tui.engine.tracing.block_layout import BlockLayout

from .allocator_state import pool, snapshot_block, snapshot_segment, trace_entry

MIB = 1 << 20


def test_the_observer_is_attached_once_and_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    attached: list[Any] = []
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", attached.append, raising=False)
    monkeypatch.setattr(observer, "_attached", False)
    told: list[tuple[int, int, int]] = []
    end = observer.listen(0, lambda *figures: told.append(figures))
    observer.listen(1, lambda *_: 1 / 0)
    (observe,) = attached
    observe(0, 3, 2, 1)
    observe(1, 3, 2, 1)
    observe(2, 3, 2, 1)
    end()
    observe(0, 3, 2, 1)
    assert told == [(3, 2, 1)], "nobody is told any more"
    observer._listeners.clear()


@pytest.fixture
def cuda_recorder(monkeypatch: pytest.MonkeyPatch) -> AllocatorTrace:
    """The recorder of a GPU of 100 MiB with 40 MiB reserved, without the GPU."""
    free, used = snapshot_block(4 * MIB, 16 * MIB, "inactive"), snapshot_block(0, 4 * MIB)
    segments = [snapshot_segment(used, free), snapshot_segment(snapshot_block(64 * MIB, 20 * MIB, "inactive"))]
    monkeypatch.setattr(AllocatorTrace, "_snapshot", lambda self: {"segments": segments, "trace": self.entries})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=0))
    recorder = AllocatorTrace.__new__(AllocatorTrace)
    recorder.cache = recorder._newest = None
    recorder._recording = True
    recorder._index, recorder._total_bytes, recorder._layout = 0, 100 * MIB, BlockLayout(segments)
    recorder.entries = []  # type: ignore[attr-defined]
    return recorder


def test_the_recorder_of_a_gpu_tells_what_the_allocator_has_where(cuda_recorder: AllocatorTrace) -> None:
    told: list[Refused] = []
    cuda_recorder._on_refused = told.append
    cuda_recorder._refused(30 * MIB, 100 * MIB, 10 * MIB)
    cuda_recorder.entries += [{"action": "oom", "size": 29 * MIB}]  # type: ignore[attr-defined]
    cuda_recorder._refused(30 * MIB, 45 * MIB, 10 * MIB)
    whole, limited_one = told
    assert (whole.asked_bytes, whole.free_bytes, whole.limit_bytes) == (30 * MIB, 10 * MIB, None)
    assert whole.outside_bytes == 50 * MIB and whole.pools == (pool(36 * MIB, 20 * MIB),)
    assert (limited_one.asked_bytes, limited_one.free_bytes, limited_one.limit_bytes) == (29 * MIB, 5 * MIB, 45 * MIB)


def test_the_allocator_is_looked_at_where_the_step_is_highest(cuda_recorder: AllocatorTrace) -> None:
    trace = [
        trace_entry("alloc", 64 * MIB, 20 * MIB), trace_entry("alloc", 4 * MIB, 8 * MIB),
        trace_entry("free_requested", 64 * MIB, 20 * MIB),
    ]  # fmt: skip
    assert len(cuda_recorder.events(Drained([*trace, {"action": "oom", "size": 29 * MIB}])).rows) == 3
    assert cuda_recorder.cache == (40 * MIB, 32 * MIB, 8 * MIB, 8 * MIB)


def test_free_blocks_are_told_apart_by_stream_and_pool() -> None:
    def segment(*sizes: tuple[int, str], **more: Any) -> dict[str, Any]:
        return snapshot_segment(*(snapshot_block(0, size, state) for size, state in sizes), **more)

    segments = [
        segment((5, "inactive"), (7, "active_allocated"), (3, "inactive")),
        segment((2, "inactive")),
        segment((8, "inactive"), (1, "active_pending_free"), stream=9),
        segment((4, "inactive"), segment_pool_id=(0, 3)),
        segment((6, "active_allocated"), segment_pool_id=(0, 4)),
    ]
    assert pools_of(segments) == (pool(10, 5), pool(8, 8, stream=9), pool(4, 4, name="large (0, 3)"))


def test_the_edge_is_what_is_usable_not_what_is_free() -> None:
    gauge = Gauge(0.0, 10 * MIB, 40 * MIB, 0, None, 50 * MIB, 100 * MIB)
    assert gauge.usable_bytes == 80 * MIB, "the device's free bytes, and what can be given back"
    allocator = CachingAllocator()
    kept = [allocator.allocate(4 * MIB) for _ in range(10)]
    for address in kept[1:5] + kept[6:]:
        allocator.free(address)
    assert allocator.cache() == (40 * MIB, 8 * MIB, 16 * MIB, 32 * MIB)
    assert replace(gauge, cache=allocator.cache()).usable_bytes == 50 * MIB


def test_the_layout_of_a_snapshot_knows_its_gaps() -> None:
    used, gap = snapshot_block(0, 4 * MIB), snapshot_block(4 * MIB, 16 * MIB, "inactive")
    whole = snapshot_segment(snapshot_block(64 * MIB, 20 * MIB, "inactive"))
    assert BlockLayout([snapshot_segment(used, gap), whole]).cache() == (40 * MIB, 4 * MIB, 20 * MIB, 16 * MIB)
    growing = snapshot_segment(used, gap, is_expandable=True)
    assert BlockLayout([growing, whole]).cache().gaps_bytes == 16 * MIB, "less than a page"
