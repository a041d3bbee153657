"""The one widget: rows in, and only the cells that differ from the rows before go out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.segment import Segment
from textual.geometry import Region
from textual.strip import Strip
from textual.widget import Widget

from ..draw import PLAIN, Row
from .row_diff import Cell, cells, changed, sequence


class Canvas(Widget):
    """Draws rows through Textual's Line API, and what changes in them past it.

    Textual's compositor sends a changed row from its left end on and takes a
    millisecond over a few of them: as much as everything else at a tick. So
    the canvas writes the cells that differ itself, wherever it has the terminal
    to itself; whole screens, after a resize say, go through the compositor.

    Args:
        redraw: Called when the size is known or has changed; should call `show`.
        send: Writes to the terminal; False: not now, the compositor has to.
    """

    DEFAULT_CSS = """
    Canvas {
        width: 1fr;
        height: 1fr;
    }
    """

    def __init__(self, redraw: Callable[[], None], send: Callable[[str], bool]) -> None:
        super().__init__()
        self._redraw, self._send = redraw, send
        self._rows: Sequence[Row] = ()
        self._strips: list[Strip] = []
        self._cells: list[list[Cell]] = []

    def on_resize(self) -> None:
        """Rows are made for a size: ask for new ones."""
        self._redraw()

    def show(self, rows: Sequence[Row]) -> int:
        """Replace what is shown.

        Returns:
            How many rows differ from what was shown.
        """
        width, height = self.size
        rows = [*rows[:height], *[Row()] * (height - len(rows))]
        before, rows_before, cells_before = self._strips, self._rows, self._cells
        same_size = len(before) == height and before[0].cell_length == width
        self._rows = rows
        if not same_size:
            self._strips = [row.strip(width) for row in rows]
            self._cells = [cells(strip) for strip in self._strips]
            self.refresh()
            return height
        self._strips, self._cells = [*before], [*cells_before]
        differing: list[tuple[int, int, int]] = []
        for y, (row, old) in enumerate(zip(rows, rows_before, strict=True)):
            # Most rows say what they said before, many are the very same.
            if row is old or row.spans == old.spans:
                continue
            self._strips[y] = row.strip(width)
            self._cells[y] = cells(self._strips[y])
            begin, end = changed(cells_before[y], self._cells[y])
            if begin < end:
                differing.append((y, begin, end))
        colours = self.app.console.color_system
        text = "".join(sequence(self._cells[y], y, begin, end, colours) for y, begin, end in differing)
        if text and not self._send(text):
            self.refresh(*(Region(0, y, end, 1) for y, _, end in differing))
        return len(differing)

    def render_line(self, y: int) -> Strip:
        """A row, for Textual."""
        if y < len(self._strips):
            return self._strips[y]
        return Strip([Segment(" " * self.size.width, PLAIN)], self.size.width)

    def render_lines(self, crop: Region) -> list[Strip]:
        """Rows, for Textual: as they are now, whatever it has drawn of them before."""
        return [self.render_line(y).crop(crop.x, crop.right) for y in crop.line_range]

    @property
    def lines(self) -> list[str]:
        """The rows shown, without styles."""
        return [strip.text for strip in self._strips]
