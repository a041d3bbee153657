"""The passes of a list of requests through a model's layers, and whether each layer does the same.

A row belongs to a layer if one of its modules was at work, and outside of
forward and backward if what it allocates or frees is that layer's: a list of
gradients is one pass, and so is clearing a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..events import Phase
from .alloc_requests import AllocRequests, InputBlocks, Ints, made_at
from .layers import GROUPS, Layers

MIDDLE = 1
NO_LAYER = -2
NO_PASS = -1
COMPUTED = (Phase.FORWARD, Phase.BACKWARD, Phase.RECOMPUTE)
SAID = (*COMPUTED, Phase.LOAD)
"""Phases whose rows say which module is at work."""


class UnlikeError(Exception):
    """The layers do not all do the same."""


class LayerRun(NamedTuple):
    """Consecutive rows of one group of layers, or of none."""

    group: int
    begin: int
    end: int


class LayerPasses:
    """The requests' rows by layer, and the passes in them.

    Args:
        requests: Of the traced layers.
        layers: Which those are.

    Attributes:
        rows: The requests', in the order that `_order` gives them.
        blocks: By row; likewise `sizes`, `phase`, `micro`, `module` and `layer`.
        names: Of modules; `module` indexes them.
        made: By row, that where its block is made; -1: nowhere.
        runs: One after the other, all rows.
        run_of: By row, the number of its run; likewise `group`.
        pass_of: By row, the number of the middle run of its pass, or `NO_PASS`;
            only the three groups' runs are in passes.
        nth: By row, so many rows into its run.

    Raises:
        UnlikeError: There is no such order in them, or the groups differ.
    """

    def __init__(self, requests: AllocRequests, layers: Layers) -> None:
        self.requests, self.layers = requests, layers
        self.blocks: Ints = requests.rows["address"].astype(np.int64)
        self.sizes: Ints = requests.rows["bytes"]
        self.made = made_at(self.blocks, self.sizes, self.blocks)
        self.phase, self.micro, self.module = self._read()
        self.layer = self._layers()
        order = self._order()
        self.rows, self.blocks, self.sizes = requests.rows[order], self.blocks[order], self.sizes[order]
        self.phase, self.micro, self.module = self.phase[order], self.micro[order], self.module[order]
        self.layer = self.layer[order]
        self.made = self.made[order]  # where a block is made no row has moved
        found, of_row = np.unique(self.layer, return_inverse=True)
        groups = [NO_LAYER if layer == NO_LAYER else layers.group(layer) for layer in found.tolist()]
        self.runs = _runs(np.array(groups)[of_row])
        lengths = [run.end - run.begin for run in self.runs]
        self.run_of = np.repeat(np.arange(len(self.runs)), lengths)
        self.group = np.array([run.group for run in self.runs], np.int64)[self.run_of]
        self.nth = np.arange(len(self.blocks)) - np.array([run.begin for run in self.runs], np.int64)[self.run_of]
        self.pass_of = self._passes()[self.run_of]
        self._compare()

    def group_made(self, made: Ints) -> Ints:
        """The groups that make blocks in their passes, by the rows where these are made; `NO_LAYER`: none does."""
        return np.where((made >= 0) & (self.pass_of[made] != NO_PASS), self.group[made], NO_LAYER)

    def in_groups(self, layer_pass: int) -> tuple[LayerRun, LayerRun, LayerRun]:
        """The three groups' runs in a pass, by group."""
        first, last = sorted((self.runs[layer_pass - 1], self.runs[layer_pass + 1]))
        return first, self.runs[layer_pass], last

    def goes_up(self, layer_pass: int) -> bool:
        """True if a pass comes from the first layer."""
        return self.runs[layer_pass - 1].group < MIDDLE

    # --- reading ------------------------------------------------------------------

    def _read(self) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int16], Ints]:
        """Read the phase, micro-batch and module of each row, and the owner of each block."""
        count = len(self.blocks)
        phase = np.full(count, Phase.IDLE, np.uint8)
        micro, module = np.zeros(count, np.int16), np.zeros(count, np.int64)
        numbers = {"": 0}
        self.owner: dict[int, str] = {}
        for start, trace in self.requests.traces:
            marks = trace.marks[trace.events["mark"]]
            some = slice(start, start + len(trace.events))
            known = np.array([numbers.setdefault(name, len(numbers)) for name in trace.names], np.int64)
            phase[some], micro[some] = marks["phase"], marks["micro_batch"]
            module[some] = known[marks["module"]]
            for block, name in zip(trace.owners["address"].tolist(), trace.owners["name"].tolist(), strict=True):
                if block:  # not on the host
                    self.owner.setdefault(block, trace.names[name])
        self.names = list(numbers)
        return phase, micro, module

    def _layers(self) -> Ints:
        """The layer that each row belongs to."""
        inputs, at_work = self.requests.inputs, self._at_work()
        computed = np.isin(self.phase, COMPUTED)
        of_block = {block: self._layer(name) for block, name in self.owner.items()}
        owned = np.array(sorted(self.owner, reverse=True), np.int64)
        computes = computed[made_at(self.blocks, self.sizes, owned)]
        for block in owned[~computes].tolist():  # what an owned tensor was converted from is its layer's too
            source = inputs[block]
            if isinstance(source, int):
                of_block.setdefault(source, of_block[block])
        made = np.flatnonzero(self.sizes > 0)
        columns = (column[made].tolist() for column in (self.blocks, at_work, computed))
        for block, layer, computing in zip(*columns, strict=True):
            inherited = _layer_of_input(inputs[block], of_block)
            if layer == NO_LAYER and not computing and of_block.get(block, NO_LAYER) == NO_LAYER:
                of_block[block] = inherited
            of_block.setdefault(block, layer)
        own = np.array([of_block.get(block, NO_LAYER) for block in self.blocks.tolist()])
        # What is gathered for a layer before that layer computes is nobody's.
        ahead = (self.made >= 0) & computed[self.made] & (at_work[self.made] == NO_LAYER)
        return np.where((at_work == NO_LAYER) & ~ahead, own, at_work)

    def _at_work(self) -> Ints:
        """The layer whose modules are at work in each row."""
        of_module = np.array([self._layer(name) for name in self.names])
        layer = np.where(np.isin(self.phase, SAID), of_module[self.module], NO_LAYER)
        # Between two modules of a layer, or after its last, that layer goes on.
        computed = np.isin(self.phase, COMPUTED)
        around = np.array([self.layers.contains_all(name) for name in self.names])[self.module]
        goes_on = (layer == NO_LAYER) & around & computed & np.concatenate([[False], computed[:-1]])
        since: Ints = np.maximum.accumulate(np.where(goes_on, 0, np.arange(len(layer))))
        return layer[since]

    def _layer(self, name: str) -> int:
        layer = self.layers.layer(name)
        return NO_LAYER if layer is None else layer

    def _order(self) -> Ints:
        """Put frees with no allocation between them into the layers' order; returns where each row was.

        Nobody can tell in which order they came, and where a table of addresses
        is cleared it is an accident. A few of them go with the allocation before.
        """
        layer, order = self.layer, np.arange(len(self.layer))
        said = np.isin(self.phase, SAID)
        for begin, end in _frees(self.sizes, self.phase):
            if end - begin >= GROUPS and len({*layer[begin:end].tolist()} - {NO_LAYER}) >= GROUPS:
                order[begin:end] = begin + np.lexsort((self.blocks[begin:end], layer[begin:end]))
            elif begin and not said[begin] and self.sizes[begin - 1] > 0:
                layer[begin:end] = layer[begin - 1]
        return order

    def _passes(self) -> Ints:
        """The pass through the layers that a run of rows is part of, by the run's number."""
        groups = [run.group for run in self.runs]
        passes = np.full(len(groups), NO_PASS, np.int64)
        for index, group in enumerate(groups):
            if group == MIDDLE:
                around = groups[max(0, index - 1) : index + 2]
                if sorted(around) != list(range(GROUPS)):
                    begin = self.runs[index].begin
                    raise UnlikeError(f"row {begin}: {self._doing(begin)} goes through groups {around}")
                passes[index - 1 : index + 2] = index
        if np.count_nonzero(passes != NO_PASS) != sum(0 <= group < GROUPS for group in groups):
            raise UnlikeError("a group of layers does something that the others do not")
        return passes

    def _doing(self, row: int) -> str:
        return Phase(int(self.phase[row])).title

    # --- comparing ----------------------------------------------------------------

    def _compare(self) -> None:
        """Hold the three runs of every pass against each other.

        Raises:
            UnlikeError: They differ.
        """
        passes = [self.in_groups(index) for index, run in enumerate(self.runs) if run.group == MIDDLE]
        for runs in passes:
            if len({run.end - run.begin for run in runs}) > 1:
                begin = runs[MIDDLE].begin
                raise UnlikeError(f"row {begin}: {self._doing(begin)} has runs of several lengths")
        rows = [
            np.concatenate([np.arange(runs[group].begin, runs[group].end) for runs in passes] or [np.arange(0)])
            for group in range(GROUPS)
        ]
        names: dict[str, int] = {}
        said = [self._says(some, group, names) for group, some in enumerate(rows)]
        unlike = np.flatnonzero((said[0] != said[MIDDLE]).any(0) | (said[2] != said[MIDDLE]).any(0))
        if len(unlike):
            raise UnlikeError(f"row {rows[MIDDLE][unlike[0]]}: {[each[:, unlike[0]].tolist() for each in said]}")
        frees = self.sizes[rows[MIDDLE]] < 0
        self._compare_frees([some[frees] for some in rows])

    def _says(self, rows: Ints, group: int, names: dict[str, int]) -> Ints:
        """Rows in words that fit every group: a row each of sizes, phases, micro-batches and modules."""
        used, module = np.unique(self.module[rows], return_inverse=True)
        away = -group * self.layers.period
        relative = [self.layers.shifted(self.names[number], away) for number in used.tolist()]
        numbers = np.array([names.setdefault(name, len(names)) for name in relative], np.int64)
        return np.stack([self.sizes[rows], self.phase[rows], self.micro[rows], numbers[module]])

    def _compare_frees(self, rows: list[Ints]) -> None:
        """Hold the blocks that the three groups free against each other: the same ones, equally far away.

        Args:
            rows: That free, by group.
        """
        made = [self.made[some] for some in rows]
        away = [self.group_made(some) - group for group, some in enumerate(made)]
        placed = self.group_made(made[MIDDLE]) != NO_LAYER
        freed = [np.stack([self.pass_of[some], self.nth[some], far]) for some, far in zip(made, away, strict=True)]
        # What the first group frees of the head's, or the last of the tail's, is compared by the other pair.
        below = (away[MIDDLE] < 0) | (freed[0] == freed[MIDDLE]).all(0)
        above = (away[MIDDLE] > 0) | (freed[2] == freed[MIDDLE]).all(0)
        unlike = np.flatnonzero(~placed | (np.abs(away[MIDDLE]) > 1) | ~below | ~above)
        if len(unlike):
            raise UnlikeError(f"row {rows[MIDDLE][unlike[0]]}: frees {[each[:, unlike[0]].tolist() for each in freed]}")


