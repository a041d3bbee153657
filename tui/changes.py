"""Changes of settings, collected one by one until they are applied as one restart."""

from __future__ import annotations

from ..engine import techniques
from ..engine.advice import meaningless
from ..engine.config import Option, RunConfig, UserError, Value
from ..engine.events import Environment
from ..engine.feed import Source, ViewerRole
from ..engine.technique import Technique
from .state import ViewState

WORKLOAD = (
    ("b", "batch size", "batch_size"),
    ("n", "sequence length", "seq_len"),
    ("", "learning rate", "learning_rate"),
)
"""Settings of the workload that the app offers: key, title, name."""

LADDERS: dict[str, tuple[Value, ...]] = {"learning_rate": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)}
"""Values to step through for options that name none."""


class Changes:
    """The settings changed and not yet applied, and the configuration they make.

    Args:
        source: The engine; its role says whether changes can be applied here.
        state: The run that changes start from.

    Attributes:
        pending: The changed settings, by option.
    """

    def __init__(self, source: Source, state: ViewState) -> None:
        self._source, self._state = source, state
        self.pending: dict[str, Value] = {}
        self._undo: list[dict[str, Value]] = []

    # --- the configuration they make ------------------------------------------------

    def base(self) -> RunConfig | None:
        """The configuration that changes start from: the one sent last, or the run's. None before the first run."""
        return self._state.requested or self._state.config

    def wanted(self) -> RunConfig | None:
        """The base with all changes."""
        base = self.base()
        return base.with_(self.pending) if base is not None else None

    def conflict(self) -> str | None:
        """The reason why the changes cannot be applied, or None."""
        wanted = self.wanted()
        return self.problem(wanted) if wanted is not None else None

    def problem(self, config: RunConfig) -> str | None:
        """The reason why a configuration cannot be run here, or None."""
        try:
            techniques.check(config, self._environment)
        except UserError as error:
            return str(error)
        return None

    def unavailable(self, option: Option, value: Value) -> str | None:
        """The reason why a value cannot be used on this machine, or None."""
        technique = techniques.registry().get(option.name)
        if technique is None or self._environment is None:
            return None
        return technique.unavailable(value, self._environment)

    @property
    def _environment(self) -> Environment | None:
        """The machine that would run a change; None: there is none, and a prediction needs no package."""
        return self._state.environment if self._state.acts and not self.of_script else None

    @property
    def of_script(self) -> bool:
        """True if the run is somebody's own script, which alone can change it."""
        return self._source.role is ViewerRole.WATCHING

    @property
    def applied(self) -> str:
        """The effect of applying changes here, as a clause of a sentence; empty: they restart the run."""
        if not self._state.live:
            return "a recording runs nothing"
        if not self._state.acts:
            return "the engine has gone"
        return {
            ViewerRole.READ_ONLY: "another viewer commands",
            ViewerRole.WATCHING: "enter says where the script sets it",
        }.get(self._source.role, "")

    def meaningless(self, option: Option) -> str:
        """The reason why a setting means nothing to the run on the screens; empty: it can be changed."""
        base = self.base() if self._state.run.watched else None
        return meaningless(option.name, base) if base is not None else ""

    def listed(self) -> list[Offer]:
        """Everything that can be changed and means something to the run on the screens."""
        return [each for each in offered() if not self.meaningless(each[2])]

    # --- one more, one less -----------------------------------------------------------

    def next_value(self, option: Option, current: Value, by: int, around: bool) -> Value | None:
        """The value a key steps to, past those that are unavailable; None if there is none."""
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

    def collect(self, option: Option, value: Value | None) -> None:
        """Take an option to a value without applying it; None: it stays."""
        base = self.base()
        if base is None or value is None:
            return
        self._undo.append(dict(self.pending))
        if value == base[option.name]:
            self.pending.pop(option.name, None)
        else:
            self.pending[option.name] = value
        self._state.version += 1

    @property
    def collected(self) -> bool:
        """True if there is a change to take back before it was applied."""
        return bool(self._undo)

    def undo(self) -> None:
        """Take back the last change collected."""
        if self._undo:
            self.pending = self._undo.pop()
            self._state.version += 1
        else:
            self._state.say("nothing to undo")

    def clear(self) -> None:
        """Forget all changes: they have been applied, or were meant for another run."""
        self.pending = {}
        self._undo.clear()


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


Offer = tuple[str, str, Option, Technique | None]
"""A setting that can be changed: key, title, option, and the technique it switches."""


def offered() -> list[Offer]:
    """Everything that can be changed."""
    named = techniques.all_options()
    rows: list[Offer] = [(key, title, named[name], None) for key, title, name in WORKLOAD]
    rows += [(t.key, t.title, t.switch, t) for t in techniques.by_group()]
    return rows
