"""Out of memory: what was asked, what was there, and why it did not fit."""

from __future__ import annotations

import gc
import json
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.events import Category, Gauge
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.out_of_memory import observer
from gpumem_tui.engine.out_of_memory.growth import LiveBytes, Rise
from gpumem_tui.engine.out_of_memory.pools import pools_of
from gpumem_tui.engine.out_of_memory.refusal import Refused
from gpumem_tui.engine.out_of_memory.report import LargestTensor, OutOfMemoryReport, Pool, Verdict
from gpumem_tui.engine.out_of_memory.verdict import Circumstances, judge
from gpumem_tui.engine.prediction.caching_allocator import CachingAllocator
from gpumem_tui.engine.prediction.expandable import expandable_reserved_bytes
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.known import predicted
from gpumem_tui.engine.prediction.outcome import Verdict as Outcome
from gpumem_tui.engine.publisher import RunPublisher
from gpumem_tui.engine.recording import read, write
from gpumem_tui.engine.run_events import MemoryLeak, OutOfMemory, RunEnded, RunEvent, from_plain, to_plain
from gpumem_tui.engine.tracing.allocator_trace import AllocatorTrace
from gpumem_tui.engine.tracing.block_layout import BlockLayout
from gpumem_tui.watch import watch

from .conftest import Engine, small_run

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@pytest.fixture(autouse=True)
def nothing_of_other_tests() -> None:
    """Their models and optimizers, not collected yet, would be others that a watched script holds beside its own."""
    gc.collect()


# --- the report travels --------------------------------------------------------------------


def a_report(**known: object) -> OutOfMemoryReport:
    figures: dict[str, object] = {
        "asked_bytes": 512 << 20, "verdict": Verdict.FULL, "reason": "all is taken", "phase": "backward", "step": 2,
        "allocated_bytes": 3 << 30, "by_category": {"parameters": 1 << 30, "activations": 2 << 30},
        "total_bytes": 4 << 30,
    }  # fmt: skip
    return OutOfMemoryReport(**figures | known)  # type: ignore[arg-type]


def test_a_report_travels_as_json_and_comes_back_the_same() -> None:
    report = a_report(
        largest=(LargestTensor(bytes=1 << 30, category="parameters", owner="lm_head.weight"),),
        pools=(Pool(stream=0, pool="large", cached_bytes=5, largest_free_block_bytes=3),),
        shape=(8192, 16384), dtype="bfloat16", operator="aten.mm",
    )  # fmt: skip
    event = OutOfMemory(text="out of memory", step=2, phase="backward", report=report)
    assert from_plain(json.loads(msgspec.json.encode(to_plain([event])))) == [event]


def test_a_recording_from_before_there_were_reports_opens() -> None:
    old = {"kind": "out_of_memory", "text": "CUDA out of memory", "step": 3, "phase": "forward", "requested_bytes": 7}
    assert from_plain([old]) == [OutOfMemory(text="CUDA out of memory", step=3, phase="forward", requested_bytes=7)]


# --- the verdict ---------------------------------------------------------------------------


def refused(asked: int, free: int = 0, pools: tuple[Pool, ...] = (), **known: Any) -> Refused:
    return Refused(
        asked_bytes=asked, needed_bytes=max(asked, 2 * MIB), reserved_bytes=0, free_bytes=free, pools=pools, **known
    )


def pool(cached: int, largest: int, stream: int = 0, name: str = "large") -> Pool:
    return Pool(stream=stream, pool=name, cached_bytes=cached, largest_free_block_bytes=largest)


CARD = Circumstances(total_bytes=24 * GIB, outside_bytes=GIB, step=2)
STATE = {Category.OPTIMIZER_STATE: 8 * GIB}
LEAK = Rise(GIB, 6)


