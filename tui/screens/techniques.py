"""Techniques: every setting with its values; changes are collected and applied as one restart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from ...engine.config import Option, RunConfig, Value, show
from ...engine.technique import Technique
from ...engine.techniques import label, memory_key
from ..actions import Action, changes, moves
from ..changes import choices, offered
from ..draw import Row, whole_clauses, wrap
from ..state import Message
from ..units import UNKNOWN, difference, shorten
from .best_change import best_change
from .page import Page, Table, Topic, scrolled
from .technique_groups import Kind, ListRow, Told, arranged, folded_row, tabs_row

FIGURES = (9, 9, 6, 10)
"""Cells of predicted peak, predicted change, whether it fits, measured change."""

PLAIN_FIGURES = (0, 8, 5, 9)
"""Cells of the same figures where there is little room."""

NARROW = 77
"""Columns below which the list moves closer together."""


def _columns(width: int) -> tuple[int, int, int, tuple[int, int, int, int]]:
    """Cells of title, present value and new value, and of the figures."""
    if width < NARROW:
        return 15, 9, 10, PLAIN_FIGURES
    extra = min((width - NARROW) // 3, 14)
    return 18 + extra, 10 + extra, 11 + extra, FIGURES


class Line(NamedTuple):
    """One setting: a technique's switch, one of its details, or the workload's."""

    key: str
    title: str
    option: Option
    technique: Technique | None
    detail: bool = False

    @property
    def group(self) -> str:
        """The group it stands in; the workload's own settings are about the batch."""
        return self.technique.group if self.technique is not None else "batch"

    def now(self, config: RunConfig) -> str:
        """Its value in a configuration, as it has an effect."""
        is_switch = self.technique is not None and not self.detail
        return self.technique.in_effect(config) if self.technique and is_switch else config.shown(self.option.name)


