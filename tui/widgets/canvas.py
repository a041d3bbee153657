"""The one widget: rows in, and only what differs from the rows before goes out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.segment import Segment
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from ..draw import PLAIN, Row


class Canvas(Widget):
    """Draws rows through Textual's Line API.

    Nothing is laid out, and a row that says what it said before is not sent again.

    Args:
        redraw: Called when the size is known or has changed; should call `show`.
    """

    DEFAULT_CSS = """
    Canvas {
        width: 1fr;
        height: 1fr;
    }
    """

    def __init__(self, redraw: Callable[[], None]) -> None:
        super().__init__()
        self._redraw = redraw
        self._strips: list[Strip] = []
        self._rows: Sequence[Row] = ()

    def on_resize(self) -> None:
        """Rows are made for a size: ask for new ones."""
        self._redraw()

    def show(self, rows: Sequence[Row]) -> int:
        """Replace what is shown.

        Returns:
            How many rows have to be sent.
        """
        width, height = self.size
        before, rows_before, rows = self._strips, self._rows, rows[:height]
        same_width = len(before) == height and before[0].cell_length == width
        # Most rows say what they said before, many are the very same: they keep their strip.
        strips = [
            before[y]
            if same_width and y < len(rows_before) and (row is rows_before[y] or row.spans == rows_before[y].spans)
            else row.strip(width)
            for y, row in enumerate(rows)
        ]
        self._rows = rows
        strips += [Strip([Segment(" " * width, PLAIN)], width)] * (height - len(strips))
        self._strips = strips
        if not same_width:
            self.refresh()
            return height
        changed = [Region(0, y, end, 1) for y in range(height) if (end := changed_until(before[y], strips[y]))]
        if changed:
            self.refresh(*changed)
        return len(changed)

    def render_line(self, y: int) -> Strip:
        """A row, for Textual."""
        if y < len(self._strips):
            return self._strips[y]
        return Strip([Segment(" " * self.size.width, PLAIN)], self.size.width)

    @property
    def lines(self) -> list[str]:
        """What is shown, without styles."""
        return [strip.text for strip in self._strips]


def changed_until(before: Strip, after: Strip) -> int:
    """The column before which two strips of one width differ; 0: nowhere.

    The compositor sends a row from its left end to the end of what changed, so
    that end is what has to be found.
    """
    if before is after:
        return 0
    old, new = list(before), list(after)
    end = after.cell_length
    while old and new and old[-1] == new[-1]:
        end -= new.pop().cell_length
        old.pop()
    if not old and not new:
        return 0
    if old and new and old[-1].style == new[-1].style:
        a, b = old[-1].text, new[-1].text
        if a.isascii() and b.isascii():
            while a and b and a[-1] == b[-1]:
                a, b, end = a[:-1], b[:-1], end - 1
    return max(end, 1)
