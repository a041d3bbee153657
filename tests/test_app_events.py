"""The events screen: it follows, scrolls, filters, and has a row for every figure of an event."""

from __future__ import annotations

from gpumem_tui.engine.run_events import Recomputed

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
    layers = ("gpt_neox.layers.4", "gpt_neox.layers.5")
    source.feed.tell(
        Recomputed(text="step 1: layers 4 and 5", step=1, micro_batch=0, layers=layers, bytes=2_663_620_608)
    )
    async with shown(source, (60, 20)) as driver:
        await driver.press("6", "f", "f", "f", "enter")
        assert [line.split() for line in driver.lines[4:11]] == [
            ["step", "1"], ["micro_batch", "0"], ["layers", "gpt_neox.layers.4,"], ["gpt_neox.layers.5"],
            ["bytes", "2,663,620,608"], ["ms", "–"], ["early_stop", "off"],
        ]  # fmt: skip
