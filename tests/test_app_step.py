"""The step screen: it points at the peak, moves, freezes, and leafs through what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.events import Phase
from gpumem_tui.engine.ledger import Ledger, LiveBlock
from gpumem_tui.engine.recording import Recording, read, write
from gpumem_tui.engine.run_events import OutOfMemory
from gpumem_tui.tui.screens.blocks import shape_of

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


async def test_a_shape_that_is_not_known_is_not_that_of_a_scalar() -> None:
    async with shown(trained(2)) as driver:
        await driver.press("2")
        listed = driver.lines[[line.startswith(" largest now") for line in driver.lines].index(True) + 1 : -2]
        assert any("embed_in" in line for line in listed)
        assert "[]" not in "".join(listed)
    assert shape_of(LiveBlock(4, Category.LOGITS_LOSS, "loss", Phase.FORWARD, 0, dtype="float32")) == "[] float32"
