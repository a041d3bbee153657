"""The op-level recorder: storages that PyTorch operators return, and their deaths.

For CPU runs (and fake tensors), where no caching allocator keeps a trace. It
sees every tensor, but no buffer that lives and dies inside a kernel.
"""

from __future__ import annotations

import threading
import time
import weakref
from array import array
from collections import deque
from typing import Any, TypeAlias

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..events import BLOCK, EVENT, SEGMENT, AllocatorPool, CacheState
from ..out_of_memory.refusal import OnRefused, Refused
from ..out_of_memory.report import size_text
from ..prediction.caching_allocator import Block, CachingAllocator, rounded_bytes, segment_bytes
from ..prediction.caching_allocator import OutOfMemoryError as NoRoomError
from .recorder import Counters, Seen, columns
from .storages import parts_of

CACHE_EVERY = 1.02
"""Times the peak has to grow until the allocator's model is looked at again."""


_WIDTH = len(EVENT.names or ())
_NO_POOL = -1

Rows: TypeAlias = "tuple[array[int], array[int]]"
"""Fields of events or blocks, row after row, and those of segments."""


class _StorageRef(weakref.ref[Any]):
    """A storage, while it is alive and to be told from others when it no longer is."""

    __slots__ = ("address", "block", "bytes", "pool", "slack")
    address: int
    bytes: int
    slack: int
    block: Block | None
    pool: int


