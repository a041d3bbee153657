"""Compare: runs of this session and opened recordings, side by side, differences signed."""

from __future__ import annotations

from ...engine.categories import Category
from ...engine.difference import Part
from ...engine.difference import difference as difference_of
from ...engine.events import Phase
from ..actions import Action, moves
from ..draw import Row, paragraph
from ..layer_table import NO_LAYER, shared_prefix
from ..run_summary import TABLE_HEADS, RunSummary, table_row
from ..units import UNKNOWN, Unit, difference, duration, shorten, tail, unit_for, whole_parts
from .owner_rows import owner_rows, peak_rows
from .page import Page, Table, Topic

MODES = (
    "categories at the peak", "layers' activations as forward ends", "layers at the peak", "highest in each phase",
    "the reference experiment's table", "differences at the peak, by owner",
)  # fmt: skip
CATEGORIES, SAVED, LAYERS, HIGHEST, REFERENCE, OWNERS = range(len(MODES))
FIGURE, NAME, WIDEST = 9, 18, 36
"""Cells of a figure, and of a row's name: at the least and at the most."""

LEGEND_ROWS = 5
"""The least rows of the list of runs: more where the comparison leaves room."""

LEGEND_HEAD = "median step, peak"
"""The heads of what stands at the right of the list of runs."""

PHASES = (Phase.LOAD, Phase.FORWARD, Phase.RECOMPUTE, Phase.BACKWARD, Phase.OPTIMIZER)

Line = tuple[str, list[int | None], Category | None]
"""A row of a comparison: its name, a size a run, and its category if it is one."""


