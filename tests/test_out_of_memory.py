"""Runs that run out of memory: what was asked, what was there, what is kept and what a prediction makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.out_of_memory import observer
from gpumem_tui.engine.out_of_memory.report import LargestTensor, OutOfMemoryReport, Pool, Verdict
from gpumem_tui.engine.prediction.expandable import expandable_reserved_bytes
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.known import predicted
from gpumem_tui.engine.prediction.outcome import Verdict as Outcome
from gpumem_tui.engine.recording import read, write
from gpumem_tui.engine.run_events import OutOfMemory, RunEnded, RunEvent, from_plain, to_plain
from gpumem_tui.tui.cli import main

from .allocator_state import outside_bytes
from .conftest import Engine, small_run

MIB, GIB = 1 << 20, 1 << 30


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
    pools = Ledger(run.latest).pools(len(run.latest.events) - 1)
    assert again.latest is not None and Ledger(again.latest).pools(len(run.latest.events) - 1) == pools
    assert sum(held.allocated_bytes for held in pools) == report.allocated_bytes
    assert sum(held.unused_bytes for held in pools) == report.cached_bytes
    assert again.config.memory_limit_bytes == limit


def test_what_fitted_one_step_and_not_the_next_has_moved(engine: Engine) -> None:
    """The optimizer's state comes at the end of the first step."""
    report = report_in(engine.run_events(limited(60 * MIB)))
    assert report.step == 2
    assert report.verdict is Verdict.MOVED, report.reason
    assert "step 1 fitted; new since then, and there to stay: optimizer (13." in report.reason


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


def test_expandable_segments_reserve_no_more_than_the_pages_that_are_used(engine: Engine) -> None:
    engine.run(limited(GIB))
    for trace in engine.traces[1:]:
        peak = int(Ledger(trace).total.max())
        assert peak <= expandable_reserved_bytes(trace) <= peak + 44 * MIB


# --- the commands -------------------------------------------------------------------------------


def test_a_prediction_takes_the_limit_for_the_size_of_the_gpu() -> None:
    card = gpu("H100 80GB")
    prediction = predicted(limited(card.context_bytes + 24 * MIB), card)
    assert prediction.available_bytes == 24 * MIB
    assert prediction.verdict is Outcome.TOO_LARGE and prediction.peak_bytes > 24 * MIB


@pytest.mark.parametrize("words", [("run",), ("estimate",), ("exec", "--", "true")])
def test_a_memory_limit_that_is_no_size_is_refused(words: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    assert main([words[0], "--memory-limit", "24", *words[1:]]) == 2
    assert "--memory-limit 24: takes a size such as 24GiB" in capfd.readouterr().err


# --- on a GPU -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gpu_engine() -> Iterator[Engine]:
    made = Engine("cuda")
    yield made
    made.session.close()


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
