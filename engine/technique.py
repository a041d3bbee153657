"""What a technique is. One file each in `engine/techniques/`, exporting TECHNIQUE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import Option, RunConfig, Value, show
from .events import Environment

if TYPE_CHECKING:
    from .workload import Model, Recipe


def _nothing(_config: RunConfig, _recipe: Recipe) -> None:
    """For techniques that act in the loop alone."""


def _never(_config: RunConfig) -> str | None:
    return None


def _any_model(_config: RunConfig, _model: Model) -> str | None:
    return None


def _as_set(_config: RunConfig) -> tuple[Value, str] | None:
    return None


def _always(_value: Value, _environment: Environment) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Technique:
    """One thing that can be done about memory.

    Imports of torch and of what builds on it belong inside `apply`: the app
    lists techniques without loading them.

    Attributes:
        name: Also the name of its switch, `options[0]`.
        title: For people.
        key: The key that steps through the switch's values in the app.
        summary: One line: what it does to memory.
        formula: What it saves or costs, in bytes.
        source: Where it is described: paper or library documentation.
        cost: What it costs in time, in half a sentence; where it depends on the
            switch's value, by value.
        order: Techniques apply in this order: a later one builds on the model
            that an earlier one leaves.
        options: The switch first, then its details.
        apply: Writes what it changes into the recipe of a run.
        overruled: What the switch comes to in a configuration, whatever it is
            set to, and what it is that decides so; None: it is as it is set.
        conflict: Why a configuration cannot be run with this technique as set
            in it (one line), or None.
        unsuitable: Why a model cannot be run with this technique as set (one line), or
            None. Sees the model on the meta device, before anything is loaded.
        unavailable: Why a value of the switch cannot be used on a machine (one
            line), or None.
    """

    name: str
    title: str
    key: str
    summary: str
    formula: str
    source: str
    order: int
    options: tuple[Option, ...]
    cost: str | Mapping[Value, str] = "nothing measurable"
    apply: Callable[[RunConfig, Recipe], None] = _nothing
    overruled: Callable[[RunConfig], tuple[Value, str] | None] = _as_set
    conflict: Callable[[RunConfig], str | None] = _never
    unsuitable: Callable[[RunConfig, Model], str | None] = _any_model
    unavailable: Callable[[Value, Environment], str | None] = _always

    @property
    def switch(self) -> Option:
        """The option that carries the technique's name."""
        return self.options[0]

    def in_effect(self, config: RunConfig) -> str:
        """The switch's value for people, as it has an effect: `on`, `off (checkpointing)`."""
        overruled = self.overruled(config)
        return f"{show(overruled[0])} ({overruled[1]})" if overruled else show(config[self.name])

    def cost_of(self, value: Value) -> str:
        """What one of the switch's values costs in time."""
        return self.cost if isinstance(self.cost, str) else self.cost[value]
