"""A screen as the app sees it: rows for a size, and the actions on it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import NamedTuple

from ..actions import Action
from ..control import Control
from ..draw import Kept, Row
from ..palette import Palette
from ..state import ViewState

Table = list[list[str]]
"""Rows of cells, the headings first: what is copied."""


class Topic(NamedTuple):
    """The explanation that `?` gives of the selected part of a screen: at most 60 words."""

    title: str
    text: str


class Page(ABC):
    """A screen.

    Args:
        state: What there is to show.
        control: What its actions act on.
        palette: Colours; replaced when the theme changes.

    Attributes:
        place: Its digit; 0: it has none, as the help.
        title: In the footer, and in the help.
        lead: Begins its row of keys, for who commands an engine.
        advising: Begins it for who watches a script that is alive.
        changing: What comes of changing a setting here, for the help.
        changing_script: The same where a script is watched.
        actions: What can be done here and not everywhere.
        typing: Whether keys are text at the moment, for `type`.
        go: Goes to another screen, by its title.
    """

    place = 0
    title = ""
    lead = ""
    advising = ""
    changing = ""
    changing_script = ""
    typing = False

    def __init__(self, state: ViewState, control: Control, palette: Palette) -> None:
        self.state, self.control, self.palette = state, control, palette
        self.changes, self.forecasts = control.changes, control.forecasts
        self.go: Callable[[str], None] = lambda title: None
        self.actions = self.make_actions()
        self._kept = Kept()

    def kept(self, part: Hashable, shows: tuple[object, ...], draw: Callable[[], list[Row]]) -> list[Row]:
        """See `Kept.rows`; the colours need not be named."""
        return self._kept.rows(part, (self.palette, *shows), draw)

    @abstractmethod
    def make_actions(self) -> tuple[Action, ...]:
        """Its actions, before the config file's keys."""

    @abstractmethod
    def rows(self, width: int, height: int) -> list[Row]:
        """Draw it; at most `height` rows are shown."""

    @abstractmethod
    def topic(self) -> Topic:
        """The explanation of the selected part."""

    def table(self) -> Table | None:
        """The whole of its table, also what is out of sight; None: what is shown is all there is."""
        return None

    def leave(self) -> bool:
        """Close details; False: there is nothing to close."""
        return False

    def turned(self) -> None:  # noqa: B027 (most screens hold on to nothing)
        """Let go of what belongs to the recording that was looked at before."""

    @property
    def in_footer(self) -> bool:
        """True if the footer leads to it; its digit does always."""
        return True

    def progress(self) -> object:
        """The state of work that goes on beside the screen: when it is another, there is more to draw."""
        return None

    def undo(self) -> None:
        """Take back a change."""
        self.state.say("nothing to undo here; on the live screen it goes back to the run before")

    def type(self, key: str) -> None:  # noqa: B027 (most screens take no text)
        """Take a key as text."""


def scrolled(top: int, selected: int, height: int, length: int) -> int:
    """First row to show so that the selected one is in sight, moving as little as possible."""
    top = min(max(top, selected - height + 1), selected)
    return max(0, min(top, length - height))