class TechniquesPage(Page):
    """All settings, with the predicted effect of each."""

    place = 4
    title = "techniques"
    lead = "letters or "
    changing = "changes are collected, enter applies"
    changing_script = "changes are collected, enter says where the script sets them"

    selected = 0
    top = 0
    _announced: Message | None = None
    """That the next undo restarts the run; it does as long as that is to be seen."""

    def make_actions(self) -> tuple[Action, ...]:
        """A letter changes a setting; enter applies all changes as one restart."""
        self.expanded: set[str] = set()
        self._named: Mapping[str, Value] = {}
        text = "change the selected setting"
        return (
            *moves("select a setting"),
            Action("techniques.before", ("left",), "Value before", text, lambda page: page.change(-1), "change"),
            Action("techniques.next", ("right",), "Next value", text, lambda page: page.change(1), "change"),
            *changes(offered(), _collect, acts=False),
            Action("techniques.details", ("tab",), "Details", "open or close the details of a technique",
                   lambda page: page.toggle(), "details"),
            Action("techniques.apply", ("enter",), "Apply the changes", "apply all changes as one restart",
                   lambda page: page.control.apply(), "apply", acts=True),
        )  # fmt: skip

    def topic(self) -> Topic:
        """The selected setting."""
        lines = self.lines()
        line = lines[min(self.selected, len(lines) - 1)]
        if line.technique is None or line.detail:
            return Topic(line.title, f"{line.option.summary[0].upper()}{line.option.summary[1:]}.")
        return Topic(line.title, f"{line.technique.title} {line.technique.summary}. {line.technique.formula}.")

    # --- actions ------------------------------------------------------------------

    def move(self, by: int) -> None:
        """Select another setting."""
        self.selected = max(0, min(self.selected + by, len(self.lines()) - 1))

    def change(self, by: int) -> None:
        """Step the selected setting's value."""
        lines = self.lines()
        option = lines[min(self.selected, len(lines) - 1)].option
        if (wanted := self.changes.wanted()) is not None:
            self.changes.collect(option, self.changes.next_value(option, wanted[option.name], by, around=False))

    def undo(self) -> None:
        """Take back the last change collected; if there is none, go back to the run before, once that was announced."""
        if self.changes.collected:
            self.changes.undo()
        elif (before := self.control.before) is None or self.state.message is self._announced is not None:
            self.control.go_back()
        else:
            self.state.say(f"nothing collected; once more restarts with the configuration before: {label(before)}")
            self._announced = self.state.message

    def toggle(self) -> None:
        """Open or close the details of the selected technique."""
        lines = self.lines()
        line = lines[min(self.selected, len(lines) - 1)]
        if line.technique is None or len(line.technique.options) == 1:
            self.state.say(f"{line.title} has no details")
            return
        self.expanded ^= {line.technique.name}
        self.select(line.technique.switch)

    def select(self, option: Option) -> None:
        """Put the selection on a setting."""
        self.selected = next(i for i, line in enumerate(self.lines()) if line.option.name == option.name)

    # --- what is listed -------------------------------------------------------------

    def lines(self) -> list[Line]:
        """The lines that can be selected: details only of what is expanded."""
        found: list[Line] = []
        for key, title, option, technique in self.changes.listed():
            found.append(Line(key, title, option, technique))
            if technique is not None and option.name in self.expanded:
                found += [Line("", o.name, o, technique, detail=True) for o in technique.options[1:]]
        return found

    def candidate(self, line: Line, wanted: RunConfig, base: RunConfig) -> RunConfig | None:
        """The collected changes and this setting's, as its key would change it; None: no other value."""
        name = line.option.name
        if wanted[name] != base[name]:
            return wanted
        value = self._named.get(name)
        if value is None or value == wanted[name]:
            value = self.changes.next_value(line.option, wanted[name], 1, around=True)
        return None if value is None else wanted.with_({name: value})

    def against(self, line: Line, wanted: RunConfig, base: RunConfig) -> RunConfig:
        """The configuration without a setting's change: all that is collected but this one, if that can be had."""
        rest = wanted.with_({line.option.name: base[line.option.name]})
        return rest if self.changes.problem(rest) is None else base

    def figures(self, config: RunConfig, base: RunConfig) -> tuple[str, str, str, str]:
        """Predicted peak, change and whether it fits; and the change as measured, once it was run."""
        show = self.state.unit
        asked = self.forecasts.predictions
        found, now = (asked.of(c) if asked is not None else None for c in (config, base))
        peak = UNKNOWN if found is None else f"~{show.show(found.peak_bytes)}"
        change = UNKNOWN if found is None or now is None else difference(found.peak_bytes, now.peak_bytes, show)
        fits = UNKNOWN if found is None or self._limits_a_cpu(config) else "yes" if found.fits else "no"
        return peak, change if change == UNKNOWN else f"~{change}", fits, self.measured_change(config, base)

    def _limits_a_cpu(self, config: RunConfig) -> bool:
        """True if the memory limit is a CPU run's: what a GPU needs, with its libraries, is not held against it."""
        here = self.state.environment
        return bool(config.memory_limit_bytes) and here is not None and not here.on_gpu

    def measured_change(self, config: RunConfig, base: RunConfig) -> str:
        """Between two configurations that have both run in this session."""
        if memory_key(config) == memory_key(base):  # it makes no difference to memory
            return UNKNOWN
        return difference(self.measured(config), self.measured(base), self.state.unit)

    def measured(self, config: RunConfig) -> int | None:
        """Peak of a configuration that has run in this session."""
        return self.state.measured.get(memory_key(config))

    def table(self) -> Table | None:
        """Every setting with what is known of changing it."""
        base, wanted = self.changes.base(), self.changes.wanted()
        if base is None or wanted is None:
            return None
        self._named = self.forecasts.named()
        cells = []
        for line in self.lines():
            config = self.candidate(line, wanted, base)
            known = self.figures(config, self.against(line, wanted, base)) if config is not None else (UNKNOWN,) * 4
            changed = show(config[line.option.name]) if config is not None else UNKNOWN
            cells.append([line.option.name, line.now(base), changed, *known])
        return [["setting", "now", "if changed", "peak", "change", "fits", "measured change"], *cells]

    # --- drawing ----------------------------------------------------------------

    def rows(self, width: int, height: int) -> list[Row]:
        """The list, and below it what is selected."""
        base, wanted = self.changes.base(), self.changes.wanted()
        if base is None or wanted is None:
            return [Row(), Row().add(" No run has started yet.", self.palette.dim)]
        self._named = self.forecasts.named()
        lines = self.lines()
        self.selected = min(self.selected, len(lines) - 1)
        below = 8 if height < 30 else 10
        listed, hidden = self._list(lines, base, wanted, width, max(3, height - below - 1))
        return [self._headings(width), *listed, *self._about(lines[self.selected], wanted, width, below, hidden)]

    def _list(
        self, lines: list[Line], base: RunConfig, wanted: RunConfig, width: int, room: int
    ) -> tuple[list[Row], int]:
        """The settings in so many rows, and how many are out of sight below."""
        arrangement = arranged([line.group for line in lines], self.selected, room)
        fixed = [row for row in arrangement if row.kind is Kind.TABS]
        moving = arrangement[len(fixed) :]
        at = next(i for i, row in enumerate(moving) if row.line == self.selected)
        body = room - len(fixed)
        self.top = scrolled(self.top, at, body, len(moving))
        rows = []
        for each in (*fixed, *moving[self.top : self.top + body]):
            if each.kind is Kind.SETTING:
                rows.append(self._line(lines[each.line], base, wanted, each.line == self.selected, width))
            else:
                rows.append(self._group(each, lines, base, wanted, width))
        return rows + [Row()] * (room - len(rows)), len(moving) - self.top - body

    def _group(self, row: ListRow, lines: list[Line], base: RunConfig, wanted: RunConfig, width: int) -> Row:
        """The row of a group: its name, with its settings where it is folded."""
        if row.kind is Kind.HEADING:
            return Row().add(f" {row.group}", self.palette.bold)
        if row.kind is Kind.TABS:
            names = list(dict.fromkeys(line.group for line in lines))
            set_in = [line.group for line in lines if wanted[line.option.name] != line.option.default]
            return tabs_row(names, row.group, [set_in.count(name) for name in names], self.palette)
        inside = [line for line in lines if line.group == row.group]
        *_, fits, measured = _columns(width)[3]
        # Those with a letter first: they are used most.
        told = [
            self._told(line, base, wanted) for line in sorted(inside, key=lambda line: not line.key) if not line.detail
        ]
        change = self._best_in(inside, base, wanted)
        return folded_row(row.group, told, change, width - 1 - (fits + measured) * bool(change), self.palette)

    def _told(self, line: Line, base: RunConfig, wanted: RunConfig) -> Told:
        name, palette = line.option.name, self.palette
        is_default = wanted[name] == line.option.default
        style = palette.busy if wanted[name] != base[name] else palette.dim if is_default else palette.plain
        return Told(f"{line.title} {line.now(wanted)}", style, is_default)

    def _best_in(self, lines: list[Line], base: RunConfig, wanted: RunConfig) -> str:
        """The largest predicted saving of one setting among some; empty: none is known."""
        asked, savings = self.forecasts.predictions, []
        if asked is None:
            return ""
        for line in lines:
            config = self.candidate(line, wanted, base)
            found, now = (asked.of(c) if c else None for c in (config, self.against(line, wanted, base)))
            if found is not None and now is not None and found.peak_bytes < now.peak_bytes:
                savings.append((found.peak_bytes - now.peak_bytes, found, now))
        if not savings:
            return ""
        _, found, now = min(savings, key=lambda saving: saving[0])
        return f"~{difference(found.peak_bytes, now.peak_bytes, self.state.unit)}"

    def _headings(self, width: int) -> Row:
        title, now, _, figures = _columns(width)
        row = Row().to(3 + title).add("now", self.palette.dim).to(3 + title + now).add("if changed", self.palette.dim)
        edge = width - 1 - sum(figures)
        for cells, head in zip(figures, self._heads(figures), strict=True):
            edge += cells
            if cells:
                row.right(head, edge, self.palette.dim)
        return row

    def _heads(self, figures: tuple[int, ...]) -> tuple[str, ...]:
        """The heads of the figures; a run on a CPU and a prediction of a GPU are not subtracted."""
        here = self.state.environment
        if here is None or here.on_gpu:
            return ("peak", "change", "fits", "measured")
        return ("GPU peak", "change" if figures[0] else "on GPU", "fits", "on a CPU")

    def _line(self, line: Line, base: RunConfig, wanted: RunConfig, selected: bool, width: int) -> Row:
        palette, name = self.palette, line.option.name
        style = palette.cursor if selected else palette.plain
        dim = palette.cursor if selected else palette.dim
        more = line.technique is not None and len(line.technique.options) > 1 and not line.detail
        fold = ("-" if name in self.expanded else "+") if more else " "
        row = Row().add(f" {line.key or ' '} ", palette.cursor if selected else palette.accent)
        title = f"    {name.rpartition('.')[2]}" if line.detail else f"{fold} {line.title}"
        title_cells, now_cells, change_cells, figure_cells = _columns(width)
        row.add(f"{shorten(title, title_cells - 1):<{title_cells}}", style)
        config, collected = self.candidate(line, wanted, base), wanted[name] != base[name]
        now = line.now(base)
        # Where another setting decides, which one takes the place of a change that would do nothing.
        overruled = now != base.shown(name) and not collected
        row.add(f"{shorten(now, now_cells + change_cells * overruled - 1 + overruled):<{now_cells}}", style)
        arrow = ("-> " if palette.ascii else "→ ") if collected else ""
        new = shorten(show(config[name]), change_cells - len(arrow) - 1) if config is not None else UNKNOWN
        new_style = palette.cursor if selected else palette.busy if collected else dim
        row.add("" if overruled else f"{arrow + new:<{change_cells}}", new_style)
        row.add(" " * (width - 1 - sum(figure_cells) - row.width), style)
        known = self.figures(config, self.against(line, wanted, base)) if config is not None else (UNKNOWN,) * 4
        for text, cells in zip(known, figure_cells, strict=True):
            if cells:
                row.add(f"{text:>{cells}}", dim if text == UNKNOWN else style)
        return row.add(" " * (width - row.width), style) if selected else row

    def _about(self, line: Line, wanted: RunConfig, width: int, room: int, hidden: int) -> list[Row]:
        """Lines out of sight; values, effect, bytes, and where that is written; obstacles."""
        palette, dash = self.palette, "-" if self.palette.ascii else "─"
        more = f"{dash} {hidden} more below " if hidden > 0 else ""
        rows = [Row().add(f"{more}{dash * (width - len(more))}", palette.dim), *self._values(line, wanted, width)]
        if problem := self._problem(line, wanted):
            rows += [Row().add(f" {text}", palette.busy) for text in wrap(problem, width - 2)]
        what = line.technique.summary if line.technique is not None and not line.detail else line.option.summary
        texts = [(what, palette.plain)]
        if line.technique is not None and (caution := line.technique.caution(wanted)):
            texts = [(caution, palette.busy), *texts]
        if line.technique is not None:
            texts += [(line.technique.formula, palette.dim)] if not line.detail else []
        verdict = self._verdict(width)
        for text, style in texts:
            rows += [
                Row().add(f" {part}", style) for part in whole_clauses(text, width - 2, room - len(verdict) - len(rows))
            ]
        if line.technique is not None and len(rows) < room - 1:
            rows.append(Row().add(f" {shorten(line.technique.source, width - 2)}", palette.off))
        rows = rows[: room - len(verdict)]
        rows += [Row()] * (room - len(verdict) - len(rows))
        return rows + verdict

    def _saves_most(self, width: int) -> list[Row]:
        """Among all values of all techniques, where the list has the next ones."""
        state = self.state
        shows = (
            self.forecasts.answers,
            state.run.config or self.changes.base(),
            state.environment,
            state.acts,
            state.unit,
            width,
        )

        def draw() -> list[Row]:
            return [Row().add(f" {line}", self.palette.accent) for line in best_change(self.forecasts, width - 2)]

        return self.kept("saves most", shows, draw)

    def _problem(self, line: Line, wanted: RunConfig) -> str | None:
        """The reason why the key's next value cannot be had with the others as they are, or None."""
        base = self.changes.base()
        config = self.candidate(line, wanted, base) if base is not None else None
        # What stands in the way of the changes collected is said in any case.
        reason = self.changes.problem(config) if config is not None and config != self.changes.wanted() else None
        return f"{show(config[line.option.name])}: {reason}" if config is not None and reason else None

    def _values(self, line: Line, wanted: RunConfig, width: int) -> list[Row]:
        """All values of the selected setting; the unavailable ones greyed, with the reason of the first."""
        palette, current = self.palette, wanted[line.option.name]
        is_current = line.option.name not in wanted.foreign
        row, reasons = Row().add(" "), dict[Value, str]()
        rows = [row]
        for value in choices(line.option, current):
            reason = self.changes.unavailable(line.option, value)
            if reason is not None:
                reasons[value] = reason
            text = f"[{show(value)}{self._change(line, value, wanted)}]"
            chosen = value == current and is_current
            text = text if chosen else f" {text[1:-1]} "
            if row.width + len(text) >= width:
                row = Row().add(" ")
                rows.append(row)
            row.add(text, palette.bold if chosen else palette.off if reason else palette.plain)
        rows += self._history(line, wanted, width)
        if not reasons:
            return rows
        by_reason: dict[str, list[str]] = {}
        for value, reason in reasons.items():
            by_reason.setdefault(reason, []).append(show(value))
        text = "; ".join(f"{reason}: {', '.join(names)}" for reason, names in by_reason.items())
        return rows + [Row().add(f" {part}", palette.off) for part in wrap(text, width - 2)]

    def _change(self, line: Line, value: Value, wanted: RunConfig) -> str:
        """The change of the predicted peak by going over to a value; empty: nothing by nature, or it is not known."""
        asked, config = self.forecasts.predictions, wanted.with_({line.option.name: value})
        if asked is None or memory_key(config) == memory_key(wanted):
            return ""
        found, now = asked.of(config), asked.of(wanted)
        if found is None or now is None:
            return ""
        return f" ~{difference(found.peak_bytes, now.peak_bytes, self.state.unit)}"

    def _history(self, line: Line, wanted: RunConfig, width: int) -> list[Row]:
        """Peaks measured in this session with other values of the selected setting, all else as wanted."""
        name, unit = line.option.name, self.state.unit
        known = {v: self.measured(wanted.with_({name: v})) for v in choices(line.option, wanted[name])}
        if len({memory_key(wanted.with_({name: value})) for value in known}) < len(known):
            return []  # it makes no difference to memory, and the others have not run
        texts = [f"{show(value)}: {unit.show(peak)}" for value, peak in known.items() if peak is not None]
        if not texts:
            return []
        return [Row().add(f" {shorten('measured peak, ' + unit.name + '  ' + '   '.join(texts), width - 2)}")]

    def _verdict(self, width: int) -> list[Row]:
        """The effect of enter, or the reason why it would have none."""
        palette, pending = self.palette, self.changes.pending
        if not pending:
            lines = wrap(f"no changes collected{self._predicted_for()}", width - 2)
            return [*self._saves_most(width), *(Row().add(f" {line}", palette.dim) for line in lines)]
        problem = self.changes.conflict()
        if problem:
            return [Row().add(f" {line}", palette.bad) for line in wrap(problem, width - 2)]
        changed = f"{len(pending)} change{'s' * (len(pending) > 1)}"
        applied = self.changes.applied
        said = "predicted" if self.forecasts.predictions and not self.forecasts.impossible() else "collected"
        text = f" {changed} {said}; {applied}" if applied else f" enter applies {changed} as one restart"
        wanted = self.changes.wanted()
        last = self.measured(wanted) if wanted is not None else None
        row = Row().add(text, palette.busy)
        if wanted is not None and (base := self.changes.base()) is not None:
            peak, change, *_ = self.figures(wanted, base)
            row.add(f"   peak {peak}, {change}" if change != UNKNOWN else "", palette.plain)
        return [row.add(f"   measured last time: {self.state.unit.full(last)}" if last else "", palette.plain)]

    def _predicted_for(self) -> str:
        """The GPU of the predictions; where it is not the run's, the way to have another."""
        predictions, here = self.forecasts.predictions, self.state.environment
        if predictions is None or not predictions.gpu_name or self.forecasts.impossible():
            return ""
        best = self.forecasts.strongest()
        counted = best is not None and best.tried < best.of  # above, as the changes that are tried
        count = 0 if counted else predictions.waiting()
        waiting = f", {count} being worked out" if count else ""
        whose = f" · ~ is predicted for {predictions.gpu_name}"
        if here is None or here.on_gpu:
            return f"{whose}{waiting}"
        elsewhere = "this run is on a CPU; another GPU: gpumem-tui config set gpu=NAME"
        return f"{whose} with its libraries' workspace{waiting}; {elsewhere}"


def _collect(page: TechniquesPage, option: Option, by: int, around: bool) -> None:
    if not page.changes.meaningless(option):
        page.select(option)
    page.control.collect(option, by, around)
