"""Step: a stacked area over one step, its phases, its peak, and a cursor."""

from __future__ import annotations

from ...engine.categories import N_CATEGORIES, Category
from ...engine.events import Phase, StepTrace
from ...engine.ledger import Ints, Ledger
from ..actions import Action, calling
from ..draw import Row
from ..units import count, duration, tail, unit_for
from ..widgets.area import area, column_of, columns
from .blocks import block_row, why_no_shape
from .page import Page, Topic

AXIS_WIDTH = 8
PHASE_SHORT = {Phase.FORWARD: "fwd", Phase.BACKWARD: "bwd", Phase.ZERO_GRAD: "zero"}


FAR = 1_000_000_000
CURSOR_MOVES = (
    ("left", "left", "Cursor left", -1, "move the cursor by a column"),
    ("right", "right", "Cursor right", 1, "move the cursor by a column"),
    ("far-left", "pageup", "Cursor far left", -8, "by eight columns"),
    ("far-right", "pagedown", "Cursor far right", 8, "by eight columns"),
)


class StepPage(Page):
    """One step, event by event."""

    place = 2
    title = "step"

    frozen: StepTrace | None = None
    """The trace looked at; None: always the latest complete one."""
    cursor: int | None = None
    """The instant pointed at; None: the peak."""
    window = (0.0, 1.0)
    """The part of the step on show."""
    _chart: tuple[tuple[object, ...], Ints, list[Row]] | None = None
    _width = 72

    def make_actions(self) -> tuple[Action, ...]:
        """Cursor, zoom, other steps."""
        return (
            *(Action(f"step.{name}", (key,), title, text, calling("move", by), "cursor" if abs(by) == 1 else "")
              for name, key, title, by, text in CURSOR_MOVES),
            Action("step.begin", ("home",), "Cursor to the beginning", "cursor to the beginning or end of the step",
                   lambda page: page.point(0)),
            Action("step.end", ("end",), "Cursor to the end", "cursor to the beginning or end of the step",
                   lambda page: page.point(FAR)),
            Action("step.zoom-in", ("+", "="), "Zoom in", "zoom about the cursor",
                   lambda page: page.zoom(0.5), "zoom"),
            Action("step.zoom-out", ("-",), "Zoom out", "zoom about the cursor", lambda page: page.zoom(2.0), "zoom"),
            Action("step.whole", ("0",), "The whole step", "the whole step", lambda page: page.zoom(FAR), "whole"),
            Action("step.peak", ("p",), "Cursor to the peak", "cursor to the peak, and let it follow the peak",
                   lambda page: page.follow_peak(), "peak"),
            Action("step.before", ("<", ","), "Step before", "other traced steps that are kept",
                   lambda page: page.other(-1), "steps"),
            Action("step.next", (">", "."), "Next step", "other traced steps that are kept",
                   lambda page: page.other(1), "steps"),
            Action("step.freeze", ("f",), "Freeze this step", "stay with this step, or follow the latest",
                   lambda page: page.freeze(), "freeze"),
        )  # fmt: skip

    def topic(self) -> Topic:
        """The chart."""
        return Topic(
            "one step, event by event",
            "Every allocation of one step, stacked by category, from 0 to the peak; the width is events, not time, "
            "which is the host's: it may be ahead of the GPU. Below, phases (z: zero_grad), the cursor, its time, and "
            "what is alive there: bytes by category and the largest tensors. ◆ marks the peak where the cursor is "
            "elsewhere.",
        )

    @property
    def ledger(self) -> Ledger | None:
        """The step on show."""
        if self.frozen is not None:
            return self.state.fold(self.frozen)
        return self.state.complete

    # --- actions ------------------------------------------------------------------

    def move(self, by: int) -> None:
        """Move the cursor by columns; at the edge of what is zoomed into, that moves along."""
        ledger = self.ledger
        if ledger is None:
            return
        shown = self._shown(ledger)
        column = self._column(ledger, shown) + by
        # Zoomed in far, an instant has several columns.
        while 0 <= column < len(shown) and shown[column] == self._instant(ledger):
            column += 1 if by > 0 else -1
        if 0 <= column < len(shown):
            self.cursor = int(shown[column])
            return
        begin, end = self._range(ledger)
        self.point(int(shown[0 if by < 0 else -1]) + by * max(1, (end - begin) // self._width))

    def point(self, instant: int) -> None:
        """Put the cursor at an instant, and bring that in sight."""
        ledger = self.ledger
        if ledger is None:
            return
        n = len(ledger.total)
        self.cursor = max(0, min(instant, n - 1))
        begin, end = self._range(ledger)
        if not begin <= self.cursor < end:
            begin = max(0, min(self.cursor - (end - begin) // 2, n - (end - begin)))
            self.window = (begin / n, self.window[1] - self.window[0] + begin / n)

    def zoom(self, factor: float) -> None:
        """Show a smaller or larger part of the step, the cursor staying where it is."""
        ledger = self.ledger
        if ledger is None:
            return
        n = len(ledger.total)
        at = self._instant(ledger) / n
        begin, end = self.window
        share = max(min(1.0, (end - begin) * factor), min(1.0, 8 / n))
        where = (at - begin) / (end - begin) if end > begin else 0.5
        begin = max(0.0, min(at - where * share, 1.0 - share))
        self.window = (begin, begin + share)

    def follow_peak(self) -> None:
        """Cursor to the peak, wherever that is in the steps to come."""
        ledger, self.cursor = self.ledger, None
        if ledger is not None:
            self.point(ledger.peak.event + 1)
            self.cursor = None

    def freeze(self) -> None:
        """Stay with the step on show, or follow the latest."""
        ledger = self.ledger
        self.frozen = None if self.frozen is not None else ledger.trace if ledger else None

    def leave(self) -> bool:
        """Follow the latest step and its peak."""
        away = self.frozen is not None or self.cursor is not None
        self.frozen = self.cursor = None
        return away

    def other(self, by: int) -> None:
        """Go to another kept trace; past the last one the latest is followed again."""
        kept = self.state.kept
        if not kept:
            return
        ledger = self.ledger
        steps, instants = [trace.step for trace in kept], len(ledger.total) if ledger is not None else 1
        at = steps.index(ledger.trace.step) if ledger is not None and ledger.trace.step in steps else len(kept) - 1
        self.frozen = None if at + by >= len(kept) else kept[max(0, at + by)]
        if self.cursor is not None and self.ledger is not None:  # as far into that step
            self.cursor = self.cursor * len(self.ledger.total) // instants

    def turned(self) -> None:
        """The step and the instant are another recording's."""
        self.leave()

    # --- what is on show --------------------------------------------------------------

    def _range(self, ledger: Ledger) -> tuple[int, int]:
        """First and last (exclusive) instant on show."""
        n = len(ledger.total)
        begin = min(round(self.window[0] * n), n - 1)
        return begin, max(begin + 1, min(n, round(self.window[1] * n)))

    def _shown(self, ledger: Ledger) -> Ints:
        """The instant of each column."""
        begin, end = self._range(ledger)
        return begin + columns(ledger.total[begin:end], self._width)

    def _instant(self, ledger: Ledger) -> int:
        return ledger.peak.event + 1 if self.cursor is None else min(self.cursor, len(ledger.total) - 1)

    def _at_column(self, ledger: Ledger, instant: int) -> int:
        """The column in which an instant lies; at an edge if it is out of sight."""
        begin, end = self._range(ledger)
        return column_of(instant - begin, self._width, end - begin)

    def _column(self, ledger: Ledger, shown: Ints) -> int:
        column = self._at_column(ledger, self._instant(ledger))
        return min(column, len(shown) - 1)

    # --- drawing ----------------------------------------------------------------

    def rows(self, width: int, height: int) -> list[Row]:
        """Title, chart, phases, and what is alive at the cursor."""
        ledger = self.ledger
        if ledger is None:
            return [Row(), Row().add(" No step has been traced yet.", self.palette.dim)]
        self._width = width - AXIS_WIDTH - 1
        below = max(6, min(height - 3 - 12, 13))  # on a tall screen, all ten of the largest
        chart_height = max(4, height - below - 3)
        shown, chart = self._charted(ledger, chart_height)
        column = self._column(ledger, shown)
        event = self._instant(ledger) - 1
        rows = [self._title(ledger, width), *chart, self._phases(ledger), self._pointer(ledger, column, event)]
        rows += self._at(ledger, event, width)
        return rows + self._largest(ledger, event, height - len(rows), width)

    def _charted(self, ledger: Ledger, height: int) -> tuple[Ints, list[Row]]:
        """The chart, drawn again only for another step or size."""
        top = max(ledger.peak.bytes, 1)
        key = (ledger, self._width, height, self.window, self.state.unit, self.palette)
        if self._chart is None or self._chart[0] != key:
            shown = self._shown(ledger)
            drawn = area(ledger.curve[:, shown], top, height, self.palette)
            rows = []
            labels = {0: top, height // 2: top // 2, height - 1: 0}
            for i, row in enumerate(drawn):
                label = self.state.unit.show(labels[i]) if i in labels else ""
                rows.append(Row().right(label, AXIS_WIDTH - 1, self.palette.dim).add(" ").extend(row))
            self._chart = (key, shown, rows)
        return self._chart[1], self._chart[2]

    def _title(self, ledger: Ledger, width: int) -> Row:
        """The step, its figures and its neighbours; what there is no room for goes, the least needed first."""
        trace, palette = ledger.trace, self.palette
        spans = trace.phases
        seconds = (spans[-1].end_us - spans[0].begin_us) / 1e6 if spans else None
        events, host = f"  {count(len(trace.events))} events", f"  {duration(seconds)} host"
        share = f"  {100 * (self.window[1] - self.window[0]):.0f} % of it" if self.window != (0.0, 1.0) else ""
        for some, gap in ((events + host, "   "), (host, "   "), (host, " "), ("", " ")):
            row = Row().add(f" step {trace.step}" if trace.step else " loading", palette.bold)
            row.add(f"{some}  peak ", palette.dim).add(self.state.unit.full(ledger.peak.bytes), palette.bold)
            row.add(share, palette.busy).add("  under way" * trace.is_open, palette.busy)
            row.add("  ended by an error" * trace.is_aborted, palette.bad)
            steps = self._steps(trace, gap)
            if row.width + len(steps) + 2 <= width:
                break
        return row.right(steps, width - 1, palette.busy if self.frozen is not None else palette.dim)

    def _steps(self, trace: StepTrace, gap: str) -> str:
        """The step before, a word on whether this one stays, and the step after."""
        steps = [kept.step for kept in self.state.kept]
        if trace.step not in steps:
            return ""
        at = steps.index(trace.step)
        before = f"< {steps[at - 1]}{gap}" if at else ""
        after = f"{gap}{steps[at + 1]} >" if at + 1 < len(steps) else ""
        return before + ("frozen" if self.frozen is not None else "latest") + after

    def _phases(self, ledger: Ledger) -> Row:
        """Names of the phases under the columns they take up."""
        palette = self.palette
        cells = [" "] * self._width
        first, last = self._range(ledger)
        for span in ledger.trace.phases:
            if span.phase is Phase.RECOMPUTE or span.end < first or span.begin + 1 >= last:
                continue
            begin, end = (self._at_column(ledger, i) for i in (span.begin + 1, max(span.begin + 1, span.end)))
            title = span.phase.title.removesuffix(" step")
            labels = (title, PHASE_SHORT.get(span.phase, title[:3]), title[:1])
            label = next((label for label in labels if len(label) < end - begin), title[:1])
            text = ("|" if palette.ascii else "│") + label
            for x, character in enumerate(text[: max(end - begin + 1, 1)], begin):
                if x < self._width:
                    cells[x] = character
        return Row().to(AXIS_WIDTH).add("".join(cells), palette.dim)

    def _pointer(self, ledger: Ledger, column: int, event: int) -> Row:
        """The cursor, and time and bytes there; the peak's place if it is elsewhere."""
        palette = self.palette
        peak_column = self._at_column(ledger, ledger.peak.event + 1)
        arrow, flag = ("^", "*") if palette.ascii else ("▲", "◆")
        marks = {column: (arrow, palette.accent)}
        if peak_column != column:
            marks[peak_column] = (flag, palette.busy)
        row = Row().to(AXIS_WIDTH)
        text = f" {duration(self._time_s(ledger, event))}" + (" peak" if event == ledger.peak.event else "")
        for x in sorted(marks):
            row.to(AXIS_WIDTH + x).add(*marks[x])
            if x == column:
                room = AXIS_WIDTH + (min((m for m in marks if m > x), default=self._width) - 1)
                row.add(text if row.width + len(text) <= room else "", palette.accent)
        if column == peak_column and column + len(text) >= self._width - 1:
            row = Row().right(text[1:] + " ", AXIS_WIDTH + column, palette.accent).add(arrow, palette.accent)
        return row

    def _time_s(self, ledger: Ledger, event: int) -> float | None:
        trace = ledger.trace
        if event < 0 or not trace.phases:
            return 0.0 if trace.phases else None
        return max(0, int(trace.events["time_us"][event]) - trace.phases[0].begin_us) / 1e6

    # --- at the cursor ------------------------------------------------------------

    def _at(self, ledger: Ledger, event: int, width: int) -> list[Row]:
        """The cursor's place and the bytes allocated there, by category."""
        palette, unit, trace = self.palette, self.state.unit, ledger.trace
        phase, micro_batch, module = ledger.where(event)
        sizes = ledger.at(event)
        row = Row().right(unit.show(sum(sizes.values())), AXIS_WIDTH - 1, palette.bold)
        row.add(f" {unit.name} ", palette.dim).add(phase.title if event >= 0 else "before the step")
        if trace.micro_batches > 1 and phase is not Phase.OPTIMIZER:
            row.add(f", micro-batch {micro_batch + 1} of {trace.micro_batches}", palette.dim)
        row.add("  ").add(tail(module, width - row.width - 1), palette.bold)
        figures = Row().add(" ")
        for category in sorted(Category, key=lambda c: -sizes[c])[:N_CATEGORIES]:
            text = f" {unit.show(sizes[category])}  "
            if sizes[category] and figures.width + 1 + len(text) <= width:
                figures.add(category.info.letter, palette.paint[category]).add(text)
        return [row, figures]

    def _largest(self, ledger: Ledger, event: int, room: int, width: int) -> list[Row]:
        """The ten largest live tensors, or so many as there is room for."""
        palette = self.palette
        if room < 2:
            return []
        blocks = ledger.largest(event, min(10, room - 1))
        unit = unit_for(max((block.bytes for block in blocks), default=0), self.state.units)
        head = Row().add(f" largest now, {unit.name}", palette.dim)
        head.right(why_no_shape(ledger, blocks), width - 1, palette.dim)
        return [head, *(block_row(block, unit, palette, width) for block in blocks)]
