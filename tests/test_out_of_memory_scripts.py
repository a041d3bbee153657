"""Scripts that run out of memory while they are watched."""

from __future__ import annotations

import gc
import re
import subprocess
import sys
import weakref

import pytest
import torch

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.out_of_memory.report import OutOfMemoryReport, Verdict
from gpumem_tui.engine.publisher import RunPublisher
from gpumem_tui.engine.run_events import MemoryLeak, OutOfMemory
from gpumem_tui.watch import watch

from .allocator_state import outside_bytes

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_of_other_tests() -> None:
    """Their models and optimizers, not collected yet, would be others that a watched script holds beside its own."""
    gc.collect()


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
    limit = f"{outside_bytes() + 520 * MIB}B"
    with pytest.raises(torch.OutOfMemoryError), watch(model, optimizer, memory_limit=limit) as watching:
        model(torch.ones(64, 256, device="cuda")).sum().backward()
        optimizer.step()
        with torch.cuda.stream(torch.cuda.Stream()):
            large = torch.empty(400 * MIB, dtype=torch.uint8, device="cuda")
            del large
            small = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
        torch.empty(300 * MIB, dtype=torch.uint8, device="cuda")
    (report,) = reports_of(watching)
    assert report.verdict is Verdict.STRANDED, report.reason
    assert small.nbytes == 8 * MIB
