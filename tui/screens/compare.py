"""Compare: runs of this session and opened recordings, side by side, differences signed."""

from __future__ import annotations

from ...engine.difference import Part
from ...engine.difference import difference as difference_of
from ...engine.events import Category, Phase
from ..actions import Action, moves
from ..draw import Row
from ..layer_table import shared_prefix
from ..run_summary import TABLE_HEADS, RunSummary, table_row
from ..units import UNKNOWN, Unit, difference, duration, shorten, tail, unit_for
from .owner_rows import owner_rows, peak_rows
from .page import Page, Table, Topic

MODES = (
    "categories at the peak", "highest in each phase", "layers at the peak", "the article's table",
    "differences at the peak, by owner",
)  # fmt: skip
FIGURE, NAME, WIDEST = 9, 18, 36
"""Cells of a figure, and of a row's name: at the least and at the most."""

LEGEND_ROWS = 5

PHASES = (Phase.LOAD, Phase.FORWARD, Phase.RECOMPUTE, Phase.BACKWARD, Phase.OPTIMIZER)

Line = tuple[str, list[int | None], Category | None]
"""A row of a comparison: its name, a size a run, and its category if it is one."""


class ComparePage(Page):
    """The fifth screen."""

    title = "compare"

    mode = 0
    selected = 0
    base = 0
    top = 0
    _predicted_at: int | None = None

    def make_actions(self) -> tuple[Action, ...]:
        """Choose a run, what to compare by, what to compare with."""
        text = "choose a run"
        return (
            Action("compare.before", ("left",), "Run before", text, lambda page: page.choose(-1), "run"),
            Action("compare.next", ("right",), "Next run", text, lambda page: page.choose(1), "run"),
            Action("compare.by", ("tab",), "Compare by ...", "by category, phase, layer, owner; the article's table",
                   lambda page: page.next_mode(), "compare by"),
            Action("compare.base", ("enter",), "Compare with this run", "the run that differences are from",
                   lambda page: page.make_base(), "compare with it"),
            Action("compare.drop", ("delete", "-"), "Forget this run", "forget a run that has ended",
                   lambda page: page.forget()),
            *moves("scroll", "scroll"),
        )  # fmt: skip

    def topic(self) -> Topic:
        """What is compared by."""
        texts = (
            "What filled the memory at each run's highest peak, by category. The first column is the run that all "
            "others are compared with; behind every other figure stands its difference from it.",
            "The most that was allocated while a phase went on, over the steps that are kept of each run.",
            "What each layer held at the run's highest peak: its parameters, gradients, optimizer state and "
            "activations together. Layers are matched by name.",
            "What the reference experiment publishes, from your own runs: allocated after loading; gradients, "
            "optimizer state and everything after the first optimizer step; and the true peak, which it does not have.",
            "Who holds more or less at the peak of the run chosen than at the base's, in bytes: by category the "
            "owners that differ most, the others summed, so that it all adds up. Layers that repeat are one owner. "
            "With a prediction as the base it says what was not foreseen.",
        )
        return Topic(MODES[self.mode], texts[self.mode])

    # --- actions --------------------------------------------------------------------

    def move(self, by: int) -> None:
        """Scroll."""
        self.top = max(0, self.top + by)

    def choose(self, by: int) -> None:
        """Another run."""
        self.selected = max(0, min(self.selected + by, len(self.runs()) - 1))

    def next_mode(self) -> None:
        """Compare by something else."""
        self.mode, self.top = (self.mode + 1) % len(MODES), 0

    def make_base(self) -> None:
        """Compare with the run chosen."""
        self.base = self.selected

    def forget(self) -> None:
        """Drop a run that has ended from the list."""
        finished = self.state.finished
        if self.selected >= len(finished):
            predicted = self.selected == self._predicted_at
            self.state.say("the prediction goes when its run does" if predicted else "this run is still on")
            return
        del finished[self.selected]
        self.base -= self.base > self.selected
        self.state.version += 1

    # --- what is compared -------------------------------------------------------------

    def runs(self) -> list[RunSummary]:
        """Those of the state; before the one that is shown, once it is steady, what was predicted of it."""
        runs, predicted = list(self.state.runs), self.control.foreseen()
        steady = self.state.run.steady and self.state.summary() is not None
        at = len(runs) - 1 if steady and not isinstance(predicted, str) else None
        if at is not None and not isinstance(predicted, str):
            runs.insert(at, predicted)
        if at != self._predicted_at:  # whatever was chosen stays chosen
            if (gone := self._predicted_at) is not None:
                self.selected -= self.selected > gone
                self.base -= self.base > gone
            if at is not None:
                self.selected += self.selected >= at
                self.base += self.base >= at > 0  # a first run is compared with what was predicted of it
            self._predicted_at = at
        return runs

    def parts(self, runs: list[RunSummary]) -> tuple[int, int, list[Part]]:
        """The base and the run that is set against it, and their difference."""
        others = [i for i in range(len(runs)) if i != self.base]
        other = self.selected if self.selected != self.base or not others else others[-1]
        return self.base, other, difference_of(runs[self.base].by_owner, runs[other].by_owner)

    def lines(self, runs: list[RunSummary]) -> list[Line]:
        """The rows of the mode that is on, with the sum where there is one."""
        if self.mode == 1:
            return [(p.title, [run.by_phase.get(p) for run in runs], None) for p in PHASES
                    if any(p in run.by_phase for run in runs)]  # fmt: skip
        if self.mode == 2:
            names = dict.fromkeys(name for run in runs for name in run.by_layer)
            found: list[Line] = [(name or "(the model itself)", [r.by_layer.get(name, 0) for r in runs], None)
                                 for name in names]  # fmt: skip
        else:
            found = [(c.info.title, [run.peak[c] for run in runs], c) for c in Category
                     if any(run.peak[c] for run in runs)]  # fmt: skip
        return [*found, ("all", [run.peak_bytes for run in runs], None)]

    def table(self) -> Table | None:
        """All runs and rows; bytes as whole numbers."""
        runs = self.runs()
        if not runs:
            return None
        if self.mode == 4:
            base, other, parts = self.parts(runs)
            heads = [f"{runs[i].origin} {runs[i].label}" for i in (base, other)]
            return [["category", "owner", *heads, "difference"], *(
                [part.category.key, name, str(before), str(after), str(after - before)]
                for part in parts
                for name, before, after in (("", part.base_bytes, part.bytes), *(t[:3] for t in part.terms))
            )]  # fmt: skip
        if self.mode == 3:
            cells = [[run.origin, run.label, *map(_whole, table_row(run))] for run in runs]
            return [["run", "settings", *TABLE_HEADS], *cells]
        heads = [f"{run.origin} {run.label}" for run in runs]
        return [["bytes", *heads], *([name, *map(_whole, sizes)] for name, sizes, _ in self.lines(runs))]

    # --- drawing ----------------------------------------------------------------------

    def rows(self, width: int, height: int) -> list[Row]:
        """The runs, and the comparison."""
        runs, palette = self.runs(), self.palette
        if not runs:
            text = " No run has ended a step yet. Change something on screen 4; every run stays here to compare."
            return [Row(), Row().add(text, palette.dim)]
        self.selected = max(0, min(self.selected, len(runs) - 1))
        self.base = max(0, min(self.base, len(runs) - 1))
        unit = unit_for(max(run.peak_bytes for run in runs), self.state.units)
        name = "bytes" if self.mode == 4 else unit.name
        title = Row().add(f" {MODES[self.mode]}", palette.bold).add(f"  {name}", palette.dim)
        below = self._footnote(width)
        height -= len(below)
        if self.mode == 3:
            return [title, *self._article(runs, unit, width, height - 1), *below]
        rows = [title, *self._legend(runs, unit, width)]
        if self.mode == 4 and len(runs) < 2:
            lines = [Row().add(" A difference takes two runs.", palette.dim)]
        elif self.mode == 4:
            base, other, parts = self.parts(runs)
            rows += peak_rows({_letter(i): runs[i] for i in (base, other)}, width, palette)
            lines = owner_rows(parts, ["~" * runs[i].predicted for i in (base, other)], width, palette)
        else:
            found, shown = self.lines(runs), self._shown(len(runs), width)
            found, edge = self._named(found, width - 1 - FIGURE * (2 * len(shown) - 1))
            rows.append(self._heads(shown, edge))
            lines = [self._line(line, runs, shown, unit, edge) for line in found]
        body = max(1, height - len(rows) - 1)
        self.top = max(0, min(self.top, len(lines) - body))
        return rows + lines[self.top : self.top + body] + below

    def _footnote(self, width: int) -> list[Row]:
        """Why no prediction is beside the run that is shown, or what to know of the one that is."""
        predicted = self.control.foreseen()
        word = predicted if isinstance(predicted, str) else predicted.caveat
        return [Row(), Row().add(f" {shorten(word, width - 2)}", self.palette.dim)] if word else []

    def _listed(self, n_runs: int) -> list[int]:
        """The runs of the legend: the base, the one chosen, the latest, and those next to the one chosen."""
        near = sorted(range(n_runs), key=lambda i: abs(i - self.selected))
        return sorted(list(dict.fromkeys((self.base, self.selected, n_runs - 1, *near)))[:LEGEND_ROWS])

    def _legend(self, runs: list[RunSummary], unit: Unit, width: int) -> list[Row]:
        """Which letter is which run."""
        on = len(runs) - 1 if self.state.live and self.state.summary() is not None else None
        rows = []
        for i in self._listed(len(runs)):
            run = runs[i]
            style = self.palette.cursor if i == self.selected else self.palette.plain
            row = Row().add(f" {_letter(i)} ", self.palette.accent if i != self.selected else style)
            row.add(f"{_figure(run, run.peak_bytes, unit):>8} ", style)
            room = max(8, width - row.width - 29)
            name = f"{run.origin}, now" if i == on else run.origin
            row.add(f"{shorten(f'{name}  {run.label}', room):<{room}}", style)
            speed = "" if run.seconds is None else duration(run.seconds)
            rows.append(row.right(f" {speed}  {run.peak_where}"[:27], width - 1, self.palette.dim))
        return rows

    def _shown(self, n_runs: int, width: int) -> list[int]:
        """The base, and as many others as there is room for, the chosen one among them or else the latest."""
        others = [i for i in range(n_runs) if i != self.base]
        room = max(1, (width - NAME - FIGURE - 1) // (2 * FIGURE))
        at = others.index(self.selected) if self.selected in others else len(others) - 1
        top = max(0, min(at - room // 2, len(others) - room))
        return [self.base, *others[top : top + room]]

    def _named(self, lines: list[Line], room: int) -> tuple[list[Line], int]:
        """The rows without what all layers' names begin with, and the cells that names get."""
        prefix = shared_prefix(name for name, _, _ in lines)
        lines = [(name.removeprefix(prefix), sizes, category) for name, sizes, category in lines]
        return lines, min(max(NAME, *(len(name) + 4 for name, _, _ in lines)), max(NAME, min(room, WIDEST)))

    def _heads(self, shown: list[int], name: int) -> Row:
        row = Row().to(name)
        for i in shown:
            head = _letter(i) if i == self.base else f"{_letter(i)} - {_letter(self.base)}"
            style = self.palette.accent if i == self.selected else self.palette.dim
            if i != self.base:
                row.right(_letter(i), row.width + FIGURE, style)
            row.right(head, row.width + FIGURE, style)
        return row

    def _line(self, line: Line, runs: list[RunSummary], shown: list[int], unit: Unit, edge: int) -> Row:
        """A size a run, and its difference from the base's."""
        name, sizes, category = line
        palette = self.palette
        row = Row().add(" ")
        if category is not None:
            row.add(category.info.letter, palette.paint[category]).add(" ")
        row.add(tail(name, edge - row.width - 1), palette.bold if name == "all" else palette.plain).to(edge)
        base = sizes[self.base]
        for i in shown:
            size = sizes[i]
            row.right(_figure(runs[i], size, unit), row.width + FIGURE, palette.plain if size else palette.dim)
            if i != self.base:
                text, style = difference(size, base, unit), palette.dim
                if size is not None and base is not None and size != base:
                    style = palette.good if size < base else palette.busy
                row.right(text, row.width + FIGURE, style)
        return row

    def _article(self, runs: list[RunSummary], unit: Unit, width: int, height: int) -> list[Row]:
        """A row a run, in the columns of the reference experiment, and the peak."""
        name = width - len(TABLE_HEADS) * (FIGURE + 2) - 2
        row = Row().add(" run").to(name)
        for head in TABLE_HEADS:
            row.right(head, row.width + FIGURE + 2, self.palette.dim)
        rows = [row]
        self.top = max(0, min(self.top, len(runs) - height + 1))
        for i, run in enumerate(runs[self.top : self.top + height - 1], self.top):
            style = self.palette.cursor if i == self.selected else self.palette.plain
            row = Row().add(f" {shorten(f'{run.origin} {run.label}', name - 2):<{name - 1}}", style)
            for size in table_row(run):
                row.add(f"{_figure(run, size, unit):>{FIGURE + 2}}", style)
            rows.append(row)
        return rows


def _letter(index: int) -> str:
    """A, B ... Z, then a ...: fifty runs have one each."""
    return chr(ord("A") + index) if index < 26 else chr(ord("a") + index - 26)


def _figure(run: RunSummary, size: int | None, unit: Unit) -> str:
    """A size of a run; what is predicted has a mark."""
    return f"~{unit.show(size)}" if run.predicted and size is not None else unit.show(size)


def _whole(size: int | None) -> str:
    return UNKNOWN if size is None else str(size)
