"""Bytes by layer: what each held at the peak of a step, and the most it held. Vectorised over the blocks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ..engine.categories import Category
from ..engine.ledger import Ints, Ledger
from ..engine.module_names import numbered_layers

COLUMNS = ("par", "grad", "opt", "act", "tmp", "other")
GROUPS: tuple[tuple[str, tuple[Category, ...]], ...] = tuple(
    (column, tuple(category for category in Category if category.info.column == column)) for column in COLUMNS
)
"""Columns of the table. Activations made again count as activations, gathered parameters as parameters."""

NO_LAYER = "(the model)"
"""The name of the model itself in a list of its layers."""


class LayerRow(NamedTuple):
    """One layer, a module within one, or an owner that belongs to none.

    Attributes:
        name: As in the model; empty: the model itself.
        peak_bytes: What it held at the peak of the step, slack included.
        sizes: The most it held of each group during the step. The most of one
            group need not coincide with the most of another.
        depth: 0: a layer.
        inner: Whether there are modules within it.
    """

    name: str
    peak_bytes: int
    sizes: tuple[int, ...]
    depth: int = 0
    inner: bool = False


class LayerTable(NamedTuple):
    """The layers of a step, as a table.

    Attributes:
        rows: Those with parameters in the model's order, then whoever else
            ever holds anything. What they held at the peak adds up to it.
        peak_bytes: The peak.
        total: The most that the whole model held of each group at one time:
            less than the column's sum where layers take turns.
    """

    rows: list[LayerRow]
    peak_bytes: int
    total: tuple[int, ...]


def layer_table(ledger: Ledger) -> LayerTable:
    """Bytes that each layer held, at the peak and at the most, during the step of a ledger."""
    total = tuple(int(ledger.curve[list(categories)].sum(axis=0).max()) for _, categories in GROUPS)
    rows = sorted(_rows(ledger, ledger.layers, 0), key=lambda row: not row.sizes[0])
    return LayerTable(rows, ledger.peak.bytes, total)


def modules_of(ledger: Ledger, parent: LayerRow) -> list[LayerRow]:
    """The modules directly within a layer or module, as rows of their own."""
    codes = [_within(module, parent.name) for module in ledger.modules]
    return _rows(ledger, codes, parent.depth + 1)


def shared_prefix(names: Iterable[str]) -> str:
    """The beginning that a model's layers have in common, not to be read: `gpt_neox.` of `gpt_neox.layers.3`."""
    layers = numbered_layers(tuple(names))
    module = layers[0].rsplit(".", 2)[:-2] if layers else []
    return f"{module[0]}." if module else ""


def _rows(ledger: Ledger, keys: list[str] | list[str | None], depth: int) -> list[LayerRow]:
    """A row for every key that holds anything. None: not in the table."""
    index = {key: i for i, key in enumerate(dict.fromkeys(key for key in keys if key is not None))}
    codes = np.asarray([-1 if key is None else index[key] for key in keys], np.int64)
    at_peak = _at_peak(ledger, codes, len(index))
    columns = [_most(ledger, codes, len(index), categories) for _, categories in GROUPS]
    inner = {module[: len(key)] for key, module in zip(keys, ledger.modules, strict=True)
             if key is not None and len(module) > len(key)}  # fmt: skip
    found = [LayerRow(key, int(at_peak[i]), tuple(int(c[i]) for c in columns), depth, key in inner)
             for key, i in index.items()]  # fmt: skip
    return [row for row in found if row.peak_bytes or any(row.sizes)]


def _within(module: str, parent: str) -> str | None:
    """The module directly within a parent that another belongs to; None: it does not."""
    if module == parent or not module.startswith(f"{parent}."):
        return None
    return parent + "." + module[len(parent) + 1 :].split(".", 1)[0]


def owners_in(ledger: Ledger, row: str) -> set[str]:
    """Names of the owners that belong to a layer or to a module."""
    return {
        name
        for name, module, layer in zip(ledger.trace.names, ledger.modules, ledger.layers, strict=True)
        if layer == row or f"{module}.".startswith(f"{row}.")
    }


def _at_peak(ledger: Ledger, codes: Ints, n_layers: int) -> Ints:
    """Bytes held by each layer's blocks at the peak, shape [n_layers]."""
    blocks = ledger.alive(ledger.peak.event)
    layer = codes[blocks["name"]]
    blocks, layer = blocks[layer >= 0], layer[layer >= 0]
    held = np.zeros(n_layers, np.int64)
    for column in ("bytes", "slack"):
        np.add.at(held, layer, blocks[column])
    return held


def _most(ledger: Ledger, codes: Ints, n_layers: int, categories: tuple[Category, ...]) -> Ints:
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
