"""Bytes by layer: the most that each layer held during a step. Vectorised over the blocks."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine.events import Category
from ..engine.ledger import Ints, Ledger, layer_of, strip_wrappers

GROUPS: tuple[tuple[str, tuple[Category, ...]], ...] = (
    ("par", (Category.PARAMETERS, Category.BUFFERS)),
    ("grad", (Category.GRADIENTS,)),
    ("opt", (Category.OPTIMIZER_STATE,)),
    ("act", (Category.ACTIVATIONS, Category.RECOMPUTED)),
    ("tmp", (Category.TEMPORARIES,)),
)
"""Columns of the table. Activations made again count as activations."""

_NUMBERED = re.compile(r"^(.*\.)\d+$")
_STATE = re.compile(r"\.(?:weight|bias)\..*$")
_OWN = re.compile(r"\.(?:weight|bias)$")


class LayerRow(NamedTuple):
    """One layer, or a module within one.

    Attributes:
        name: As in the model; empty: the model itself.
        sizes: The most it held of each group during the step. The most of one
            group need not coincide with the most of another.
        depth: 0: a layer.
        inner: Whether there are modules within it.
    """

    name: str
    sizes: tuple[int, ...]
    depth: int = 0
    inner: bool = False


class LayerTable(NamedTuple):
    """All layers of a step.

    Attributes:
        rows: In the model's order, without those that never hold anything.
        total: The most that the whole model held of each group at one time:
            less than the column's sum where layers take turns.
    """

    rows: list[LayerRow]
    total: tuple[int, ...]


def layer_table(ledger: Ledger) -> LayerTable:
    """The most that each layer held, by group, during the step of a ledger."""
    total = tuple(int(ledger.curve[list(categories)].sum(axis=0).max()) for _, categories in GROUPS)
    return LayerTable(_rows(ledger, [_layer(name) for name in ledger.trace.names], 0), total)


def modules_of(ledger: Ledger, parent: LayerRow) -> list[LayerRow]:
    """The modules directly within a layer or module, as rows of their own."""
    codes = [_within(name, parent.name) for name in ledger.trace.names]
    return _rows(ledger, codes, parent.depth + 1)


def _rows(ledger: Ledger, keys: list[str | None], depth: int) -> list[LayerRow]:
    """A row for every key that holds anything. None: not in the table."""
    index = {key: i for i, key in enumerate(dict.fromkeys(key for key in keys if key is not None))}
    codes = np.asarray([-1 if key is None else index[key] for key in keys], np.int64)
    columns = [_most(ledger, codes, len(index), categories) for _, categories in GROUPS]
    inner = {_owner(name)[: len(key)] for key, name in zip(keys, ledger.trace.names, strict=True)
             if key is not None and len(_owner(name)) > len(key)}  # fmt: skip
    found = [LayerRow(key, tuple(int(c[i]) for c in columns), depth, key in inner) for key, i in index.items()]
    return [row for row in found if any(row.sizes)]


def _layer(name: str) -> str | None:
    """The layer of an owner; an optimizer's tensors carry their own name behind their parameter's."""
    return layer_of(_STATE.sub("", name))


def _owner(name: str) -> str:
    """The module of an owner: without the parameter's own name and what follows it."""
    return _STATE.sub("", _OWN.sub("", strip_wrappers(name)))


def _within(name: str, parent: str) -> str | None:
    """The module directly within a parent that an owner belongs to; None: it does not."""
    module = _owner(name)
    if module == parent or not module.startswith(f"{parent}."):
        return None
    return parent + "." + module[len(parent) + 1 :].split(".", 1)[0]


def owned_by(name: str, layer: str) -> bool:
    """Whether an owner belongs to a layer or module."""
    return _layer(name) == layer or f"{_owner(name)}.".startswith(f"{layer}.")


def _most(ledger: Ledger, codes: Ints, n_layers: int, categories: tuple[Category, ...]) -> npt.NDArray[np.int64]:
    """Highest running sum of each layer's blocks of some categories, shape [n_layers]."""
    blocks = ledger.blocks[np.isin(ledger.blocks["category"], categories)]
    most = np.zeros(n_layers, np.int64)
    layer = codes[blocks["name"]]
    blocks, layer = blocks[layer >= 0], layer[layer >= 0]
    if not len(blocks):
        return most
    when = np.concatenate((blocks["born"], blocks["died"]))
    delta = np.concatenate((blocks["bytes"], -blocks["bytes"]))
    layer = np.concatenate((layer, layer))
    # One event is one alloc or one free, so within a layer `when` orders them all.
    order = np.lexsort((when, layer))
    layer, running = layer[order], np.cumsum(delta[order])
    starts = np.flatnonzero(np.r_[True, layer[1:] != layer[:-1]])
    base = np.r_[0, running[starts[1:] - 1]]
    most[layer[starts]] = np.maximum.reduceat(running, starts) - base
    return most


@lru_cache(maxsize=4)
def numbered_layers(names: tuple[str, ...]) -> list[str]:
    """The repeated layers of a model, in order: those of the most frequent prefix."""
    layers = dict.fromkeys(layer_of(name) for name in names)
    groups: dict[str, list[str]] = {}
    for layer in layers:
        if match := _NUMBERED.match(layer):
            groups.setdefault(match.group(1), []).append(layer)
    most = max(groups.values(), key=lambda group: len(group), default=[])  # noqa: PLW0108
    return sorted(most, key=lambda layer: int(layer.rsplit(".", 1)[1]))
