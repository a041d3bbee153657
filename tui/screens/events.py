"""Events: all that was told, newest last, and the details of one."""

from __future__ import annotations

from collections import deque
from itertools import islice

from rich.style import Style

from ...engine.config import show
from ...engine.run_events import (
    Loaded,
    LossNotFinite,
    MemoryLeak,
    OutOfMemory,
    Output,
    Recomputed,
    Refused,
    RunEnded,
    RunEvent,
    RunFailed,
    RunStarted,
    Saved,
    StepEnded,
)
from ..actions import Action, moves
from ..draw import Row, wrap
from ..event_log import Filter
from ..units import clock, count, shorten
from .page import Page, Table, Topic

MEANINGS: dict[type[RunEvent], str] = {
    RunStarted: "A run began; its configuration is in the header.",
    Loaded: "The model is on the device. What is allocated now are its parameters and buffers.",
    StepEnded: "An optimizer step ended. The peak is the allocator's own counter, of traced and untraced steps.",
    LossNotFinite: "The loss is nan or infinite: the weights are lost, and every step from here on is.",
    Recomputed: "Backward computed a checkpointed segment again: the bytes held for that, and the time it took.",
    OutOfMemory: "The device refused an allocation. The run has ended, everything of it is freed.",
    MemoryLeak: "More is alive at the end of every step than of the one before: somebody keeps tensors.",
    RunFailed: "The run raised an error. The traceback is in the details.",
    Refused: "The engine did not do what was asked, and says why.",
    RunEnded: "The run is over. Leaked bytes are what the allocator still counts beyond what was there before.",
    Saved: "A recording or an export was written; gpumem-tui open FILE shows a recording again.",
}


NAME_WIDTH = 24
"""Cells of a value's name in the details."""


class EventsPage(Page):
    """The log of events."""

    place = 6
    title = "events"
    filter = Filter.NO_RECOMPUTES
    selected: int | None = None
    """Index of the event selected; None: the latest, whatever comes."""
    detailed = False
    detail_top = 0

    @property
    def log(self) -> deque[RunEvent]:
        """The events that the filter admits."""
        return self.state.logs[self.filter]

    def make_actions(self) -> tuple[Action, ...]:
        """Select, filter, details."""
        return (
            *moves("select; the last one follows what comes"),
            Action("events.filter", ("f",), "Filter the log", "filter: all, no recomputes, no steps, problems only",
                   lambda page: page.next_filter(), "filter"),
            Action("events.details", ("enter",), "Details", "all that is known of an event, or back to the log",
                   lambda page: page.toggle_details(), "details"),
        )  # fmt: skip

    def topic(self) -> Topic:
        """The kind of event selected, or the log."""
        if self.selected is None or not self.log:
            text = (
                "Everything the engine tells, with the time since it began: runs, steps, recomputes, failures, notes."
            )
            return Topic("the log", text)
        event = self.log[self._position()]
        return Topic(event.words, MEANINGS.get(type(event), "A note of the engine."))

    def table(self) -> Table:
        """The log, as filtered."""
        return [["time", "kind", "text"], *([clock(m.time_s), m.kind, m.text] for m in self.log)]

    def next_filter(self) -> None:
        """Show less, then everything again."""
        self.filter = Filter((self.filter + 1) % len(Filter))
        self.selected = None

    def toggle_details(self) -> None:
        """Open or close the details of what is selected."""
        self.detailed = not self.detailed and bool(self.log)
        self.detail_top = 0
        if self.detailed and self.selected is None:
            self.selected = self.log[-1].index

    def leave(self) -> bool:
        """Close the details."""
        closed, self.detailed = self.detailed, False
        return closed

    def move(self, by: int) -> None:
        """Select another, or scroll the details."""
        if self.detailed:
            self.detail_top = max(0, self.detail_top + by)
        elif self.log:
            at = max(0, min(self._position() + by, len(self.log) - 1))
            self.selected = None if at == len(self.log) - 1 else self.log[at].index

    def _position(self) -> int:
        """The selected event's place in the log; the oldest's, if it has been dropped."""
        log = self.log
        if self.selected is None:
            return len(log) - 1
        low, high = 0, len(log)
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if log[middle].index < self.selected else (low, middle)
        return min(low, max(len(log) - 1, 0))

    # --- drawing ----------------------------------------------------------------

    def rows(self, width: int, height: int) -> list[Row]:
        """A title and the log, or the details of one event."""
        log, palette = self.log, self.palette
        title = Row().add(" events", palette.bold).add(f"  {self.filter.title}", palette.accent)
        title.add(f"  {count(len(log))}", palette.dim)
        if not log:
            return [title, Row().add(" nothing yet", palette.dim)]
        at = self._position()
        if self.detailed:
            return [title, *self._details(log[at], width, height - 1)]
        if self.selected is None:
            title.add("  following", palette.good)
        body = height - 1
        top = max(0, min(at - body // 2 if self.selected is not None else len(log) - body, len(log) - body))
        rows = [title]
        for i, event in enumerate(islice(log, top, top + body), top):
            rows.append(self._line(event, width, i == at and self.selected is not None))
        return rows

    def _line(self, event: RunEvent, width: int, selected: bool) -> Row:
        palette = self.palette
        style = palette.cursor if selected else palette.plain
        mark = " "
        if getattr(event, "detail", ""):
            mark = "+"
        row = Row().add(f" {clock(event.time_s):>7} ", palette.dim)
        row.add(f"{event.words:<14}", palette.cursor if selected else kind_style(event, self))
        return row.add(f"{mark} {shorten(event.text, width - row.width - 3)}", style)

    def _details(self, event: RunEvent, width: int, height: int) -> list[Row]:
        """The whole text, a traceback line by line, and the plain values."""
        palette = self.palette
        rows = [Row().add(f" {event.words}", kind_style(event, self))]
        rows[0].add(f"  {clock(event.time_s)}  run {event.run}  no. {event.index}", palette.dim)
        rows += [Row().add(f" {line}") for line in wrap(event.text, width - 2)]
        for name, value in event.figures().items():
            if name == "detail":
                rows += [Row().add(f" {line}", palette.dim) for line in str(value).splitlines()]
            else:
                rows += self._value(name, value, width, 0)
        self.detail_top = max(0, min(self.detail_top, len(rows) - height))
        return rows[self.detail_top : self.detail_top + height]

    def _value(self, name: str, value: object, width: int, depth: int) -> list[Row]:
        """A value and its name, wrapped; what is made of parts has a row for each, set in."""
        dim, name = self.palette.dim, "  " * depth + name
        if isinstance(value, dict) and value:
            parts = [self._value(str(key), part, width, depth + 1) for key, part in value.items()]
            return [Row().add(f" {name}", dim), *(row for rows in parts for row in rows)]
        edge = 2 + max(len(name), NAME_WIDTH)
        lines = wrap(_shown(value), width - edge - 1) or [""]
        return [Row().add(f" {name}" if not i else "", dim).to(edge).add(line) for i, line in enumerate(lines)]


def kind_style(event: RunEvent, page: Page) -> Style:
    """Problems stand out, routine recedes."""
    palette = page.palette
    if event.is_problem:
        return palette.bad
    match event:
        case RunStarted() | Loaded() | Saved():
            return palette.good
        case StepEnded() | Recomputed() | Output():
            return palette.dim
    return palette.busy


def _shown(value: object) -> str:
    """A event's value for reading."""
    if isinstance(value, dict | list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return show(value) if isinstance(value, bool | float | str) else "–" if value is None else str(value)
