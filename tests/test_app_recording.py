"""A recording in the app: it is looked at, offers no command, and says what would lower its peak."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.prediction import gpus
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.recording import Recording, write
from gpumem_tui.engine.techniques import memory_key
from gpumem_tui.tui.prediction_client import Background
from gpumem_tui.tui.state import ViewState

from .app_driver import GPU_UNIT, RECORDINGS, SIZES, Oracle, opened, restarted, shown, trained
from .conftest import small_run
from .fake_source import GPU, FakeSource

GIB = 1 << 30


async def test_a_recording_is_looked_at_and_refuses_commands() -> None:
    source = trained(2)
    source.live = False
    async with shown(source) as driver:
        assert "recording" in driver.lines[0]
        for key in ("l", "x", "r", "h", "!"):
            await driver.press("escape", key)
            assert "this is a recording: it can be looked at" in driver.text
        assert source.commands == []
        await driver.press("escape", "2")
        assert driver.line("step 2")


async def test_a_recording_offers_nothing_that_takes_an_engine() -> None:
    """Neither in the row of keys, nor in the help, nor by name; what can be foreseen can still be asked."""
    source = trained(2)
    async with shown(source) as driver:
        assert "restarts" in driver.lines[-2]
    source.live = False
    async with shown(source, (80, 100)) as driver:
        assert "restarts" not in driver.lines[-2]
        named = {command.title for command in driver.app.get_system_commands(driver.app.screen)}
        assert not named & {"Restart the run", "Stop the run", "LoRA: next value", "Take over"}
        assert {"Save a recording", "Save the screen", "Copy this table", "Up"} <= named
        await driver.press("?")
        assert "restart" not in driver.text
        await driver.press("4")
        assert "apply" not in driver.lines[-2]
        assert "change" in driver.lines[-2]
        await driver.press("k")
        assert "a recording runs nothing" in driver.text
        await driver.press("enter")
        assert source.commands == []
        assert "this is a recording" in driver.text


@pytest.mark.parametrize("size", [(60, 20), *SIZES])
@pytest.mark.parametrize("settings", [{}, {"checkpointing": "layers"}])
async def test_a_recording_says_what_would_lower_its_peak_most(size: tuple[int, int], settings: dict[str, str]) -> None:
    source = FakeSource(GPU, unit=GPU_UNIT)
    source.start(**settings)
    for _ in range(3):
        source.finish_step()
    source.live = False

    oracle = Oracle(lambda config: (12 << 30) - (3 << 30) * bool(config["lora"]))
    async with shown(source, size, predictions=oracle) as driver:
        assert driver.line("The peak is inside AdamW.step(): ")
        assert "saves most, as another training: LoRA on, ~-3.00 GiB" in driver.text
        assert ("recomputed; layer" in driver.text) == bool(settings)
    oracle = Oracle(lambda config: 12 << 30)
    async with shown(source, size, predictions=oracle) as driver:
        assert "no single change is predicted to lower the peak" in driver.text


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


async def test_what_opened_recordings_measured_stands_beside_the_predictions() -> None:
    """LoRA is measured by the recording beside; checkpointing is not: that one accumulates as well."""
    async with shown(opened("full", "checkpointed", "lora"), (120, 40)) as driver:
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


async def test_a_prediction_says_what_would_wait_on_the_host(tmp_path: Path) -> None:
    config = small_run(checkpointing="layers", offload="checkpoints", kv_cache="off", batch_size=8, seq_len=256)
    predicted = predict(config, gpus.gpu("H100 80GB"))
    path = tmp_path / "predicted.gpumem"
    write(path, [predicted.run])
    async with shown(Recording(path)) as driver:
        assert driver.line("host").split()[1:] == [
            driver.app.state.unit.show(predicted.pinned_bytes), driver.app.state.unit.name, "page-locked",
        ]  # fmt: skip
