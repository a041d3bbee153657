"""Layers that are alike need not all be traced: a few stand for all of them.

A model of 32 equal layers is predicted from one of six. Which layers are alike
is read off the modules, never off a model's name:

    head   at least the first; the first two where the second notices that the first has no layer before it
    group  three times a period of layers; the middle one stands for what was left out
    tail   at least the last; all that are treated otherwise, and the one before them

Three groups, because only by comparing them can be told that they do the same
(`layer_extrapolation`). Where no period is found, every layer is traced.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import torch

from ..model_shell import shell_of
from ..workload import Plan

GROUPS = 3
LONGEST_HEAD = 4
LONGEST_PERIOD = 12
_INDEX = re.compile(r"(^|_)(idx|index|id|number)$")


@dataclass(frozen=True)
class Layers:
    """The layers of a model that are traced, and how many each stands for.

    Attributes:
        container: Name of the list of layers: `model.layers`.
        head: Layers before the first group.
        period: Layers in a group.
        tail: Layers after the last group.
        copies: How many groups the middle one stands for beside itself.
    """

    container: str
    head: int
    period: int
    tail: int
    copies: int
    _pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)
    _known: dict[str, tuple[str, int, str] | None] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        # A KV cache numbers the model's layers on its own (`owners.of_outputs`).
        pattern = re.compile(rf"^((?:{re.escape(self.container)}|layers)\.)(\d+)(?=\.|$)")
        object.__setattr__(self, "_pattern", pattern)

    @property
    def traced(self) -> int:
        """Number of layers traced."""
        return self.head + GROUPS * self.period + self.tail

    @cached_property
    def middle(self) -> range:
        """The layers that stand for others as well."""
        first = self.head + self.period
        return range(first, first + self.period)

    def layer(self, name: str) -> int | None:
        """The layer that a module's or an owner's name lies in."""
        parts = self._parts(name)
        return parts[1] if parts is not None else None

    def contains_all(self, module: str) -> bool:
        """True if a module is one that has all layers inside it."""
        return not module or f"{self.container}.".startswith(f"{module}.")

    def group(self, layer: int) -> int:
        """0 to 2; -1 in the head, 3 in the tail."""
        return -1 if layer < self.head else min((layer - self.head) // self.period, GROUPS)

    def times(self, name: str) -> int:
        """Number of the model's modules that the named one stands for."""
        return self.copies + 1 if self.layer(name) in self.middle else 1

    def shifted(self, name: str, layers: int) -> str:
        """The same name in a layer so much further on."""
        parts = self._parts(name) if layers else None
        return f"{parts[0]}{parts[1] + layers}{parts[2]}" if parts is not None else name

    def _parts(self, name: str) -> tuple[str, int, str] | None:
        """The name up to the layer's number, that, and the rest; None: it lies in no layer."""
        if name not in self._known:
            found = self._pattern.match(name)
            self._known[name] = (found[1], int(found[2]), name[found.end() :]) if found else None
        return self._known[name]

    def final(self, name: str) -> str:
        """The name in the model as it is; of what stands for several, the first of them."""
        layer = self.layer(name)
        behind = layer is not None and layer >= self.middle.stop
        return self.shifted(name, self.copies * self.period) if behind else name

    def repeated(self, names: Iterable[str]) -> Iterator[str]:
        """Names of what is traced, in order, each as often as what it stands for comes there."""
        for is_middle, some in groupby(names, lambda name: self.layer(name) in self.middle):
            yield from list(some) * (self.copies + 1 if is_middle else 1)

    def all_of(self, names: Iterable[str]) -> Iterator[str]:
        """Names of what is traced, in order, as they are in the model, with those they stand for."""
        for is_middle, some in groupby(names, lambda name: self.layer(name) in self.middle):
            if not is_middle:
                yield from map(self.final, some)
                continue
            group = list(some)
            for copy in range(self.copies + 1):
                yield from (self.shifted(name, copy * self.period) for name in group)


HEADS = (1, 2)
"""The shortest heads to try: whether the second layer is like the third is known when both have been traced."""


def shortened(plan: Plan, head: int = HEADS[0]) -> tuple[Plan, Layers | None]:
    """A plan of fewer layers for the same prediction; the plan itself where that cannot be.

    Args:
        plan: Of all layers.
        head: Layers of it, at the least.
    """
    found = _alike(plan, head)
    if found is None:
        return plan, None
    layers, kept, signatures = found
    try:
        architecture = _with_layers(plan.architecture, kept)
        shell = shell_of(architecture, plan.task)
    except Exception:  # a configuration that insists on its number of layers
        return plan, None
    container = shell.get_submodule(layers.container)
    if [_signature(i, layer) for i, layer in enumerate(container)] != [signatures[i] for i in kept]:
        return plan, None
    return dataclasses.replace(plan, architecture=architecture, shell=shell), layers


def _alike(plan: Plan, least_head: int) -> tuple[Layers, list[int], list[Any]] | None:
    """The shortest head and period that the layers have; which to keep; all signatures."""
    shell, architecture, layer_period = plan.shell, plan.architecture, plan.recipe.layer_period
    count = int(getattr(architecture, "num_hidden_layers", 0) or 0)
    lists = [
        name for name, m in shell.named_modules() if isinstance(m, torch.nn.ModuleList) and count and len(m) == count
    ]
    if len(lists) != 1:
        return None
    signatures = [_signature(i, layer) for i, layer in enumerate(shell.get_submodule(lists[0]))]
    shortest_tail = plan.recipe.last_layers + 1
    shortest_head = -(-least_head // layer_period) * layer_period
    for head in range(shortest_head, shortest_head + LONGEST_HEAD, layer_period):
        for shortest in range(1, LONGEST_PERIOD + 1):
            period = math.lcm(shortest, layer_period)
            tail = shortest_tail + (count - head - GROUPS * period - shortest_tail) % period
            left_out = count - head - GROUPS * period - tail
            if left_out <= 0:
                continue
            body = signatures[head : count - tail]
            if body[period:] == body[:-period]:
                layers = Layers(lists[0], head, period, tail, left_out // period)
                kept = [*range(head + GROUPS * period), *range(count - tail, count)]
                return layers, kept, signatures
    return None


def _signature(index: int, layer: torch.nn.Module) -> Any:
    """All that tells one layer from another: its modules, their settings, their shapes."""
    described = []
    for name, module in layer.named_modules():
        settings = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, int | float | str) and not (_INDEX.search(key) and value == index)
        }
        shapes = [(key, tuple(p.shape), p.dtype) for key, p in module.named_parameters(recurse=False)]
        shapes += [(key, tuple(b.shape), b.dtype) for key, b in module.named_buffers(recurse=False)]
        described.append((name, type(module), settings, shapes))
    return described


def _with_layers(architecture: Any, kept: list[int]) -> Any:
    """The configuration of a model with these layers only."""
    count = architecture.num_hidden_layers
    fields = {
        key: [value[i] for i in kept] if isinstance(value, list) and len(value) == count else value
        for key, value in architecture.to_dict().items()
    }
    fields[architecture.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = len(kept)
    return type(architecture).from_dict(fields)
