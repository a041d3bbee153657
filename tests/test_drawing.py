"""What screens are drawn of: curves, bars, and figures in their units."""

from __future__ import annotations

import numpy as np
import pytest

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.tui.draw import Row, whole_clauses
from gpumem_tui.tui.palette import Palette
from gpumem_tui.tui.units import IN_GIB, IN_KIB, IN_MIB, clock, duration, rate, shorten, tail, unit_for, whole_parts
from gpumem_tui.tui.widgets.area import area, columns
from gpumem_tui.tui.widgets.bars import Part, bar, stacked

from .app_driver import trained


@pytest.mark.parametrize("width", [1, 7, 72, 5000])
def test_resampling_keeps_the_peak(width: int) -> None:
    ledger = Ledger(trained(2).run.traces()[-1])
    shown_instants = columns(ledger.total, width)
    assert len(shown_instants) == width
    assert ledger.total[shown_instants].max() == ledger.peak.bytes
    assert (np.diff(shown_instants) >= 0).all()


@pytest.mark.parametrize("palette", [Palette(), Palette(ascii=True), Palette(mono=True)])
def test_area_is_as_high_as_its_sum(palette: Palette) -> None:
    curve = np.zeros((len(Category), 3), np.int64)
    curve[Category.PARAMETERS] = (8, 4, 0)
    curve[Category.ACTIVATIONS] = (8, 4, 0)
    rows = [row.text for row in area(curve, 16, 4, palette)]
    assert [len(row) for row in rows] == [3] * 4
    filled = [sum(row[x] != " " or palette == Palette() for row in rows) for x in range(3)]
    if palette != Palette():
        assert filled == [4, 2, 0]
        assert [row[0] for row in rows] == ["A", "A", "P", "P"]


@pytest.mark.parametrize("ascii", [False, True])
def test_bars_have_their_width_and_share(ascii: bool) -> None:
    palette = Palette(ascii=ascii)
    assert bar(50, 100, 10, palette.plain, palette).text == ("#####" if ascii else "█████") + "     "
    assert bar(0, 100, 10, palette.plain, palette).text.strip() == ""
    assert bar(5, 0, 10, palette.plain, palette).width == 10
    if not ascii:
        assert bar(1, 10**9, 10, palette.plain, palette).text[0] == "▏"
    parts = [Part("P", 25, palette.plain), Part("G", 50, palette.plain)]
    row = stacked(parts, 100, 8, palette)
    assert row.width == 8
    assert [len(text) for text, _ in row.spans] == [2, 4, 2]
    assert stacked([Part("P", 1, palette.plain)], 10**9, 8, palette).text[0] == "P"


def test_units_and_figures() -> None:
    assert unit_for(5 << 30) is IN_GIB
    assert unit_for(1 << 30) is IN_MIB
    assert unit_for(1 << 20) is IN_KIB
    assert [unit_for(size, "GB").name for size in (10**6, 10**9, 10**10)] == ["KB", "MB", "GB"]
    assert (IN_MIB.show(None), IN_MIB.show(0), IN_GIB.full(3 << 29)) == ("–", "0.0", "1.50 GiB")
    assert [rate(v) for v in (None, 987.0, 21_800.0, 1.3e6)] == ["–", "987", "21.8k", "1.3M"]
    assert [duration(v) for v in (None, 0.0004, 0.094, 3.118)] == ["–", "0.4 ms", "94 ms", "3.12 s"]
    assert [clock(v) for v in (7, 751, 3729)] == ["0:07", "12:31", "1:02:09"]
    assert shorten("abcdef", 4) == "abc…"
    assert tail("gpt_neox.layers.10.mlp", 12) == "…10.mlp"
    assert len(tail("averyveryverylongname", 8)) == 8


def test_what_is_drawn_moves_no_cursor() -> None:
    """Lines that libraries have printed, names out of a file."""
    row = Row().add("a\x1b[2Jb\nc\td\x00e\udcfff").add("é─█")
    assert row.text == "a [2Jb c d e fé─█"
    assert row.width == len(row.text)


def test_a_row_of_parts_ends_with_a_whole_one() -> None:
    parts = ["lora", "checkpointing=layers", "dtype=bfloat16"]
    assert whole_parts(parts, " ", 40) == "lora checkpointing=layers dtype=bfloat16"
    assert whole_parts(parts, " ", 39) == "lora checkpointing=layers"
    assert whole_parts(parts, " ", 39, counted=True) == "lora checkpointing=layers +1"
    assert whole_parts(parts[1:], " ", 10) == "checkpoin…", "the first is shown in any case"
    assert whole_parts([], " ", 10) == ""


def test_a_text_too_long_ends_with_a_whole_clause() -> None:
    text = "dtype=mixed is for your script to set: autocast; it acts on parameters. Another sentence"
    assert whole_clauses(text, 40, 2) == ["dtype=mixed is for your script to set:", "autocast; it acts on parameters."]
    assert whole_clauses(text, 40, 1) == ["dtype=mixed is for your script to set"]
    assert whole_clauses(text, 20, 1) == []
