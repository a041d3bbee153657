"""The allocations of a rehearsal in order, of blocks that have numbers and no place yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..events import Recompute, StepTrace

Ints = npt.NDArray[np.int64]

InputBlocks = int | tuple[int, ...]
"""The block of an operator's first argument, the blocks of them all if that is a list; 0: of none."""


class Kept(NamedTuple):
    """Memory that was given up and may stay, as a matter of timing.

    Attributes:
        bytes: Size, as the allocator hands it out.
        begin: Row from which on.
        end: Row after which it is gone for certain.
    """

    bytes: int
    begin: int
    end: int


@dataclass(frozen=True)
class AllocRequests:
    """Everything the allocator is asked for, from the first workspace on.

    Attributes:
        rows: dtype EVENT; the address is the block's number, and an allocation's
            `pool` that of the stream it is made on. A row of 0 bytes tells the
            allocator something: to give back what is cached or, with `slack`, that a
            model of so many bytes is about to be loaded; a negative `slack` that a
            kernel may take so many for as long as it runs.
        traces: What was traced, by the row where each begins; its events are
            rows.
        recomputes: One for each recompute span of the traces, in order.
        inputs: By block.
        kept: What may be there besides.
    """

    rows: npt.NDArray[Any]
    traces: Sequence[tuple[int, StepTrace]]
    recomputes: Sequence[Recompute]
    inputs: Sequence[InputBlocks]
    kept: Sequence[Kept] = ()


def born_at(rows: npt.NDArray[Any], blocks: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """The rows where blocks are made; -1: they are made elsewhere.

    Args:
        rows: dtype EVENT.
        blocks: Their numbers.
    """
    return made_at(rows["address"].astype(np.int64), rows["bytes"], blocks.astype(np.int64))


def made_at(numbers: Ints, sizes: Ints, blocks: Ints) -> Ints:
    """The places in a list of requests where blocks are made; -1: they are made elsewhere.

    Args:
        numbers: Block of each request: small ones, as they index a table.
        sizes: Its bytes; negative: given back.
        blocks: The numbers that are looked for.
    """
    made = np.flatnonzero(sizes > 0)
    at = np.full(max(int(numbers.max(initial=0)), int(blocks.max(initial=0))) + 1, -1, np.int64)
    at[numbers[made]] = made
    return at[blocks]
