"""The uses of addresses by blocks, one after the other: which free ends which allocation."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .trace_entries import ALLOC, COMPLETED, FREE

Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


class Uses:
    """Allocations and frees of blocks, sorted by address.

    Args:
        actions: ALLOC, FREE or COMPLETED, in order, shape (n,); n > 0.
        addresses: Of the blocks, shape (n,).
        there: So many at the beginning stand for blocks that are there, each at an address of its own: FREE for
            one that was freed and waits.
        deferred: A block that was freed is not free before that is completed.

    Attributes:
        owners: The allocation that a free ends, by its number; of all else its own number, shape (n,).
        unknown: Frees of what nobody allocated, shape (n,).
        held: Those whose blocks are not free at the end, by address: allocations, and frees that wait.
        pending: Of those: frees that wait.
        addresses: That are used, each once, in order.
        places: The one of `addresses` that each is at, shape (n,).
    """

    def __init__(self, actions: npt.NDArray[np.int8], addresses: Numbers, there: int, deferred: bool) -> None:
        order = np.argsort(addresses, kind="stable")
        action, address, stood = actions[order], addresses[order], order < there
        position = np.arange(len(order))
        first = np.append(True, address[1:] != address[:-1])
        # The latest allocation or free at the address, if there was one.
        latest = np.maximum.accumulate(np.where((action != COMPLETED) | first, position, 0))
        before = np.where(first, position, latest[position - 1])
        ends = (action == FREE) & (action[before] == ALLOC)
        waits = (action == FREE) & stood | (ends & deferred)
        last = np.append(first[1:], True)
        held = last & ((action[latest] == ALLOC) | waits)
        self.owners = position.copy()
        self.owners[order[ends]] = order[before[ends]]
        self.unknown = np.zeros(len(order), np.bool_)
        self.unknown[order[(action == FREE) & ~ends & ~stood]] = True
        self.held, self.pending = order[latest[held]], waits[held]
        self.addresses, place = address[first], np.cumsum(first) - 1
        self.places = np.empty_like(place)
        self.places[order] = place
        self._taken = (action[latest] == ALLOC) | waits
        self._first = position[first]
        self._keys = place * len(order) + order

    def taken(self, places: npt.NDArray[np.intp], before: npt.NDArray[np.intp]) -> Flags:
        """True where a block begins that is not free.

        Args:
            places: Of `addresses`, shape (m,).
            before: The number of what happens next, for each of them, shape (m,).
        """
        at = np.searchsorted(self._keys, places * len(self.owners) + before) - 1
        taken: Flags = (at >= self._first[places]) & self._taken[at]
        return taken