class ComparePage(Page):
    """Runs side by side."""

    place = 5
    title = "compare"

    mode = 0
    selected = 0
    base = 0
    top = 0

    def make_actions(self) -> tuple[Action, ...]:
        """Choose a run, what to compare by, what to compare with."""
        text = "choose a run"
        return (
            Action("compare.before", ("left",), "Run before", text, lambda page: page.choose(-1), "run"),
            Action("compare.next", ("right",), "Next run", text, lambda page: page.choose(1), "run"),
            Action("compare.look", ("o",), "Look at this run", "look at the run chosen, on all screens",
                   lambda page: page.look(), "look at it"),
            Action("compare.by", ("tab",), "Compare by ...", "by category, layer, phase or owner; the reference "
                   "experiment's table", lambda page: page.next_mode(), "compare by"),
            Action("compare.base", ("enter",), "Compare with this run", "the run that differences are from",
                   lambda page: page.make_base(), "compare with it"),
            Action("compare.drop", ("delete", "-"), "Forget this run", "forget a run that has ended",
                   lambda page: page.forget()),
            *moves("scroll", "scroll"),
        )  # fmt: skip

    def topic(self) -> Topic:
        """The explanation of the rows that are compared."""
        texts = (
            "What filled the memory at each run's highest peak, by category. The first column is the run that all "
            "others are compared with, the earliest or the first file named; behind every other figure stands its "
            "difference from it: what is saved has a minus. Last comes what was predicted of the run on the screens.",
            "What each layer keeps for backward as forward ends: one instant in every run, so that a difference is "
            "what a change saves. Whoever saves most, in the run chosen against the base, comes first. Of a "
            "checkpointed layer its input is left; the rest is computed again.",
            "What each layer held at the run's highest peak: its parameters, gradients, optimizer state and "
            "activations together. Peaks of two runs may be two instants, one in forward and one in the optimizer "
            "step: then a difference is of what is held there as well. Layers are matched by name.",
            "The most that was allocated while a phase went on, over the steps that are kept of each run.",
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
        """Choose another run."""
        self.selected = max(0, min(self.selected + by, len(self.runs()) - 1))

    def next_mode(self) -> None:
        """Compare by something else."""
        self.mode, self.top = (self.mode + 1) % len(MODES), 0

    def make_base(self) -> None:
        """Compare with the run chosen."""
        self.base = self.selected

    def forget(self) -> None:
        """Drop a run that has ended from the list."""
        if self.selected >= len(self.state.runs):
            self.state.say("the prediction goes when its run does")
        elif self.selected == self.state.place:
            self.state.say("this run is still on the screens")
        else:
            self.state.forget(self.selected)
            self.base -= self.base > self.selected

    def look(self) -> None:
        """Have the run chosen on all screens."""
        self.control.look_at(self.selected)

    # --- what is compared -------------------------------------------------------------

    def runs(self) -> list[RunSummary]:
        """The state's runs, and at the end, once it is steady, the prediction of the one on the screens."""
        runs, predicted = self.state.runs, self.forecasts.of_shown()
        steady = self.state.run.steady and self.state.summary() is not None
        listed = isinstance(predicted, str) or predicted.run in (run.run for run in runs) or not steady
        return runs if isinstance(predicted, str) or listed else [*runs, predicted]

    def other(self, n_runs: int) -> int:
        """The run set against the base: the one chosen, or else the one on the screens, or else the next."""
        choices = (self.selected, self.state.place, *range(n_runs))
        return next((i for i in choices if i != self.base and i < n_runs), self.base)

    def parts(self, runs: list[RunSummary]) -> tuple[int, int, list[Part]]:
        """The base and the run that is set against it, and their difference."""
        other = self.other(len(runs))
        return self.base, other, difference_of(runs[self.base].by_owner, runs[other].by_owner)

    def lines(self, runs: list[RunSummary]) -> list[Line]:
        """The rows of the mode that is on, with the sum where there is one."""
        if self.mode == HIGHEST:
            return [(p.title, [run.by_phase.get(p) for run in runs], None) for p in PHASES
                    if any(p in run.by_phase for run in runs)]  # fmt: skip
        if self.mode in (LAYERS, SAVED):
            return self._by_layer([run.by_layer if self.mode == LAYERS else run.saved_by_layer for run in runs])
        found: list[Line] = [(c.info.title, [run.peak[c] for run in runs], c) for c in Category
                             if any(run.peak[c] for run in runs)]  # fmt: skip
        return [*found, ("all", [run.peak_bytes for run in runs], None)]

    def _by_layer(self, runs: list[dict[str, int] | None]) -> list[Line]:
        """A row a layer; of what is saved, whoever saves most first."""
        names = dict.fromkeys(name for layers in runs for name in layers or ())
        found: list[Line] = [
            (name or NO_LAYER, [None if r is None else r.get(name, 0) for r in runs], None) for name in names
        ]
        if self.mode == SAVED:
            other = self.other(len(runs))
            found.sort(key=lambda line: (line[1][other] or 0) - (line[1][self.base] or 0))
        return [*found, ("all", [None if r is None else sum(r.values()) for r in runs], None)]

    def table(self) -> Table | None:
        """All runs and rows; bytes as whole numbers."""
        runs = self.runs()
        if not runs:
            return None
        if self.mode == OWNERS:
            base, other, parts = self.parts(runs)
            heads = [f"{runs[i].origin} {runs[i].label}" for i in (base, other)]
            return [["category", "owner", *heads, "difference"], *(
                [part.category.key, name, str(before), str(after), str(after - before)]
                for part in parts
                for name, before, after in (("", part.base_bytes, part.bytes), *(t[:3] for t in part.terms))
            )]  # fmt: skip
        if self.mode == REFERENCE:
            cells = [[run.origin, run.label, *map(_whole, table_row(run))] for run in runs]
            return [["run", "settings", *TABLE_HEADS], *cells]
        heads = [f"{run.origin} {run.label}" for run in runs]
        return [["bytes", *heads], *([name, *map(_whole, sizes)] for name, sizes, _ in self.lines(runs))]

    # --- drawing ----------------------------------------------------------------------

    def rows(self, width: int, height: int) -> list[Row]:
        """The runs, and the comparison."""
        runs, palette = self.runs(), self.palette
        if not runs:
            text = "No run has ended a step yet. Change something on screen 4; every run stays here to compare."
            return [Row(), *paragraph(text, width, palette.dim)]
        self.selected = max(0, min(self.selected, len(runs) - 1))
        self.base = max(0, min(self.base, len(runs) - 1))
        unit = unit_for(max(run.peak_bytes for run in runs), self.state.units)
        name = "bytes" if self.mode == OWNERS else unit.name
        title = Row().add(f" {MODES[self.mode]}", palette.bold).add(f"  {name}", palette.dim)
        below = self._footnote(width)
        height -= len(below)
        if self.mode == REFERENCE:
            if (room := height - 2) < len(runs):
                title.add(f"  {room} of {len(runs)} runs, ↑ ↓ to the others", palette.busy)
            return [title, *self._reference(runs, unit, width, height - 1), *below]
        heads, lines = self._owners(runs, width) if self.mode == OWNERS else self._lines(runs, unit, width)
        listed = self._listed(len(runs), max(LEGEND_ROWS, height - len(heads) - len(lines) - 2))
        if len(listed) < len(runs):
            title.add(f"  {len(listed)} of {len(runs)} runs, ← → to the others", palette.busy)
        if title.width + len(LEGEND_HEAD) + 1 < width:
            title.right(LEGEND_HEAD, width - 1, palette.dim)
        rows = [title, *self._legend(runs, listed, unit, width), *heads]
        body = max(1, height - len(rows) - 1)
        self.top = max(0, min(self.top, len(lines) - body))
        return rows + lines[self.top : self.top + body] + below

    def _owners(self, runs: list[RunSummary], width: int) -> tuple[list[Row], list[Row]]:
        """Heads and rows of the difference of two runs in named terms."""
        if len(runs) < 2:
            return [], [Row().add(" A difference takes two runs.", self.palette.dim)]
        base, other, parts = self.parts(runs)
        marks = ["~" * runs[i].predicted for i in (base, other)]
        heads = peak_rows({_letter(i): runs[i] for i in (base, other)}, width, self.palette)
        return heads, owner_rows(parts, marks, width, self.palette)

    def _lines(self, runs: list[RunSummary], unit: Unit, width: int) -> tuple[list[Row], list[Row]]:
        """Heads and rows of the runs that have a column."""
        found, shown = self.lines(runs), self._shown(len(runs), width)
        found, edge = self._named(found, width - 1 - FIGURE * (2 * len(shown) - 1))
        heads = [self._instants(runs, shown, width)] * (self.mode == LAYERS)
        if self.mode == SAVED:
            heads += self._saved_most(found[:-1], runs, shown, unit, width)
        return [*heads, self._heads(shown, edge)], [self._line(line, runs, shown, unit, edge) for line in found]

    def _saved_most(
        self, layers: list[Line], runs: list[RunSummary], shown: list[int], unit: Unit, width: int
    ) -> list[Row]:
        """The layers that keep the fewest activations against the base, for each run with a column."""
        known = [i for i in shown if runs[i].saved_by_layer is not None]
        texts = []
        for i in (i for i in known if self.base in known and i != self.base and not runs[i].predicted):
            by_name = {name: (sizes[i] or 0) - (sizes[self.base] or 0) for name, sizes, _ in layers}
            least = min(by_name.values(), default=0)
            if (text := difference(least, 0, unit)).startswith("-"):
                names = [name for name, by in by_name.items() if difference(by, 0, unit) == text]
                texts.append(f"{_letter(i)} in {_together(names)}, {text}{' each' * (len(names) > 1)}")
        row = Row().add(shorten(f" saved most activations: {'; '.join(texts)}", width - 1), self.palette.good)
        without = ", ".join(_letter(i) for i in shown if i not in known)
        none = Row().add(f" no forward ended in {without}: nothing to compare there", self.palette.busy)
        return [row] * bool(texts) + [none] * bool(without)

    def _instants(self, runs: list[RunSummary], shown: list[int], width: int) -> Row:
        """The phase of each column's peak: a difference between two phases is not what a change saves."""
        phases = {_letter(i): runs[i].peak_where.rsplit(", ", 1)[-1].removesuffix(" step") for i in shown}
        text = ", ".join(f"{letter} in {phase}" for letter, phase in phases.items())
        apart = len({*phases.values()}) > 1
        text = f" peaks: {text}{': not one instant' * apart}"
        return Row().add(shorten(text, width - 1), self.palette.busy if apart else self.palette.dim)

    def _footnote(self, width: int) -> list[Row]:
        """The caveat of the prediction; in the list of owners, the reason why there is none."""
        predicted = self.forecasts.of_shown()
        word = predicted * (self.mode == OWNERS) if isinstance(predicted, str) else predicted.caveat
        return [Row(), *paragraph(word, width, self.palette.dim)] if word else []

    def _listed(self, n_runs: int, room: int) -> list[int]:
        """The runs that are listed: the base, the one chosen, the latest, and those next to the one chosen."""
        near = sorted(range(n_runs), key=lambda i: abs(i - self.selected))
        return sorted(list(dict.fromkeys((self.base, self.selected, n_runs - 1, *near)))[:room])

    def _legend(self, runs: list[RunSummary], listed: list[int], unit: Unit, width: int) -> list[Row]:
        """The legend: the letter of each run."""
        word = "now" if self.state.live else "shown" if self.state.several else ""
        common = set.intersection(*(set(run.label.split()) for run in runs))
        rows = []
        for i in listed:
            run = runs[i]
            style = self.palette.cursor if i == self.selected else self.palette.plain
            row = Row().add(f" {_letter(i)} ", self.palette.accent if i != self.selected else style)
            row.add(f"{_figure(run, run.peak_bytes, unit):>8} ", style)
            room = max(8, width - row.width - 29)
            name = run.origin + f" ×{run.times}" * (run.times > 1)
            name += ", 1 step only" * (run.steps == 1)
            name += f", {word}" if word and i == self.state.place and not run.predicted else ""
            # What tells it from the others; the base has all.
            parts = [part for part in run.label.split() if i == self.base or part not in common]
            label = whole_parts(parts, " ", room - len(name) - 2, counted=True)
            row.add(f"{shorten(f'{name}  {label}', room):<{room}}", style)
            speed = "" if run.median_seconds is None else duration(run.median_seconds)
            where = run.peak_where.removesuffix(" step")
            rows.append(row.right(f" {speed}  {where}"[:27], width - 1, self.palette.dim))
        return rows

    def _shown(self, n_runs: int, width: int) -> list[int]:
        """The base, and as many others as there is room for, among them the one it is set against."""
        others = [i for i in range(n_runs) if i != self.base]
        room, other = max(1, (width - NAME - FIGURE - 1) // (2 * FIGURE)), self.other(n_runs)
        at = others.index(other) if other in others else 0
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

    def _reference(self, runs: list[RunSummary], unit: Unit, width: int, height: int) -> list[Row]:
        """A row a run, in the columns of the reference experiment, and the peak."""
        # Where names would have no room, what was loaded has none: the first column.
        first = int(width - len(TABLE_HEADS) * (FIGURE + 2) < NAME)
        name = width - len(TABLE_HEADS[first:]) * (FIGURE + 2) - 2
        row = Row().add(" run").to(name)
        for head in TABLE_HEADS[first:]:
            row.right(head, row.width + FIGURE + 2, self.palette.dim)
        rows = [row]
        self.top = max(0, min(self.top, len(runs) - height + 1))
        for i, run in enumerate(runs[self.top : self.top + height - 1], self.top):
            style = self.palette.cursor if i == self.selected else self.palette.plain
            row = Row().add(f" {shorten(f'{run.origin} {run.label}', name - 2):<{name - 1}}", style)
            for size in table_row(run)[first:]:
                row.add(f"{_figure(run, size, unit):>{FIGURE + 2}}", style)
            rows.append(row)
        return rows


def _letter(index: int) -> str:
    """A, B ... Z, then a ...: fifty runs have one each."""
    return chr(ord("A") + index) if index < 26 else chr(ord("a") + index - 26)


def _figure(run: RunSummary, size: int | None, unit: Unit) -> str:
    """A size of a run; what is predicted has a mark."""
    return f"~{unit.show(size)}" if run.predicted and size is not None else unit.show(size)


def _together(names: list[str]) -> str:
    """Layers in a few words: `layers.0…23`, `8 of layers.0…23`."""
    if len(names) <= 2:
        return " and ".join(names)
    stems, numbers = {name.rpartition(".")[0] for name in names}, [name.rpartition(".")[2] for name in names]
    if len(stems) > 1 or not all(number.isdigit() for number in numbers):
        return f"{names[0]} and {len(names) - 1} others"
    first, last = min(map(int, numbers)), max(map(int, numbers))
    return f"{len(names)} of " * (len(names) <= last - first) + f"{stems.pop()}.{first}…{last}"


def _whole(size: int | None) -> str:
    return UNKNOWN if size is None else str(size)
