"""The requests of all layers, made from those of a few.

Wherever a training step goes through the layers, forwards or backwards, its
rows are a run for each of them, one after the other. Where the runs of three
neighbours say the same, so would those of every layer between them, and the
middle run is written as many times as there are such layers:

    traced      0 | 1 | 2 | 3 | 4
    extrapolated   0 | 1 | 2 2' 2'' 2''' | 3 | 4

Saying the same means: the same sizes from the same modules in the same order,
and each block freed lies equally many layers away. Anything else, a row between
two layers that belongs to neither, a layer out of turn, and the requests is not
extrapolated: the model is then traced layer by layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ..events import MARK, Phase, PhaseSpan, Recompute, StepTrace
from .alloc_requests import AllocRequests, Ints, born_at
from .layer_passes import MIDDLE, NO_LAYER, LayerPasses, UnlikeError
from .layers import GROUPS, Layers


def extrapolate(requests: AllocRequests, layers: Layers) -> AllocRequests:
    """Write the middle layers' rows as often as there are layers like them.

    Raises:
        UnlikeError: They are not alike.
    """
    return _Extrapolating(requests, layers).requests()


class _Extrapolating:
    """The steps of `extrapolate`.

    Attributes:
        origin: By new row, the old one.
        copy: By new row, in which copy of the middle group it is; 0: in none, or in the group itself.
        block: By new row, the number of its block.
        run_at: By the number of a run, where it is written first.
    """

    def __init__(self, requests: AllocRequests, layers: Layers) -> None:
        self.old, self.layers, self.passes = requests, layers, LayerPasses(requests, layers)
        self.stride = int(self.passes.blocks.max(initial=0)) + 1
        self._lay_out()
        self.block = self._blocks()

    # --- rows -----------------------------------------------------------------------

    def _lay_out(self) -> None:
        """Decide where each row comes from: a middle run is written as often as there are layers like it."""
        times = self.layers.copies + 1
        origin, copy = [], []
        for index, run in enumerate(self.passes.runs):
            rows, copies = np.arange(run.begin, run.end), np.arange(1)
            if run.group == MIDDLE:
                copies = np.arange(times) if self.passes.goes_up(index) else np.arange(times)[::-1]
            origin.append(np.tile(rows, len(copies)))
            copy.append(np.repeat(copies, len(rows)))
        self.origin, self.copy = np.concatenate(origin), np.concatenate(copy)
        self.run_at: list[int] = np.cumsum([0, *map(len, origin)]).tolist()

    def _blocks(self) -> Ints:
        """Say which block each row speaks of.

        Raises:
            UnlikeError: What the middle layers hold is freed by none.
        """
        passes, copies, origin = self.passes, self.layers.copies, self.origin
        by_group = passes.group_made(passes.made)
        group, of_middle = passes.group[origin], by_group[origin] == MIDDLE
        if (of_middle & ~np.isin(group, (0, MIDDLE, GROUPS - 1))).any():
            raise UnlikeError("what the middle layers hold is freed by itself")
        copy = np.where(of_middle & (group == GROUPS - 1), copies, self.copy)
        block = self._copy_of(passes.blocks[origin], copy)
        # What a copy of the middle group frees of its neighbours is another copy's, or at the ends another group's.
        frees = np.flatnonzero((passes.sizes[origin] < 0) & (group == MIDDLE) & (by_group[origin] != NO_LAYER))
        made = passes.made[origin[frees]]
        first, middle, last = (passes.blocks[begin + passes.nth[made]] for begin in self._begins(made))
        other = self.copy[frees] + by_group[origin[frees]] - MIDDLE
        block[frees] = np.where(other < 0, first, np.where(other > copies, last, self._copy_of(middle, other)))
        return block

    def _copy_of(self, block: Ints, copy: Ints) -> Ints:
        """The numbers of blocks in copies of the middle group; 0 is the group itself."""
        return block + copy * self.stride

    def _begins(self, rows: Ints) -> Ints:
        """Begins of the three groups' runs, in the pass of each of some rows [3, rows]."""
        passes, found = self.passes, np.zeros((GROUPS, len(self.passes.runs)), np.int64)
        for index, run in enumerate(passes.runs):
            if run.group == MIDDLE:
                found[:, index] = [each.begin for each in passes.in_groups(index)]
        return found[:, passes.pass_of[rows]]

    def _new_row(self, row: int, written_before: int) -> int:
        """The new place of an old row; of a middle one, the place of the copy after so many."""
        index = int(self.passes.run_of[row])
        run = self.passes.runs[index]
        again = written_before * (run.end - run.begin) if run.group == MIDDLE else 0
        return self.run_at[index] + again + row - run.begin

    # --- what the rows say ------------------------------------------------------------

    def requests(self) -> AllocRequests:
        """The requests of all layers, put together again."""
        rows = self.passes.rows[self.origin]
        rows["address"] = self.block
        marks, at_work = self._at_work()
        traces: list[tuple[int, StepTrace]] = []
        recomputes: list[Recompute] = []
        waiting = iter(self.old.recomputes)
        for start, trace in self.old.traces:
            begin = self._new_row(start, 0)
            end = self._new_row(start + len(trace.events) - 1, 0) + 1
            rows["mark"][begin:end] = np.arange(end - begin)
            names = {name: i for i, name in enumerate(self.layers.all_of(trace.names))}
            used, place = np.unique(marks["module"][begin:end], return_inverse=True)
            called = [names.setdefault(self._named(*at_work[n]), len(names)) for n in used.tolist()]
            marks["module"][begin:end] = np.array(called, np.int64)[place]
            owners = self._owners(trace, rows[begin:end], names)
            phases, again = self._phases(start, trace, begin, waiting)
            recomputes += again
            extrapolated = dataclasses.replace(
                trace, events=rows[begin:end], marks=marks[begin:end], owners=owners, names=tuple(names), phases=phases
            )
            traces.append((begin, extrapolated))
        copies = self.layers.copies
        kept = [
            each._replace(begin=self._new_row(each.begin, 0), end=self._new_row(each.end, copies))
            for each in self.old.kept
        ]
        return AllocRequests(rows, traces, recomputes, self.old.inputs, kept)

    def _named(self, name: str, group: int, copy: int) -> str:
        """The name of what belongs to a group, or to none."""
        layers = self.layers
        if not 0 <= group < GROUPS:
            return layers.final(name)
        return layers.shifted(name, (0, copy, layers.copies)[group] * layers.period)

    def _at_work(self) -> tuple[Any, list[tuple[str, int, int]]]:
        """One mark a row: what was at work; and by the number of a module there, its name, group and copy."""
        passes, origin = self.passes, self.origin
        pairs, number = _numbered(passes.module, passes.group)
        marks = np.empty(len(origin), MARK)
        marks["phase"], marks["micro_batch"] = passes.phase[origin], passes.micro[origin]
        copies = self.layers.copies + 1
        marks["module"] = number[origin] * copies + self.copy
        return marks, [(passes.names[name], group, copy) for name, group in pairs for copy in range(copies)]

    def _owners(self, trace: StepTrace, rows: npt.NDArray[Any], names: dict[str, int]) -> Any:
        """The owners of blocks, from the mark of the block's own row on."""
        made = born_at(self.old.rows, trace.owners["address"])
        group, copies = self.passes.group_made(made), self.layers.copies + 1
        pairs, number = _numbered(trace.owners["name"], group)
        called = np.zeros((len(pairs), copies), np.int64)
        for (name, of_group), numbers in zip(pairs, called, strict=True):
            for copy in range(copies if of_group == MIDDLE else 1):
                found = self._named(trace.names[name], of_group, copy)
                numbers[copy] = names.setdefault(found, len(names))
        times = np.where(group == MIDDLE, copies, 1)
        origin = np.repeat(np.arange(len(times)), times)
        copy = np.arange(len(origin)) - np.repeat(np.cumsum(times) - times, times)
        owners = trace.owners[origin]
        owners["address"] = self._copy_of(owners["address"].astype(np.int64), copy)
        owners["mark"] = born_at(rows, owners["address"])
        owners["name"] = called[number[origin], copy]
        return owners

    def _phases(
        self, start: int, trace: StepTrace, begin: int, waiting: Iterator[Recompute]
    ) -> tuple[tuple[PhaseSpan, ...], list[Recompute]]:
        """Phases and recomputes; one inside of a middle run is written as often as the run."""
        passes, copies = self.passes, self.layers.copies
        spans: list[tuple[PhaseSpan, Recompute | None]] = []
        for span in trace.phases:
            first, last = start + span.begin, start + span.end - 1
            recompute = next(waiting) if span.phase is Phase.RECOMPUTE else None
            inside = first <= last and passes.group[first] == MIDDLE and passes.run_of[first] == passes.run_of[last]
            if not inside:
                at = self._new_row(first, 0) if first < len(passes.run_of) else len(self.origin)
                until = at if last < first else self._new_row(last, copies) + 1
                again = recompute and recompute._replace(layers=tuple(self.layers.all_of(recompute.layers)))
                spans.append((span._replace(begin=at - begin, end=until - begin), again))
                continue
            for nth in range(copies + 1):
                copy = nth if passes.goes_up(int(passes.run_of[first])) else copies - nth
                at, until = self._new_row(first, nth), self._new_row(last, nth) + 1
                again = recompute and recompute._replace(
                    layers=tuple(self._named(name, MIDDLE, copy) for name in recompute.layers)
                )
                spans.append((span._replace(begin=at - begin, end=until - begin), again))
        spans.sort(key=lambda pair: pair[0].begin)
        return tuple(span for span, _ in spans), [again for _, again in spans if again is not None]


def _numbered(names: Ints, groups: Ints) -> tuple[list[tuple[int, int]], Ints]:
    """The pairs of a name and a group in the order they come up, and the number of that of each row."""
    _, first, number = np.unique(names * (2 * GROUPS) + groups, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    first = first[order]
    return list(zip(names[first].tolist(), groups[first].tolist(), strict=True)), rank[number]