@pytest.mark.parametrize(
    ("verdict", "of", "around"),
    [
        (Verdict.TOO_BIG, refused(24 * GIB, free=20 * GIB), CARD),
        (Verdict.TOO_BIG, refused(10 * GIB, limit_bytes=8 * GIB), CARD),
        (Verdict.FULL, refused(2 * GIB, GIB), CARD),
        (Verdict.FULL, refused(2 * GIB, GIB, (pool(GIB // 2, GIB // 4),)), CARD),
        (Verdict.FRAGMENTED, refused(2 * GIB, GIB, (pool(4 * GIB, GIB),)), CARD),
        (Verdict.STRANDED, refused(2 * GIB, GIB, (pool(3 * GIB, 3 * GIB, stream=7),)), CARD),
        (Verdict.STRANDED, refused(2 * GIB, 0, (pool(3 * GIB, 3 * GIB, name="large (0, 1)"),)), CARD),
        (Verdict.STRANDED, refused(2 * GIB, GIB, (pool(GIB // 2, MIB), pool(GIB, GIB, stream=7))), CARD),
        (Verdict.FULL, refused(KIB, 0, (pool(3 * GIB, 3 * GIB),)), CARD),
        (Verdict.SOMEBODY_ELSES, refused(2 * GIB), CARD._replace(outside_bytes=8 * GIB, others_bytes=7 * GIB)),
        (Verdict.SOMEBODY_ELSES, refused(2 * GIB), CARD._replace(outside_bytes=8 * GIB)),
        (Verdict.FULL, refused(2 * GIB), CARD._replace(outside_bytes=3 * GIB)),
        (Verdict.FULL, refused(2 * GIB), CARD._replace(outside_bytes=8 * GIB, others_bytes=GIB)),
        (Verdict.GROWN, refused(2 * GIB), CARD._replace(rise=LEAK, grows="held by script", came=STATE)),
        (Verdict.MOVED, refused(2 * GIB), CARD._replace(rise=Rise(KIB, 6), came=STATE)),
        (Verdict.FULL, refused(9 * GIB), CARD._replace(rise=LEAK, came=STATE)),
        (Verdict.GROWN, refused(2 * GIB, GIB, (pool(4 * GIB, GIB),)), CARD._replace(rise=LEAK)),
        (Verdict.MOVED, refused(2 * GIB, GIB, (pool(4 * GIB, GIB),)), CARD._replace(came=STATE)),
        (Verdict.FULL, refused(2 * MIB), CARD._replace(others_bytes=489 * MIB)),
    ],
)
def test_the_verdict_follows_from_what_is_free_where(verdict: Verdict, of: Refused, around: Circumstances) -> None:
    found, reason = judge(of, around)
    assert (found, "\n" in reason) == (verdict, False), reason


def test_the_reason_names_bytes_and_culprits() -> None:
    _, moved = judge(refused(2 * GIB), CARD._replace(came=STATE))
    assert "step 1 fitted" in moved and "since then optimizer (8.00 GiB) have come" in moved
    _, grown = judge(refused(2 * GIB), CARD._replace(rise=LEAK, grows="held by script"))
    assert "with every step 1.00 GiB more stay alive (held by script)" in grown
    _, stranded = judge(refused(2 * GIB, GIB, (pool(3 * GIB, 3 * GIB, stream=7),)), CARD)
    assert "3.00 GiB of them in one piece for stream 0x7" in stranded


def test_what_is_free_on_the_device_is_held_against_the_segment_that_torch_takes() -> None:
    """12 MiB are more than the 8 MiB asked for, and no segment of 20 MiB fits in them."""

    def reason(cached: int) -> tuple[Verdict, str]:
        refused = Refused(8 * MIB, 20 * MIB, 108 * MIB, 12 * MIB, limit_bytes=120 * MIB, pools=(pool(cached, 6 * MIB),))
        return judge(refused, CARD)

    assert reason(10 * MIB) == (
        Verdict.FRAGMENTED,
        "10.0 MiB are cached and 12.0 MiB of the device are free, together enough for the segment of 20.0 MiB that "
        "torch takes for 8.0 MiB, but the largest cached piece is 6.0 MiB",
    )
    verdict, full = reason(7 * MIB)
    assert verdict is Verdict.FULL and full.endswith(
        "free, less than the segment of 20.0 MiB that torch takes for 8.0 MiB"
    )


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


# --- growth --------------------------------------------------------------------------------


def live_bytes(figures: list[int]) -> LiveBytes:
    live = LiveBytes()
    for figure in figures:
        live.add(figure)
    return live


def test_what_rises_by_about_the_same_with_every_step_is_a_leak() -> None:
    assert live_bytes([50, 70, *range(70, 190, 20)]).rise() == Rise(20, 5)
    assert live_bytes([100, 110, 120]).rise() is None, "too early to tell"
    assert live_bytes([100, 110, 120]).rise(at_least=3) == Rise(10, 2), "not where memory has run out"
    assert live_bytes([100] * 9).rise(at_least=3) is None
    assert live_bytes([10, 20, 30, 40, 400, 410]).rise() is None, "something has come; it does not grow"


def test_a_leak_is_seen_beneath_rows_of_different_lengths() -> None:
    noise = [(step * 3) % 4 * 1000 for step in range(80)]
    rise = live_bytes([1_000_000 + 100 * step + noise[step] for step in range(80)]).rise()
    assert rise is not None
    assert rise.bytes == pytest.approx(100, rel=0.5)
    assert live_bytes([1_000_000 + n for n in noise]).rise() is None


# --- the observer ----------------------------------------------------------------------------


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


def snapshot_block(address: int, size: int, state: str = "active_allocated") -> dict[str, Any]:
    return {"address": address, "size": size, "requested_size": size, "state": state}


def snapshot_segment(*blocks: dict[str, Any], **more: Any) -> dict[str, Any]:
    total = sum(block["size"] for block in blocks)
    return {"stream": 0, "segment_type": "large", "blocks": list(blocks), "total_size": total, "device": 0, **more}


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
    entries = [
        {"action": action, "addr": address, "size": size, "user_metadata": "1", "time_us": 0}
        for action, address, size in (
            ("alloc", 64 * MIB, 20 * MIB), ("alloc", 4 * MIB, 8 * MIB), ("free_requested", 64 * MIB, 20 * MIB)
        )
    ]  # fmt: skip
    assert len(cuda_recorder.events([*entries, {"action": "oom", "size": 29 * MIB}])) == 3
    assert cuda_recorder.cache == (40 * MIB, 32 * MIB, 8 * MIB, 8 * MIB)


# --- runs, under a memory limit -----------------------------------------------------------------


def limited(limit: int, **settings: Any) -> RunConfig:
    return replace(small_run(**{"batch_size": 8, "seq_len": 64} | settings), memory_limit_bytes=limit)


def report_in(events: list[RunEvent]) -> OutOfMemoryReport:
    (told,) = [event for event in events if isinstance(event, OutOfMemory)]
    assert told.report is not None
    return told.report


@pytest.mark.parametrize(
    ("limit", "settings", "where"),
    [
        (3 * MIB, {}, ("load", 0)),
        (24 * MIB, {}, ("forward", 1)),
        (52 * MIB, {}, ("backward", 1)),
        (40 * MIB, {"checkpointing": "layers"}, ("optimizer step", 1)),
    ],
)
def test_a_run_that_dies_reports_every_byte_of_that_instant(
    engine: Engine, tmp_path: Path, limit: int, settings: dict[str, Any], where: tuple[str, int]
) -> None:
    events = engine.run_events(limited(limit, **settings))
    report = report_in(events)
    assert (report.phase, report.step) == where
    assert sum(report.by_category.values()) == report.allocated_bytes
    assert "unknown" not in report.by_category
    assert report.traced and report.verdict is Verdict.FULL
    assert report.operator.startswith("aten.") and report.shape and report.dtype == "float32"
    assert report.largest[0].bytes == max(tensor.bytes for tensor in report.largest) and len(report.largest) == 10
    assert report.allocated_bytes + report.cached_bytes + report.free_bytes == report.limit_bytes == limit
    assert report.free_bytes < report.asked_bytes or report.largest_free_block_bytes < report.asked_bytes
    assert next(e for e in events if isinstance(e, RunEnded)).leaked_bytes == 0

    run = engine.session.run
    assert run is not None
    assert run.latest is not None and run.latest.is_aborted
    assert sum(Ledger(run.latest).end.values()) == report.allocated_bytes, "the trace ends where memory did"
    write(tmp_path / "oom.gpumem", [run])
    (again,) = read(tmp_path / "oom.gpumem")
    assert report_in(list(again.events())) == report
    assert again.config.memory_limit_bytes == limit


def test_what_fitted_one_step_and_not_the_next_has_moved(engine: Engine) -> None:
    """The optimizer's state comes at the end of the first step."""
    report = report_in(engine.run_events(limited(60 * MIB)))
    assert report.step == 2
    assert report.verdict is Verdict.MOVED, report.reason
    assert "step 1 fitted; since then optimizer (13." in report.reason


def test_a_limit_that_suffices_changes_nothing_but_what_the_gauge_says(engine: Engine) -> None:
    free = engine.run(small_run())
    document = engine.run(replace(small_run(), memory_limit_bytes=64 * MIB))
    assert document["failure"] is None
    assert [step["loss"] for step in document["steps"]] == [step["loss"] for step in free["steps"]]
    gauge = engine.session.run.training_gauge
    assert gauge is not None and gauge.cache is not None
    assert gauge.device_total_bytes == 64 * MIB == engine.session.environment().device_total_bytes
    assert gauge.usable_bytes is not None and 0 < gauge.usable_bytes < 64 * MIB
    assert gauge.cache.reserved_bytes <= 64 * MIB
    engine.run(small_run())
    assert engine.session.environment().device_total_bytes > 64 * MIB


# --- scripts -----------------------------------------------------------------------------------


def net() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256))
    return model, torch.optim.AdamW(model.parameters())


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: int = 64) -> None:
    model(torch.ones(rows, 256)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def reports_of(watching: watch) -> list[OutOfMemoryReport]:
    told = [event for event in watching.source.events() if isinstance(event, OutOfMemory)]
    return [event.report for event in told if event.report is not None]


def test_a_loop_that_catches_it_and_goes_on_with_fewer_rows_is_watched_on() -> None:
    model, optimizer = net()
    rows, done = 4096, 0
    with watch(model, optimizer, memory_limit="24MiB") as watching:
        while done < 3:
            try:
                train(model, optimizer, rows)
                done += 1
            except torch.OutOfMemoryError:
                rows //= 2
    reports = reports_of(watching)
    assert len(reports) == 4 and rows == 256
    for report in reports:
        assert sum(report.by_category.values()) == report.allocated_bytes
        assert "unknown" not in report.by_category
    run = watching.source.run
    assert run is not None
    assert run.ended is not None and run.ended.steps == 3 and run.ended.reason == "done"
    assert [trace.step for trace in run.traces()] == [1, 2, 3] and run.traces()[-1].is_complete


def test_the_run_is_shown_with_the_batch_that_it_died_of_and_not_the_first() -> None:
    model, optimizer = net()
    with pytest.raises(torch.OutOfMemoryError), watch(model, optimizer, memory_limit="40MiB") as watching:
        for rows in (64, 128, 4096):
            run = watching.source.run
            assert run is None or run.config.batch_size == 64
            train(model, optimizer, rows)
    run = watching.source.run
    assert run is not None
    assert run.refused is not None and run.refused.phase == "forward"
    assert run.config.batch_size == 4096


def test_weights_that_a_script_has_made_before_are_there_when_its_first_step_begins() -> None:
    model, optimizer = net()
    with pytest.raises(torch.OutOfMemoryError), watch(model, optimizer, memory_limit="40MiB") as watching:
        for rows in (64, 4096):
            train(model, optimizer, rows)
    run, (report,) = watching.source.run, reports_of(watching)
    assert run is not None
    began = Ledger(run.traces()[0]).at(-1)
    assert began[Category.PARAMETERS] == sum(parameter.nbytes for parameter in model.parameters())
    own = f"parameters ({began[Category.PARAMETERS] / MIB:.1f} MiB)"  # a model of another test may have some too
    assert own not in report.reason


class Thrifty(torch.nn.Module):
    """It asks for room to work in, and makes do with less."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(256, 256)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        for mib in (400, 200, 1):
            try:
                room = torch.empty(mib * MIB, dtype=torch.uint8)
                break
            except torch.OutOfMemoryError:
                continue
        outputs: torch.Tensor = self.layer(rows)
        del room
        return outputs


def test_what_is_made_good_within_the_model_ends_no_step() -> None:
    model = Thrifty()
    optimizer = torch.optim.AdamW(model.parameters())
    with watch(model, optimizer, memory_limit="40MiB") as watching:
        for _ in range(2):
            train(model, optimizer)
    assert not reports_of(watching)
    run = watching.source.run
    assert run is not None
    assert [(trace.step, trace.is_complete) for trace in run.traces()] == [(1, True), (2, True)]
    assert all(Ledger(trace).mismatch_bytes == 0 for trace in run.traces())


def test_a_leak_is_told_before_it_kills_and_is_the_verdict_when_it_does() -> None:
    model, optimizer = net()
    kept: list[torch.Tensor] = []
    with pytest.raises(torch.OutOfMemoryError), watch(model, optimizer, memory_limit="32MiB") as watching:
        while True:
            train(model, optimizer)
            kept.append(torch.ones(1 << 19))
    (leak,) = [event for event in watching.source.events() if isinstance(event, MemoryLeak)]
    (report,) = reports_of(watching)
    assert leak.growth_bytes == report.growth_bytes == 2 * MIB
    assert leak.steps_left is not None and leak.step + leak.steps_left == pytest.approx(report.step, abs=3)
    assert report.verdict is Verdict.GROWN
    assert report.growth_owner == "held by script, made in batch"
    assert report.by_category["held_by_script"] >= (len(kept) - 1) * 2 * MIB


def test_rows_that_get_longer_are_no_leak() -> None:
    model, optimizer = net()
    with watch(model, optimizer) as watching:
        for rows in range(64, 576, 64):
            kept = model(torch.ones(rows, 256))
            kept.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not any(isinstance(event, MemoryLeak) for event in watching.source.events())


def test_gaps_between_what_is_kept_are_fragmentation() -> None:
    model, optimizer = net()
    with pytest.raises(torch.OutOfMemoryError), watch(model, optimizer, memory_limit="100MiB") as watching:
        train(model, optimizer)
        many = [torch.ones(4 << 18) for _ in range(20)]
        few = many[::5]
        del many
        torch.ones(50 << 18)
    (report,) = reports_of(watching)
    assert report.verdict is Verdict.FRAGMENTED, report.reason
    assert len(few) == 4
    assert report.asked_bytes == 50 * MIB <= report.cached_bytes + report.free_bytes
    assert report.largest_free_block_bytes == 16 * MIB


def test_the_error_is_the_scripts_and_holds_nothing_of_ours() -> None:
    model, optimizer = net()
    caught: torch.OutOfMemoryError | None = None
    with watch(model, optimizer, memory_limit="24MiB") as watching:
        try:
            train(model, optimizer, 4096)
        except torch.OutOfMemoryError as error:
            caught = error
    assert re.match(r"CPU out of memory\. Tried to allocate \d+\.0 MiB\. The memory limit is 24\.0 MiB", str(caught))
    assert type(caught) is torch.OutOfMemoryError and len(reports_of(watching)) == 1
    dies = weakref.ref(model)
    caught = None
    del model, optimizer
    gc.collect()
    assert dies() is None, "watching keeps nothing alive"


DIES = """
import atexit, torch
from gpumem_tui.engine.run_events import OutOfMemory
from gpumem_tui.watch import watch
model = torch.nn.Linear(256, 256)
watching = watch(model, torch.optim.AdamW(model.parameters()), memory_limit="24MiB")
atexit.register(lambda: print([e.report.verdict.value for e in watching.source.events() if isinstance(e, OutOfMemory)]))
watching.begin()
for rows in (16, 100_000):
    model(torch.ones(rows, 256)).sum().backward()
"""


def test_a_script_that_dies_uncaught_has_told_by_its_end_and_fails_as_ever() -> None:
    done = subprocess.run([sys.executable, "-c", DIES], capture_output=True, text=True, check=False)
    assert done.stdout == "['too_big']\n"
    assert done.returncode == 1 and "torch.OutOfMemoryError: CPU out of memory." in done.stderr


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_engine() -> Iterator[Engine]:
    made = Engine("cuda")
    yield made
    made.session.close()


def outside_bytes() -> int:
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{}, {"checkpointing": "layers"}, {"lora": "on"}, {"accumulation": 2}])
def test_a_gpu_tells_every_byte_of_the_instant_it_refuses(gpu_engine: Engine, settings: dict[str, Any]) -> None:
    big = {"batch_size": 64, "seq_len": 512, "rows": 64} | settings
    first = gpu_engine.run_events(small_run(**big))
    assert not any(isinstance(event, OutOfMemory) for event in first)
    peak = int(Ledger(gpu_engine.traces[1]).total.max())
    limit = outside_bytes() + int(0.6 * peak)
    events = gpu_engine.run_events(replace(small_run(**big), memory_limit_bytes=limit))
    report = report_in(events)
    assert sum(report.by_category.values()) == report.allocated_bytes
    assert "unknown" not in report.by_category
    assert report.limit_bytes is not None and abs(report.limit_bytes - 0.6 * peak) < 64 * MIB
    assert report.total_bytes == limit and report.allocated_bytes + report.cached_bytes <= report.limit_bytes
    assert report.module and report.step == 1
    assert next(e for e in events if isinstance(e, RunEnded)).leaked_bytes == 0
    assert not observer._listeners, "nobody listens when no run is traced"


@pytest.mark.gpu
def test_a_step_that_is_not_traced_is_told_by_the_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunPublisher, "wants", lambda self, step: step <= 2)
    model, optimizer = net()
    model.cuda()
    kept = []
    limit = f"{outside_bytes() + 400 * MIB}B"
    with pytest.raises(torch.OutOfMemoryError), watch(model, optimizer, memory_limit=limit) as watching:
        for step in range(8):
            rows = torch.ones(4096 if step < 5 else 200_000, 256, device="cuda")
            kept.append(model(rows).sum())
            kept[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
    (report,) = reports_of(watching)
    assert report.step == 6 and not report.traced
    assert sum(report.by_category.values()) == report.allocated_bytes
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert report.by_category["parameters"] == weights
    assert report.by_category["optimizer_state"] >= 2 * weights


@pytest.mark.gpu
def test_what_another_stream_has_cached_is_stranded() -> None:
    model, optimizer = net()
    model.cuda()
    limit = f"{outside_bytes() + 200 * MIB}B"
    with pytest.raises(torch.OutOfMemoryError), watch(model, optimizer, memory_limit=limit) as watching:
        model(torch.ones(64, 256, device="cuda")).sum().backward()
        optimizer.step()
        with torch.cuda.stream(torch.cuda.Stream()):
            large = torch.empty(150 * MIB, dtype=torch.uint8, device="cuda")
            del large
            small = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
        torch.empty(120 * MIB, dtype=torch.uint8, device="cuda")
    (report,) = reports_of(watching)
    assert report.verdict is Verdict.STRANDED, report.reason
    assert small.nbytes == 8 * MIB


# --- the commands -------------------------------------------------------------------------------


def command(*words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "gpumem_tui.tui", *words]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_a_prediction_takes_the_limit_for_the_size_of_the_gpu() -> None:
    card = gpu("H100 80GB")
    prediction = predicted(limited(card.context_bytes + 24 * MIB), card)
    assert prediction.available_bytes == 24 * MIB
    assert prediction.verdict is Outcome.TOO_LARGE and prediction.peak_bytes > 24 * MIB


@pytest.mark.parametrize("words", [("run",), ("estimate",), ("exec", "--", "true")])
def test_a_memory_limit_that_is_no_size_is_refused(words: tuple[str, ...]) -> None:
    done = command(words[0], "--memory-limit", "24", *words[1:])
    assert done.returncode == 2
    assert "--memory-limit 24: takes a size such as 24GiB" in done.stderr


# --- how near the edge is -------------------------------------------------------------------------


def test_the_edge_is_what_is_usable_not_what_is_free() -> None:
    gauge = Gauge(0.0, 10 * MIB, 40 * MIB, 0, None, 50 * MIB, 100 * MIB)
    assert gauge.usable_bytes == 80 * MIB, "the device's free bytes, and what can be given back"
    allocator = CachingAllocator()
    kept = [allocator.allocate(4 * MIB)[0] for _ in range(10)]
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


def test_expandable_segments_reserve_no_more_than_the_pages_that_are_used(engine: Engine) -> None:
    engine.run(limited(GIB))
    for trace in engine.traces[1:]:
        peak = int(Ledger(trace).total.max())
        assert peak <= expandable_reserved_bytes(trace) <= peak + 44 * MIB
