"""Live: what fills the device now, what filled it at the peak, how far the edge is, and why."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from functools import partial

from ...engine.categories import Category
from ...engine.config import Option
from ...engine.events import Phase, StepTrace
from ...engine.ledger import Bytes
from ...engine.module_names import numbered_layers
from ...engine.run_events import RunEvent
from ..actions import Action, changes, moves
from ..changes import offered
from ..draw import Row, wrap
from ..event_log import Filter
from ..explain import explanations
from ..units import UNKNOWN, clock, count, difference, duration, percent, rate, shorten
from ..widgets.area import area, columns
from ..widgets.bars import bar
from ..widgets.ticks import ticks
from .best_change import best_change
from .device_bar import device_rows
from .page import Page, Table, Topic
from .topics import OTHERS, PARTS

SMALL = (Category.BUFFERS, Category.INPUTS, Category.WORKSPACE, Category.SLACK)
"""Together in one row, `OTHERS`, where there is no room for a row each."""

RARE = {Category.GATHERED, Category.COMMUNICATION, Category.HELD_BY_SCRIPT}
"""Categories of several ranks or of watched scripts: no row until something has been held."""

NAME_WIDTH, FIGURE_WIDTH = 17, 9
ROOMY = 26
"""Rows from which every category has a row of its own."""

PERCENT_WIDTH, PERCENT_FROM = 5, 70
"""Columns of a share of what is allocated, and columns of the screen from which it has room beside the bar."""

WIDE = 130

TRACING_WIDTH = 76
"""Columns from which the share of tracing has room."""

CRAMPED = 20
"""Rows up to which no category that has held nothing has a row."""


class LivePage(Page):
    """The bytes now and at the peak, by category."""

    place = 1
    title = "live"
    lead = "a letter changes a technique and restarts · z back · "
    advising = "a letter says where your script sets it · "
    changing = "a change restarts the run"
    changing_script = "a letter says where your script sets it"
    focus: str | Category | None = None
    """The part selected; None: none."""
    _alone: list[Category] = list(Category)  # noqa: RUF012

    def make_actions(self) -> tuple[Action, ...]:
        """A letter changes a technique and restarts; arrows select what `?` explains."""
        return (
            *changes(offered(), _flip, acts=True),
            *moves("select a part, for ? to explain", "? explains"),
        )

    def topic(self) -> Topic:
        """The part selected."""
        if isinstance(self.focus, Category):
            info = self.focus.info
            return Topic(f"{info.letter} {info.title}", f"{info.meaning} {info.note}".strip())
        if self.focus is not None:
            return Topic(self.focus, PARTS[self.focus])
        return Topic(
            "live",
            "What fills the GPU now, what filled it at the peak, and how far the edge is. Up and down select a part of "
            "the screen; ? then explains that part." + self._letters(),
        )

    def _letters(self) -> str:
        """The effect of letters, as a sentence; empty: they have none."""
        if not self.state.acts:
            return ""
        if self.changes.of_script:
            return " A letter says where your script sets a technique."
        return " Letters change a technique and restart the run."

    def move(self, by: int) -> None:
        """Select another part."""
        others = [] if SMALL[0] in self._alone else [OTHERS]
        parts: list[str | Category] = ["run", "device", *self._alone, *others, "why", "recompute"]
        at = parts.index(self.focus) + by if self.focus in parts else 0 if by > 0 else len(parts) - 1
        self.focus = parts[max(0, min(at, len(parts) - 1))]

    def leave(self) -> bool:
        """Select nothing."""
        selected, self.focus = self.focus is not None, None
        return selected

    def undo(self) -> None:
        """Back to the run before."""
        self.control.go_back()

    def table(self) -> Table:
        """Categories now and at the peak, whole bytes."""
        now = self.state.latest
        peak = self.state.peak.peak.by_category if self.state.peak else None
        cells = [[c.key, *(str(sizes[c]) if sizes else UNKNOWN for sizes in (now, peak))] for c in Category]
        return [["bytes", "now", "peak"], *cells]

    def rows(self, width: int, height: int) -> list[Row]:
        """Step, device, categories, the reason of the peak, what happened last."""
        run, roomy = self._marked("run", [self._step(width), *self._ranks(width)]), height >= ROOMY
        device = self._marked("device", device_rows(self.state, self.palette, width, self.forecasts.expandable_bytes))
        categories, recompute = self._categories(width, height), self._marked("recompute", self._recomputes(width))
        spare = height - sum(map(len, (run, device, categories, recompute)))
        lines = max(2, min(spare, 3))
        why = (self.state.peak, self.state.unit, width, lines)
        why_rows = self._marked("why", self.kept("why", why, partial(self._reason, width, lines)))
        spare -= len(why_rows) + 1  # what happened last is worth more than a blank
        rows: list[Row] = []
        blanks = (roomy, height > CRAMPED, roomy, False, roomy)
        for part, blank in zip((run, device, categories, why_rows, recompute), blanks, strict=True):
            rows += part + [Row()] * (blank and spare > 0)
            spare -= blank
        chart = self._chart(width, min(height - len(rows) - 4, 10))
        rows += self._last(width, height - len(rows) - len(chart))
        rows += [Row()] * (height - len(rows) - len(chart))
        return rows + chart

    def _marked(self, part: str | Category, rows: list[Row]) -> list[Row]:
        """The rows of a part, with a mark in front if it is the one selected."""
        if self.focus != part:
            return rows
        (text, style), *rest = rows[0].spans
        mark = (">" if self.palette.ascii else "▸", self.palette.accent)
        return [Row([mark, (text[1:], style), *rest], rows[0].width), *rows[1:]]

    def _chart(self, width: int, height: int) -> list[Row]:
        """The latest step at a glance, where there is room for it; screen 2 has it at length."""
        ledger = self.state.complete
        if ledger is None or height < 5:
            return []

        def draw() -> list[Row]:
            curve = ledger.curve[:, columns(ledger.total, width - 2)]
            drawn = area(curve, ledger.peak.bytes, height - 2, self.palette)
            step = f"step {ledger.trace.step}" if ledger.trace.step else "loading"
            title = Row().add(f" {step}", self.palette.bold)
            title.add(f"  up to {unit.full(ledger.peak.bytes)}, event by event", self.palette.dim)
            return [Row(), title, *(Row().add(" ").extend(row) for row in drawn)]

        unit = self.state.unit
        return self.kept("chart", (ledger, unit, width, height), draw)

    def _step(self, width: int) -> Row:
        """Figures of the last step, each in a place of its own."""
        run, palette = self.state.run, self.palette
        row = Row().add(" step ", palette.dim).add(f"{run.step or UNKNOWN!s:<7}", palette.bold)
        row.add(f"{duration(run.seconds):>8}").add(" wall", palette.dim).to(26)
        speed, unit = (run.rows_per_s, " rows/s") if run.tokens is None else (run.tokens_per_s, " tok/s")
        row.add(f"{rate(speed):>6}").add(unit, palette.dim).to(40)
        known = run.loss is not None and math.isfinite(run.loss)
        loss = format(run.loss, ".4f") if known else run.lost_loss or UNKNOWN
        row.add("loss ", palette.dim).add(loss, palette.bad if run.lost_loss else palette.plain).to(54)
        share = run.trace_share
        if width >= TRACING_WIDTH:
            row.add("tracing ", palette.dim).add(UNKNOWN if share is None else f"{100 * share:.1f} % of time")
        if run.parameters is not None and width >= WIDE:
            row.to(80).add(count(run.parameters)).add(" parameters", palette.dim)
            if run.trainable is not None and run.trainable != run.parameters:
                row.add(f", {count(run.trainable)} trained", palette.dim)
        return row

    def _ranks(self, width: int) -> list[Row]:
        """The rank on the screens, and which is the highest, by the allocators' counters; nothing of a run alone."""
        state, job = self.state, self.state.job
        if state.shown is None or len(job) < 2:
            return []
        row = Row().add(" rank ", self.palette.dim).add(f"{state.shown.id.rank}", self.palette.bold)
        row.add(f" of {len(job)}", self.palette.dim)
        peaks = {run.id.rank: state.run_list.state_of(run).peak_bytes for run in job}
        known = {rank: size for rank, size in peaks.items() if size is not None}
        if known:
            highest, lowest = (pick(known, key=known.__getitem__) for pick in (max, min))
            figures = f"all ranks {state.unit.full(known[highest])}"
            if known[highest] != known[lowest]:
                figures = f"highest rank {highest} {state.unit.show(known[highest])}"
                figures += f", lowest rank {lowest} {state.unit.full(known[lowest])}"
            row.to(26).add(shorten(figures, width - 27))
        return [row]

    # --- categories -----------------------------------------------------------

    def _categories(self, width: int, height: int) -> list[Row]:
        roomy, ever = height >= ROOMY, self.state.ever
        now = self.state.latest
        peak = self.state.peak.peak.by_category if self.state.peak else None
        scale = max((max(sizes.values()) for sizes in (now, peak) if sizes), default=0)
        totals = tuple(sum(sizes.values()) if sizes else 0 for sizes in (now, peak))
        rare = RARE if height > CRAMPED else set(Category)
        alone = [c for c in Category if (roomy or c not in SMALL) and (c in ever or c not in rare)]
        self._alone = alone
        rows = [self._headings(width)]
        unit = self.state.unit
        for category in alone:
            sizes = tuple(found[category] if found is not None else None for found in (now, peak))
            shares = tuple(self._percent(size, total) for size, total in zip(sizes, totals, strict=True))
            shows = (*sizes, *shares, category in ever, scale, unit, width)
            row = self.kept(category, shows, partial(self._category, category, sizes, shares, scale, width))
            rows += self._marked(category, row)
        if not roomy:
            rows += self._marked(OTHERS, [self._small(now, peak, width)])
        rows.append(self._total(now, peak, width))
        return rows

    def _second_column(self, width: int) -> int:
        return NAME_WIDTH + FIGURE_WIDTH + _percent_width(width) + 1 + self._bar_width(width) + 2

    def _bar_width(self, width: int) -> int:
        return (width - NAME_WIDTH - 2 * (FIGURE_WIDTH + _percent_width(width)) - 5) // 2

    def _headings(self, width: int) -> Row:
        state, palette, second = self.state, self.palette, self._second_column(width)
        now = "now" if state.current or state.over or state.now is None else "latest"
        row = Row().to(3).add(state.unit.name, palette.dim).right(now, NAME_WIDTH + FIGURE_WIDTH, palette.bold)
        if state.now is not None and not state.over:
            # An instant of a step under way, or the end of the latest traced: steps between may not be.
            trace = state.now.trace
            phase, micro_batch, _ = state.now.where(len(trace.events) - 1)
            at = "its end" if trace.is_complete else _within(phase, micro_batch, trace)
            step = f" step {trace.step}" if trace.step else " loading"
            short = (f" {at}", f" {phase.title}") if not trace.is_complete else (step,)
            row.add(_fitting((f"{step}, {at}", *short), second - row.width), palette.dim)
        row.to(second).right("peak", second + FIGURE_WIDTH, palette.bold)
        if state.peak is not None:
            peak = state.peak.peak
            step = f" step {peak.step}" if peak.step else " loading"
            at = f", {_within(peak.phase, peak.micro_batch, state.peak.trace)}" if peak.step else ""
            row.add(_fitting((f"{step}{at}", step), width - row.width), palette.dim)
        return row

    def _category(
        self, category: Category, sizes: tuple[int | None, ...], shares: tuple[str, ...], scale: int, width: int
    ) -> list[Row]:
        palette, info = self.palette, category.info
        seen = category in self.state.ever
        name_style = palette.plain if seen else palette.dim
        row = Row().add(" ").add(info.letter, palette.paint[category] if seen else palette.dim).add(" ")
        row.add(info.title, name_style)
        for start, size, share in zip((NAME_WIDTH, self._second_column(width)), sizes, shares, strict=True):
            style = palette.bad if category is Category.UNKNOWN and size else palette.plain if size else palette.dim
            row.to(start).right(self.state.unit.show(size), start + FIGURE_WIDTH, style)
            self._share(row, share, width)
            shown = size if size and share else 0
            row.extend(bar(shown, scale, self._bar_width(width), palette.ink[category], palette))
        return [row]

    def _percent(self, size: int | None, total: int) -> str:
        """A share, and none of what reads 0.0."""
        return percent(size, total) if size and float(self.state.unit.show(size)) else ""

    def _share(self, row: Row, share: str, width: int) -> None:
        """Percent, as far as there is room, and the space before the bar."""
        room = _percent_width(width)
        row.add(f"{share:>{room}}" * bool(room), self.palette.dim).add(" ")

    def _small(self, now: Bytes | None, peak: Bytes | None, width: int) -> Row:
        """Small categories in one row, named with their bytes where the bar would be, as far as there is room."""
        palette, unit = self.palette, self.state.unit
        row = Row().to(3).add(OTHERS)
        for start, sizes in ((NAME_WIDTH, now), (self._second_column(width), peak)):
            size = sum(sizes[c] for c in SMALL) if sizes is not None else None
            row.to(start).right(unit.show(size), start + FIGURE_WIDTH, palette.plain if size else palette.dim)
            self._share(row, self._percent(size, sum(sizes.values()) if sizes else 0), width)
            end = row.width + self._bar_width(width)
            parts = {category: sizes[category] for category in SMALL if sizes and sizes[category]}
            for category in sorted(parts, key=parts.__getitem__, reverse=True):
                if not float(figure := unit.show(parts[category])):
                    continue
                words = (f"{name} {figure}  " for name in (category.info.title, category.info.letter))
                row.add(next((text for text in words if row.width + len(text) - 2 <= end), ""), palette.dim)
        return row

    def _total(self, now: Bytes | None, peak: Bytes | None, width: int) -> Row:
        palette, unit = self.palette, self.state.unit
        row = Row().to(3).add("allocated", palette.dim)
        gauge = self.state.gauge if self.state.over else None
        total = sum(now.values()) if now is not None else gauge.allocated_bytes if gauge is not None else None
        row.right(unit.show(total), NAME_WIDTH + FIGURE_WIDTH, palette.bold).add(f" {unit.name}", palette.dim)
        on_cpu = self.state.environment is not None and not self.state.environment.on_gpu
        start = self._second_column(width)
        row.add(_fitting([", counted op by op"] * on_cpu, start - row.width), palette.dim)
        total = sum(peak.values()) if peak is not None else None
        row.to(start).right(unit.show(total), start + FIGURE_WIDTH, palette.bold).add(f" {unit.name}", palette.dim)
        run = self.state.run
        if total is not None and run.peak_bytes is not None and run.peak_bytes > total:
            row.add(f", untraced step {run.peak_step}: {unit.show(run.peak_bytes)}", palette.busy)
        return self._predicted(row, total, width)

    def _predicted(self, row: Row, peak_bytes: int | None, width: int) -> Row:
        """The predicted peak, and how far beyond it the measured one is, as far as there is room."""
        predicted, unit = self.forecasts.of_shown(), self.state.unit
        if isinstance(predicted, str):
            return row
        figure, beyond = f"~{unit.show(predicted.peak_bytes)}", ""
        if peak_bytes is not None and self.state.run.steady:
            beyond = difference(peak_bytes, predicted.peak_bytes, unit._replace(decimals=unit.decimals + 1))
        full, short = f", {figure} predicted{beyond and f', {beyond}'}", f", {figure} {beyond}".rstrip()
        for text in (full, short, f" {figure}"):
            if row.width + len(text) < width:
                return row.add(text, self.palette.dim)
        return row

    # --- words ------------------------------------------------------------------

    def _reason(self, width: int, most: int) -> list[Row]:
        """Two rows, whether they are needed or not; more if they are, and there is room."""
        state, palette = self.state, self.palette
        if state.peak is None:
            return [Row().add(" The first allocations will show here.", palette.dim), Row()]
        texts = [wrap(text, width - 2) for text in explanations(state.peak, state.unit)]
        lines = next((lines for lines in texts if len(lines) <= most), texts[-1][:most])
        return [Row().add(f" {line}") for line in [*lines, ""][: max(2, len(lines))]]

    def _recomputes(self, width: int) -> list[Row]:
        state, answers = self.state, self.forecasts.answers
        config = state.run.config or self.changes.base()
        keys = (state.peak, state.acts, state.over, state.environment, config, answers)
        shows = (*keys, state.run.last_recompute, len(state.run.lit), state.now and state.now.trace.names, state.unit)
        return self.kept("recompute", (*shows, width), lambda: self._recompute(width))

    def _recompute(self, width: int) -> list[Row]:
        """The layers as a strip that lights up while backward computes them again."""
        state, palette = self.state, self.palette
        layers = numbered_layers(state.now.modules) if state.now is not None else []
        event, keys = state.run.last_recompute, best_change(self.forecasts, width - 2)
        advice = [Row().add(f" {line}", palette.accent) for line in keys]
        if event is None or state.over:
            return advice or [Row().add(" no recompute", palette.dim)]
        row = Row().add(" ")
        row.extend(ticks(layers, set(state.run.lit), set(event.layers), min(48, width // 2 - 10), palette))
        name = event.layers[0].rsplit(".", 1)[-1]
        if len(event.layers) > 1:
            name += "–" + event.layers[-1].rsplit(".", 1)[-1]
        row.add(f" {len(set(state.run.lit)):>2}/{len(layers)} recomputed; layer {name:<3}", palette.dim)
        made = f" {state.unit.full(event.bytes)}" + (f" in {duration(event.ms / 1e3)}" if event.ms is not None else "")
        row.add(_fitting((f" made{made}", made), width - row.width), palette.dim)
        if len(keys) == 1 and row.width + len(keys[0]) + 3 < width:
            return [row.right(keys[0], width - 1, palette.accent)]
        return [row, *advice]

    def _last(self, width: int, room: int) -> list[Row]:
        """The latest that happened, newest last; steps and recomputes have places of their own."""
        room, log = max(0, min(room, 8)), self.state.logs[Filter.NOTABLE]
        latest = log[-1] if log else None
        return self.kept("last", (latest, room, width), partial(self._events, log, room, width))

    def _events(self, log: deque[RunEvent], room: int, width: int) -> list[Row]:
        recent = [log[i] for i in range(max(0, len(log) - room), len(log))]
        rows = []
        for event in recent:
            bad = event.is_problem
            row = Row().add(f" {clock(event.time_s):>7} ", self.palette.dim)
            rows.append(row.add(shorten(event.text, width - 10), self.palette.bad if bad else self.palette.dim))
        return rows


def _percent_width(width: int) -> int:
    return PERCENT_WIDTH if width >= PERCENT_FROM else 0


def _within(phase: Phase, micro_batch: int, trace: StepTrace) -> str:
    """A phase of a step: `optimizer`, `backward 2/4`."""
    title = phase.title.removesuffix(" step")
    several = trace.micro_batches > 1 and phase in (Phase.FORWARD, Phase.BACKWARD, Phase.RECOMPUTE)
    return f"{title} {micro_batch + 1}/{trace.micro_batches}" if several else title


def _fitting(texts: Sequence[str], room: int) -> str:
    """The first of some texts that there is room for; empty if there is for none."""
    return next((text for text in texts if len(text) < room), "")


def _flip(page: LivePage, option: Option, by: int, around: bool) -> None:
    page.control.flip(option, by, around)
