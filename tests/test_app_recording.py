"""A recording in the app: it is looked at, offers no command, and says what would lower its peak."""

from __future__ import annotations

import pytest

from .app_driver import GPU_UNIT, SIZES, Oracle, shown, trained
from .fake_source import GPU, FakeSource


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
    assert oracle.hurried == {True}, "there is no training to give way to"
    oracle = Oracle(lambda config: 12 << 30)
    async with shown(source, size, predictions=oracle) as driver:
        assert "no single change is predicted to lower the peak" in driver.text
