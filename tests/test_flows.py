"""What a person does on the screens, from the first key to what comes of it."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.events import Category
from gpumem_tui.engine.feed import Feed
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.recording import Recording, write
from gpumem_tui.engine.run_events import Recomputed
from gpumem_tui.engine.techniques import memory_key
from gpumem_tui.tui.cli import main
from gpumem_tui.tui.prediction_client import Background
from gpumem_tui.tui.run_summary import summarize
from gpumem_tui.tui.screens.compare import HIGHEST, LAYERS, MODES, REFERENCE, SAVED, _together
from gpumem_tui.tui.state import Filter, ViewState

from .app_driver import RECORDINGS, SIZES, Driver, Oracle, shown, trained
from .fake_source import GPU, MIB, FakeSource

GIB = 1 << 30


def opened(*names: str) -> Recording:
    return Recording(*(RECORDINGS / f"{name}.gpumem" for name in names))


async def restarted(driver: object, *keys: str, steps: int = 2) -> None:
    """Press, and let the engine obey and train."""
    await driver.press(*keys)  # type: ignore[attr-defined]
    driver.source.obey()  # type: ignore[attr-defined]
    for _ in range(steps):
        driver.source.finish_step()  # type: ignore[attr-defined]
        await driver.tick()  # type: ignore[attr-defined]


# --- pause ----------------------------------------------------------------------------


async def test_pause_freezes_the_view_while_data_goes_on() -> None:
    source = trained(2)
    async with shown(source) as driver:
        await driver.press("space")
        before = driver.lines
        assert "view paused" in before[0]
        for _ in range(3):
            source.finish_step()
            await driver.tick()
        assert driver.lines == before
        assert source.commands == [], "the run goes on"
        await driver.press("6")
        assert "step 3:" not in driver.text, "also other screens show what was there"
        await driver.press("space")
        assert "step 3:" in driver.text and "step 5:" in driver.text, "nothing that happened meanwhile is lost"


async def test_a_change_ends_the_pause() -> None:
    async with shown(trained(1)) as driver:
        await driver.press("space", "k")
        assert "restarting" in driver.lines[0]


# --- starting and restarting ----------------------------------------------------------------


async def test_every_stage_of_a_restart_is_seen() -> None:
    source = trained(2)
    async with shown(source) as driver:
        source.advance(2)
        await driver.press("4", "k", "enter", "escape")
        assert "▸ stopping" in driver.lines[-2]
        source.end("stopped")
        await driver.tick()
        assert "✓ freed, 0 bytes leaked" not in driver.lines[-2]
        assert "loading" in driver.lines[-2]
        source.start(checkpointing="layers")
        await driver.tick()
        assert "✓ freed, 0 bytes leaked" in driver.lines[-2]
        assert "✓ loaded" in driver.lines[-2]
        assert "▸ warm-up: " in driver.lines[-2]
        source.finish_step()
        await driver.tick()
        assert "warm-up" not in driver.text


# --- compare ----------------------------------------------------------------------------------


async def test_runs_are_compared_by_category_phase_and_layer() -> None:
    source = trained(2)
    async with shown(source) as driver:
        await restarted(driver, "k")
        await driver.press("5")
        assert "run 1  B8" in driver.text
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
        row = driver.line("run 2 B8 lora").split()
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


# --- step --------------------------------------------------------------------------------------


async def test_zooming_shows_a_part_of_the_step_and_the_cursor_stays() -> None:
    source = trained(2)
    ledger = Ledger(source.run.traces()[-1])
    async with shown(source) as driver:
        await driver.press("2", "+", "+", "+")
        assert "12 % of it" in driver.lines[1]
        assert f"{ledger.peak.bytes / MIB:.1f}" in driver.text
        assert "peak" in next(line for line in driver.lines if "▲" in line)
        chart = driver.lines[2:8]
        await driver.press("home")
        assert driver.lines[2:8] != chart, "what is shown moves with the cursor"
        await driver.press("-", "-", "-")
        assert "% of it" not in driver.lines[1]
        await driver.press("+", "0")
        assert "% of it" not in driver.lines[1]


async def test_zoomed_in_far_the_cursor_goes_event_by_event() -> None:
    source = trained(2)
    ledger = Ledger(source.run.traces()[-1])
    async with shown(source) as driver:
        await driver.press("2", *"+" * 12, "home")
        page = driver.app.board.page
        seen = []
        for _ in range(len(ledger.total) + 3):
            seen.append(page.cursor)  # type: ignore[attr-defined]
            await driver.press("right")
        assert seen[: len(ledger.total)] == list(range(len(ledger.total)))
        await driver.press("left")
        assert page.cursor == len(ledger.total) - 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 40)])
@pytest.mark.parametrize("steps", [5, 123])
async def test_the_steps_before_and_after_are_never_cut(size: tuple[int, int], steps: int) -> None:
    async with shown(trained(steps), size) as driver:
        await driver.press("2", "+", "+", "<", "<")
        title = driver.lines[1]
        assert title.split()[:2] == ["step", str(steps - 2)]
        assert title.split()[-5:] == ["<", str(steps - 3), "frozen", str(steps - 1), ">"]
        assert "265.0 MiB" in title
        assert "25 % of it" in title


async def test_leafing_through_steps_leaves_the_cursor_where_it_is_in_the_step() -> None:
    async with shown(trained(4)) as driver:
        await driver.press("2", "home", *["right"] * 9)
        where = driver.app.board.page.cursor  # type: ignore[attr-defined]
        await driver.press("<", "<")
        assert driver.lines[1].split()[1] == "2"
        assert driver.app.board.page.cursor == where > 0  # type: ignore[attr-defined]
        await driver.press("p", "<")
        assert " peak" in next(line for line in driver.lines if "▲" in line)


async def test_a_phase_that_is_narrow_has_a_short_name() -> None:
    async with shown(trained(2), (60, 20)) as driver:
        await driver.press("2")
        phases = next(line for line in driver.lines if "│forward" in line)
        assert "│opt" in phases


async def test_the_largest_tensors_follow_the_cursor() -> None:
    source = trained(2)
    ledger = Ledger(source.run.traces()[-1])
    async with shown(source, (120, 40)) as driver:
        await driver.press("2")
        for event, key in ((ledger.peak.event, "p"), (-1, "home"), (len(ledger.trace.events) - 1, "end")):
            await driver.press(key)
            at = next(i for i, line in enumerate(driver.lines) if "largest now" in line)
            for block, line in zip(ledger.largest(event), driver.lines[at + 1 : at + 11], strict=False):
                assert line.split()[0] == f"{block.bytes / MIB:.1f}"
                assert block.name in line


# --- layers ------------------------------------------------------------------------------------


async def test_layers_fold_open_to_their_modules() -> None:
    source = trained(2)
    async with shown(source) as driver:
        await driver.press("3", "down")
        row = next(line for line in driver.lines if "layers.0" in line)
        assert row.startswith("+")
        await driver.press("tab")
        inner = next(line for line in driver.lines if "mlp" in line)
        # The parameter and its gradient and moments; activations are made by the module too.
        assert inner.split()[2:5] == ["6.0", "6.0", "12.0"]
        await driver.press("tab")
        assert "mlp" not in driver.text


async def test_a_layers_tensors_are_listed_with_all_their_bytes() -> None:
    source = trained(2)
    ledger = Ledger(source.run.traces()[-1])
    async with shown(source, (100, 40)) as driver:
        await driver.press("3", "down", "enter")
        assert driver.lines[1].startswith(" gpt_neox.layers.0")
        held = sum(ledger.by_layer(ledger.peak.event)["gpt_neox.layers.0"].values())
        state = sum(  # optimizer state carries its own name behind the parameter's
            size for layer, sizes in ledger.by_layer(ledger.peak.event).items() for size in sizes.values()
            if layer.startswith("gpt_neox.layers.0")
        )  # fmt: skip
        assert f"{max(held, state) / MIB:.1f} MiB at the peak" in driver.lines[1]
        assert any("gpt_neox.layers.0.mlp.weight" in line for line in driver.lines)
        await driver.press("escape")
        assert "at peak" in driver.lines[3]


async def test_layers_are_found_by_name() -> None:
    source = FakeSource(layers=40)
    source.start()
    source.finish_step()
    async with shown(source) as driver:
        await driver.press("3", "/", *"layers.2q", "backspace")
        assert "/layers.2_" in driver.lines[1], "letters are text, and q does not quit"
        assert driver.app.is_running
        shown_layers = [line.split()[0].split(".")[-1] for line in driver.lines if "layers." in line][1:]
        assert shown_layers == ["2", *(str(20 + i) for i in range(10))]
        await driver.press("enter", "down")
        assert "/layers.2" in driver.lines[1]
        await driver.press("escape")
        assert "embed_in" in driver.text


async def test_modules_within_layers_are_found_too() -> None:
    async with shown(Recording(RECORDINGS / "h100-tiny.gpumem"), (120, 40)) as driver:
        await driver.press("3", "/", *"attention.d", "enter")
        names = [line[1:].split()[0] for line in driver.lines[4:-3] if line.strip()]
        wanted = (f"layers.{i}{name}" for i in range(6) for name in ("", ".attention", ".attention.dense"))
        assert names == list(wanted)
        assert [line[0] for line in driver.lines[4:7]] == ["-", "-", " "]


async def test_what_nothing_is_called_is_said() -> None:
    async with shown(trained(2)) as driver:
        await driver.press("3", "/", *"xyz")
        assert "nothing is called xyz" in driver.text
        await driver.press("enter", "down", "tab", "enter", "escape", "escape")
        assert "embed_in" in driver.text


# --- techniques ---------------------------------------------------------------------------------


def smaller_with_lora(config: RunConfig) -> int:
    return 100 * MIB + config.batch_size * MIB - 50 * MIB * bool(config["lora"])


async def test_predictions_stand_before_and_measurements_beside_them() -> None:
    source = trained(2)
    oracle = Oracle(smaller_with_lora, ready=False)
    async with shown(source, predictions=oracle) as driver:
        await driver.press("4")
        assert driver.line("b   batch size").split()[3:] == ["8", "16", "–", "–", "–", "–"]
        assert "~ is predicted for H100 80GB" in driver.text
        oracle.ready = True
        await driver.press("1")
        assert "saves most on H100 80GB: a accumulation 8 with b batch size 1, ~-7.0 MiB" in driver.text
        assert "more: l LoRA on, ~-50.0 MiB (another training)" in driver.text
        await driver.press("4")
        await driver.press("down")
        assert driver.line("b   batch size").split()[3:] == ["8", "16", "~116.0", "~+8.0", "yes", "–"]
        assert driver.line("l + LoRA").split()[3:] == ["off", "on", "~58.0", "~-50.0", "yes", "–"]
        before = driver.app.state.peak
        await restarted(driver, "b", "enter")
        await restarted(driver, "B", "enter")
        after = driver.app.state.runs[-2].peak_bytes
        assert before is not None
        change = (after - before.peak.bytes) / MIB
        assert driver.line("b   batch size").split()[-1] == f"{change:+.1f}"


async def test_beside_what_is_collected_a_change_is_its_own_and_the_sum_stands_below() -> None:
    async with shown(trained(2), (120, 40), predictions=Oracle(smaller_with_lora)) as driver:
        await driver.press("4", "l")
        assert driver.line("b   batch size").split()[-4:] == ["~66.0", "~+8.0", "yes", "–"]
        assert driver.line("l + LoRA").split()[-4:] == ["~58.0", "~-50.0", "yes", "–"]
        await driver.press("b")
        assert driver.line("b   batch size").split()[-4:] == ["~66.0", "~+8.0", "yes", "–"]
        assert driver.line("l + LoRA").split()[-4:] == ["~66.0", "~-50.0", "yes", "–"]
        assert "enter applies 2 changes as one restart   peak ~66.0, ~-42.0" in driver.text


async def test_what_cannot_be_combined_says_why_before_it_is_chosen() -> None:
    source = trained(1)
    source.run.environment = GPU
    async with shown(source) as driver:
        await driver.press("4")
        while "quantization" not in driver.app.board.page.topic().title:
            await driver.press("down")
        assert "nf4: " in driver.text
        assert "lora=on" in driver.text
        assert source.commands == []


# --- copy and save ---------------------------------------------------------------------------------


@pytest.mark.parametrize("screen", "12345 6".replace(" ", ""))
async def test_a_screens_table_is_copied_whole(screen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = trained(40)
    copied: list[str] = []
    async with shown(source) as driver:
        monkeypatch.setattr(driver.app, "copy_to_clipboard", copied.append)
        await driver.press(screen, "y")
        table = driver.app.board.page.table()
        lines = copied[0].splitlines()
        if table is None:
            assert len(lines) == 24
        else:
            assert lines == ["\t".join(cells) for cells in table]
            assert len({len(cells) for cells in table}) == 1
        if screen == "6":
            assert len(lines) > 40
        assert f"copied {len(lines)} lines" in driver.text


async def test_a_layers_tensors_are_copied_too() -> None:
    async with shown(trained(2)) as driver:
        await driver.press("3", "down", "enter")
        table = driver.app.board.page.table()
        assert table is not None
        assert table[0] == ["bytes", "category", "name", "shape", "made"]
        assert sum(int(cells[0]) for cells in table[1:]) == 24 * MIB


async def test_the_screen_is_saved_as_a_picture_and_as_text(tmp_path: Path) -> None:
    async with shown(trained(2), save_dir=tmp_path) as driver:
        await driver.press("i")
        (svg,), (text,) = tmp_path.glob("*.svg"), tmp_path.glob("*.txt")
        assert "optimizer" in svg.read_text()
        assert "P parameters" in text.read_text()
        assert svg.stem in driver.text.replace("\n", "").replace(" ", "")


async def test_a_picture_that_cannot_be_saved_is_said() -> None:
    async with shown(trained(2), save_dir=Path("/proc/none")) as driver:
        await driver.press("i")
        assert "No such file" in driver.text


# --- without a terminal ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("recordings")
    paths = []
    for name, settings in (("plain", {}), ("checkpointed", {"checkpointing": "layers"})):
        write(folder / f"{name}.gpumem", [trained(3, **settings).run])
        paths.append(str(folder / f"{name}.gpumem"))
    return paths


def test_once_prints_the_live_screen_as_plain_text(recordings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["open", recordings[0], "--once"]) == 0
    out = capsys.readouterr().out
    assert "P parameters" in out
    assert "The peak is inside AdamW.step()" in out
    assert "\x1b" not in out


def test_json_says_what_the_screen_shows(recordings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["open", recordings[0], "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    ledger = max(
        (Ledger(trace) for trace in Recording(Path(recordings[0])).run.traces()), key=lambda one: one.peak.bytes
    )
    assert document["schema"] == "gpumem-live/1"
    assert document["peak"]["allocated_bytes"] == ledger.peak.bytes
    assert sum(document["peak"]["by_category"].values()) == ledger.peak.bytes
    assert document["step"] == 3


def test_jsonl_is_a_line_each(recordings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["open", recordings[0], "--jsonl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["recording"]


def test_where_there_is_no_terminal_it_is_plain_text(recordings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["open", recordings[0]]) == 0
    out = capsys.readouterr().out
    assert "step ended     step 3" in out
    assert "P parameters" in out
    assert "\x1b" not in out


# --- recordings opened together ------------------------------------------------------------------------


async def test_every_recording_opened_can_be_looked_at_on_all_screens() -> None:
    async with shown(opened("full", "checkpointed", "lora")) as driver:
        assert "recording full, 1 of 3" in driver.lines[0]
        figures = driver.lines[1:-2]
        await driver.press("j")
        assert "recording checkpointed, 2 of 3" in driver.lines[0]
        assert driver.app.state.run.recomputes and driver.lines[1:-2] != figures
        await driver.press("3")
        assert "recomputed" in driver.text
        await driver.press("j")
        assert "recording lora, 3 of 3" in driver.lines[0]
        assert "recomputed" not in driver.text
        assert "j J runs" in driver.lines[-2]
        await driver.press("j", "1")
        assert driver.lines[1:-2] == figures, "round, and as it was"
        await driver.press("J")
        assert "recording lora, 3 of 3" in driver.lines[0]


async def test_the_run_chosen_on_compare_is_looked_at() -> None:
    async with shown(opened("full", "checkpointed", "lora")) as driver:
        await driver.press("5", "right", "right", "o")
        assert "recording lora, 3 of 3" in driver.lines[0]
        assert [run.origin for run in driver.app.page.runs()] == ["full", "checkpointed", "lora"]
        assert "lora, shown" in driver.text
        await driver.press("-")
        assert "still on the screens" in driver.text
        await driver.press("left", "left", "-")
        assert "recording lora, 2 of 2" in driver.lines[0]


async def test_what_was_held_on_to_is_let_go_with_the_recording() -> None:
    """A frozen step, a cursor and collected changes belong to the recording they were made on."""
    async with shown(opened("full", "lora")) as driver:
        await driver.press("4", "b", "2", "<", "left", "space")
        assert "frozen" in driver.text
        await driver.press("j")
        assert driver.app.control.changes.pending == {}
        assert "frozen" not in driver.text and "view paused" not in driver.text
        trace = driver.app.state.kept[-1]
        assert driver.app.page.ledger.trace is trace
        assert {ledger.trace for ledger in driver.app.state.traces._folds.values()} <= set(driver.app.state.kept)


def test_recordings_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(RECORDINGS / "full.gpumem", tmp_path / folder)
    found = Recording(tmp_path / "a/full.gpumem", tmp_path / "b/full.gpumem")
    assert [run.id.engine for run in found.runs()] == [str(tmp_path / "a/full"), str(tmp_path / "b/full")]


@pytest.mark.parametrize("size", SIZES)
async def test_what_opened_recordings_measured_stands_beside_the_predictions(size: tuple[int, int]) -> None:
    """LoRA is measured by the recording beside; checkpointing is not: that one accumulates as well."""
    async with shown(opened("full", "checkpointed", "lora"), size) as driver:
        full, _, lora = driver.app.state.runs
        change = f"{(lora.peak_bytes - full.peak_bytes) / GIB:+.2f}"
        await driver.press("4")
        assert driver.line("l + LoRA").split()[-1] == change
        assert driver.line("k + checkpointing").split()[-1] == "–"
        await driver.press("J")
        assert driver.line("l + LoRA").split()[-1] == change.replace("-", "+")


def test_a_recording_of_another_gpu_measures_nothing_here(tmp_path: Path) -> None:
    for name, environment in (("here", GPU), ("elsewhere", replace(GPU, device_name="NVIDIA A100")),
                              ("older", replace(GPU, packages={"torch": "2.0"}))):  # fmt: skip
        source = FakeSource(environment)
        source.start(rows=64, batch_size=len(name))
        source.finish_step()
        source.finish_step()
        write(tmp_path / f"{name}.gpumem", [source.run])
    found = Recording(*(tmp_path / f"{name}.gpumem" for name in ("here", "elsewhere", "older")))
    state = ViewState()
    state.update(found, 0.0)
    for run in found.runs():
        state.look_at(run)
        assert list(state.measured) == [memory_key(run.config)]


async def test_a_run_that_was_left_in_its_first_step_has_measured_nothing() -> None:
    """The optimizer's state was not there yet: its peak is none to set a prediction against."""
    source = trained(2)
    async with shown(source) as driver:
        await restarted(driver, "k", steps=1)
        config = driver.source.run.config
        assert memory_key(config) not in driver.app.state.measured
        await restarted(driver, "K")
        assert memory_key(config) not in driver.app.state.measured
        await driver.press("5")
        assert "1 step only" in driver.line("B")
        assert "1 step only" not in driver.line("A")


