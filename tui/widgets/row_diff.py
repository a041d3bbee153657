"""The bytes that turn one row of a terminal into another: the cells that differ, and no style twice."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from rich.cells import get_character_cell_size
from rich.color import Color
from rich.console import COLOR_SYSTEMS
from rich.style import Style
from textual.strip import Strip

from ..draw import PLAIN, hollow

Cell = tuple[str, Style]
"""One cell; of a wide character the second is the empty string."""

ERASE_REST = "\x1b[K"
ATTRIBUTES = (("bold", "1"), ("dim", "2"), ("italic", "3"), ("underline", "4"), ("reverse", "7"))


def cells(strip: Strip) -> list[Cell]:
    """A row cell by cell; a blank that looks the same in many styles has one."""
    found: list[Cell] = []
    for text, style, _ in strip:
        style = style or PLAIN  # noqa: PLW2901
        if text.isascii():
            blank = (" ", PLAIN) if hollow(style) else (" ", style)
            found += [blank if character == " " else (character, style) for character in text]
        else:
            for character in text:
                size = get_character_cell_size(character)
                if not size and found:  # an accent of the character before
                    found[-1] = (found[-1][0] + character, found[-1][1])
                    continue
                found.append((character, PLAIN if character == " " and hollow(style) else style))
                found += [("", style)] * (size - 1)
    return found


def changed(before: Sequence[Cell], after: Sequence[Cell]) -> tuple[int, int]:
    """The columns from the first to the last (exclusive) that differ in two rows of one width; equal ones: nothing."""
    if before == after:
        return 0, 0
    begin, end = 0, len(after)
    while before[begin] == after[begin]:
        begin += 1
    while before[end - 1] == after[end - 1]:
        end -= 1
    # A wide character is sent as a whole, and one that was there is overwritten as a whole.
    while begin and "" in (before[begin][0], after[begin][0]):
        begin -= 1
    while end < len(after) and "" in (before[end][0], after[end][0]):
        end += 1
    return begin, end


def sequence(row: Sequence[Cell], y: int, begin: int, end: int, colours: str | None) -> str:
    """The escape sequences and text of a row's columns, from plain style to plain style.

    Args:
        row: All of it.
        y: Where it is.
        begin: First column.
        end: Last column, exclusive.
        colours: What the terminal can show, by rich's name for it; None: no colours.
    """
    blank, rest = (" ", PLAIN), len(row)
    while rest > begin and row[rest - 1] == blank:
        rest -= 1
    # Blanks up to the row's end are erased and not written.
    erases = end - rest > len(ERASE_REST)
    parts, now = [f"\x1b[{y + 1};{begin + 1}H"], PLAIN
    for cell in row[begin : rest if erases else end]:
        character, style = cell
        if style is not now and not (cell == blank and hollow(now)):
            parts.append(transition(now, style, colours))
            now = style
        parts.append(character)
    parts.append(transition(now, PLAIN, colours))
    return "".join(parts) + (ERASE_REST if erases else "")


@lru_cache(maxsize=4096)
def transition(before: Style, after: Style, colours: str | None) -> str:
    """The shortest escape sequence that leads from one style to another."""
    old, new = _attributes(before), _attributes(after)
    ink, ground = _codes(after.color, True, colours), _codes(after.bgcolor, False, colours)
    afresh = ("0", *new, *(ink if ink != ("39",) else ()), *(ground if ground != ("49",) else ()))
    ways = [";".join(afresh).removeprefix("0;") if not (old or before.color or before.bgcolor) else ";".join(afresh)]
    if set(old) <= set(new):
        changes = [code for code in new if code not in old]
        changes += ink if ink != _codes(before.color, True, colours) else ()
        changes += ground if ground != _codes(before.bgcolor, False, colours) else ()
        ways.append(";".join(changes))
    shortest = min(ways, key=len)
    return f"\x1b[{'' if shortest == '0' else shortest}m" if shortest else ""


def _attributes(style: Style) -> tuple[str, ...]:
    return tuple(code for name, code in ATTRIBUTES if getattr(style, name))


def _codes(color: Color | None, ink: bool, colours: str | None) -> tuple[str, ...]:
    if color is None or colours is None or color.is_default:
        return ("39" if ink else "49",)
    return color.downgrade(COLOR_SYSTEMS[colours]).get_ansi_codes(ink)
