"""Layers: the most that each layer held, and what its recomputes cost; its modules, its tensors."""

from __future__ import annotations

from collections.abc import Callable

from ...engine.events import Category
from ...engine.ledger import Ledger, LiveBlock
from ..actions import Action, moves
from ..draw import Row
from ..layer_table import GROUPS, LayerRow, LayerTable, layer_table, modules_of, owned_by
from ..run_state import LayerRecomputes
from ..units import UNKNOWN, count, tail
from .blocks import block_row, made_in, shape_of
from .page import Page, Table, Topic, scrolled

SORTS = ("model's order", *(name for name, _ in GROUPS), "times", "bytes", "ms")
LETTERS = (
    Category.PARAMETERS, Category.GRADIENTS, Category.OPTIMIZER_STATE, Category.ACTIVATIONS, Category.TEMPORARIES,
)  # fmt: skip
FIGURE, LAST = 8, (6, 8, 7)
NARROW_FIGURE, NARROW_LAST = 7, (4, 7, 0)
NARROW = 76
"""Columns below which figures move closer together, and the last one goes."""
NOTHING = LayerRecomputes()


def _recomputes(
    known: LayerRecomputes, show: Callable[[int | None], str] = str, any_yet: bool = True
) -> tuple[str, str, str]:
    """How often, bytes, milliseconds; dashes for what is not known."""
    times = count(known.count) if known.count or any_yet else UNKNOWN
    size = UNKNOWN if known.bytes is None else show(known.bytes)
    return times, size, UNKNOWN if known.mean_ms is None else f"{known.mean_ms:.2f}"


