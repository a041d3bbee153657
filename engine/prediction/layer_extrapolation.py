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

from ..events import MARK, OWNER, Phase, PhaseSpan, Recompute, StepTrace
from .alloc_requests import AllocRequests, born_at
from .layer_passes import MIDDLE, LayerPasses, LayerRun, UnlikeError
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
        self.stride = max(self.passes.blocks, default=0) + 1
        self.origin: list[int] = []
        self.copy: list[int] = []
        self.block: list[int] = []
        self.run_at: list[int] = []
        for index, run in enumerate(self.passes.runs):
            self.run_at.append(len(self.origin))
            if run.group == MIDDLE:
                self._write_pass(index)
            else:
                self.origin += range(run.begin, run.end)
                self.copy += [0] * (run.end - run.begin)
                self.block += [self._as_it_is(block, run.group) for block in self.passes.blocks[run.begin : run.end]]

    # --- rows -----------------------------------------------------------------------

    def _copy_of(self, block: int, copy: int) -> int:
        """The number of a block in one of the copies of the middle group; 0 is the group itself."""
        return block + copy * self.stride

    def _as_it_is(self, block: int, group: int) -> int:
        """The block that a row outside of the middle group speaks of."""
        place = self.passes.place(block)
        if place is None or place.group != MIDDLE:
            return block
        if group not in (0, GROUPS - 1):
            raise UnlikeError("what the middle layers hold is freed by itself")
        return self._copy_of(block, 0 if group == 0 else self.layers.copies)

    def _write_pass(self, layer_pass: int) -> None:
        """The middle run of a pass, as often as there are layers like it."""
        run, copies = self.passes.runs[layer_pass], self.layers.copies
        frees = self._freed_in(run)
        for copy in range(copies + 1) if self.passes.goes_up(layer_pass) else range(copies, -1, -1):
            self.origin += range(run.begin, run.end)
            self.copy += [copy] * (run.end - run.begin)
            for block, freed in zip(self.passes.blocks[run.begin : run.end], frees, strict=True):
                if freed is None:
                    self.block.append(self._copy_of(block, copy))
                    continue
                away, in_first, in_middle, in_last = freed
                other = copy + away
                inside = self._copy_of(in_middle, other)
                self.block.append(in_first if other < 0 else in_last if other > copies else inside)

    def _freed_in(self, run: LayerRun) -> list[tuple[int, int, int, int] | None]:
        """Frees of a middle run, row by row: how many groups away, and the block in each of three; None: no free."""
        found: list[tuple[int, int, int, int] | None] = []
        for block, size in zip(
            self.passes.blocks[run.begin : run.end], self.passes.sizes[run.begin : run.end], strict=True
        ):
            place = self.passes.place(block)
            if size >= 0 or place is None:
                found.append(None)
                continue
            first, middle, last = (
                self.passes.blocks[each.begin + place.nth] for each in self.passes.in_groups(place.layer_pass)
            )
            found.append((place.group - MIDDLE, first, middle, last))
        return found

    def _new_row(self, row: int, written_before: int) -> int:
        """The new place of an old row; of a middle one, the place of the copy after so many."""
        index = self.passes.run_of[row]
        run = self.passes.runs[index]
        again = written_before * (run.end - run.begin) if run.group == MIDDLE else 0
        return self.run_at[index] + again + row - run.begin

    # --- what the rows say ------------------------------------------------------------

    def requests(self) -> AllocRequests:
        """The requests of all layers, put together again."""
        origin = np.array(self.origin, np.int64)
        rows = self.passes.rows[origin]
        rows["address"] = self.block
        marks, at_work = self._at_work(origin)
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

    def _named(self, name: str, group: int | None, copy: int) -> str:
        """The name of what belongs to a group, or to none."""
        layers = self.layers
        if group is None or not 0 <= group < GROUPS:
            return layers.final(name)
        return layers.shifted(name, (0, copy, layers.copies)[group] * layers.period)

    def _at_work(self, origin: npt.NDArray[np.int64]) -> tuple[Any, list[tuple[str, int, int]]]:
        """One mark a row: what was at work; and by the number of a module there, its name, group and copy."""
        passes = self.passes
        numbers: dict[tuple[str, int], int] = {}
        old = [numbers.setdefault(key, len(numbers)) for key in zip(passes.module, passes.group_of(), strict=True)]
        marks = np.empty(len(origin), MARK)
        marks["phase"] = np.array(passes.phase, np.uint8)[origin]
        marks["micro_batch"] = np.array(passes.micro, np.int16)[origin]
        copies = self.layers.copies + 1
        marks["module"] = np.array(old, np.int64)[origin] * copies + np.array(self.copy, np.int64)
        return marks, [(*key, copy) for key in numbers for copy in range(copies)]

    def _owners(self, trace: StepTrace, rows: npt.NDArray[Any], names: dict[str, int]) -> Any:
        """The owners of blocks, from the mark of the block's own row on."""
        blocks: list[int] = []
        said: list[tuple[int, int, int]] = []
        called: dict[tuple[int, int | None], list[int]] = {}
        for block, _, category, name, description in trace.owners.tolist():
            place = self.passes.place(block)
            group = place.group if place else None
            copies = range(self.layers.copies + 1) if group == MIDDLE else range(1)
            if (name, group) not in called:
                found = (self._named(trace.names[name], group, copy) for copy in copies)
                called[name, group] = [names.setdefault(each, len(names)) for each in found]
            blocks += [self._copy_of(block, copy) for copy in copies]
            said += [(category, each, description) for each in called[name, group]]
        owners = np.empty(len(blocks), OWNER)
        owners["address"] = blocks
        owners["mark"] = born_at(rows, owners["address"])
        owners["category"], owners["name"], owners["made"] = np.array(said, np.int64).reshape(-1, 3).T
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
            inside = first <= last and passes.is_middle(first) and passes.run_of[first] == passes.run_of[last]
            if not inside:
                at = self._new_row(first, 0) if first < len(passes.run_of) else len(self.origin)
                until = at if last < first else self._new_row(last, copies) + 1
                again = recompute and recompute._replace(layers=tuple(self.layers.all_of(recompute.layers)))
                spans.append((span._replace(begin=at - begin, end=until - begin), again))
                continue
            for nth in range(copies + 1):
                copy = nth if passes.goes_up(passes.run_of[first]) else copies - nth
                at, until = self._new_row(first, nth), self._new_row(last, nth) + 1
                again = recompute and recompute._replace(
                    layers=tuple(self._named(name, MIDDLE, copy) for name in recompute.layers)
                )
                spans.append((span._replace(begin=at - begin, end=until - begin), again))
        spans.sort(key=lambda pair: pair[0].begin)
        return tuple(span for span, _ in spans), [again for _, again in spans if again is not None]