def test_how_long_a_run_was_and_how_its_device_was_named_makes_no_other_configuration() -> None:
    config = RunConfig()
    assert memory_key(replace(config, steps=9, rows=9, seed=9, device="cuda:0")) == memory_key(config)
    for other in ({"batch_size": 9}, {"seq_len": 9}, {"model": "tiny-2"}, {"pretrained": True}):
        assert memory_key(replace(config, **other)) != memory_key(config)


def test_predictions_are_of_the_gpu_of_the_recording_that_is_shown(tmp_path: Path) -> None:
    for name, gpu in (("h", "NVIDIA H100 80GB HBM3"), ("i", "NVIDIA H100 80GB HBM3"), ("l", "NVIDIA L4")):
        source = FakeSource(replace(GPU, device_name=gpu))
        source.start()
        source.finish_step()
        write(tmp_path / f"{name}.gpumem", [source.run])
    found = Recording(*(tmp_path / f"{name}.gpumem" for name in "hil"))
    config = found.runs()[0].config
    with closing(Background(found)) as predictions:
        predictions.of(config)
        first = predictions._predictor
        predictions.look_at(found.runs()[1].environment)
        predictions.of(config)
        assert predictions._predictor is first, "one GPU, one process"
        predictions.look_at(found.runs()[2].environment)
        predictions.of(config)
        assert predictions.gpu_name == "NVIDIA L4"
        assert first is not None and first._closed