class LayersPage(Page):
    """The third screen."""

    title = "layers"

    top = 0
    selected = 0
    sort = 0
    wanted = ""
    """Layers whose name has this in it."""
    opened: str | None = None
    """The layer whose tensors are on show."""
    _table: tuple[Ledger, LayerTable] | None = None
    _tensors: tuple[object, list[LiveBlock]] | None = None
    _figure, _last = FIGURE, LAST

    def make_actions(self) -> tuple[Action, ...]:
        """Select, sort, open."""
        self.unfolded: set[str] = set()
        return (
            *moves("select a layer"),
            Action("layers.sort-before", ("left",), "Sort by the column before", "sort by another column",
                   lambda page: page.sort_by(-1), "sort"),
            Action("layers.sort-next", ("right",), "Sort by the next column", "sort by another column",
                   lambda page: page.sort_by(1), "sort"),
            Action("layers.unfold", ("tab",), "Modules of this layer", "show or hide the modules within",
                   lambda page: page.unfold(), "modules"),
            Action("layers.tensors", ("enter",), "Tensors of this layer", "its tensors at the peak, or back",
                   lambda page: page.open(), "tensors"),
            Action("layers.filter", ("/",), "Find layers by name", "only layers with a text in their name",
                   lambda page: page.start_typing(), "find"),
        )  # fmt: skip

    def topic(self) -> Topic:
        """The table."""
        if self.opened is not None:
            return Topic(self.opened, "Its tensors alive at the peak of the step, largest first, with the category, "
                         "and where they were made if that was during the step.")  # fmt: skip
        return Topic(
            "layers",
            "The most that each layer held during the step: parameters, gradients, optimizer state, activations kept "
            "for backward, temporaries. Not all at one time. Then how often it was recomputed, the bytes a "
            "recompute holds and its milliseconds. R marks the layers being recomputed now.",
        )

    # --- actions --------------------------------------------------------------------

    def move(self, by: int) -> None:
        """Select another row."""
        self.selected = max(0, min(self.selected + by, self._length() - 1))

    def sort_by(self, by: int) -> None:
        """Sort by another column."""
        self.sort = (self.sort + by) % len(SORTS)
        self.top = self.selected = 0

    def unfold(self) -> None:
        """Show or hide the modules within the selected row."""
        row = self._selected_row()
        if row is None or not row.inner:
            self.state.say("nothing within" if row is None else f"{row.name}: no modules within that hold anything")
            return
        self.unfolded ^= {row.name}

    def open(self) -> None:
        """Show the tensors of the selected row, or go back."""
        row = self._selected_row()
        self.opened = None if self.opened is not None or row is None else row.name
        self.top = 0

    def start_typing(self) -> None:
        """Take keys as the text to find."""
        self.opened, self.typing, self.wanted = None, True, ""
        self.top = self.selected = 0

    def type(self, key: str) -> None:
        """One more character; enter keeps the filter, escape drops it."""
        if key in ("enter", "escape"):
            self.typing = False
            self.wanted = self.wanted if key == "enter" else ""
        elif key == "backspace":
            self.wanted = self.wanted[:-1]
        elif len(key) == 1:
            self.wanted += key
        self.top = self.selected = 0

    def leave(self) -> bool:
        """Close the tensors, then drop the filter."""
        if self.opened is not None:
            self.opened = None
        elif self.wanted:
            self.wanted = ""
        else:
            return False
        return True

    # --- what is on show --------------------------------------------------------------

    def layers(self) -> LayerTable | None:
        """Of the latest complete step, folded once a step."""
        ledger = self.state.complete
        if ledger is None:
            return None
        if self._table is None or self._table[0] is not ledger:
            self._table = (ledger, layer_table(ledger))
        return self._table[1]

    def tensors(self) -> list[LiveBlock]:
        """Of the layer opened, at the peak of the step."""
        ledger = self.state.complete
        if ledger is None or self.opened is None:
            return []
        key = (ledger, self.opened)
        if self._tensors is None or self._tensors[0] != key:
            alive = ledger.largest(ledger.peak.event, len(ledger.blocks))
            self._tensors = (key, [block for block in alive if owned_by(block.name, self.opened)])
        return self._tensors[1]

    def table(self) -> Table | None:
        """Every layer and module on show, or the tensors; whole bytes."""
        if self.opened is not None:
            cells = [[str(b.bytes), b.category.key, b.name, shape_of(b), made_in(b)] for b in self.tensors()]
            return [["bytes", "category", "name", "shape", "made"], *cells]
        table = self.layers()
        if table is None:
            return None
        rows = [[row.name, *map(str, row.sizes), *_recomputes(self._known(row))] for row in self._ordered(table)[0]]
        return [["layer", *(name for name, _ in GROUPS), "recomputes", "bytes", "ms"], *rows]

    def _length(self) -> int:
        if self.opened is not None:
            return len(self.tensors())
        table = self.layers()
        return len(self._ordered(table)[0]) if table else 0

    def _selected_row(self) -> LayerRow | None:
        table = self.layers()
        rows = self._ordered(table)[0] if table else []
        return rows[min(self.selected, len(rows) - 1)] if rows else None

    def _known(self, row: LayerRow) -> LayerRecomputes:
        return self.state.run.recomputes.get(row.name, NOTHING)

    def _smallest(self) -> int:
        """What would still be shown as more than nothing."""
        unit = self.state.unit
        return int(unit.bytes / 10**unit.decimals)

    def _ordered(self, table: LayerTable) -> tuple[list[LayerRow], int]:
        """The layers in the order asked for, and how many are left out as too small to have a figure."""
        named = [row for row in table.rows if self.wanted.lower() in row.name.lower()]
        shown = [row for row in named if max(row.sizes) >= self._smallest() / 2] or named
        if self.sort:
            shown = sorted(shown, key=self._sort_key)
        return [inner for row in shown for inner in self._unfolded(row)], len(named) - len(shown)

    def _sort_key(self, row: LayerRow) -> float:
        if self.sort <= len(GROUPS):
            return -row.sizes[self.sort - 1]
        known = self._known(row)
        return -((known.count, known.bytes, known.mean_ms)[self.sort - len(GROUPS) - 1] or 0)

    def _unfolded(self, row: LayerRow) -> list[LayerRow]:
        """A row, and below it the modules within, as deep as they are unfolded."""
        ledger = self.state.complete
        if row.name not in self.unfolded or ledger is None:
            return [row]
        return [row, *(deeper for inner in modules_of(ledger, row) for deeper in self._unfolded(inner))]

    # --- drawing ----------------------------------------------------------------------

    def rows(self, width: int, height: int) -> list[Row]:
        """Headings, layers, total; or the tensors of one layer."""
        table, ledger = self.layers(), self.state.complete
        if table is None or ledger is None:
            return [Row(), Row().add(" No step has been traced yet.", self.palette.dim)]
        if self.opened is not None:
            return self._tensor_rows(ledger, width, height)
        self._figure, self._last = (FIGURE, LAST) if width >= NARROW else (NARROW_FIGURE, NARROW_LAST)
        name_width = max(12, width - len(GROUPS) * self._figure - sum(self._last) - 1)
        body = max(1, height - 4)
        ordered, hidden = self._ordered(table)
        self.selected = max(0, min(self.selected, len(ordered) - 1))
        self.top = scrolled(self.top, self.selected, body, len(ordered))
        rows = [self._title(ledger, len(ordered), body), *self._headings(name_width)]
        for i, row in enumerate(ordered[self.top : self.top + body], self.top):
            rows.append(self._layer(row, name_width, i == self.selected, width))
        if hidden and len(ordered) < body:
            text = f" {hidden} more, each below {self.state.unit.full(self._smallest())}"
            rows.append(Row().add(text, self.palette.dim))
        rows += [Row()] * (body + 3 - len(rows))
        return [*rows, self._total(table, name_width)]

    def _tensor_rows(self, ledger: Ledger, width: int, height: int) -> list[Row]:
        blocks, unit = self.tensors(), self.state.unit
        self.selected = max(0, min(self.selected, len(blocks) - 1))
        self.top = scrolled(self.top, self.selected, height - 1, len(blocks))
        title = Row().add(f" {self.opened or '(the model itself)'}", self.palette.bold)
        held = unit.full(sum(block.bytes for block in blocks))
        title.add(f"  {count(len(blocks))} tensors, {held} at the peak of step {ledger.trace.step}", self.palette.dim)
        shown = blocks[self.top : self.top + height - 1]
        return [title, *(block_row(block, unit, self.palette, width) for block in shown)]

    def _title(self, ledger: Ledger, length: int, body: int) -> Row:
        palette = self.palette
        row = Row().add(f" step {ledger.trace.step}" if ledger.trace.step else " loading", palette.bold)
        row.add("  the most each layer held, ", palette.dim).add(self.state.unit.name, palette.dim)
        if self.typing or self.wanted:
            row.add(f"  /{self.wanted}", palette.accent).add("_" if self.typing else "", palette.accent)
        if length > body:
            row.add(f"   {self.top + 1}–{min(self.top + body, length)} of {length}", palette.dim)
        return row

    def _headings(self, name_width: int) -> list[Row]:
        """Two rows: what the last three columns are about, and the columns."""
        palette = self.palette
        over = Row().right("recomputes", name_width + len(GROUPS) * self._figure + sum(self._last), palette.dim)
        row = Row().add(" layer")
        edge = name_width
        for i, (name, _) in enumerate(GROUPS):
            edge += self._figure
            marked = self.sort == i + 1
            row.to(edge - len(name) - 2).add(LETTERS[i].info.letter, palette.paint[LETTERS[i]])
            row.add(f" {name}", palette.accent if marked else palette.dim)
        heads = ("times" if self._last[0] > 5 else "no.", self.state.unit.name, "ms")
        for i, (name, cells) in enumerate(zip(heads, self._last, strict=True)):
            edge += cells
            marked = self.sort == len(GROUPS) + 1 + i
            row.right(name if cells else "", edge, palette.accent if marked else palette.dim)
        return [over, row]

    def _mark(self, row: LayerRow) -> str:
        """R: being recomputed; r: recomputed in this micro-batch; + -: modules within."""
        run = self.state.run
        if run.last_recompute is not None and row.name in run.last_recompute.layers:
            return "R"
        if row.name in run.lit:
            return "r"
        return ("-" if row.name in self.unfolded else "+") if row.inner else " "

    def _layer(self, row: LayerRow, name_width: int, selected: bool, width: int) -> Row:
        palette, unit = self.palette, self.state.unit
        style = palette.cursor if selected else palette.plain
        dim = palette.cursor if selected else palette.dim
        mark = self._mark(row)
        line = Row().add(mark, palette.paint[Category.RECOMPUTED] if mark in "Rr" else palette.dim)
        line.add("  " * row.depth + tail(row.name or "(the model itself)", name_width - 2 - 2 * row.depth), style)
        edge = name_width
        for size in row.sizes:
            text = unit.show(size)
            line.add(" " * (edge + self._figure - len(text) - line.width), style).add(text, style if size else dim)
            edge += self._figure
        figures = _recomputes(self._known(row), unit.show, bool(self.state.run.recomputes))
        for text, cells in zip(figures, self._last, strict=True):
            if cells:
                line.add(" " * (edge + cells - len(text) - line.width), style)
                line.add(text, dim if text == UNKNOWN else style)
            edge += cells
        return line.add(" " * (width - line.width), style) if selected else line

    def _total(self, table: LayerTable, name_width: int) -> Row:
        palette, unit = self.palette, self.state.unit
        row = Row().add(" all at once", palette.bold)
        edge = name_width
        for size in table.total:
            edge += self._figure
            row.right(unit.show(size), edge, palette.bold)
        known = self.state.run.recomputes.values()
        # A segment counts once, at its first layer.
        times = sum(r.count for r in known if r.seconds is not None)
        if times:
            row.right(count(times), edge + self._last[0], palette.bold)
            mean = sum(r.seconds or 0.0 for r in known) * 1e3 / times
            row.right(f"{mean:.2f}" if self._last[2] else "", edge + sum(self._last), palette.bold)
        return row
