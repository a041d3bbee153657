"""What keys do: changes collected or applied at once, and the commands a source gets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import NamedTuple

from ..engine import techniques
from ..engine.config import Option, RunConfig, UserError, Value, show
from ..engine.events import Environment
from ..engine.exports import registry
from ..engine.feed import Command, Pause, Save, Source, Start, Stop, TakeOver, ViewerRole
from ..engine.prediction.advice import LEAST_SAVING_BYTES, single_changes
from ..engine.run import Run
from ..engine.technique import Effect, Technique
from .predictions import Predictions
from .run_summary import RunSummary, predicted_beside
from .state import ViewState

WORKLOAD = (
    ("b", "batch size", "batch_size"),
    ("n", "sequence length", "seq_len"),
    ("", "learning rate", "learning_rate"),
)
"""Settings of the workload that the app offers: key, title, name."""

LADDERS: dict[str, tuple[Value, ...]] = {"learning_rate": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
"""Values to step through for options that name none."""


class Saving(NamedTuple):
    """A change of a single technique, and what it would do.

    Attributes:
        changes: Settings by name: mostly one, two where they go together (accumulation with a smaller batch).
        saved_bytes: At the predicted peak.
        effect: On what is computed.
    """

    changes: Mapping[str, Value]
    saved_bytes: int
    effect: Effect


class Strongest(NamedTuple):
    """Of the changes of a single technique what saves most at the predicted peak.

    Attributes:
        found: What keeps the mathematics, and behind it what saves more and does not; each saves more than
            those before it. Of changes with the same effect the best of one setting, then of two.
        tried: So many have been worked out.
        of: So many there are.
    """

    found: tuple[Saving, ...]
    tried: int
    of: int


class Control:
    """Between the keys and the source.

    Args:
        source: Gets the commands.
        state: Told what comes of it.
        save_dir: Where recordings go.
        predictions: Peaks of configurations that have not run, if there is anybody to ask.

    Attributes:
        pending: Changes collected and not applied, by option.
        predicts: Whether anything is asked of who predicts.
        on_command: Called when the source is asked for something.
        on_turn: Called when what is looked at has become another recording.
    """

    def __init__(
        self, source: Source, state: ViewState, save_dir: Path, predictions: Predictions | None = None
    ) -> None:
        self.source, self.state, self.save_dir = source, state, save_dir
        self._predictions, self.predicts = predictions, True
        self.on_command: Callable[[], None] = lambda: None
        self.on_turn: Callable[[], None] = lambda: None
        self.pending: dict[str, Value] = {}
        self._undo: list[dict[str, Value]] = []
        self._before: list[RunConfig] = []
        self._saved: set[Path] = set()
        self._saving: Save | None = None
        self._prediction: tuple[object, RunSummary | str] | None = None

    # --- predictions ----------------------------------------------------------

    @property
    def predictions(self) -> Predictions | None:
        """Who predicts, if there is anybody to ask and it is wanted."""
        return self._predictions if self.predicts else None

    @property
    def answers(self) -> int | None:
        """How many predictions there are: what shows some is drawn anew when it changes; None: nobody is asked."""
        return self.predictions.answers() if self.predictions is not None else None

    def predict(self, wanted: bool) -> None:
        """Ask for predictions, or no longer: what is still to be worked out is not begun."""
        self.predicts = wanted
        if self._predictions is not None and not wanted:
            self._predictions.drop()

    # --- configurations -------------------------------------------------------

    def base(self) -> RunConfig | None:
        """The configuration that changes start from: what was sent last, or what runs."""
        return self.state.requested or self.state.config

    def wanted(self) -> RunConfig | None:
        """The base with the collected changes."""
        base = self.base()
        return base.with_(self.pending) if base is not None else None

    def conflict(self) -> str | None:
        """Why the collected changes cannot be applied, or None."""
        wanted = self.wanted()
        if wanted is None:
            return None
        return self.problem(wanted)

    @property
    def environment(self) -> Environment | None:
        """Of where a change would be run; None: nowhere, or not known yet. What is only predicted needs no package."""
        runs = self.state.live and self.source.role is not ViewerRole.WATCHING
        return self.state.environment if runs else None

    def problem(self, config: RunConfig) -> str | None:
        """Why a configuration cannot be run here, or None."""
        try:
            techniques.check(config, self.environment)
        except UserError as error:
            return str(error)
        return None

    def unavailable(self, option: Option, value: Value) -> str | None:
        """Why a value cannot be used on this machine, or None."""
        technique = techniques.registry().get(option.name)
        if technique is None or self.environment is None:
            return None
        return technique.unavailable(value, self.environment)

    def next_value(self, option: Option, current: Value, by: int, around: bool) -> Value | None:
        """The value a key steps to, past what is unavailable; None if there is none."""
        values = choices(option, current)
        position = values.index(current)
        for _ in values:
            position += by
            if around:
                position %= len(values)
            if not 0 <= position < len(values) or values[position] == current:
                return None
            if self.unavailable(option, values[position]) is None:
                return values[position]
        return None

    def strongest(self) -> Strongest | None:
        """What is known by now of which change of a single technique saves most; None if nobody predicts."""
        base, predictions = self.state.run.config or self.base(), self.predictions
        if base is None or predictions is None:
            return None
        hurry = not self.state.live  # beside a recording there is no training to give way to
        now = predictions.of(base, hurry)
        changes = [one for one in single_changes(base) if self.problem(base.with_(one)) is None]
        configs = [base.with_(one) for one in changes]
        then = [predictions.of(config, hurry) for config in configs]
        tried = len(configs) - predictions.unanswered(configs) if now else 0
        savings = [
            Saving(one, now.peak_bytes - found.peak_bytes, techniques.effect(base, config))
            for one, config, found in zip(changes, configs, then, strict=True)
            if now is not None and found is not None
        ]
        savings.sort(key=lambda one: (one.effect, len(one.changes), -one.saved_bytes))
        best: list[Saving] = []
        for saving in savings:
            if saving.saved_bytes - (best[-1].saved_bytes if best else 0) >= LEAST_SAVING_BYTES:
                best.append(saving)
        return Strongest(tuple(best), tried, len(configs))

    def prediction(self) -> RunSummary | str:
        """The run on the screens as it was predicted, a run of its own; if it is a prediction, itself.

        Returns:
            A line that says why there is none to set beside it, empty if nobody predicts.
        """
        shown, predictions, state = self.state.shown, self.predictions, self.state
        if shown is None:
            return ""
        if state.run.predicted:
            return state.summary_of(shown)
        if predictions is None:
            return ""
        if state.run.watched:
            return "No prediction is set beside this run: the loop is a script's own."
        key = (shown, shown.config, predictions.answers())
        if self._prediction is None or self._prediction[0] != key:
            found = predictions.of_run(shown)
            said = found if isinstance(found, str) else predicted_beside(found.run, shown, state.origin_of(shown))
            self._prediction = (key, said)
        return self._prediction[1]

    # --- changes ----------------------------------------------------------------

    def collect(self, option: Option, by: int, around: bool = False) -> None:
        """Step an option's value without applying it."""
        base, wanted = self.base(), self.wanted()
        if base is None or wanted is None:
            return
        value = self.next_value(option, wanted[option.name], by, around)
        if value is None:
            return
        self._undo.append(dict(self.pending))
        if value == base[option.name]:
            self.pending.pop(option.name, None)
        else:
            self.pending[option.name] = value
        self.state.version += 1

    @property
    def collected(self) -> bool:
        """True if there is a change to take back before it was applied."""
        return bool(self._undo)

    @property
    def before(self) -> RunConfig | None:
        """The configuration before the last change applied."""
        return self._before[-1] if self._before else None

    def undo(self) -> None:
        """Take back the last change collected."""
        if self._undo:
            self.pending = self._undo.pop()
            self.state.version += 1
        else:
            self.state.say("nothing to undo")

    def apply(self) -> None:
        """All collected changes as one restart."""
        wanted = self.wanted()
        if wanted is None or not self.pending:
            self.state.say("nothing changed; r restarts the run as it is")
        elif self._start(wanted):
            self.pending = {}
            self._undo.clear()

    def flip(self, option: Option, by: int = 1, around: bool = True) -> None:
        """Step an option's value and restart with it at once."""
        base = self.base()
        if base is None:
            self.state.say("no run has started yet")
            return
        value = self.next_value(option, base[option.name], by, around)
        if value is None:
            self.state.say(f"{option.name} stays {show(base[option.name])}: there is no other value to step to")
        elif self._start(base.with_({option.name: value})):
            self.state.say(f"{option.name}: {show(base[option.name])} → {show(value)}, restarting (z goes back)")

    def change(self, changes: Mapping[str, Value]) -> None:
        """Restart with some settings changed at once."""
        base = self.base()
        if base is None:
            self.state.say("no run has started yet")
        elif base.with_(changes) == base:
            self.state.say("the run has these settings already")
        elif self._start(base.with_(changes)):
            said = ", ".join(f"{name} {show(value)}" for name, value in changes.items() if base[name] != value)
            self.state.say(f"{said}, restarting (z goes back)")

    def go_back(self) -> None:
        """Restart with the configuration before the last change."""
        if not self._before:
            self.state.say("nothing to go back to")
            return
        config = self._before.pop()
        if self._start(config, remember=False):
            self.state.say("going back to the configuration before, restarting")

    def _start(self, config: RunConfig, remember: bool = True) -> bool:
        base = self.base()
        if problem := self.problem(config):
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
        base = self.base()
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
        config = self.base()
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
        predicted = self.prediction()
        return found if isinstance(predicted, str) else [*found, predicted.run]

    def look_at(self, index: int) -> None:
        """Have another run on all screens; what is collected was meant for the one before."""
        runs = self.lookable()
        if not 0 <= index < len(runs):
            return
        self.pending = {}
        self._undo.clear()
        self.state.look_at(runs[index])
        if self._predictions is not None:
            self._predictions.look_at(runs[index].environment)
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


