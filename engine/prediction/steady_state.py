"""One more step of a loop that has settled, for the allocator alone.

From the second step on the requests repeat, but the allocator may still need a
step or two until its segments suffice for every order of them. So it is asked for
the last step's once more. Their allocations are of new blocks. A block that they
free without having allocated it has been freed already: its successor, a block of
the same size that the last step left behind, is freed instead.
"""

from __future__ import annotations

from collections import defaultdict, deque

import numpy as np

from .alloc_requests import Ints, made_at


def once_more(blocks: Ints, sizes: Ints, before: slice, last: slice) -> tuple[Ints, Ints]:
    """The requests of one more step.

    A block that the last step found and freed is succeeded by one of the same size
    that the step left behind: the first allocated in the step before by the first
    allocated in the last step, and so on. One without successor is not freed again.

    Args:
        blocks: Number of the block of each request so far.
        sizes: Its bytes; negative: given back.
        before: The requests of the step before the last.
        last: Those of the last step.

    Returns:
        Which of all requests are made again, and of which blocks; new ones have the numbers after the highest.
    """
    begin, rows = last.start, np.arange(last.start, last.stop)
    made = made_at(blocks, sizes, blocks[last])
    own, freed = made >= begin, sizes[last] < 0
    stays = sizes[last] > 0
    stays[made[freed & own] - begin] = False
    by_size: dict[int, deque[int]] = defaultdict(deque)
    for block, size in zip(blocks[last][stays].tolist(), sizes[last][stays].tolist(), strict=True):
        by_size[size].append(block)
    found = rows[freed & ~own]
    born = made[found - begin]
    born = np.where((born >= before.start) & (born < before.stop), born, -1)
    new = int(blocks.max(initial=-1)) + np.cumsum(sizes[last] > 0)
    again = np.full(len(rows), -1)
    again[own] = new[made[own] - begin]
    for row in found[np.argsort(born, kind="stable")].tolist():
        if of_size := by_size[-int(sizes[row])]:
            again[row - begin] = of_size.popleft()
    happens = (sizes[last] != 0) & (again >= 0)
    return rows[happens], again[happens]
