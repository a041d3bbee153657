"""The step screen: it points at the peak, moves, freezes, and leafs through what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.recording import Recording, read, write
from gpumem_tui.engine.run_events import OutOfMemory

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


async def test_a_step_that_an_error_ended_is_kept_and_shown_to_its_last_event(tmp_path: Path) -> None:
    source = trained(1)
    source.advance(9)
    source.abort_step("CUDA out of memory", 1 << 30)
    source.fail(OutOfMemory, "CUDA out of memory")
    async with shown(source) as driver:
        await driver.press("2")
        assert "ended by an error" in driver.line("step 2")
        assert driver.app.page.ledger.trace is source.run.traces()[-1]
    write(tmp_path / "died.gpumem", [source.run])
    (died,) = read(tmp_path / "died.gpumem")
    assert died.traces()[-1].ending == source.run.traces()[-1].ending
    assert died.traces()[-1].ending.requested_bytes == 1 << 30
    async with shown(Recording(tmp_path / "died.gpumem")) as driver:
        await driver.press("2")
        assert "ended by an error" in driver.line("step 2")
