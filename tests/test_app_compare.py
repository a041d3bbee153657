"""The compare screen: any two runs, by category, phase, layer and owner."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.events import Phase
from gpumem_tui.engine.feed import Feed
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.recording import Recording, write
from gpumem_tui.engine.run_events import Recomputed, StepEnded
from gpumem_tui.tui.event_log import Filter
from gpumem_tui.tui.run_summary import summarize
from gpumem_tui.tui.screens.compare import HIGHEST, LAYERS, MODES, REFERENCE, SAVED, _together
from gpumem_tui.tui.state import ViewState

from .app_driver import Driver, opened, restarted, shown, trained
from .fake_source import MIB, FakeSource

GIB = 1 << 30


async def test_runs_are_compared_by_category_phase_and_layer() -> None:
    source = trained(2)
    async with shown(source) as driver:
        await restarted(driver, "k")
        await driver.press("5")
        assert "run 1  B8×S256" in driver.text
        assert "run 2, now  checkpointing=layers" in driver.text
        first, second = driver.app.state.runs
        a, b = first.peak[Category.OPTIMIZER_STATE], second.peak[Category.OPTIMIZER_STATE]
        assert driver.line("O optimizer").split()[2:] == [f"{a / MIB:.1f}", f"{b / MIB:.1f}", "0.0"]
        await driver.compare_by(HIGHEST)
        a, b = (run.by_phase[phase] for run in (first, second) for phase in run.by_phase if phase.title == "backward")
        assert driver.line("backward").split()[1:] == [f"{a / MIB:.1f}", f"{b / MIB:.1f}", f"{(b - a) / MIB:+.1f}"]
        await driver.compare_by(LAYERS)
        a, b = (run.by_layer["gpt_neox.layers.3"] for run in (first, second))
        row = next(line for line in driver.lines if "layers.3" in line).split()
        assert row[1:3] == [f"{a / MIB:.1f}", f"{b / MIB:.1f}"]


async def test_the_time_of_a_run_is_its_median_step_and_says_so() -> None:
    source = trained(1)
    for step, seconds in enumerate((0.040, 0.042, 0.042, 0.345), 2):
        source.feed.tell(StepEnded(text="", step=step, seconds=seconds))
    async with shown(source) as driver:
        await driver.press("5")
        assert driver.lines[1].rstrip().endswith("median step, peak")
        assert "42 ms" in driver.line("A ")


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 40)])
async def test_a_layer_is_one_row_whatever_wraps_the_model_or_caches_its_keys(size: tuple[int, int]) -> None:
    """A full run with a KV cache beside one of PEFT's: names have no prefix, and are not cut at the useful end."""
    async with shown(opened("h100-tiny-lora", "h100-tiny"), size) as driver:
        await driver.press("j")
        lora, _ = driver.app.state.runs
        await driver.compare_by(LAYERS)
        names = [line.split()[0] for line in driver.lines[5:-3] if line.strip()]
        assert len(names) == len(set(names))
        assert {"layers.0", "layers.5", "embed_in", "final_layer_norm"} <= set(names)
        held = driver.app.state.summary().by_layer["gpt_neox.layers.0"]
        assert driver.line("layers.0").split()[1:3] == [
            f"{size / MIB:.1f}" for size in (lora.by_layer["gpt_neox.layers.0"], held)
        ]


def listed(driver: Driver) -> list[str]:
    """The letters of the runs above the comparison."""
    return [line.split()[0] for line in driver.lines[2:] if re.match(r" [A-Z] +~?\d.* run \d", line)]


async def test_all_runs_are_listed_where_there_is_room_and_else_it_is_said_how_many_are_not() -> None:
    source = trained(2)
    async with shown(source, (60, 20)) as driver:
        for i in range(10):
            await restarted(driver, "n" if i % 2 else "b")
        await driver.press("5")
        n_runs, letters = len(driver.app.page.runs()), listed(driver)
        assert 5 <= len(letters) < n_runs and (letters[0], letters[-1]) == ("A", "ABCDEFGHIJKLM"[n_runs - 1])
        assert f"{len(letters)} of {n_runs} runs" in driver.lines[1]
        await driver.press(*["right"] * 4)
        assert {"A", "E", letters[-1]} <= set(listed(driver))
        await driver.press(*["tab"] * REFERENCE)
        assert f"of {n_runs} runs" not in driver.text, "a row each"
        await driver.pilot.resize_terminal(120, 40)
        await driver.press(*["tab"] * (len(MODES) - REFERENCE))
        assert len(listed(driver)) == n_runs
        assert "runs," not in driver.lines[1]


