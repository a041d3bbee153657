"""The step screen: it points at the peak, moves, freezes, and leafs through what is kept."""

from __future__ import annotations

import pytest

from gpumem_tui.engine.ledger import Ledger

from .app_driver import SIZES, shown, trained
from .fake_source import MIB


@pytest.mark.parametrize("size", SIZES)
async def test_step_points_at_the_peak_and_moves(size: tuple[int, int]) -> None:
    source = trained(2)
    ledger = Ledger(source.run.traces()[-1])
    async with shown(source, size) as driver:
        await driver.press("2")
        assert f"peak {ledger.peak.bytes / MIB:.1f} MiB" in driver.line("step 2")
        at = next(line for line in driver.lines if "optimizer step  AdamW" in line)
        assert at.split()[0] == f"{ledger.peak.bytes / MIB:.1f}"
        largest = ledger.largest(ledger.peak.event, 1)[0]
        row = driver.lines[next(i for i, t in enumerate(driver.lines) if "largest now" in t) + 1]
        assert f"{largest.bytes / MIB:.1f}" in row
        assert largest.name in row
        await driver.press("home")
        assert f"{int(ledger.total[0]) / MIB:.1f} MiB" in driver.text
        await driver.press("right", "left", "end", "p")
        assert "optimizer step  AdamW" in driver.text


async def test_step_freezes_and_leafs_through_what_is_kept() -> None:
    source = trained(3)
    async with shown(source) as driver:
        await driver.press("2")
        assert driver.line("step 3")
        await driver.press("<")
        assert driver.line("step 2")
        source.finish_step()
        await driver.tick()
        assert driver.line("step 2")
        assert "frozen" in driver.text
        await driver.press("f")
        assert "latest" in driver.text
        assert driver.line("step 4")
        await driver.press("f")
        source.finish_step()
        await driver.tick()
        assert driver.line("step 4")
        await driver.press(">", ">")
        assert "latest" in driver.text
        assert driver.line("step 5")
