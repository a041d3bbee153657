"""What is sent of a row that changed makes the terminal show the new row, whatever it showed before."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rich.console import COLOR_SYSTEMS
from textual.strip import Strip

from gpumem_tui.engine.categories import Category
from gpumem_tui.tui.draw import Row
from gpumem_tui.tui.palette import Palette
from gpumem_tui.tui.themes import THEMES
from gpumem_tui.tui.widgets.row_diff import ATTRIBUTES, cells, changed, sequence

from .vt import Look, Screen

WIDTH = 24
PALETTES = [*map(Palette, THEMES.values()), Palette(mono=True)]
TEXTS = st.lists(st.sampled_from(["a", "b", " ", "  ", "1", "█", "▋", "─", "漢", "e\u0301"]), max_size=9).map("".join)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Strip, Strip]:
    """Two rows in one theme; often the second is the first with another piece in it."""
    palette = draw(st.sampled_from(PALETTES))
    styles = [
        palette.plain, palette.bold, palette.cursor, palette.dim, palette.off, palette.bad,
        palette.ink[Category.GRADIENTS], palette.paint[Category.PARAMETERS], palette.texture[Category.PARAMETERS],
        palette.over(Category.PARAMETERS, Category.GRADIENTS),
    ]  # fmt: skip
    span = st.tuples(TEXTS, st.sampled_from(styles))
    first = draw(st.lists(span, max_size=6))
    at = draw(st.integers(0, len(first)))
    second = [*first[:at], *draw(st.lists(span, max_size=2)), *first[at + draw(st.integers(0, 2)) :]]
    return _strip(first), _strip(second)


def _strip(spans: list[tuple[str, object]]) -> Strip:
    row = Row()
    for text, style in spans:
        row.add(text, style)  # type: ignore[arg-type]
    return row.strip(WIDTH)


def _expected(strip: Strip, colours: str | None) -> list[tuple[str, Look]]:
    """Cell by cell, told without the code under test."""
    found = []
    for segment in strip:
        style = segment.style
        assert style is not None
        codes = [("39",), ("49",)]
        for i, colour in enumerate((style.color, style.bgcolor)):
            if colour is not None and colours is not None and not colour.is_default:
                codes[i] = colour.downgrade(COLOR_SYSTEMS[colours]).get_ansi_codes(not i)
        attributes = frozenset(code for name, code in ATTRIBUTES if getattr(style, name))
        screen = Screen(WIDTH, 1)
        screen.look = Look(attributes, ";".join(codes[0]), ";".join(codes[1]))
        screen.feed(segment.text)
        found += screen.grid[0][: screen.x]
    return found


def _visible(row: list[tuple[str, Look]]) -> list[tuple[str, object]]:
    """Of a blank only what can be seen of it."""
    return [
        (
            character,
            (look.ground, look.attributes & {"4", "7"}) if character == " " and "7" not in look.attributes else look,
        )
        for character, look in row
    ]


@given(pairs(), st.sampled_from(["truecolor", "256", "standard", None]))
def test_a_changed_row_is_drawn_as_it_is(rows: tuple[Strip, Strip], colours: str | None) -> None:
    before, after = rows
    screen = Screen(WIDTH, 2)
    screen.grid[1] = _expected(before, colours)
    begin, end = changed(cells(before), cells(after))
    screen.feed(sequence(cells(after), 1, begin, end, colours) if begin < end else "")
    assert _visible(screen.grid[1]) == _visible(_expected(after, colours))
    assert screen.look == Look(), "the terminal is left in its plain style"
    assert screen.lines[0] == ""


def test_only_the_cells_that_differ_are_sent() -> None:
    palette = Palette()

    def sent(before: Row, after: Row) -> str:
        one, other = (cells(row.strip(20)) for row in (before, after))
        begin, end = changed(one, other)
        return sequence(other, 0, begin, end, "truecolor") if begin < end else ""

    def row(figure: str, rest: str = "of it") -> Row:
        return Row().add("at ").add(figure, palette.bold).add(f" {rest}", palette.dim)

    assert sent(row("12.50"), row("12.50")) == ""
    assert sent(row("12.50"), row("12.60")) == "\x1b[1;7H\x1b[1m6\x1b[m"
    assert sent(row("12.50", "of it all"), row("12.50")) == "\x1b[1;16H   "
    assert sent(row("12.50", "of it here"), row("12.50")) == "\x1b[1;16H\x1b[K"
    assert sent(Row().add("漢 a"), Row().add("字 a")) == "\x1b[1;1H字"


def test_styles_that_follow_each_other_say_only_what_is_new() -> None:
    palette = Palette()
    row = Row().add("a", palette.dim).add("b", palette.dim + palette.bold).add("c", palette.bold).add("d")
    text = sequence(cells(row.strip(4)), 0, 0, 4, "256")
    assert text == "\x1b[1;1H\x1b[38;5;247ma\x1b[1mb\x1b[39mc\x1b[md"
