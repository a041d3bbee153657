"""The log of events, kept once for each choice of what is shown of it."""

from __future__ import annotations

from collections import deque
from enum import IntEnum

from ..engine.run_events import Recomputed, RunEvent, StepEnded

KEPT_EVENTS = 20_000


class Filter(IntEnum):
    """The events that the log shows."""

    ALL = 0
    NO_RECOMPUTES = 1
    NOTABLE = 2
    PROBLEMS = 3

    @property
    def title(self) -> str:
        """Name for people."""
        return ("everything", "without recomputes", "without steps and recomputes", "problems only")[self]

    def admits(self, event: RunEvent) -> bool:
        """True if an event is shown."""
        match self:
            case Filter.ALL:
                return True
            case Filter.NO_RECOMPUTES:
                return not isinstance(event, Recomputed)
            case Filter.NOTABLE:
                return not isinstance(event, Recomputed | StepEnded)
        return event.is_problem


class EventLog:
    """The latest events, oldest first: `log[Filter.NOTABLE]` is those that a filter admits."""

    def __init__(self) -> None:
        self._admitted: dict[Filter, deque[RunEvent]] = {each: deque(maxlen=KEPT_EVENTS) for each in Filter}

    def __getitem__(self, filter: Filter) -> deque[RunEvent]:
        return self._admitted[filter]

    def add(self, event: RunEvent) -> None:
        """Take in the newest."""
        for each, log in self._admitted.items():
            if each.admits(event):
                log.append(event)

    def clear(self) -> None:
        """Forget them all."""
        for log in self._admitted.values():
            log.clear()
