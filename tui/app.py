"""The app: a clock that asks the source, one canvas, and keys.

It knows a `Source` and nothing of what is behind it; it loads no torch. It asks
`refresh_hz` times a second and the engine never calls it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.events import Key

from ..engine.config import UserError
from ..engine.feed import End, Source, Standing
from .control import Control, offered
from .draw import Row, wrap
from .palette import Palette
from .screens.events import EventsPage
from .screens.header import header
from .screens.help import HelpPage
from .screens.layers import LayersPage
from .screens.live import LivePage
from .screens.page import Page
from .screens.step import StepPage
from .screens.techniques import TechniquesPage
from .state import ViewState
from .stopped import outlive_sigstop
from .units import shorten
from .widgets.canvas import Canvas
from .writer import writing

MIN_WIDTH, MIN_HEIGHT = 60, 20


class GpumemApp(App[None], inherit_bindings=False):
    """Shows a source.

    Args:
        source: An engine, or a recording.
        refresh_hz: How often the source is asked; 0: only when `tick` is called.
        save_dir: Where recordings go; the working directory if None.
        ascii: Draw without Unicode blocks.
        on_start: Called once the first frame is out: the time to start an engine.
    """

    ENABLE_COMMAND_PALETTE = False
    TITLE = "gpumem-tui"

    # ctrl-a, ctrl-b, ctrl-s and ctrl-q belong to tmux, screen and the terminal.
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c", "quit", priority=True, show=False),
        Binding("ctrl+z", "suspend_process", show=False),
        Binding("tab", "press('tab')", priority=True, show=False),
    ]

    def __init__(
        self,
        source: Source,
        *,
        refresh_hz: float = 10.0,
        save_dir: Path | None = None,
        ascii: bool = False,
        on_start: Callable[[], None] | None = None,
    ) -> None:
        # The terminal's own colours, unless a theme was asked for. It has to be
        # known before Textual decides how to do without colours (NO_COLOR).
        own_theme = "TEXTUAL_THEME" in os.environ
        super().__init__(ansi_color=None if own_theme else True)
        if not own_theme:
            self.theme = "ansi-dark"
        self.source = source
        self.refresh_hz, self.on_start = refresh_hz, on_start
        self.state = ViewState()
        self.control = Control(source, self.state, save_dir or Path.cwd())
        self.palette = Palette(ascii=ascii, mono=self.no_color)
        kinds: tuple[type[Page], ...] = (LivePage, StepPage, LayersPage, TechniquesPage, EventsPage, HelpPage)
        self.pages: list[Page] = [kind(self.state, self.control, self.palette) for kind in kinds]
        self.page = self.pages[0]
        self.canvas = Canvas(self.draw)
        self._page_before_help = self.page
        self.asking = self.ended = False

    def compose(self) -> ComposeResult:
        """One widget."""
        yield self.canvas

    def on_mount(self) -> None:
        """Start the clock."""
        outlive_sigstop(self)
        self.tick()
        if self.refresh_hz > 0:
            self.set_interval(1 / self.refresh_hz, self.tick)
        if self.on_start is not None:
            self.call_after_refresh(self.on_start)

    # --- asking and drawing -------------------------------------------------------

    def tick(self) -> None:
        """Ask the source for what is new, and draw if there is anything.

        While the terminal has not taken the frame before, this one is skipped:
        a slow link should lag by one frame, not by thirty.
        """
        if writing(self):
            return
        if self.state.update(self.source, time.monotonic()):
            self.draw()

    def draw(self) -> None:
        """Show the page that is on; the canvas sends what differs."""
        width, height = self.canvas.size
        if not width or not height:
            return
        if width < MIN_WIDTH or height < MIN_HEIGHT:
            text = f"gpumem-tui needs {MIN_WIDTH}x{MIN_HEIGHT}, this is {width}x{height}"
            self.canvas.show([Row().add(text)])
            return
        rows = [header(self.state, self.palette, width)]
        rows += self._page_rows(width, height - 3)
        message = self._message(width)
        room = height - 1 - len(message)
        rows = rows[:room] + [Row()] * (room - len(rows))
        self.canvas.show([*map(self._plain, rows + message), self._footer(width)])

    def _page_rows(self, width: int, height: int) -> list[Row]:
        """The page; a mistake in drawing it costs the page and not the run that is going on."""
        try:
            return self.page.rows(width, height)
        except Exception as error:
            self.log.error(error)
            return [Row().add(f" This screen cannot be drawn: {type(error).__name__}: {error}", self.palette.bad)]

    def _plain(self, row: Row) -> Row:
        """Without the few typographic characters, where only ASCII is wanted."""
        if self.palette.ascii:
            row.spans = [(text.translate(ASCII), style) for text, style in row.spans]
        return row

    def _message(self, width: int) -> list[Row]:
        """What has just been said, in up to three rows, or else the page's own keys."""
        if self.asking:
            return [Row().add(f" {shorten(QUIT_QUESTION, width - 2)}", self.palette.busy)]
        message = self.state.message
        if message is None:
            return [Row().add(f" {shorten(self.page.hint, width - 2)}", self.palette.dim)]
        style = self.palette.bad if message.problem else self.palette.busy
        lines = wrap(message.text, width - 2)
        lines = [*lines[:2], " ".join(lines[2:])] if len(lines) > 3 else lines
        return [Row().add(f" {shorten(line, width - 2)}", style) for line in lines]

    def _footer(self, width: int) -> Row:
        palette = self.palette
        row = Row().add(" ")
        for number, page in enumerate(self.pages[:-1], 1):
            on = page is self.page
            row.add(f"{number}", palette.accent).add(f" {page.title}" if not on else "", palette.dim)
            row.add(f" {page.title}" if on else "", palette.bold).add("  ")
        if self.source.standing not in (Standing.OWNER, Standing.ATTACHED):
            row.add(f"{self.source.standing} ", self.palette.bad)
        paused = self.state.status == "paused"
        for key, what in (("space", "go on" if paused else "pause"), ("?", "help"), ("q", "quit")):
            if row.width + len(key) + len(what) + 2 < width:
                row.add(" ").add(key, palette.accent).add(f" {what}", palette.dim)
        return row

    # --- keys -----------------------------------------------------------------------

    def on_key(self, event: Key) -> None:
        """Every key that Textual has no binding for."""
        character = event.character or ""
        # Letters come as typed, so that B is not b; names for the rest.
        key = character if len(character) == 1 and character.isprintable() and character != " " else event.key
        event.stop()
        self.action_press(key)

    def action_press(self, key: str) -> None:
        """A key: the page's, or the same everywhere, or a technique's on the live screen."""
        if self.asking:
            self._answer(key)
        elif not (self.page.press(key) or self._press_anywhere(key)) and self.page is self.pages[0]:
            self._flip(key)
        self.state.update(self.source, time.monotonic())
        self.draw()

    def _press_anywhere(self, key: str) -> bool:
        match key:
            case "space":
                self.control.toggle_pause()
            case "s":
                self.control.save()
            case "r":
                self.control.restart()
            case "x":
                self.control.stop()
            case "z" if self.page is self.pages[0]:
                self.control.go_back()
            case "q":
                self._quit()
            case "!":
                self.control.take_over()
            case "?":
                self._toggle_help()
            case "escape":
                self.state.dismiss()
                if self.page is self.pages[-1]:
                    self._toggle_help()
            case _ if key.isdigit() and 1 <= int(key) < len(self.pages):
                self.page = self.pages[int(key) - 1]
            case _:
                return False
        return True

    def _quit(self) -> None:
        """Leave; where the engine would go on without us, ask what is to become of the run."""
        run = self.state.run
        if self.source.standing is not Standing.ATTACHED:
            self.exit()
        elif run.running or run.status == "starting":
            self.asking = True
        else:
            self._answer("x")

    def _answer(self, key: str) -> None:
        """The answer to what becomes of the run; any other key stays."""
        self.asking = False
        if key == "x":
            with suppress(UserError):  # somebody else has ended it, or commands it by now
                self.source.command(End())
                self.ended = True
        if key in ("d", "q", "x"):
            self.exit()

    def _toggle_help(self) -> None:
        help_page = self.pages[-1]
        if self.page is help_page:
            self.page = self._page_before_help
        else:
            self._page_before_help, self.page = self.page, help_page

    def _flip(self, key: str) -> None:
        """Step a technique's value and restart; batch size and length go up, in capitals down."""
        for letter, _, option, technique in offered():
            if not letter or key.lower() != letter:
                continue
            self.control.flip(option, 1 if key == letter else -1, around=technique is not None)
            return


QUIT_QUESTION = "d detach, the run goes on · x stop the run and quit · esc stay"

ASCII = str.maketrans({**dict(zip("…–·↑↓×─│", "~--^vx-|", strict=True)), "→": "->", "←": "<-"})
"""For terminals and fonts that have ASCII only."""
