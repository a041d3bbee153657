"""Everything that is drawn, without a terminal: the screens, the frame around them, the words said in it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

from ..engine.config import kind_and_line
from ..engine.feed import Source, ViewerRole
from ..engine.run import RunId
from .actions import Action, check_keys, everywhere, hint, offered_here, remapped, shown_keys
from .control import Control
from .draw import Kept, Row, paragraph, whole_clauses, wrap
from .palette import Palette
from .predictions import Predictions
from .screens import screens
from .screens.header import header
from .screens.help import HelpPage
from .screens.out_of_memory import OutOfMemoryPage
from .screens.page import Page
from .screens.progress import progress
from .screens.ranks import RanksPage
from .screens.tour import Tour
from .settings import Settings
from .state import ViewState
from .units import shorten, whole_parts

MIN_WIDTH, MIN_HEIGHT = 60, 20

ASCII = str.maketrans({**dict(zip("…–·↑↓×─│▲◆", "~--^vx-|^*", strict=True)), "→": "->", "←": "<-"})
"""Replacements for terminals and fonts that have ASCII only."""


class Board:
    """The screens over one source.

    Args:
        source: An engine, or a recording.
        settings: The config file.
        palette: Colours.
        save_dir: Where recordings go; the working directory if None.
        predictions: Peaks of configurations that have not run, if there is anybody to ask.

    Raises:
        UserError: The config file gives an action a key it cannot have.
    """

    def __init__(
        self,
        source: Source,
        settings: Settings,
        palette: Palette,
        save_dir: Path | None = None,
        predictions: Predictions | None = None,
    ) -> None:
        self.state = ViewState()
        self.state.units = str(settings["units"])
        self.control = Control(source, self.state, save_dir or Path.cwd(), predictions)
        self.control.forecasts.enabled = bool(settings["predict"])
        self.control.on_turn = self._turned
        self.palette = palette
        self.pages: list[Page] = [kind(self.state, self.control, palette) for kind in screens()]
        self.page = self.pages[0]
        self.ranks = next(page for page in self.pages if isinstance(page, RanksPage))
        self.everywhere = remapped(everywhere([page.title for page in self.pages]), settings.keys)
        for page in self.pages:
            page.actions = remapped(page.actions, settings.keys)
        self.help = HelpPage(self.state, self.control, palette, lambda: self._before_help, lambda: self.everywhere)
        self.refusal = OutOfMemoryPage(self.state, self.control, palette)
        self.refusal.actions = remapped(self.refusal.actions, settings.keys)
        self._before_help = self._before_refusal = self.page
        for page in (*self.pages, self.refusal):
            page.go = self._go_to
        scopes = {page.title: (*page.actions, *self.everywhere) for page in (*self.pages, self.help)}
        digitless = [action for action in self.everywhere if not action.name.startswith("screen.")]
        check_keys(scopes | {self.refusal.title: (*self.refusal.actions, *digitless)}, settings.keys, settings.where)
        self._refusals: set[RunId] = set()
        self.tour: Tour | None = None
        self.question = ""
        self._moved: tuple[object, ...] = ()
        self.frozen = False
        self.rate = ""
        self._kept = Kept()

    # --- what can be done -----------------------------------------------------------

    def find(self, key: str) -> tuple[Action, Page | None] | None:
        """The action of a key here, and the screen if it is that screen's own; None: there is none.

        In the help the keys of the screen it explains are to be had as well.
        """
        explained = [self._before_help] if self.page is self.help else []
        for page in (self.page, None, *explained):
            for action in self.everywhere if page is None else page.actions:
                if key in action.keys:
                    return action, page
        return None

    def offered(self, actions: Iterable[Action], live: bool) -> tuple[Action, ...]:
        """The actions that can do anything here."""
        return offered_here(actions, live, self.state.several, not self.control.changes.of_script)

    def elsewhere(self, key: str) -> str:
        """The answer to a character that does nothing here: the screens where it does something."""
        found: dict[str, list[str]] = {}
        for page in self.pages:
            for action in self.offered(page.actions, self.state.acts):
                if key in action.keys:
                    found.setdefault(action.title, []).append(page.title)
        where = "; ".join(f"{title} ({', '.join(pages)})" for title, pages in found.items())
        helps = next(action for action in self.everywhere if action.name == "help").keys[0]
        return f"{key} does nothing here" + (f", elsewhere: {where}" if where else f"; {helps} lists the keys")

    def go(self, index: int) -> None:
        """Go to a screen by its place."""
        self.page = self.pages[index]

    def _go_to(self, title: str) -> None:
        self.page = next(page for page in self.pages if page.title == title)

    def turn_to_refusal(self) -> bool:
        """Show why a run has run out of memory as soon as it has ended by it; True if that has just been."""
        refused = self.state.refused
        if refused is None or refused is self.refusal.run:
            return False
        self.refusal.run = refused
        if refused.id in self._refusals:  # it has come up before, and is looked at again
            return False
        self._refusals.add(refused.id)
        self.state.dismiss()  # the screen says it, and more
        self.show_refusal()
        return True

    def show_refusal(self) -> None:
        """Go to the screen of the run that ran out of memory last."""
        if self.refusal.run is None:
            self.state.say("no run has run out of memory here")
        elif self.page is not self.refusal:
            self._before_refusal = self.page if self.page is not self.help else self._before_help
            self.page = self.refusal

    def toggle_help(self) -> None:
        """Explain what is selected, or go back."""
        if self.page is self.help:
            self.page = self._before_help
        else:
            self._before_help, self.page = self.page, self.help
            self.help.top = 0

    def leave(self) -> None:
        """Cancel saving, or close what is open, innermost first: a message, details, the help."""
        if self.control.cancel_saving():
            return
        if self.state.message is not None:
            self.state.dismiss()
        elif not self.page.leave() and self.page is self.help:
            self.toggle_help()
        elif self.page is self.refusal:
            self.page = self._before_refusal

    def _turned(self) -> None:
        for page in self.pages:
            page.turned()

    def moved(self) -> bool:
        """True if there is more of what is worked on, predictions, saving, measuring, since this was asked last."""
        saving, before = self.control.saving, self._moved
        saved = saving.work.share if saving is not None else None
        self._moved = (self.control.forecasts.answers, saved, self.page.progress())
        return self._moved != before

    def repaint(self, palette: Palette) -> None:
        """Change the colours."""
        self.palette = palette
        for page in (*self.pages, self.help, self.refusal):
            page.palette = palette

    @property
    def touring(self) -> Tour | None:
        """The tour where it is seen: not over a question, nor over what has gone wrong."""
        message = self.state.message
        hidden = self.question or (message is not None and message.problem)
        return None if hidden else self.tour

    # --- drawing ----------------------------------------------------------------------

    def rows(self, width: int, height: int) -> list[Row]:
        """The rows of the whole terminal."""
        if not fits(width, height):
            return [Row().add(f"gpumem-tui needs {MIN_WIDTH}x{MIN_HEIGHT}, this is {width}x{height}")]
        tour = self.touring
        said = tour.rows(self.palette, width) if tour is not None else self._said(width)
        rows = [header(self.state, self.palette, width, self.frozen)]
        # A message lies over the page for a moment; the tour, which talks about the page, beside it.
        rows += self._page_rows(width, height - 2 - (len(said) if tour is not None else 1))
        room = height - 1 - len(said)
        rows = rows[:room] + [Row()] * (room - len(rows))
        role = self.control.source.role
        shows = (self.page, *self._in_footer(), self.rate, self.frozen, role, width, self.palette)
        footer = self._kept.rows("footer", shows, lambda: [self._footer(width, role)])
        return [*map(self._plain, [*rows, *said, *footer])]

    def _page_rows(self, width: int, height: int) -> list[Row]:
        """The page; a mistake in drawing it costs the page and not the run that is going on."""
        try:
            return self.page.rows(width, height)
        except Exception as error:
            logging.getLogger(__name__).exception("drawing %s", self.page.title)
            return [Row().add(f" This screen cannot be drawn: {kind_and_line(error)}", self.palette.bad)]

    def _plain(self, row: Row) -> Row:
        """Without the few typographic characters, where only ASCII is wanted."""
        if self.palette.ascii:
            row.spans = [(text.translate(ASCII), style) for text, style in row.spans]
        return row

    def _said(self, width: int) -> list[Row]:
        """The latest message in up to three rows, or else the page's own keys."""
        if self.question:
            return paragraph(self.question, width, self.palette.busy)
        if (saving := self.control.saving) is not None:
            text = f"saving {saving.path.name}  {100 * saving.work.share:.0f} %, {self._name('dismiss')} cancels"
            return [Row().add(f" {shorten(text, width - 2)}", self.palette.busy)]
        message = self.state.message
        if message is None and (row := progress(self.state, self.palette)) is not None:
            return [row]
        if message is None:
            role = self.control.source.role
            commands = self.state.live and role in (ViewerRole.OWNER, ViewerRole.ATTACHED)
            resumes = self._resumes() if commands and self.page is not self.refusal else ""
            watches = self.state.acts and role is ViewerRole.WATCHING
            lead = self.page.lead if commands else self.page.advising * watches
            shows = (self.page, commands, resumes, lead, width, self.palette)
            return self._kept.rows("keys", shows, lambda: [self._keys(width, commands, resumes, lead)])
        style = self.palette.bad if message.problem else self.palette.busy
        lines = whole_clauses(message.text, width - 2, 3) or wrap(message.text, width - 2)
        lines = [*lines[:2], " ".join(lines[2:])] if len(lines) > 3 else lines
        return [Row().add(f" {shorten(line, width - 2)}", style) for line in lines]

    def _name(self, action: str) -> str:
        """The keys of an action that every screen has."""
        return shown_keys(a for a in self.everywhere if a.name == action)

    def _resumes(self) -> str:
        """The key that resumes where nothing goes on, as a hint."""
        if self.state.status == "held":
            return f"{self._name('hold')} goes on"
        return f"{self._name('restart')} starts it again" if self.state.over and not self.state.requested else ""

    def _keys(self, width: int, commands: bool, resumes: str, lead: str) -> Row:
        """The keys of the page for whoever looks at it."""
        row = Row().add(f" {resumes}" if resumes else "", self.palette.busy).add(" ·" if resumes else "")
        keys = lead + hint(self.offered(self.page.actions, commands))
        if self.state.several:
            keys += f" · {self._name('run.next')} {self._name('run.before')} runs"
        return row.add(f" {whole_parts(keys.split(' · '), ' · ', width - 2 - row.width)}", self.palette.dim)

    def _footer(self, width: int, role: ViewerRole) -> Row:
        """The screens, the keys everywhere, and how often the terminal is refreshed."""
        palette = self.palette
        keys = {action.name: action.keys[0] for action in self.everywhere}
        said = "" if role in (ViewerRole.OWNER, ViewerRole.ATTACHED) else f" {role}"
        row = Row().add(" ")
        own = {key for action in self.page.actions for key in action.keys}
        pages = [page for page in self._in_footer() if keys[f"screen.{page.title}"] not in own]
        for page in self._with_room(pages, width - len(said)):
            row.add(keys[f"screen.{page.title}"], palette.accent)
            row.add(f" {page.title}", palette.bold if page is self.page else palette.dim).add(" ")
        row.add(said, palette.bad)
        labels = (("help", "help"), ("quit", "quit"), ("pause", "go on" if self.frozen else "pause"))
        for name, label in labels:
            if row.width + len(keys[name]) + len(label) + 2 < width:
                row.add(" ").add(keys[name], palette.accent).add(f" {label}", palette.dim)
        return row.right(self.rate, width - 1, palette.dim) if row.width + len(self.rate) + 2 < width else row

    def _in_footer(self) -> list[Page]:
        return [page for page in self.pages if page.in_footer or page is self.page]

    def _with_room(self, pages: Sequence[Page], width: int) -> list[Page]:
        """The screens with room for digit and name: the last ones go first, the one that is on never."""
        kept = list(pages)
        for page in reversed([page for page in pages if page is not self.page]):
            if sum(len(f"1 {each.title} ") for each in kept) + len(" ? help") + 1 < width:
                break
            kept.remove(page)
        return kept


def fits(width: int, height: int) -> bool:
    """True if a terminal is large enough for the screens."""
    return width >= MIN_WIDTH and height >= MIN_HEIGHT


def check(settings: Settings) -> None:
    """Refuse keys that no action could be reached by, before anything is opened.

    Raises:
        UserError: One line that names file and key.
    """
    Board(cast(Source, None), settings, Palette())  # nothing is asked before the first `update`