def choices(option: Option, current: Value) -> tuple[Value, ...]:
    """The values that keys step through, the current one among them."""
    values = option.choices or LADDERS.get(option.name, ())
    if isinstance(option.default, bool):
        values = values or (False, True)
    if current in values:
        return values
    if isinstance(current, int | float):
        return tuple(sorted((*(v for v in values if isinstance(v, int | float)), current)))
    return (*values, current)


def free_name(
    folder: Path, model: str, taken: set[Path], now: Callable[[], float] = time.time, suffix: str = ".gpumem"
) -> Path:
    """A path for a file that is not there yet, nor `taken` by one still being written."""
    safe = "".join(c if c.isalnum() or c in "-._" else "-" for c in model.rsplit("/", 1)[-1]) or "model"
    stem = f"gpumem-{safe}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(now()))}"
    paths = (folder / (f"{stem}{suffix}" if n == 0 else f"{stem}-{n}{suffix}") for n in count())
    return next(path for path in paths if path not in taken and not path.exists())


def offered() -> list[tuple[str, str, Option, Technique | None]]:
    """Everything that can be changed: key, title, option, and the technique it switches."""
    named = techniques.all_options()
    rows: list[tuple[str, str, Option, Technique | None]] = [
        (key, title, named[name], None) for key, title, name in WORKLOAD
    ]
    rows += [(t.key, t.title, t.switch, t) for t in techniques.registry().values()]
    return rows
