"""Rows of styled text: what screens are made of, without a terminal or an app."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual.strip import Strip

from .palette import Palette

PLAIN = Palette.plain


@dataclass
class Row:
    """One line under construction; texts are put one after the other, or at a column.

    Attributes:
        spans: Text and style, left to right.
        width: Cells so far.
    """

    spans: list[tuple[str, Style]] = field(default_factory=list)
    width: int = 0

    def add(self, text: str, style: Style = PLAIN) -> Row:
        """Put a text at the end; whatever a library has printed into it, it moves no cursor."""
        if not text.isprintable():
            text = "".join(character if character.isprintable() else " " for character in text)
        if text:
            self.spans.append((text, style))
            self.width += len(text) if text.isascii() else cell_len(text)
        return self

    def to(self, column: int) -> Row:
        """Go on at a column; one that has been passed already is left alone."""
        return self.add(" " * (column - self.width))

    def right(self, text: str, column: int, style: Style = PLAIN) -> Row:
        """Put a text so that it ends before a column."""
        return self.to(column - len(text)).add(text, style)

    def extend(self, other: Row) -> Row:
        """Put another row at the end."""
        self.spans.extend(other.spans)
        self.width += other.width
        return self

    @property
    def text(self) -> str:
        """The text without the styles."""
        return "".join(text for text, _ in self.spans)

    def strip(self, width: int) -> Strip:
        """A row for Textual: cut or filled to a width, every segment with a style.

        A change of style costs a terminal up to forty bytes: neighbours of one
        style are one segment, and blanks take the style they stand beside.
        """
        joined: list[tuple[str, Style]] = []
        room = width
        for text, style in self.spans:
            cells = len(text) if text.isascii() else cell_len(text)
            if cells > room:
                text = set_cell_size(text, room)  # noqa: PLW2901
                cells = room
            room -= cells
            if cells:
                _join(joined, text, style)
        if room:
            _join(joined, " " * room, PLAIN)
        return Strip([Segment(text, style) for text, style in joined], width)


class Kept:
    """Rows by part of a screen: a part is drawn again only when what it shows is not what it showed."""

    def __init__(self) -> None:
        self._parts: dict[Hashable, tuple[tuple[object, ...], list[Row]]] = {}

    def rows(self, part: Hashable, shows: tuple[object, ...], draw: Callable[[], list[Row]]) -> list[Row]:
        """The rows of a part; nobody may change them.

        Args:
            part: Its name.
            shows: Everything that its rows depend on.
            draw: Makes them.
        """
        before = self._parts.get(part)
        if before is None or before[0] != shows:
            before = self._parts[part] = (shows, draw())
        return before[1]


def _join(joined: list[tuple[str, Style]], text: str, style: Style) -> None:
    """Add a span, to the one before if the terminal would show the same."""
    if joined:
        before, other = joined[-1]
        if style is other or style == other or (text.isspace() and hollow(style) and hollow(other)):
            joined[-1] = (before + text, other)
            return
        if before.isspace() and hollow(other) and hollow(style):
            joined[-1] = (before + text, style)
            return
    joined.append((text, style))


def hollow(style: Style) -> bool:
    """True if a blank looks the same in it as in any other such style."""
    return style.bgcolor is None and not style.reverse and not style.underline


def wrap(text: str, width: int) -> list[str]:
    """Lines of a paragraph; what is longer than a line, a path say, is broken."""
    lines: list[str] = []
    line = ""
    width = max(width, 1)
    words = [word[i : i + width] for word in text.split() for i in range(0, len(word), width)]
    for word in words:
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line] if line else lines


def whole_clauses(text: str, width: int, rows: int) -> list[str]:
    """The lines of a text that there is room for, up to the end of a sentence or of a clause; none: for not one."""
    clauses = re.split(r"(?<=[;:.]) ", text)
    for n in range(len(clauses), 0, -1):
        lines = wrap(" ".join(clauses[:n]).rstrip(";:"), width)
        if len(lines) <= rows:
            return lines
    return []


def paragraph(text: str, width: int, style: Style = PLAIN) -> list[Row]:
    """Rows of a text as long as it takes, one cell in from the left and from the right."""
    return [Row().add(f" {line}", style) for line in wrap(text, width - 2)]
