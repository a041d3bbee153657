"""One more step of a loop that has settled, for the allocator alone.

From the second step on the events repeat, but the allocator may still need a
step or two until its segments suffice for every order of them. So the last
step's events are played to it again: what they allocate is new, and what they
free that was there before is what the last step left in its place.
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
    heir = _heirs(before, last)
    now: dict[int, int] = {}
    for address, size in zip(last.events["address"].tolist(), last.events["bytes"].tolist(), strict=True):
        if size > 0:
            now[address] = allocator.allocate(size)[0]
        elif address in now:
            allocator.free(now.pop(address))
        elif address in heir:
            allocator.free(heir.pop(address))


def _heirs(before: StepTrace, last: StepTrace) -> dict[int, int]:
    """By the address of what the last step found and freed, that of what it left of the same size and rank."""
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
    heirs = {}
    for address, size in sorted(freed.items(), key=lambda item: born.get(item[0], -1)):
        if by_size[size]:
            heirs[address] = by_size[size].popleft()
    return heirs
