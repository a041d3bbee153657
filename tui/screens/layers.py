"""Layers: what each held at the peak, the most it held, and what its recomputes cost; its modules, its tensors."""

from __future__ import annotations

from typing import NamedTuple

from ...engine.categories import Category
from ...engine.ledger import Ledger, LiveBlock
from ..actions import Action, moves
from ..draw import Row
from ..layer_table import GROUPS, NO_LAYER, LayerRow, LayerTable, layer_table, modules_of, owners_in, shared_prefix
from ..run_state import LayerRecomputes
from ..units import IN_MIB, UNKNOWN, Unit, count, tail, unit_for
from .blocks import block_row, made_in, shape_of, why_no_shape
from .page import Page, Table, Topic, scrolled

NAME = 13
"""Cells that a layer's name has at the least."""

WIDEST = 40
"""At the most: further away, it is not seen which figures are its."""

NOTHING = LayerRecomputes()


class Column(NamedTuple):
    """One column of figures.

    Attributes:
        name: What it is sorted and copied by.
        cells: It takes up.
        rank: Where there is no room for all columns, the highest goes first.
        head: Above it; {} is the unit. Empty: the name.
        letter: Before the head.
        over: Above the heads: the words that columns side by side share.
    """

    name: str
    cells: int
    rank: int
    head: str = ""
    letter: Category | None = None
    over: str = ""


MOST, RECOMPUTED = "most held during the step", "recomputed"
COLUMNS: tuple[Column, ...] = (
    Column("at peak", 8, 0),
    Column("par", 7, 1, letter=Category.PARAMETERS, over=MOST),
    Column("grad", 7, 1, letter=Category.GRADIENTS, over=MOST),
    Column("opt", 7, 1, letter=Category.OPTIMIZER_STATE, over=MOST),
    Column("act", 7, 1, letter=Category.ACTIVATIONS, over=MOST),
    Column("tmp", 7, 2, letter=Category.TEMPORARIES, over=MOST),
    Column("other", 7, 5, over=MOST),
    Column("times", 6, 4, over=RECOMPUTED),
    Column("bytes each", 10, 1, "{} each", over=RECOMPUTED),
    Column("mean ms", 8, 3, over=RECOMPUTED),
)
"""Those about recomputes are there once there was one."""


