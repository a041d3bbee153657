"""The requests of all micro-batches of a step, made from those of three.

The first micro-batch of a step makes what the others find, the gradients for example, and the last one is
followed by the optimizer. Those between them do what the one before them did, so three are traced:

    traced         0 | 1 | 2
    extrapolated   0 | 1 | 1' 1'' 1''' | 2

Where the second and the third say the same, so would any between them: the same sizes from the same modules
in the same order, and what is freed is the micro-batch's own, or what the one before it has left at the same
place. What they leave for later, such as their losses, is freed beside one another. Anything else, and the
step is traced with all of its micro-batches.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..events import MARK, Phase, PhaseSpan, Recompute, StepTrace
from .alloc_requests import AllocRequests, born_at

TRACED = 3
BETWEEN = 1
"""The micro-batch that stands for others: from 0."""

Ints = npt.NDArray[np.int64]


class UnlikeMicroBatchesError(Exception):
    """The micro-batches do not all do the same."""


class _Step(NamedTuple):
    """A step's micro-batches that stand for others, by row of the requests.

    Attributes:
        between: Where the one between begins.
        last: Where the last one begins, as long as that.
        rows: So many rows in each.
        first_block: The number of the first block that a copy makes.
    """

    between: int
    last: int
    rows: int
    first_block: int


def extrapolate_micro_batches(requests: AllocRequests, micro_batches: int) -> AllocRequests:
    """Write the rows of the micro-batch between the first and the last as often as there are.

    Args:
        requests: Of steps of `TRACED` micro-batches.
        micro_batches: That the steps have, more than those.

    Raises:
        UnlikeMicroBatchesError: They are not alike.
    """
    return _Extrapolating(requests, micro_batches - TRACED).requests()


class _Extrapolating:
    """The steps of `extrapolate_micro_batches`.

    Attributes:
        origin: By new row, the old one.
        copy: By new row, in which copy of the micro-batch it is, from 1; 0: in none.
        at: By old row, the new one.
        born: By old row, where its block is made; -1: nowhere.
        inserted: By old row, how many copies of it follow.
    """

    def __init__(self, requests: AllocRequests, copies: int) -> None:
        self.old, self.copies, rows = requests, copies, requests.rows
        self.blocks = rows["address"].astype(np.int64)
        self.sizes: Ints = rows["bytes"]
        self.born = born_at(rows, rows["address"])
        self.turn = _turns(self.sizes)
        self._read_marks()
        self.steps: list[_Step] = []
        for start, trace in requests.traces:
            if trace.micro_batches == TRACED:
                self.steps.append(self._step(start, trace))
        self._lay_out()

    # --- reading ----------------------------------------------------------------------

    def _read_marks(self) -> None:
        """Read what was at work in each row."""
        self.marks = np.zeros(len(self.sizes), MARK)
        self.marks["phase"] = Phase.IDLE
        for start, trace in self.old.traces:
            self.marks[start : start + len(trace.events)] = trace.marks[trace.events["mark"]]

    def _step(self, start: int, trace: StepTrace) -> _Step:
        """Find a step's micro-batches and hold them against each other."""
        begins = [start + span.begin for span in trace.phases if span.phase is Phase.DATA]
        ends = [start + span.begin for span in trace.phases if span.phase is Phase.OPTIMIZER]
        if len(begins) != TRACED or len(ends) != 1:
            raise UnlikeMicroBatchesError("a step is not made of micro-batches and the optimizer")
        _, between, last = begins
        rows = last - between
        if ends[0] - last != rows:
            raise UnlikeMicroBatchesError(f"{rows} rows, and {ends[0] - last} in the last micro-batch")
        before = self.steps[-1] if self.steps else None
        free = before.first_block + before.rows * self.copies if before else int(self.blocks.max(initial=0)) + 1
        step = _Step(between, last, rows, free)
        self._compare(step)
        return step

    def _compare(self, step: _Step) -> None:
        said = [self._says(begin, step.rows) for begin in (step.between, step.last)]
        if not all(map(np.array_equal, *said)):
            raise UnlikeMicroBatchesError("the last micro-batch does something that the one before it does not")
        freed = self._freed(step.last, step.rows)
        if not ((freed >= step.between) & (freed < step.last + step.rows)).all():
            raise UnlikeMicroBatchesError("the last micro-batch frees what the one before it has not left")

    def _freed(self, begin: int, rows: int) -> Ints:
        """The rows where what is freed by some rows was made."""
        some = slice(begin, begin + rows)
        found: Ints = self.born[some][self.sizes[some] < 0]
        return found

    def _says(self, begin: int, rows: int) -> tuple[Any, ...]:
        """A micro-batch in words that fit each; frees with no allocation between them in any order."""
        some = slice(begin, begin + rows)
        sizes, turn = self.sizes[some], self.turn[some] - self.turn[begin]
        own = self.born[some] - begin
        own = np.where((sizes < 0) & (own >= 0), own, -1)
        order = np.lexsort((sizes, own, turn))
        marks = self.marks[some]
        at_work = np.where(sizes < 0, -1, marks["module"])
        told, pool = self.old.rows["slack"][some], self.old.rows["pool"][some]
        return tuple(column[order] for column in (sizes, own, turn, marks["phase"], at_work, told, pool))

    # --- rows -------------------------------------------------------------------------

    def _lay_out(self) -> None:
        """Decide where each row comes from."""
        count, numbers = len(self.sizes), np.arange(1, self.copies + 1)
        places, origins, copies = [], [], []
        for step in self.steps:
            places.append(np.full(step.rows * self.copies, step.last))
            origins.append(np.tile(np.arange(step.last, step.last + step.rows), self.copies))
            copies.append(np.repeat(numbers, step.rows))
            for row in self._freed_later(step):
                places.append(np.full(self.copies, row + 1))
                origins.append(np.full(self.copies, row))
                copies.append(numbers)
        place = np.concatenate(places)
        self.origin = np.insert(np.arange(count), place, np.concatenate(origins))
        self.copy = np.insert(np.zeros(count, np.int64), place, np.concatenate(copies))
        self.at = np.flatnonzero(self.copy == 0)
        self.block = self.blocks[self.origin]
        for step in self.steps:
            self._number(step)

    def _freed_later(self, step: _Step) -> list[int]:
        """Rows that free, after its step's micro-batches, what the one between has made.

        Raises:
            UnlikeMicroBatchesError: What the last one has made at the same place is not freed beside it.
        """
        end = step.last + step.rows
        later = end + np.flatnonzero(self.sizes[end:] < 0)
        made = self.born[later]
        of_between = later[(made >= step.between) & (made < step.last)]
        of_last = later[(made >= step.last) & (made < end)]
        beside = {int(self.born[row]) - step.last: int(row) for row in of_last}
        left = self._left(step)
        found = []
        for row in of_between.tolist():
            nth = int(self.born[row]) - step.between
            other = beside.get(nth)
            if other is None or self.turn[other] != self.turn[row]:
                raise UnlikeMicroBatchesError("what one micro-batch leaves is not freed beside what another does")
            left.discard(nth)
            found.append(row)
        if left & beside.keys():
            raise UnlikeMicroBatchesError("what one micro-batch leaves is never freed, and what another does is")
        return found

    def _left(self, step: _Step) -> set[int]:
        """Rows, from 0, in which the one between makes what neither it nor the last one frees."""
        made = np.flatnonzero(self.sizes[step.between : step.last] > 0)
        freed = np.concatenate([self._freed(begin, step.rows) for begin in (step.between, step.last)])
        return {*made.tolist()} - {*(freed - step.between).tolist()}

    def _copied(self, step: _Step, nth: Ints, copy: Ints) -> Ints:
        """The block that a copy makes in its `nth` row; that of copy 0 is the one between's own."""
        own = self.blocks[np.minimum(step.between + nth, step.last - 1)]
        return np.where(copy == 0, own, step.first_block + (copy - 1) * step.rows + nth)

    def _number(self, step: _Step) -> None:
        """Say which blocks the rows of a step's copies, of its last micro-batch and of what follows speak of."""
        made, copy = self.born[self.origin], self.copy
        inside = (self.origin >= step.last) & (self.origin < step.last + step.rows)
        own = inside & (made >= step.last) & (made < step.last + step.rows)
        others = inside & (made >= step.between) & (made < step.last)
        new, found = self.block, own & (copy > 0)
        new[found] = self._copied(step, made[found] - step.last, copy[found])
        before = np.where(copy == 0, self.copies, copy - 1)
        new[others] = self._copied(step, made[others] - step.between, before[others])
        later = (copy > 0) & ~inside & (made >= step.between) & (made < step.last)
        new[later] = self._copied(step, made[later] - step.between, copy[later])

    # --- what the rows say ------------------------------------------------------------

    def requests(self) -> AllocRequests:
        """The requests of all micro-batches, put together again."""
        rows = self.old.rows[self.origin]
        rows["address"] = self.block
        marks = self._marks()
        follow = np.bincount(self.origin[self.copy > 0], minlength=len(self.at))
        for step in self.steps:  # copies of a micro-batch stand before it
            follow[step.last : step.last + step.rows] = 0
        self.behind = self.at + 1 + follow
        traces, recomputes, waiting = [], [], iter(self.old.recomputes)
        for start, trace in self.old.traces:
            begin = int(self.at[start])
            end = int(self.behind[start + len(trace.events) - 1])
            rows["mark"][begin:end] = np.arange(end - begin)
            spans: list[tuple[PhaseSpan, Recompute | None]] = []
            for span in trace.phases:
                spans += self._spans(start, begin, span, next(waiting) if span.phase is Phase.RECOMPUTE else None)
            spans.sort(key=lambda pair: pair[0].begin)
            recomputes += [again for _, again in spans if again is not None]
            extrapolated = dataclasses.replace(
                trace,
                events=rows[begin:end],
                marks=marks[begin:end],
                owners=self._owners(trace, rows[begin:end]),
                phases=tuple(span for span, _ in spans),
                micro_batches=trace.micro_batches + (self.copies if trace.micro_batches == TRACED else 0),
            )
            traces.append((begin, extrapolated))
        kept = [
            each._replace(begin=int(self.at[each.begin]), end=int(self.behind[each.end]) - 1) for each in self.old.kept
        ]
        return AllocRequests(rows, traces, recomputes, self.old.inputs, kept)

    def _marks(self) -> Any:
        """One mark a row: what was at work."""
        marks = self.marks[self.origin]
        inside = np.zeros(len(self.sizes), bool)
        for step in self.steps:
            inside[step.last : step.last + step.rows] = True
        of_last = inside[self.origin]
        copy = np.where(self.copy > 0, self.copy - 1, self.copies)
        marks["micro_batch"][of_last] = BETWEEN + 1 + copy[of_last]
        return marks

    def _owners(self, trace: StepTrace, rows: npt.NDArray[Any]) -> Any:
        """The owners of blocks, from the mark of the block's own row on, with the blocks of the copies."""
        owners = trace.owners
        blocks = owners["address"].astype(np.int64)
        made = born_at(self.old.rows, owners["address"])
        origin, block = [np.arange(len(owners))], [blocks]
        for step in self.steps:
            found = np.flatnonzero((made >= step.between) & (made < step.last))
            for copy in range(1, self.copies + 1):
                origin.append(found)
                block.append(self._copied(step, made[found] - step.between, np.full(len(found), copy)))
        order = np.argsort(np.concatenate(origin), kind="stable")
        extrapolated, numbers = owners[np.concatenate(origin)[order]], np.concatenate(block)[order]
        extrapolated["address"] = numbers
        extrapolated["mark"] = born_at(rows, extrapolated["address"])
        return extrapolated

    def _spans(
        self, start: int, begin: int, span: PhaseSpan, recompute: Recompute | None
    ) -> list[tuple[PhaseSpan, Recompute | None]]:
        """A phase where it is now; one of the last micro-batch also in each copy."""
        first, last = start + span.begin, start + span.end - 1
        step = next((step for step in self.steps if step.last <= first < step.last + step.rows), None)
        at = int(self.at[first]) if first < len(self.at) else len(self.origin)
        until = at if last < first else int(self.behind[last])
        copies = self.copies if step is not None else 0
        found = []
        for away in range(copies, -1, -1):
            back = away * (step.rows if step is not None else 0) + begin
            micro_batch = span.micro_batch + copies - away
            again = recompute and recompute._replace(micro_batch=micro_batch)
            found.append((span._replace(micro_batch=micro_batch, begin=at - back, end=until - back), again))
        return found


def _turns(sizes: Ints) -> Ints:
    """By row, a number that rows share which free, one after the other."""
    frees = sizes < 0
    alone = np.ones(len(sizes), bool)
    alone[1:] = ~(frees[1:] & frees[:-1])
    turns: Ints = np.cumsum(alone)
    return turns
