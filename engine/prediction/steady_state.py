"""One more step of a loop that has settled, for the allocator alone.

From the second step on the events repeat, but the allocator may still need a
step or two until its segments suffice for every order of them. So the last
step's events are played to it again. Their allocations get new blocks. A block
that they free without having allocated it has been freed already: its successor,
a block of the same size that the last step left behind, is freed instead.
"""

from __future__ import annotations

from collections import defaultdict, deque

from ..events import StepTrace
from .caching_allocator import CachingAllocator


def repeat(allocator: CachingAllocator, before: StepTrace, last: StepTrace) -> None:
    """Play a step's events once more.

    Args:
        allocator: As the last step has left it.
        before: The step before the last.
        last: What to repeat.
    """
    successors = successors_of(before, last)
    now: dict[int, int] = {}
    events = (last.events[column].tolist() for column in ("address", "bytes", "pool"))
    for address, size, pool in zip(*events, strict=True):
        if size > 0:
            now[address] = allocator.allocate(size, last.pools[pool].stream)[0]
        elif address in now:
            allocator.free(now.pop(address))
        elif address in successors:
            allocator.free(successors.pop(address))


def successors_of(before: StepTrace, last: StepTrace) -> dict[int, int]:
    """Addresses of blocks that take the place of those freed, by the address freed.

    A block that the last step found and freed is succeeded by one of the same size
    that the step left behind: the first allocated in the step before by the first
    allocated in the last step, and so on.
    """
    left: dict[int, int] = {}
    freed: dict[int, int] = {}
    for address, size in zip(last.events["address"].tolist(), last.events["bytes"].tolist(), strict=True):
        if size > 0:
            left.pop(address, None)
            left[address] = size
        elif address in left:
            del left[address]
        else:
            freed[address] = -size
    by_size: dict[int, deque[int]] = defaultdict(deque)
    for address, size in left.items():
        by_size[size].append(address)
    born = {address: index for index, address in enumerate(before.events["address"].tolist())}
    successors = {}
    for address, size in sorted(freed.items(), key=lambda item: born.get(item[0], -1)):
        if by_size[size]:
            successors[address] = by_size[size].popleft()
    return successors
