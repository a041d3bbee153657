"""The form of a technique. One file each in `engine/techniques/`, exporting TECHNIQUE."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .categories import Category
from .config import Option, RunConfig, Value, show
from .events import Environment

if TYPE_CHECKING:
    from .recipe import Model, Recipe


class Effect(enum.IntEnum):
    """A change's effect on the training, beside its memory; the larger, the less harmless."""

    NONE = 0
    NUMERICS = 1
    TRAINING = 2
    UNSOUND = 3

    @property
    def title(self) -> str:
        """Name for people."""
        return ("same mathematics", "other rounding", "another training", "may not train at all")[self]


class Group(enum.StrEnum):
    """The subject of a technique; the order is the screen's."""

    NUMBERS = "numbers"
    MODEL = "model"
    MEMORY_FOR_TIME = "memory for time"
    OPTIMIZER = "optimizer"
    SEVERAL_GPUS = "several GPUs"


class Mathematics(NamedTuple):
    """The mathematics of a configuration, as far as one technique decides it.

    Two configurations that agree in all fields make the same updates, up to the
    order in which numbers are added.

    Attributes:
        training: Which parameters are updated, by which rule, from which tokens.
        numerics: In how many bits.
        unsound: Why the loss may become nan, or nothing be learnt; empty: no reason known.
    """

    training: str = ""
    numerics: str = ""
    unsound: str = ""

    def effect(self, other: Mathematics) -> Effect:
        """The effect of going over to another one."""
        if other.unsound and not self.unsound:
            return Effect.UNSOUND
        if self.training != other.training:
            return Effect.TRAINING
        return Effect.NUMERICS if self.numerics != other.numerics else Effect.NONE


Recognise = Callable[[Any, Any], Mapping[str, Value]]
"""Reads a technique's settings off a model and its optimizer."""


def _nothing(_config: RunConfig, _recipe: Recipe) -> None:
    """The `apply` of techniques that act in the loop alone."""


def _never(_config: RunConfig) -> str | None:
    return None


def _any_model(_config: RunConfig, _model: Model) -> str | None:
    return None


def _as_set(_config: RunConfig) -> tuple[Value, str] | None:
    return None


def _always(_value: Value, _environment: Environment) -> str | None:
    return None


def _the_same(_config: RunConfig) -> Mathematics:
    return Mathematics()


def _not_visible(_model: Any, _optimizer: Any) -> Mapping[str, Value]:
    """The `recognise` of techniques that leave no mark on a model or its optimizer."""
    return {}


@dataclass(frozen=True, slots=True)
class Technique:
    """One thing that can be done about memory.

    Imports of torch and of what builds on it belong inside `apply` and
    `recognise`: the app lists techniques without loading them.

    Attributes:
        name: Also the name of its switch, `options[0]`.
        title: For people.
        group: Which techniques it stands among.
        summary: One line: what it does to memory.
        formula: What it saves or costs, in bytes.
        source: Where it is described: paper or library documentation.
        cost: What it costs, time above all, in half a sentence; empty: nothing to speak of. Where it
            depends on the switch's value, by value.
        slowdown: Of a step's time about what it adds: of changes that would help alike, the quickest comes first.
        order: Techniques apply in this order: a later one builds on the model
            that an earlier one leaves.
        options: The switch first, then its details.
        in_script: How it is set in a training script of one's own; where it depends on the switch's value, by
            value: one that is not named is had without what sets the others.
        in_plain_script: The same for a model that is none of transformers'; "": as `in_script`; None: it means
            nothing there.
        acts_on: The categories whose bytes it changes.
        variants: Settings that between them set every value which trains
            otherwise, each complete in itself: what the tests train, and what
            they combine with the other techniques'.
        packages: Distributions whose version matters to it, beside PyTorch and
            transformers.
        key: The key that steps through the switch's values in the app; "": none,
            the techniques screen and the palette reach it.
        apply: Writes what it changes into the recipe of a run.
        overruled: What the switch comes to in a configuration, whatever it is
            set to, and what it is that decides so; None: it is as it is set.
        conflict: Why a configuration cannot be run with this technique as set
            in it (one line), or None.
        unsuitable: Why a model cannot be run with this technique as set (one line), or
            None. Sees the model on the meta device, before anything is loaded.
        unavailable: Why a value of the switch cannot be used on a machine (one
            line), or None.
        saves: The values of the switch that can lower memory, those first that save most if that is known; of
            several that hold the same the most usual one. Where it depends on the configuration, a function of it;
            None: all but the default.
        caution: What of a configuration's memory surprises where this technique is used (one
            line), or None.
        mathematics: What a configuration computes, as far as it decides that.
        recognise: Its settings in a watched script, by name, from the model and
            the optimizer while the model's forward is entered; without those
            that cannot be told. It may find values that no option takes.
    """

    name: str
    title: str
    group: Group
    summary: str
    formula: str
    source: str
    order: int
    options: tuple[Option, ...]
    in_script: str | Mapping[Value, str]
    acts_on: tuple[Category, ...]
    variants: tuple[Mapping[str, Value], ...]
    in_plain_script: str | Mapping[Value, str] | None = ""
    packages: tuple[str, ...] = ()
    key: str = ""
    cost: str | Mapping[Value, str] = ""
    slowdown: float = 0.0
    apply: Callable[[RunConfig, Recipe], None] = _nothing
    overruled: Callable[[RunConfig], tuple[Value, str] | None] = _as_set
    conflict: Callable[[RunConfig], str | None] = _never
    unsuitable: Callable[[RunConfig, Model], str | None] = _any_model
    unavailable: Callable[[Value, Environment], str | None] = _always
    saves: tuple[Value, ...] | Callable[[RunConfig], tuple[Value, ...]] | None = None
    caution: Callable[[RunConfig], str | None] = _never
    mathematics: Callable[[RunConfig], Mathematics] = _the_same
    recognise: Recognise = _not_visible

    @property
    def switch(self) -> Option:
        """The option that carries the technique's name."""
        return self.options[0]

    def savers(self, config: RunConfig) -> tuple[Value, ...]:
        """The values of the switch that can lower a configuration's memory, but for the one that it has."""
        overruled = self.overruled(config)
        now = (config[self.name], overruled[0] if overruled else None)
        if self.saves is None:
            found = tuple(value for value in self.switch.choices if value != self.switch.default)
        else:
            found = self.saves if isinstance(self.saves, tuple) else self.saves(config)
        return tuple(value for value in found if value not in now)

    def in_effect(self, config: RunConfig) -> str:
        """The switch's value for people, as it has an effect: `on`, `off (checkpointing)`."""
        overruled = self.overruled(config)
        return f"{show(overruled[0])} ({overruled[1]})" if overruled else config.shown(self.name)

    def means_something(self, config: RunConfig) -> bool:
        """False where the model of a watched script is none of transformers', and only those have it."""
        return not config.unknown_architecture or self.in_plain_script is not None or self._is_set(config)

    def _is_set(self, config: RunConfig) -> bool:
        return config[self.name] != self.switch.default or self.name in config.foreign

    def script_lines(self, name: str, config: RunConfig) -> str:
        """The way one of its options comes to be as it is in a configuration, in a script of one's own."""
        lines = (config.unknown_architecture and self.in_plain_script) or self.in_script
        if isinstance(lines, str):
            return lines
        every = " or ".join(dict.fromkeys(lines.values()))
        return lines.get(config[self.name]) or (f"without {every}" if name == self.name else every)

    def cost_of(self, value: Value) -> str:
        """The cost of one of the switch's values; empty: nothing to speak of."""
        return self.cost if isinstance(self.cost, str) else self.cost[value]