def _frees(sizes: Ints, phases: npt.NDArray[np.uint8]) -> Iterator[tuple[int, int]]:
    """Rows of one phase that free, with no allocation between them: begin and end."""
    frees = sizes < 0
    changes = np.flatnonzero((frees[1:] != frees[:-1]) | (phases[1:] != phases[:-1])) + 1
    begins = np.concatenate([[0], changes])
    ends = np.concatenate([changes, [len(sizes)]])
    some = frees[begins]
    return zip(begins[some].tolist(), ends[some].tolist(), strict=True)


def _layer_of_input(source: InputBlocks, of_block: dict[int, int]) -> int:
    """The layer of what a tensor was made of.

    Raises:
        UnlikeError: It was made of several layers' tensors: it grows with their number.
    """
    if isinstance(source, int):
        return of_block.get(source, NO_LAYER)
    layers = {of_block.get(block, NO_LAYER) for block in source} - {NO_LAYER}
    if len(layers) > 1:
        raise UnlikeError("one tensor is made of several layers'")
    return layers.pop() if layers else NO_LAYER


def _runs(groups: Ints) -> list[LayerRun]:
    """Consecutive rows of one group."""
    changes = np.flatnonzero(groups[1:] != groups[:-1]) + 1
    bounds = [0, *changes.tolist(), len(groups)]
    return [LayerRun(int(groups[begin]), begin, end) for begin, end in pairwise(bounds)]
