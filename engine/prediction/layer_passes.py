"""The passes of a list of requests through a model's layers, and whether each layer does the same.

A row belongs to a layer if one of its modules was at work, and outside of
forward and backward if what it allocates or frees is that layer's: a list of
gradients is one pass, and so is clearing a cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ..events import Phase
from .alloc_requests import AllocRequests, InputBlocks
from .layers import GROUPS, Layers

MIDDLE = 1
NO_LAYER = -2
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


class BlockOrigin(NamedTuple):
    """The origin of a block.

    Attributes:
        layer_pass: In which pass, by the number of its middle run.
        group: By which group.
        nth: So many rows into the group's run.
    """

    layer_pass: int
    group: int
    nth: int


class LayerPasses:
    """The requests' rows by layer, and the passes in them.

    Args:
        requests: Of the traced layers.
        layers: Which those are.

    Attributes:
        rows: The requests's, in the order that `_order` gives them.
        blocks: By row; likewise `sizes`, `phase`, `micro`, `module` and `layer`.
        runs: One after the other, all rows.
        pass_of: By the number of a run, the number of the middle run of its
            layer_pass; only the three groups' runs are in passes.
        run_of: By row, the number of its run.

    Raises:
        UnlikeError: There is no such order in them, or the groups differ.
    """

    def __init__(self, requests: AllocRequests, layers: Layers) -> None:
        self.requests, self.layers = requests, layers
        self.blocks, self.sizes = requests.rows["address"].tolist(), requests.rows["bytes"].tolist()
        self._born = {
            block: row for row, (block, size) in enumerate(zip(self.blocks, self.sizes, strict=True)) if size > 0
        }
        self._read()
        self.layer = self._layers()
        self.rows = requests.rows[self._order()]
        self.runs = _runs([NO_LAYER if layer is None else layers.group(layer) for layer in self.layer])
        self.run_of = [index for index, run in enumerate(self.runs) for _ in range(run.begin, run.end)]
        self.pass_of = self._passes()
        self._compare()

    def place(self, block: int) -> BlockOrigin | None:
        """The origin of a block; None: it was not made in a pass."""
        row = self._born.get(block)
        index = -1 if row is None else self.run_of[row]
        if row is None or index not in self.pass_of:
            return None
        return BlockOrigin(self.pass_of[index], self.runs[index].group, row - self.runs[index].begin)

    def in_groups(self, layer_pass: int) -> tuple[LayerRun, LayerRun, LayerRun]:
        """The three groups' runs in a pass, by group."""
        first, last = sorted((self.runs[layer_pass - 1], self.runs[layer_pass + 1]))
        return first, self.runs[layer_pass], last

    def is_middle(self, row: int) -> bool:
        """True if a row is the middle group's."""
        return self.runs[self.run_of[row]].group == MIDDLE

    def group_of(self) -> list[int]:
        """By row, the group of layers that it belongs to, or `NO_LAYER`."""
        return [self.runs[index].group for index in self.run_of]

    def goes_up(self, layer_pass: int) -> bool:
        """True if a pass comes from the first layer."""
        return self.runs[layer_pass - 1].group < MIDDLE

    # --- reading ------------------------------------------------------------------

    def _read(self) -> None:
        """Read the phase, micro-batch and module of each row, and the owner of each block."""
        self.phase = [Phase.IDLE] * len(self.blocks)
        self.micro = [0] * len(self.blocks)
        self.module = [""] * len(self.blocks)
        self.owner: dict[int, str] = {}
        for start, trace in self.requests.traces:
            marks = trace.marks[trace.events["mark"]]
            end = start + len(trace.events)
            self.phase[start:end] = [Phase(p) for p in marks["phase"].tolist()]
            self.micro[start:end] = marks["micro_batch"].tolist()
            self.module[start:end] = [trace.names[n] for n in marks["module"].tolist()]
            for block, name in zip(trace.owners["address"].tolist(), trace.owners["name"].tolist(), strict=True):
                if block:  # not on the host
                    self.owner.setdefault(block, trace.names[name])

    def _layers(self) -> list[int | None]:
        """The layer that each row belongs to."""
        layers = self.layers
        of_block = {block: layers.layer(name) for block, name in self.owner.items()}
        for block in sorted(self.owner, reverse=True):  # what an owned tensor was converted from is its layer's too
            source = self.requests.inputs[block]
            if isinstance(source, int) and self.phase[self._born[block]] not in COMPUTED:
                of_block.setdefault(source, of_block[block])
        found, at_work, before = [], None, Phase.IDLE
        ahead: set[int] = set()
        for row, (block, size) in enumerate(zip(self.blocks, self.sizes, strict=True)):
            phase, module = self.phase[row], self.module[row]
            layer = layers.layer(module) if phase in SAID else None
            if layer is None and phase in COMPUTED and before in COMPUTED and layers.contains_all(module):
                layer = at_work  # between two modules of a layer, or after its last
            at_work, before = layer, phase
            if size > 0:
                inherited = self._layer_of_input(self.requests.inputs[block], of_block)
                if layer is None and of_block.get(block) is None and phase not in COMPUTED:
                    of_block[block] = inherited
                of_block.setdefault(block, layer)
            if layer is None and size > 0 and phase in COMPUTED:
                ahead.add(block)  # what is gathered for a layer before that layer computes
            found.append(of_block.get(block) if layer is None and block not in ahead else layer)
        return found

    def _order(self) -> Any:
        """Put frees with no allocation between them into the layers' order; returns where each row was.

        Nobody can tell in which order they came, and where a table of addresses
        is cleared it is an accident. A few of them go with the allocation before.
        """
        layer = self.layer
        order = list(range(len(layer)))
        for begin, end in _frees(self.sizes, self.phase):
            ranks = {row: (NO_LAYER if (found := layer[row]) is None else found) for row in range(begin, end)}
            if len(set(ranks.values()) - {NO_LAYER}) >= GROUPS:
                order[begin:end] = sorted(ranks, key=lambda row: (ranks[row], self.blocks[row]))
            elif begin and self.phase[begin] not in SAID and self.sizes[begin - 1] > 0:
                layer[begin:end] = [layer[begin - 1]] * (end - begin)
        columns: tuple[list[Any], ...] = (layer, self.blocks, self.sizes, self.phase, self.micro, self.module)
        for column in columns:
            column[:] = [column[row] for row in order]
        return np.array(order, np.int64)

    @staticmethod
    def _layer_of_input(source: InputBlocks, of_block: dict[int, int | None]) -> int | None:
        """The layer of what a tensor was made of.

        Raises:
            UnlikeError: It was made of several layers' tensors: it grows with their number.
        """
        if isinstance(source, int):
            return of_block.get(source)
        layers = {of_block.get(block) for block in source} - {None}
        if len(layers) > 1:
            raise UnlikeError("one tensor is made of several layers'")
        return layers.pop() if layers else None

    def _passes(self) -> dict[int, int]:
        """The pass through the layers that a run of rows is part of, by the run's number."""
        passes: dict[int, int] = {}
        groups = [run.group for run in self.runs]
        for index, group in enumerate(groups):
            if group == MIDDLE:
                around = groups[max(0, index - 1) : index + 2]
                if sorted(around) != list(range(GROUPS)):
                    run = self.runs[index]
                    raise UnlikeError(f"row {run.begin}: {self.phase[run.begin].title} goes through groups {around}")
                passes |= dict.fromkeys((index - 1, index, index + 1), index)
        if len(passes) != sum(0 <= group < GROUPS for group in groups):
            raise UnlikeError("a group of layers does something that the others do not")
        return passes

    # --- comparing ----------------------------------------------------------------

    def _says(self, row: int, group: int) -> tuple[Any, ...]:
        """A row in words that fit every group."""
        layers, module = self.layers, self.module[row]
        relative = layers.shifted(module, -group * layers.period) if layers.layer(module) is not None else module
        return self.sizes[row], self.phase[row], self.micro[row], relative

    def _frees(self, row: int, group: int) -> tuple[Any, ...]:
        """The block a row frees, in words that fit every group; its group is told apart from the rest."""
        block = self.blocks[row]
        place = self.place(block)
        return (block,) if place is None else (place.layer_pass, place.nth, place.group - group)

    def _compare(self) -> None:
        """Hold the three runs of every pass against each other.

        Raises:
            UnlikeError: They differ.
        """
        for layer_pass, run in enumerate(self.runs):
            if run.group != MIDDLE:
                continue
            runs = self.in_groups(layer_pass)
            if len({each.end - each.begin for each in runs}) > 1:
                raise UnlikeError(f"row {run.begin}: {self.phase[run.begin].title} has runs of several lengths")
            for n in range(run.end - run.begin):
                rows = [each.begin + n for each in runs]
                said = [self._says(row, group) for group, row in enumerate(rows)]
                if not said[0] == said[1] == said[2]:
                    raise UnlikeError(f"row {rows[1]}: {said}")
                if self.sizes[rows[1]] < 0:
                    self._compare_frees(rows)

    def _compare_frees(self, rows: list[int]) -> None:
        freed = [self._frees(row, group) for group, row in enumerate(rows)]
        away = freed[MIDDLE][-1] if len(freed[MIDDLE]) > 1 else None
        # What the first group frees of the head's, or the last of the tail's, is compared by the other pair.
        below = away is None or away < 0 or freed[0] == freed[MIDDLE]
        above = away is None or away > 0 or freed[2] == freed[MIDDLE]
        if away is None or abs(away) > 1 or not (below and above):
            raise UnlikeError(f"row {rows[1]}: frees {freed}")


def _frees(sizes: list[int], phases: list[Phase]) -> Iterator[tuple[int, int]]:
    """Rows of one phase that free, with no allocation between them: begin and end."""
    begin = 0
    for row in range(1, len(sizes) + 1):
        if row == len(sizes) or (sizes[row] < 0, phases[row]) != (sizes[begin] < 0, phases[begin]):
            if sizes[begin] < 0:
                yield begin, row
            begin = row


def _runs(groups: list[int]) -> list[LayerRun]:
    """Consecutive rows of one group."""
    runs: list[LayerRun] = []
    begin = 0
    for row in range(1, len(groups) + 1):
        if row == len(groups) or groups[row] != groups[begin]:
            runs.append(LayerRun(groups[begin], begin, row))
            begin = row
    return runs