class OpTracker(TorchDispatchMode):
    """Records allocations while it is entered as a context manager.

    The address of a storage is that of PyTorch's storage object: unique among
    the living and, unlike a data pointer, there for fake tensors too.

    Args:
        device_type: Whose storages count.
        memory_limit_bytes: Have the CUDA caching allocator's model hand out blocks within so
            many bytes, and refuse as it would; 0: there is no end.

    Attributes:
        on_refused: Told of every tensor that is refused, while it is.
    """

    always_on = True

    def __init__(self, device_type: str = "cpu", memory_limit_bytes: int = 0) -> None:
        TorchDispatchMode.__init__(self)
        self.workspaces: dict[int, str] = {}
        self.on_refused: OnRefused | None = None
        self._device_type = device_type
        self.cache: CacheState | None = None
        self._cache_next = 0.0
        self._allocator = CachingAllocator(memory_limit_bytes) if memory_limit_bytes else None
        self._alive: dict[int, _StorageRef] = {}
        self._dead: deque[_StorageRef] = deque()
        self._rows, self._segments = array("q"), array("q")
        self._mark = 0
        self._counting = threading.RLock()  # the gauge's thread takes in deaths as well
        self._allocated = 0
        self._peak = 0

    # --- seeing -------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and look at the storages it returns.

        Raises:
            torch.OutOfMemoryError: They are more than the memory limit leaves.
        """
        out = func(*args, **(kwargs or {}))
        try:
            self.look(func, out)
        except torch.OutOfMemoryError:
            del out  # the error holds this frame
            raise
        return out

    def look(self, func: Any, out: Any) -> None:
        """Count what an operator has returned.

        Raises:
            torch.OutOfMemoryError: It is more than the memory limit leaves.
        """
        for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                try:
                    self.see(leaf)
                except NoRoomError:
                    refused = self._refused(str(func.overloadpacket), leaf)
                    break
        else:
            return
        del leaf, out
        if self.on_refused is not None:
            self.on_refused(refused)
        allocated = self.allocated_bytes()
        raise torch.OutOfMemoryError(
            f"CPU out of memory. Tried to allocate {size_text(refused.asked_bytes)}. The memory limit is "
            f"{size_text(refused.limit_bytes or 0)}, of which {size_text(refused.free_bytes)} is free. "
            f"{size_text(allocated)} is allocated, and "
            f"{size_text(refused.reserved_bytes - allocated)} is reserved but unallocated."
        )

    def see(self, tensor: torch.Tensor) -> None:
        """Count the storages of a tensor that are new."""
        if tensor.device.type == self._device_type:
            for part in parts_of(tensor):
                self._see(part)

    def _see(self, tensor: torch.Tensor, forced: bool = False) -> None:
        """Count a storage if it is new.

        Args:
            tensor: It is of this one.
            forced: It has been there all the time, whatever the limit is.
        """
        with self._counting:
            self._count_dead()
            storage = tensor.untyped_storage()
            known = self._alive.get(storage._cdata)
            if known is not None:
                if known.bytes == storage.nbytes():
                    return
                self._free(known)  # resized in place
            if storage.nbytes():
                self._count(storage, forced)

    def _count(self, storage: torch.UntypedStorage, forced: bool) -> None:
        """Count a storage that is new."""
        address, size = storage._cdata, storage.nbytes()
        block, slack, pool = self._place(size, forced) if self._allocator is not None else (None, 0, _NO_POOL)
        # A method written in C: in a callback of Python's own, an interrupt of the user's would be lost.
        self._alive[address] = reference = _StorageRef(storage, self._dead.append)
        reference.address, reference.bytes, reference.block, reference.slack = address, size, block, slack
        reference.pool = pool
        self._allocated += size + slack
        if self._allocated > self._peak:
            self._peak = self._allocated
            if self._allocator is not None and self._peak > self._cache_next:
                self.cache, self._cache_next = self._allocator.cache(), self._peak * CACHE_EVERY
        self._rows.extend((address, size, slack, self._mark, time.time_ns() // 1000, pool))

    def _place(self, size: int, forced: bool) -> tuple[Block, int, int]:
        """The block that the allocator would hand out, its bytes beyond those asked for, and its pool's number."""
        allocator = self._allocator
        assert allocator is not None
        limit = allocator.capacity_bytes
        if forced:
            allocator.capacity_bytes = None
        try:
            block = allocator.allocate(size)
        finally:
            allocator.capacity_bytes = limit
            for grown in allocator.growths:
                self._segments.extend((len(self._rows) // _WIDTH, *grown))
            allocator.growths.clear()
        return block, block.size - size, block.pool.number

    def _refused(self, operator: str, tensor: torch.Tensor) -> Refused:
        allocator, asked = self._allocator, max(part.untyped_storage().nbytes() for part in parts_of(tensor))
        assert allocator is not None
        assert allocator.capacity_bytes is not None
        with self._counting:
            pools = allocator.pools()
        return Refused(
            asked_bytes=asked,
            needed_bytes=segment_bytes(rounded_bytes(asked)),
            reserved_bytes=allocator.reserved_bytes,
            free_bytes=max(0, allocator.capacity_bytes - allocator.reserved_bytes),
            limit_bytes=allocator.capacity_bytes,
            pools=pools,
            operator=operator,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
        )

    def _count_dead(self) -> None:
        """Take in the deaths since an operator last returned or the mark was last set, in their order."""
        if not self._dead:
            return
        with self._counting:
            while self._dead:
                reference = self._dead.popleft()
                if self._alive.get(reference.address) is reference:
                    self._free(reference)

    def _free(self, reference: _StorageRef) -> None:
        del self._alive[reference.address]
        if self._allocator is not None and reference.block is not None:
            self._allocator.free(reference.block)
        size, slack = reference.bytes, reference.slack
        self._allocated -= size + slack
        self._rows.extend((reference.address, -size, -slack, self._mark, time.time_ns() // 1000, reference.pool))

    # --- Recorder -----------------------------------------------------------

    @property
    def pools(self) -> tuple[AllocatorPool, ...]:
        """Pools of the allocator's model; none where memory is not limited."""
        return self._allocator.pool_table if self._allocator is not None else ()

    def start(self) -> Rows:
        """Begin a trace; what is alive goes on being known."""
        alive = self.holding()
        del self._rows[:], self._segments[:]
        return alive

    def holding(self) -> Rows:
        """Blocks alive, and what each pool holds."""
        alive, held = array("q"), array("q")
        with self._counting:
            self._count_dead()
            for address, reference in self._alive.items():
                alive.extend((address, reference.bytes, reference.slack, reference.pool))
            for pool, size in enumerate(self._allocator.reserved_by_pool() if self._allocator is not None else ()):
                held.extend((-1, pool, size))
        return alive, held

    def drain(self) -> Rows:
        """Events since the last drain."""
        with self._counting:
            self._count_dead()
            drained = self._rows, self._segments
            self._rows, self._segments = array("q"), array("q")
        return drained

    def alive(self, started: Rows) -> Seen:
        """Blocks as columns."""
        return Seen(columns(started[0], BLOCK), columns(started[1], SEGMENT))

    def events(self, drained: Rows | None) -> Seen:
        """Events as columns."""
        rows, segments = drained or (array("q"), array("q"))
        return Seen(columns(rows, EVENT), columns(segments, SEGMENT))

    def stop(self) -> None:
        """Nothing to do: it records for as long as it is entered."""

    def stamp(self, mark: int) -> None:
        """Tag from now on; a CPU's backward runs on the thread that calls it."""
        if self._dead:
            self._count_dead()
        self._mark = mark

    def address(self, tensor: torch.Tensor) -> int:
        """The storage object's address; 0 on another device, or if it is empty.

        A tensor no operator has returned (mapped from a file) is counted now, and so is
        a storage that has been resized.
        """
        if tensor.device.type != self._device_type:
            return 0
        self._see(tensor, forced=True)
        storage = tensor.untyped_storage()
        return int(storage._cdata) if storage.nbytes() else 0

    def allocated_bytes(self) -> int:
        """Sum over the storages alive."""
        self._count_dead()
        return self._allocated

    def counters(self) -> Counters:
        """The sum over the storages alive, its peak, and what the allocator's model holds where memory is limited."""
        reserved = self._allocator.reserved_bytes if self._allocator is not None else None
        return Counters(self.allocated_bytes(), self._peak, reserved)

    def reset_peak(self) -> None:
        """Start again from what is alive."""
        self._count_dead()
        self._peak, self._cache_next = self._allocated, 0.0

    def timer(self) -> HostTimer:
        """The host's clock: operators on a CPU have finished when they return."""
        return HostTimer()


class HostTimer:
    """Wall-clock stopwatch."""

    def __init__(self) -> None:
        self._began = self._ended = time.perf_counter()

    def stop(self) -> None:
        """Mark the end."""
        self._ended = time.perf_counter()

    def done(self) -> bool:
        """Always: there is nothing to wait for."""
        return True

    def ms(self) -> float:
        """Milliseconds between creation and `stop`."""
        return (self._ended - self._began) * 1e3