class LayersPage(Page):
    """A table of layers, and their modules and tensors."""

    place = 3
    title = "layers"

    top = 0
    selected = 0
    sort = ""
    """The column it is sorted by; empty: the model's order."""
    wanted = ""
    """Layers whose name has this in it."""
    opened: str | None = None
    """The layer whose tensors are on show."""
    _table: tuple[Ledger, LayerTable] | None = None
    _within: tuple[Ledger, dict[str, list[LayerRow]]] | None = None
    _tensors: tuple[object, list[LiveBlock]] | None = None
    _columns: tuple[Column, ...] = COLUMNS
    """Those on show."""
    _unit = IN_MIB

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
            Action("layers.filter", ("/",), "Find layers by name", "only layers and modules with a text in their name",
                   lambda page: page.start_typing(), "find"),
        )  # fmt: skip

    def topic(self) -> Topic:
        """The table."""
        if self.opened is not None:
            return Topic(self.opened, "Its tensors alive at the peak of the step, largest first, with the category, "
                         "and where they were made if that was during the step.")  # fmt: skip
        return Topic(
            "layers",
            "At peak: what a layer holds then; it adds up to the peak. Then the most of each kind, not all at one "
            "time. Recomputed: how often; bytes freed in forward and made again in backward each time (a segment's at "
            "its first layer); mean time from step 2 on. In front: + modules within, R being recomputed, r already.",
        )

    # --- actions --------------------------------------------------------------------

    def move(self, by: int) -> None:
        """Select another row."""
        self.selected = max(0, min(self.selected + by, self._length() - 1))

    def sort_by(self, by: int) -> None:
        """Sort by another column."""
        orders = ["", *(column.name for column in self._columns)]
        at = orders.index(self.sort) if self.sort in orders else 0
        self.sort = orders[(at + by) % len(orders)]
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
        """The layers of the latest complete step, folded once a step."""
        ledger = self.state.complete
        if ledger is None:
            return None
        if self._table is None or self._table[0] is not ledger:
            self._table = (ledger, layer_table(ledger))
        return self._table[1]

    def tensors(self) -> list[LiveBlock]:
        """The tensors of the layer opened, at the peak of the step."""
        ledger = self.state.complete
        if ledger is None or self.opened is None:
            return []
        key = (ledger, self.opened)
        if self._tensors is None or self._tensors[0] != key:
            alive = ledger.largest(ledger.peak.event, len(ledger.blocks))
            names = owners_in(ledger, self.opened)
            self._tensors = (key, [block for block in alive if block.name in names])
        return self._tensors[1]

    def table(self) -> Table | None:
        """Every layer and module on show, or the tensors; whole bytes."""
        if self.opened is not None:
            cells = [[str(b.bytes), b.category.key, b.name, shape_of(b), made_in(b)] for b in self.tensors()]
            return [["bytes", "category", "name", "shape", "made"], *cells]
        table = self.layers()
        if table is None:
            return None
        plain = Unit("bytes", 1, 0)
        rows = [[row.name, *(self._text(row, column, plain) for column in COLUMNS)] for row in self._ordered(table)]
        return [["layer", *(column.name for column in COLUMNS)], *rows]

    def _length(self) -> int:
        if self.opened is not None:
            return len(self.tensors())
        table = self.layers()
        return len(self._ordered(table)) if table else 0

    def _selected_row(self) -> LayerRow | None:
        table = self.layers()
        rows = self._ordered(table) if table else []
        return rows[min(self.selected, len(rows) - 1)] if rows else None

    def _known(self, row: LayerRow) -> LayerRecomputes:
        return self.state.run.recomputes.get(row.name, NOTHING)

    def _value(self, row: LayerRow, column: Column) -> float | None:
        """The value in a column: bytes, times or milliseconds; None: not known."""
        if column.name == "at peak":
            return row.peak_bytes
        if column.over == MOST:
            return row.sizes[[name for name, _ in GROUPS].index(column.name)]
        known = self._known(row)
        if column.name == "times":
            return known.count if known.count or self.state.run.recomputes else None
        return known.bytes if column.name == "bytes each" else known.mean_ms

    def _text(self, row: LayerRow, column: Column, unit: Unit) -> str:
        value = self._value(row, column)
        if value is None:
            return UNKNOWN
        if column.name in ("times", "mean ms"):
            return count(int(value)) if column.name == "times" else f"{value:.2f}"
        return unit.show(int(value))

    @property
    def _counts_there(self) -> bool:
        """True if how often stands before the bytes each, for want of room for a column."""
        return all(column.name != "times" for column in self._columns)

    def _ordered(self, table: LayerTable) -> list[LayerRow]:
        """The layers in the order asked for, the modules of those that are unfolded below them."""
        shown = [row for row in table.rows if self._found(row)]
        for column in COLUMNS:
            if column.name == self.sort:
                shown.sort(key=lambda row, by=column: -(self._value(row, by) or 0))  # type: ignore[misc]
        return [inner for row in shown for inner in self._unfolded(row)]

    def _unfolded(self, row: LayerRow) -> list[LayerRow]:
        """A row, and below it the modules within, as deep as they are unfolded or as what is wanted is in them."""
        if self._called(row.name):
            within = self._modules(row) if row.name in self.unfolded else []
        else:
            within = [module for module in self._modules(row) if self._found(module)]
        return [row, *(deeper for module in within for deeper in self._unfolded(module))]

    def _called(self, name: str) -> bool:
        return self.wanted.lower() in name.lower()

    def _found(self, row: LayerRow) -> bool:
        """True if a row or a module within it is called what is wanted."""
        return self._called(row.name) or any(self._found(module) for module in self._modules(row))

    def _modules(self, row: LayerRow) -> list[LayerRow]:
        """The modules directly within a row, found once a step."""
        ledger = self.state.complete
        if ledger is None or not row.inner:
            return []
        if self._within is None or self._within[0] is not ledger:
            self._within = (ledger, {})
        known = self._within[1]
        if row.name not in known:
            known[row.name] = modules_of(ledger, row)
        return known[row.name]

    # --- drawing ----------------------------------------------------------------------

    def rows(self, width: int, height: int) -> list[Row]:
        """Headings, layers, total; or the tensors of one layer."""
        table, ledger = self.layers(), self.state.complete
        if table is None or ledger is None:
            return [Row(), Row().add(" No step has been traced yet.", self.palette.dim)]
        if self.opened is not None:
            return self._tensor_rows(ledger, width, height)
        self._columns = self._fitting(width)
        name_width = min(width - 1 - sum(column.cells for column in self._columns), WIDEST)
        body, ordered = max(1, height - 4), self._ordered(table)
        self._unit = unit_for(table.peak_bytes, self.state.units)
        prefix = shared_prefix(row.name for row in table.rows)
        self.selected = max(0, min(self.selected, len(ordered) - 1))
        self.top = scrolled(self.top, self.selected, body, len(ordered))
        rows = [self._title(ledger, len(ordered), body), *self._headings(name_width)]
        for i, row in enumerate(ordered[self.top : self.top + body], self.top):
            rows.append(self._layer(row, row.name.removeprefix(prefix), name_width, i == self.selected, width))
        if not ordered:
            rows.append(Row().add(f" nothing is called {self.wanted}", self.palette.dim))
        rows += [Row()] * (body + 3 - len(rows))
        return [*rows, self._total(table, name_width)]

    def _fitting(self, width: int) -> tuple[Column, ...]:
        """The columns there is something for, and room."""
        found = [column for column in COLUMNS if column.over != RECOMPUTED or self.state.run.recomputes]
        while sum(column.cells for column in found) > width - 1 - NAME:
            found.remove(max(found, key=lambda column: column.rank))
        return tuple(found)

    def _tensor_rows(self, ledger: Ledger, width: int, height: int) -> list[Row]:
        blocks = self.tensors()
        unit = unit_for(max((block.bytes for block in blocks), default=0), self.state.units)
        self.selected = max(0, min(self.selected, len(blocks) - 1))
        why = [Row().add(f" {said}", self.palette.dim)] if (said := why_no_shape(ledger, blocks)) else []
        body = height - 1 - len(why)
        self.top = scrolled(self.top, self.selected, body, len(blocks))
        title = Row().add(f" {self.opened or NO_LAYER}", self.palette.bold)
        held = unit.full(sum(block.bytes for block in blocks))
        title.add(f"  {count(len(blocks))} tensors, {held} at the peak of step {ledger.trace.step}", self.palette.dim)
        if title.width + len(back := "esc goes back") + 2 < width:
            title.right(back, width - 1, self.palette.accent)
        shown = blocks[self.top : self.top + body]
        return [title, *(block_row(block, unit, self.palette, width) for block in shown), *why]

    def _title(self, ledger: Ledger, length: int, body: int) -> Row:
        palette, unit = self.palette, self._unit
        row = Row().add(f" step {ledger.trace.step}" if ledger.trace.step else " loading", palette.bold)
        where = ledger.peak.phase.title.removesuffix(" step")
        row.add(f"  {unit.name}  peak {unit.show(ledger.peak.bytes)} in {where}", palette.dim)
        if self.typing or self.wanted:
            row.add(f"  /{self.wanted}", palette.accent).add("_" if self.typing else "", palette.accent)
        if length > body:
            row.add(f"   {self.top + 1}–{min(self.top + body, length)} of {length}", palette.dim)
        return row

    def _headings(self, name_width: int) -> list[Row]:
        """Two rows: what columns side by side share, and the columns."""
        palette, edge = self.palette, name_width
        over, row = Row(), Row().add(" layer")
        for column in self._columns:
            edge += column.cells
            head = column.head.format(self._unit.name) or column.name
            head = f"n×{self._unit.name}" if column.name == "bytes each" and self._counts_there else head
            style = palette.accent if self.sort == column.name else palette.dim
            if column.letter is not None:
                row.to(edge - len(head) - 2).add(column.letter.info.letter, palette.paint[column.letter])
                row.add(f" {head}", style)
            else:
                row.right(head, edge, style)
            if column.over == MOST:
                over.to(edge - column.cells + 2).add(MOST if MOST not in over.text else "", palette.dim)
        if self._columns[-1].over == RECOMPUTED:
            so_far = f"{RECOMPUTED} so far"  # in all steps of the run
            over.right(so_far if over.width + len(so_far) < edge else RECOMPUTED, edge, palette.dim)
        return [over, row]

    def _mark(self, row: LayerRow) -> str:
        """R: being recomputed; r: recomputed in this micro-batch; + -: modules within."""
        run = self.state.run
        going_on = self.state.live and run.running
        if going_on and run.last_recompute is not None and row.name in run.last_recompute.layers:
            return "R"
        if going_on and row.name in run.lit:
            return "r"
        shown = row.name in self.unfolded or not self._called(row.name)
        return ("-" if shown else "+") if row.inner else " "

    def _layer(self, row: LayerRow, name: str, name_width: int, selected: bool, width: int) -> Row:
        palette = self.palette
        style = palette.cursor if selected else palette.plain
        dim = palette.cursor if selected else palette.dim
        mark = self._mark(row)
        line = Row().add(mark, palette.paint[Category.RECOMPUTED] if mark in "Rr" else palette.dim)
        line.add("  " * row.depth + tail(name or NO_LAYER, name_width - 2 - 2 * row.depth), style)
        edge = name_width
        for column in self._columns:
            edge += column.cells
            text = self._text(row, column, self._unit)
            if column.name == "bytes each" and self._counts_there and self._known(row).count:
                text = f"{self._known(row).count}×{text}"
            line.add(" " * (edge - len(text) - line.width), style).add(text, style if self._value(row, column) else dim)
        return line.add(" " * (width - line.width), style) if selected else line

    def _total(self, table: LayerTable, name_width: int) -> Row:
        """The peak, and the most that all of them held of each group at one time; of recomputes the sum and mean."""
        unit, known = self._unit, self.state.run.recomputes.values()
        row = Row().add(" all at once", self.palette.bold)
        # A segment counts once, at its first layer.
        times = sum(r.count for r in known if r.seconds is not None)
        seconds = sum(r.seconds or 0.0 for r in known)
        figures = {"at peak": unit.show(table.peak_bytes), "times": count(times)}
        figures["bytes each"] = f"{times}×" if self._counts_there else ""
        figures |= {name: unit.show(size) for (name, _), size in zip(GROUPS, table.total, strict=True)}
        timed = sum(r.timed for r in known)
        figures["mean ms"] = f"{seconds * 1e3 / timed:.2f}" if timed else UNKNOWN
        edge = name_width
        for column in self._columns:
            edge += column.cells
            row.right(figures[column.name], edge, self.palette.bold)
        return row
