"""The events screen: it follows, scrolls, filters, and has a row for every figure of an event."""

from __future__ import annotations

from gpumem_tui.engine.events import Kind

from .app_driver import shown, trained


async def test_events_scroll_and_filter() -> None:
    source = trained(30, checkpointing="layers")
    async with shown(source) as driver:
        await driver.press("6")
        assert "following" in driver.text
        assert "recomputed" not in "".join(driver.lines[2:-2])
        assert "step 30:" in driver.text
        await driver.press("home")
        assert "run started" in driver.lines[2]
        await driver.press("f")
        assert "step ended" not in driver.text
        await driver.press("f", "f")
        assert "everything" in driver.text
        assert "recomputed" in "".join(driver.lines[2:-2])


async def test_details_of_an_event_have_a_row_for_every_figure() -> None:
    source = trained(1)
    by_category = {"parameters": 2_663_620_608, "buffers": 256}
    source.feed.milestone(
        Kind.NOTE, "a note", memory={"loaded": {"allocated_bytes": 2_663_620_864, "by_category": by_category}},
        layers=["a", "b"], notes=[], other={},
    )  # fmt: skip
    async with shown(source, (60, 20)) as driver:
        await driver.press("6", "enter")
        rows = [line.rstrip() for line in driver.lines[4:12]]
        assert [row.split() for row in rows] == [
            ["memory"], ["loaded"], ["allocated_bytes", "2,663,620,864"], ["by_category"],
            ["parameters", "2,663,620,608"], ["buffers", "256"], ["layers", "a,", "b"], ["notes", "none"],
        ]  # fmt: skip
        assert [len(row) - len(row.lstrip()) for row in rows] == [1, 3, 5, 5, 7, 7, 1, 1]
