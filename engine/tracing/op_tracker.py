"""The op-level recorder: storages that PyTorch operators return, and their deaths.

For CPU runs (and fake tensors), where no caching allocator keeps a trace. It
sees every tensor, but no buffer that lives and dies inside a kernel.
"""

from __future__ import annotations

import time
import weakref
from array import array
from collections import deque
from typing import Any

import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..events import BLOCK, EVENT
from .recorder import columns
from .storages import parts_of


class _StorageRef(weakref.ref[Any]):
    """A storage, while it is alive and to be told from others when it no longer is."""

    __slots__ = ("address", "bytes")
    address: int
    bytes: int


class OpTracker(TorchDispatchMode):
    """Records allocations while it is entered as a context manager.

    The address of a storage is that of PyTorch's storage object: unique among
    the living and, unlike a data pointer, there for fake tensors too.
    """

    always_on = True
    workspaces: tuple[int, ...] = ()
    refused_bytes: int | None = None

    def __init__(self, device_type: str = "cpu") -> None:
        TorchDispatchMode.__init__(self)
        self._device_type = device_type
        self._alive: dict[int, _StorageRef] = {}
        self._dead: deque[_StorageRef] = deque()
        self._rows = array("q")
        self._mark = 0
        self._allocated = 0
        self._peak = 0

    # --- seeing -------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and look at the storages it returns."""
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.see(out)
        elif out is not None:
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self.see(leaf)
        return out

    def see(self, tensor: torch.Tensor) -> None:
        """Count the storages of a tensor that are new."""
        if tensor.device.type == self._device_type:
            for part in parts_of(tensor):
                self._see(part)

    def _see(self, tensor: torch.Tensor) -> None:
        if self._dead:
            self._count_dead()
        storage = tensor.untyped_storage()
        address = storage._cdata
        size = storage.nbytes()
        known = self._alive.get(address)
        if known is not None:
            if known.bytes == size:
                return
            self._free(known)  # resized in place
        if size == 0:
            return
        # A method written in C: in a callback of Python's own, an interrupt of the user's would be lost.
        self._alive[address] = reference = _StorageRef(storage, self._dead.append)
        reference.address, reference.bytes = address, size
        self._allocated += size
        self._peak = max(self._peak, self._allocated)
        self._rows.extend((address, size, 0, self._mark, time.time_ns() // 1000))

    def _count_dead(self) -> None:
        """Take in the deaths since an operator last returned or the mark was last set, in their order."""
        while self._dead:
            reference = self._dead.popleft()
            if self._alive.get(reference.address) is reference:
                self._free(reference)

    def _free(self, reference: _StorageRef) -> None:
        del self._alive[reference.address]
        self._allocated -= reference.bytes
        self._rows.extend((reference.address, -reference.bytes, 0, self._mark, time.time_ns() // 1000))

    # --- Recorder -----------------------------------------------------------

    def start(self) -> array[int]:
        """Begin a trace; what is alive goes on being known."""
        self._count_dead()
        del self._rows[:]
        alive = array("q")
        for address, reference in self._alive.items():
            alive.extend((address, reference.bytes, 0))
        return alive

    def drain(self) -> array[int]:
        """Events since the last drain."""
        self._count_dead()
        rows, self._rows = self._rows, array("q")
        return rows

    def alive(self, started: array[int]) -> npt.NDArray[Any]:
        """Blocks as columns."""
        return columns(started, BLOCK)

    def events(self, drained: array[int]) -> npt.NDArray[Any]:
        """Events as columns."""
        return columns(drained, EVENT)

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
        self._see(tensor)
        storage = tensor.untyped_storage()
        return int(storage._cdata) if storage.nbytes() else 0

    def allocated_bytes(self) -> int:
        """Sum over the storages alive."""
        self._count_dead()
        return self._allocated

    def peak_bytes(self) -> int:
        """Highest sum since `reset_peak`."""
        return self._peak

    def reserved_bytes(self) -> int | None:
        """There is no caching allocator."""
        return None

    def reset_peak(self) -> None:
        """Start again from what is alive."""
        self._count_dead()
        self._peak = self._allocated

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
