"""The app: a clock that asks the source, one canvas, and keys.

It knows a `Source` and nothing of what is behind it; it loads no torch. It asks
`refresh_hz` times a second and the engine never calls it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import ClassVar

from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.events import Click, Key, MouseScrollDown, MouseScrollUp, Resize
from textual.screen import Screen

from ..engine.config import UserError, show
from ..engine.exports import registry
from ..engine.feed import End, Source, ViewerRole
from .actions import Action
from .board import Board, fits
from .interrupt import INTERRUPTED, end
from .palette import Palette
from .predictions import Predictions
from .screens.tour import Tour
from .settings import NAMED, Settings, automatic_hz, config_path
from .stopped import outlive_sigstop
from .themes import THEMES
from .widgets.canvas import Canvas
from .writer import send, writing

QUIT_QUESTION = "d detach, the run goes on · x stop the run and quit · esc stay"

NOTHING_TO_LOSE_S = 10.0
"""Time after the start in which Ctrl-C ends the app and the engine it has started, without a question."""

RATES = (0.5, 1.0, 2.0, 4.0, 10.0, 20.0)
"""Refreshes a second that `[` and `]` step through."""


class GpumemApp(App[None], inherit_bindings=False):
    """Shows a source.

    Args:
        source: An engine, or a recording.
        refresh_hz: How often the source is asked; 0: only when `tick` is called.
        save_dir: Where recordings go; the working directory if None.
        settings: The config file; None: the defaults.
        background: What the terminal's background was found to be, for the theme `auto`.
        predictions: Peaks of configurations that have not run.
        tour: Begin with the tour, and call this when it has been left; None: begin without.
        on_shown: Called once the first frame has been drawn.
        started: The engine has been started with the app, which has nothing to lose in its first seconds.
    """

    TITLE = "gpumem-tui"
    COMMAND_PALETTE_BINDING = ""

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
        settings: Settings | None = None,
        background: str = "dark",
        predictions: Predictions | None = None,
        tour: Callable[[], object] | None = None,
        on_shown: Callable[[], object] = lambda: None,
        started: bool = True,
    ) -> None:
        # The terminal's own colours have to be known before Textual decides how
        # to do without colours (NO_COLOR).
        super().__init__(ansi_color=True)
        self.theme = "ansi-light" if background == "light" else "ansi-dark"
        self.settings = settings or Settings(config_path())
        self.background, self.source = background, source
        self.refresh_hz = refresh_hz
        self.board = Board(source, self.settings, self._palette(), save_dir, predictions)
        self.state, self.control = self.board.state, self.board.control
        self.control.on_command = self._unfreeze
        self.canvas = Canvas(self.draw, partial(send, self))
        self.ended = self.interrupted = False
        self._wants_tour, self._on_shown = tour is not None, on_shown
        self._tour, self._on_tour_left = Tour(), tour or (lambda: None)
        self._asks_from_s = time.monotonic() + NOTHING_TO_LOSE_S * started
        self._ticks: list[float] = []

    def compose(self) -> ComposeResult:
        """One widget."""
        yield self.canvas

    def on_mount(self) -> None:
        """Start the clock."""
        outlive_sigstop(self)
        if self._wants_tour:
            self.start_tour()
        self.tick()
        self.call_after_refresh(self._on_shown)
        self._timer = self.set_interval(1 / self.refresh_hz, self.tick) if self.refresh_hz > 0 else None

    def on_resize(self, event: Resize) -> None:
        """Below the smallest size there is no palette: Textual cannot lay its own out in a few columns."""
        if len(self.screen_stack) > 1 and not fits(*event.size):
            self.pop_screen()

    # --- asking and drawing -------------------------------------------------------

    def tick(self) -> None:
        """Ask the source for what is new, and draw if there is anything.

        While the terminal has not taken the frame before, this one is skipped:
        a slow link should lag by one frame, not by thirty.
        """
        if writing(self):
            return
        now = time.monotonic()
        changed = self._count(now) | self.board.moved()
        if not self.board.frozen:
            changed |= self._update(now)
        if changed:
            self.draw()

    def _update(self, now: float) -> bool:
        """Take in what is new; whether anything is."""
        changed = self.state.update(self.source, now)
        return self.board.turn_to_refusal() or changed

    def _count(self, now: float) -> bool:
        """The actual rate, for the footer; whether it reads differently than before."""
        self._ticks = [*(t for t in self._ticks if now - t < 3.0), now]
        if self.refresh_hz <= 0 or now - self._ticks[0] < 1.0:
            return False
        rate = (len(self._ticks) - 1) / (now - self._ticks[0])
        # A rate that is as asked reads as asked, and not now 10 and now 9.
        rate = self.refresh_hz if rate > 0.9 * self.refresh_hz else rate
        text = f"{rate:.0f} Hz" if rate >= 1 else f"{rate:.1f} Hz"
        changed, self.board.rate = text != self.board.rate, text
        return changed

    def draw(self) -> None:
        """Show the page that is on; the canvas sends what differs."""
        width, height = self.canvas.size
        if width and height:
            self.canvas.show(self.board.rows(width, height))

    # --- keys -----------------------------------------------------------------------

    def on_key(self, event: Key) -> None:
        """Every key that Textual has no binding for."""
        character = event.character or ""
        # Letters come as typed, so that B is not b; names for the rest.
        key = character if len(character) == 1 and character.isprintable() and character != " " else event.key
        if len(self.screen_stack) == 1:
            event.stop()
            self.action_press(key)

    def action_press(self, key: str) -> None:
        """A key: text, where that is wanted; the page's own action, or one that is the same everywhere."""
        if len(self.screen_stack) > 1:  # the command palette is open
            self.screen.focus_next()
            return
        if self.board.question:
            self._answer(key)
        elif self.board.touring is not None and key in ("enter", "escape"):
            if key == "escape" or not self._tour.next():
                self._leave_tour()
        else:
            self._leave_tour()
            self._act(key)
        self.draw()

    def _act(self, key: str) -> None:
        if self.page.typing:
            self.page.type(key)
        elif found := self.board.find(key):
            action, page = found
            if page not in (None, self.page):
                self.board.toggle_help()
            self.perform(action, self if page is None else page)
        elif len(key) == 1:
            self.state.say(self.board.elsewhere(key))

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """The command palette: every action that can be had here, and the run in every format."""
        for actions, target in ((self.page.actions, self.page), (self.board.everywhere, self)):
            for action in self.board.offered(actions, self.state.acts):
                text = f"{' '.join(action.keys)}  {action.text}"
                yield SystemCommand(action.title, text, partial(self.perform, action, target))
        for name, made in registry().items():
            yield SystemCommand(f"Export the run: {name}", made.summary, partial(self.export, name))

    def export(self, format_name: str) -> None:
        """Write the run on the screens in a format that other programs open."""
        self.control.save(format_name)
        self.draw()

    def perform(self, action: Action, target: object) -> None:
        """Do something, and show what came of it; what takes an engine is refused where there is none."""
        if action.acts and not self.state.live:
            self.state.say("this is a recording: it can be looked at, nothing in it can be run or changed")
        elif action.several and not self.state.several:
            self.state.say("there is no other run to look at; gpumem-tui open A.gpumem B.gpumem opens several")
        else:
            action.run(target)
        if not self.board.frozen:
            self._update(time.monotonic())
        self.draw()

    def on_click(self, event: Click) -> None:
        """The footer's digits, where the mouse is wanted."""
        if event.screen_y == self.size.height - 1:
            text = self.canvas.lines[-1]
            digits = [i for i, c in enumerate(text[: event.screen_x + 1]) if c.isdigit() and text[i - 1] == " "]
            if digits:
                self.action_press(text[digits[-1]])

    def on_mouse_scroll_down(self, _event: MouseScrollDown) -> None:
        """Like the arrow key."""
        self.action_press("down")

    def on_mouse_scroll_up(self, _event: MouseScrollUp) -> None:
        """Like the arrow key."""
        self.action_press("up")

    # --- actions ----------------------------------------------------------------------

    @property
    def page(self):  # type: ignore[no-untyped-def]
        """The screen that is on."""
        return self.board.page

    def go(self, index: int) -> None:
        """Go to a screen by its place."""
        self.board.go(index)

    def quit(self) -> None:
        """Leave; where the engine would go on without us, ask what is to become of the run."""
        if self._commands_a_run():
            self.board.question = QUIT_QUESTION
        elif self.source.role is ViewerRole.ATTACHED:
            self._answer("x")
        else:
            self.exit()

    def _commands_a_run(self) -> bool:
        """True if there is a run to lose: the engine's, whichever is looked at, or one to come."""
        self._freeze(False)  # it is about the engine as it is, and not as a paused view has it
        self._update(time.monotonic())
        return self.source.role is ViewerRole.ATTACHED and self.state.under_way_or_to_come

    def _answer(self, key: str, return_code: int = 0) -> None:
        """The answer to what becomes of the run; any other key stays."""
        self.board.question = ""
        if key == "x":
            with suppress(UserError):  # somebody else has ended it, or commands it by now
                self.source.command(End())
                self.ended = True
        if key in ("d", "q", "x"):
            self.exit(return_code=return_code)

    def toggle_help(self) -> None:
        """Explain what is selected, or go back."""
        self.board.toggle_help()

    def leave(self) -> None:
        """Close what is open."""
        self.board.leave()

    async def action_quit(self) -> None:
        """Ctrl-C, as a key."""
        self.interrupt()

    def interrupt(self) -> None:
        """Ctrl-C: what `quit` does, and at its question the end of the run; in the first seconds the end at once."""
        if self.board.question:
            self._answer("x", INTERRUPTED)
        elif self._commands_a_run() and time.monotonic() > self._asks_from_s:
            self.quit()
            self.draw()
        else:
            self.interrupted = True
            self.exit(return_code=INTERRUPTED)

    def interrupt_by_signal(self) -> None:
        """The same from a signal's handler: a terminal in raw mode sends a key, `kill -INT` a signal."""
        try:
            asyncio.get_running_loop().call_soon_threadsafe(self.interrupt)
        except RuntimeError:  # the terminal is not taken yet, or given back
            end()

    def open_palette(self) -> None:
        """Every action by name."""
        if fits(*self.size):
            self.action_command_palette()

    def toggle_freeze(self) -> None:
        """Freeze the view while data goes on, or catch up."""
        self._freeze(not self.board.frozen)
        if self.board.frozen and self.state.requested is not None:
            self.state.say("the view is paused before the restart can be seen; the same key again goes on")

    def _unfreeze(self) -> None:
        self._freeze(False)

    def _freeze(self, frozen: bool) -> None:
        self.board.frozen = frozen
        if self._timer is not None:
            (self._timer.pause if frozen else self._timer.resume)()

    def start_tour(self) -> None:
        """The tour, on the live screen."""
        self.board.go(0)
        self.state.dismiss()
        self.board.tour = self._tour

    def _leave_tour(self) -> None:
        if self.board.tour is not None:
            self.board.tour = None
            self._on_tour_left()

    def copy_table(self) -> None:
        """The whole table to the terminal's clipboard, tab-separated; the screen's text if it has none."""
        table = self.page.table()
        lines = ["\t".join(cells) for cells in table] if table else [line.rstrip() for line in self.canvas.lines]
        self.copy_to_clipboard("\n".join(lines) + "\n")
        self.state.say(f"copied {len(lines)} lines")

    def picture(self) -> str:
        """The screen as SVG, on the background it is seen on."""
        svg = self.export_screenshot(title=self.TITLE)
        return svg.replace("#292929", "#ffffff").replace("#c5c8c6", "#1c1c1c") if self._light else svg

    @property
    def _light(self) -> bool:
        return self.board.palette.theme.name == "light"

    def save_picture(self) -> None:
        """The screen as SVG and as text."""
        stem = f"gpumem-{self.page.title}-{time.strftime('%Y%m%d-%H%M%S')}"
        path = self.control.save_dir / stem
        try:
            path.with_suffix(".svg").write_text(self.picture(), encoding="utf-8")
            text = "\n".join(line.rstrip() for line in self.canvas.lines)
            path.with_suffix(".txt").write_text(text + "\n", encoding="utf-8")
        except OSError as error:
            self.state.say(f"{path}: {error.strerror}", problem=True)
        else:
            self.state.say(f"saved {path}.svg and .txt")

    # --- settings that persist ----------------------------------------------------------

    def _palette(self) -> Palette:
        name = str(self.settings["theme"])
        theme = THEMES[self.background if name == "auto" else name]
        return Palette(theme, ascii=bool(self.settings["ascii"]), mono=self.no_color)

    def _set(self, name: str, value: object, said: str = "") -> None:
        """Change a setting, in the config file too, and say so."""
        try:
            self.settings.set(name, value)
        except UserError as error:
            self.settings.values[name] = NAMED[name].parse(value, name)
            self.state.say(f"for this session only: {error}", problem=True)
        else:
            self.state.say(said or f"{name} {show(self.settings[name])}")

    def next_theme(self) -> None:
        """Change to the next theme."""
        names = [str(name) for name in NAMED["theme"].choices]
        self._set("theme", names[(names.index(str(self.settings["theme"])) + 1) % len(names)])
        self.board.repaint(self._palette())

    def toggle_predictions(self) -> None:
        """Have what changes would do worked out, or no longer."""
        forecasts = self.control.forecasts
        forecasts.enable(not forecasts.enabled)
        self._set("predict", forecasts.enabled)

    def next_units(self) -> None:
        """Count in GB instead of GiB, or back."""
        self.state.units = "GB" if self.state.units == "GiB" else "GiB"
        self._set("units", self.state.units)

    def refresh_by(self, by: int) -> None:
        """Refresh more or less often."""
        nearest = min(range(len(RATES)), key=lambda i: abs(RATES[i] - self.refresh_hz))
        self.refresh_hz = RATES[max(0, min(nearest + by, len(RATES) - 1))]
        if self._timer is not None:
            self._timer.stop()
            self._timer = self.set_interval(1 / self.refresh_hz, self.tick)
        self._ticks.clear()
        automatic = self.refresh_hz == automatic_hz()
        said = f"{self.refresh_hz:g} refreshes a second, as the link suggests" if automatic else ""
        self._set("refresh", 0.0 if automatic else self.refresh_hz, said)
