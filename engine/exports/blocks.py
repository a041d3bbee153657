"""The blocks of a step as the formats write them: in the order of what became of them, described once a kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..ledger import Ledger, LiveBlock

CHUNK = 1 << 11
"""Actions written at once: a megabyte of text, whatever the step, that stays in the core's cache."""


class Actions(NamedTuple):
    """Every allocation and free of a step in order, those before it first.

    Attributes:
        row: Of the ledger's blocks.
        is_alloc: Or a free.
        event: That it happened at; -1: before the step began.
    """

    row: npt.NDArray[np.int64]
    is_alloc: npt.NDArray[np.bool_]
    event: npt.NDArray[np.int64]


def actions(ledger: Ledger) -> Actions:
    """Allocations and frees of every block.

    A block whose free was lost ends where the next one at its address begins,
    so one event may free a block and make another.
    """
    blocks, n = ledger.blocks, len(ledger.trace.events)
    before = int(np.count_nonzero(blocks["born"] < 0))
    slots = np.full(before + 2 * n, -1, np.int64)
    rows = np.arange(len(blocks))
    slots[:before] = rows[:before]
    slots[before + 2 * blocks["born"][before:] + 1] = rows[before:]
    dies = blocks["died"] < n
    slots[before + 2 * blocks["died"][dies]] = rows[dies]
    taken = np.flatnonzero(slots >= 0)
    place = taken - before
    event = np.where(place < 0, -1, place >> 1)
    return Actions(slots[taken], (place < 0) | (place & 1 == 1), event)


def chunks(ledger: Ledger) -> Iterator[tuple[Actions, int]]:
    """The actions, so many at once that they take little memory, and how many events of the step each part is."""
    done = actions(ledger)
    for start in range(0, len(done.row), CHUNK):
        here = slice(start, start + CHUNK)
        part = Actions(done.row[here], done.is_alloc[here], done.event[here])
        yield part, int(np.count_nonzero(part.event >= 0))


class BlockTexts:
    """A text for each block; blocks that differ in nothing but their place and time share it.

    Args:
        ledger: Whose blocks.
        describe: Makes the text of a block in a layer.
    """

    def __init__(self, ledger: Ledger, describe: Callable[[LiveBlock, str], bytes]) -> None:
        self._ledger, self._describe = ledger, describe
        self._texts: dict[int, bytes] = {}
        trace, blocks = ledger.trace, ledger.blocks
        # The last tag is that of what was alive before: its mark is -1.
        marks = trace.marks
        module = marks["module"].astype(np.int64) << 24
        tags = np.append(module | marks["micro_batch"].astype(np.int64) << 8 | marks["phase"], -1)
        tags = np.unique(tags, return_inverse=True)[1].ravel()
        key = tags[blocks["born_mark"]]
        for column, indexed in (("name", trace.names), ("pool", trace.pools)):
            key = key * (len(indexed) + 1) + blocks[column] + 1
        key = key * 64 + blocks["category"]
        # Without an operator or a shape a block of any size is alike; the text may not tell the size.
        self._key = key * (len(trace.descriptions) + 1) + ledger.made + 1

    def of(self, rows: npt.NDArray[np.int64]) -> list[bytes]:
        """Texts of blocks, by their rows."""
        keys, texts = self._key[rows].tolist(), self._texts
        for key, row in zip(keys, rows.tolist(), strict=True):
            if key not in texts:
                layer = self._ledger.layers[self._ledger.blocks["name"][row]]
                texts[key] = self._describe(self._ledger.describe(row), layer)
        return [texts[key] for key in keys]