async def test_a_configuration_that_ran_several_times_is_listed_once_with_its_latest_run() -> None:
    async with shown(trained(2)) as driver:
        for _ in range(2):  # there and back, twice
            await restarted(driver, "k")
            await restarted(driver, "K")
        assert [(run.origin, run.times) for run in driver.app.state.runs] == [("run 1", 2), ("run 2", 2), ("run 5", 1)]
        await driver.press("5")
        assert "run 1 ×2  B8" in driver.text and "run 2 ×2  checkpointing=layers" in driver.text
        await restarted(driver, "r", steps=1)
        await driver.press("1")
        await restarted(driver, "b")
        first = driver.app.state.runs[0]
        assert (first.origin, first.times, first.steps) == ("run 1", 4, 2), "what was cut short replaces no figures"


async def test_earlier_runs_come_first_and_what_a_change_saves_has_a_minus() -> None:
    async with shown(trained(2)) as driver:
        await restarted(driver, "k")
        await restarted(driver, "l")
        await driver.press("5")
        assert [run.origin for run in driver.app.page.runs()] == ["run 1", "run 2", "run 3"]
        assert driver.line("A        B").split() == ["A", "B", "B", "-", "A", "C", "C", "-", "A"]
        full, _, lora = driver.app.state.runs
        assert driver.line("all").split()[-1] == f"{(lora.peak_bytes - full.peak_bytes) / MIB:.1f}"
        assert lora.peak_bytes < full.peak_bytes


async def test_two_peaks_that_are_two_instants_say_so() -> None:
    """Gradients are there in one and not in the other, which is not what a layer saves."""
    async with shown(opened("full", "lora", "checkpointed")) as driver:
        await driver.compare_by(LAYERS)
        assert "peaks: A in optimizer, B in backward, C in optimizer: not one instant" in driver.text
        await driver.press("right", "-", "right")
        assert "peaks: A in optimizer, B in optimizer" in driver.text and "instant" not in driver.text


async def test_which_layer_saves_most_is_told_at_one_instant_of_all_runs() -> None:
    async with shown(opened("full", "checkpointed"), (80, 30)) as driver:
        await driver.compare_by(SAVED)
        assert re.search(r"saved most activations: B in layers\.0…\d+, -\d+\.\d+ each", driver.text)
        full, checkpointed = driver.app.state.runs
        assert full.saved_by_layer and checkpointed.saved_by_layer
        await driver.press("j")
        for event in driver.app.state.logs[Filter.ALL]:
            if isinstance(event, Recomputed):
                (layer,) = event.layers
                kept, less = full.saved_by_layer[layer], checkpointed.saved_by_layer[layer]
                assert kept - less == event.bytes, "what is not kept is what is computed again"
                row = driver.line(layer.removeprefix("gpt_neox.")).split()
                assert row[1:] == [f"{kept / GIB:.2f}", f"{less / GIB:.2f}", f"{(less - kept) / GIB:+.2f}"]


async def test_the_layer_that_saves_most_stands_first_whichever_run_is_chosen() -> None:
    async with shown(opened("h100-tiny", "h100-tiny-lora")) as driver:
        await driver.compare_by(SAVED)
        page = driver.app.page
        changes = [after - before for _, (before, after), _ in page.lines(page.runs())[:-1]]
        first = driver.lines[driver.lines.index(driver.line("saved most")) + 2].split()
        assert driver.line("saved most activations").split(": ")[1].strip() == f"B in layers.0…5, {first[-1]} each"
        assert changes == sorted(changes) != sorted(changes, reverse=True)
        await driver.press("right", "enter", "left")
        changes = [before - after for _, (before, after), _ in page.lines(page.runs())[:-1]]
        assert changes == sorted(changes)


def test_layers_are_named_together() -> None:
    assert _together(["lm_head"]) == "lm_head"
    assert _together(["layers.3", "layers.0"]) == "layers.3 and layers.0"
    assert _together([f"layers.{i}" for i in (2, 0, 1)]) == "layers.0…2"
    assert _together([f"layers.{i}" for i in (9, 1, 5)]) == "3 of layers.1…9"
    assert _together(["embed_in", "layers.0", "layers.1"]) == "embed_in and 2 others"


