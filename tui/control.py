"""The commands that keys send to a source: start, stop, hold, save, and which run is looked at."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

from ..engine.config import Option, RunConfig, UserError, Value, show
from ..engine.exports import registry
from ..engine.feed import Command, Pause, Save, Source, Start, Stop, TakeOver, ViewerRole
from ..engine.out_of_memory.fixes import settings_text
from ..engine.out_of_memory.report import Fix
from ..engine.run import Run
from .changes import Changes
from .forecasts import Forecasts
from .predictions import Predictions
from .state import ViewState


class Control:
    """Commands to a source. Each answers by a message in the state: done, or why not.

    Args:
        source: Gets the commands.
        state: Gets the messages.
        save_dir: Folder for recordings and exports.
        predictions: Peaks of configurations that have not run; None: nobody predicts.

    Attributes:
        changes: Settings changed and not applied.
        forecasts: Predictions about the run on the screens.
        on_command: Called when a command has been sent.
        on_turn: Called when another run has come on the screens.
    """

    def __init__(
        self, source: Source, state: ViewState, save_dir: Path, predictions: Predictions | None = None
    ) -> None:
        self.source, self.state, self.save_dir = source, state, save_dir
        self.changes = Changes(source, state)
        self.forecasts = Forecasts(state, self.changes, predictions)
        self.on_command: Callable[[], None] = lambda: None
        self.on_turn: Callable[[], None] = lambda: None
        self._before: list[RunConfig] = []
        self._saved: set[Path] = set()
        self._saving: Save | None = None

    # --- changes ----------------------------------------------------------------

    @property
    def before(self) -> RunConfig | None:
        """The configuration before the last change applied."""
        return self._before[-1] if self._before else None

    def apply(self) -> None:
        """Restart with all collected changes."""
        wanted = self.changes.wanted()
        if wanted is None or not self.changes.pending:
            self.state.say("nothing changed; r restarts the run as it is")
        elif self._start(wanted):
            self.changes.clear()

    def flip(self, option: Option, by: int = 1, around: bool = True) -> None:
        """Step an option's value and restart with it at once."""
        base = self.changes.base()
        if base is None:
            self.state.say("no run has started yet")
            return
        value = self.next_value(option, base[option.name], by, around)
        if value is None:
            self.state.say(f"{option.name} stays {show(base[option.name])}: there is no other value to step to")
        elif self._start(base.with_({option.name: value})):
            self.state.say(f"{option.name}: {show(base[option.name])} → {show(value)}, restarting (z goes back)")

    def next_value(self, option: Option, current: Value, by: int, around: bool) -> Value | None:
        """The value that a key goes to: forward first the one named as what saves most, or else the next one."""
        named = self.forecasts.named().get(option.name) if by > 0 and current == self._base_value(option) else None
        if named is not None and named != current:
            return named
        return self.changes.next_value(option, current, by, around)

    def collect(self, option: Option, by: int, around: bool) -> None:
        """Take an option to the value that its key goes to, without applying it."""
        if nothing := self.changes.meaningless(option):
            self.state.say(nothing)
        elif (wanted := self.changes.wanted()) is not None:
            self.changes.collect(option, self.next_value(option, wanted[option.name], by, around))

    def _base_value(self, option: Option) -> Value | None:
        base = self.changes.base()
        return base[option.name] if base is not None else None

    def change(self, changes: Mapping[str, Value]) -> None:
        """Restart with some settings changed at once."""
        base = self.changes.base()
        if base is None:
            self.state.say("no run has started yet")
        elif base.with_(changes) == base:
            self.state.say("the run has these settings already")
        elif self._start(base.with_(changes)):
            said = ", ".join(f"{name} {show(value)}" for name, value in changes.items() if base[name] != value)
            self.state.say(f"{said}, restarting (z goes back)")

    def fix(self, run: Run, fix: Fix) -> bool:
        """Restart a run that ran out of memory with a change that would fit; False: that cannot be done from here."""
        if self.source.role is ViewerRole.WATCHING:
            self.state.say(f"for your script to set: {fix.text}")
            return False
        if not self._start(run.config.with_(fix.set)):
            return False
        self.state.say(f"{settings_text(fix.set)}, restarting (z goes back)")
        return True

    def go_back(self) -> None:
        """Restart with the configuration before the last change."""
        if not self._before:
            self.state.say("nothing to go back to")
            return
        config = self._before.pop()
        if self._start(config, remember=False):
            self.state.say("going back to the configuration before, restarting")

    def _start(self, config: RunConfig, remember: bool = True) -> bool:
        base = self.changes.base()
        if problem := self.changes.problem(config):
            self.state.say(problem, problem=True)
            return False
        if not self._send(Start(config)):
            return False
        if remember and base is not None and base != config:
            self._before.append(base)
        self.state.requested, self.state.stopping = config, True
        self.state.version += 1
        return True

    # --- commands -----------------------------------------------------------------

    def restart(self) -> None:
        """The same run again."""
        base = self.changes.base()
        if base is None:
            self.state.say("no run has started yet")
        elif self._start(base):
            self.state.say("restarting")

    def stop(self) -> None:
        """End the run."""
        if not self.state.run.running and self.state.live:
            self.state.say("nothing is running; r starts the last run again")
        elif self._send(Stop()):
            self.state.stopping, self.state.requested = True, None
            self.state.dismiss()  # what has been said of a restart that is no more

    def toggle_pause(self) -> None:
        """Hold the run, or let it go on."""
        if not self.state.run.running and self.state.live:
            self.state.say("nothing is running")
            return
        self._send(Pause(self.state.run.status != "held"))

    def take_over(self) -> None:
        """Command the engine from here, whoever does now."""
        if self.source.role is not ViewerRole.READ_ONLY:
            self.state.say("nobody else commands this engine")
        elif self._send(TakeOver()):
            self.state.say("this viewer commands now; the other may only look")

    @property
    def saving(self) -> Save | None:
        """The recording or export that is being written."""
        return self._saving if self._saving is not None and not self._saving.work.over else None

    def cancel_saving(self) -> bool:
        """Leave what is being written; False: nothing is."""
        if self.saving is None:
            return False
        self.saving.work.cancelled = True
        return True

    def save(self, format_name: str = "") -> None:
        """Write a recording under a name that is not taken, or export the run in a format."""
        config = self.changes.base()
        if config is None:
            self.state.say("no run has started yet: nothing to save")
            return
        if self.saving is not None:
            self.state.say(f"{self.saving.path.name} is being saved")
            return
        suffix = registry()[format_name].suffix if format_name else ".gpumem"
        path = free_name(self.save_dir, config.model, self._saved, suffix=suffix)
        command = Save(path, self.state.shown, format_name)
        if self._send(command):
            self._saved.add(command.path)
            self._saving = command

    # --- runs to look at ------------------------------------------------------------

    def lookable(self) -> list[Run]:
        """The runs that can be had on the screens, as compare lists them: each kind of run, the prediction last."""
        found = [group[-1] for group in self.state.listed]
        predicted = self.forecasts.of_shown()
        return found if isinstance(predicted, str) else [*found, predicted.run]

    def look_at(self, index: int) -> None:
        """Have another run on all screens; what is collected was meant for the one before."""
        runs = self.lookable()
        if not 0 <= index < len(runs):
            return
        self._have_on_screens(runs[index])

    def look_at_run(self, run: Run) -> None:
        """Have one of the source's runs on all screens, if it is still kept and not there already."""
        if run is not self.state.shown and (run in self.state.run_list.runs or run in self.lookable()):
            self._have_on_screens(run)

    def _have_on_screens(self, run: Run) -> None:
        self.changes.clear()
        self.state.look_at(run)
        self.forecasts.turned()
        self.on_turn()
        self.on_command()

    def look_on(self, by: int) -> None:
        """Have the next run, or the one before, on all screens."""
        runs = self.lookable()
        at = next((i for i, run in enumerate(runs) if run is self.state.shown), self.state.place)
        if runs:
            self.look_at((at + by) % len(runs))

    def _send(self, command: Command) -> bool:
        try:
            self.source.command(command)
        except UserError as error:
            self.state.say(str(error), problem=True)
            return False
        self.on_command()
        return True


def free_name(
    folder: Path, model: str, taken: set[Path], now: Callable[[], float] = time.time, suffix: str = ".gpumem"
) -> Path:
    """A path for a file that is not there yet, nor `taken` by one still being written."""
    safe = "".join(c if c.isalnum() or c in "-._" else "-" for c in model.rsplit("/", 1)[-1]) or "model"
    stem = f"gpumem-{safe}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now()))}"
    paths = (folder / (f"{stem}{suffix}" if n == 0 else f"{stem}-{n}{suffix}") for n in count())
    return next(path for path in paths if path not in taken and not path.exists())