async def test_any_run_can_be_what_the_others_are_compared_with() -> None:
    source = trained(2)
    async with shown(source) as driver:
        await restarted(driver, "b")
        await driver.press("5")
        (forward,) = {driver.line("L logits").split()[-1]}
        assert forward.startswith("+")
        await driver.press("right", "enter")
        assert driver.line("L logits").split()[-1] == forward.replace("+", "-")


async def test_the_reference_experiments_table_from_ones_own_runs() -> None:
    source = trained(2)
    async with shown(source) as driver:
        await restarted(driver, "l")
        await driver.compare_by(REFERENCE)
        assert "the reference experiment's table" in driver.text
        assert "after step" in driver.text
        ledger = {trace.step: Ledger(trace) for trace in source.run.traces()}
        loaded, peak = sum(ledger[0].end.values()), max(one.peak.bytes for one in ledger.values())
        row = driver.line("run 2 B8×S256 lora").split()
        assert (row[4], row[-1]) == (f"{loaded / MIB:.1f}", f"{peak / MIB:.1f}")
        assert row[5] == "0.0", "LoRA has no gradients here"


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 40)])
async def test_the_table_names_its_runs_at_every_width(size: tuple[int, int]) -> None:
    async with shown(opened("full", "checkpointed", "lora"), size) as driver:
        await driver.compare_by(REFERENCE)
        assert [driver.line(name) for name in ("full B", "checkpoi", "lora B")]
        assert ("loaded" in driver.text) == (size[0] > 60)


async def test_what_makes_no_difference_to_memory_was_not_measured_with_values_that_never_ran() -> None:
    async with shown(trained(2)) as driver:
        await driver.press("4")
        assert "measured peak, MiB  8: " in driver.text
        await driver.press("down", "down")
        assert driver.line("learning rate")
        assert "measured peak" not in driver.text


async def test_a_run_that_has_ended_can_be_forgotten() -> None:
    source = trained(2)
    async with shown(source) as driver:
        await restarted(driver, "b")
        await driver.press("5", "-")
        assert "run 1" not in driver.text
        await driver.press("-")
        assert "run 2" in driver.text
        assert "still on" in driver.text


def test_runs_that_ended_are_kept_with_few_traces_and_boundedly() -> None:
    source = FakeSource()
    state = ViewState()
    for i in range(Feed.KEPT_RUNS + 4):
        source.start(batch_size=1 + i)
        for _ in range(12):
            source.finish_step()
        state.update(source, float(i))
    assert len(state.runs) == len(source.runs()) == Feed.KEPT_RUNS + 1
    steps = [trace.step for trace in source.runs()[0].traces()]
    assert steps[:2] == [0, 1] and steps[-1] == 12 and len(steps) <= 4, "load, first step, highest peak, last"


def test_a_recording_is_summed_up_as_the_run_was(tmp_path: Path) -> None:
    source = trained(3, checkpointing="layers")
    state = ViewState()
    state.update(source, 0.0)
    write(tmp_path / "x.gpumem", [source.run])
    live, (run,) = state.summary(), Recording(tmp_path / "x.gpumem").runs()
    assert live is not None
    assert live._replace(origin="x", run=run) == summarize(run, "x")


@pytest.mark.parametrize("size", [(60, 20), (80, 24)])
async def test_of_a_run_that_died_in_forward_no_layer_has_saved_anything(size: tuple[int, int]) -> None:
    source = trained(2)
    source.end("stopped")
    source.start(batch_size=64)
    source.advance(4)
    source.abort_step()
    source.end("failed")
    async with shown(source, size) as driver:
        await driver.compare_by(SAVED)
        full, died = driver.app.state.runs
        assert full.saved_by_layer and died.saved_by_layer is None
        assert "no forward ended in B: nothing to compare there" in driver.text
        assert "saved most" not in driver.text
        assert driver.line("layers.0").split()[2:] == ["–", "–"]


def test_a_forward_that_broke_off_is_not_the_one_before_it() -> None:
    source = trained(1, accumulation=2)
    kept = Ledger(source.run.traces()[-1]).saved_by_layer

    def place() -> tuple[Phase, int]:
        assert source.run.latest is not None
        ledger = Ledger(source.run.latest)
        return ledger.where(len(ledger.trace.events) - 1)[:2]

    while place() != (Phase.FORWARD, 1):
        source.advance()
    source.advance(2)
    assert place() == (Phase.FORWARD, 1)
    source.abort_step()
    assert Ledger(source.run.traces()[-1]).saved_by_layer == kept
