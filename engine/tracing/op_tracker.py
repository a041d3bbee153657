"""The op-level recorder: storages that PyTorch operators return, and their deaths.

For CPU runs (and fake tensors), where no caching allocator keeps a trace. It
sees every tensor, but no buffer that lives and dies inside a kernel.
"""

from __future__ import annotations

import time
import weakref
from array import array
from typing import Any

import numpy.typing as npt
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..events import BLOCK, EVENT
from .recorder import columns


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
        self._alive: dict[int, tuple[int, weakref.ref[Any]]] = {}
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
        """Count a tensor's storage if it is new."""
        if tensor.device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        size = storage.nbytes()
        known = self._alive.get(address)
        if known is not None:
            if known[0] != size:  # resized in place
                self._free(address)
            else:
                return
        if size == 0:
            return
        self._alive[address] = (size, weakref.ref(storage, lambda _: self._free(address)))
        self._allocated += size
        self._peak = max(self._peak, self._allocated)
        self._rows.extend((address, size, 0, self._mark, time.time_ns() // 1000))

    def _free(self, address: int) -> None:
        size, _ = self._alive.pop(address)
        self._allocated -= size
        self._rows.extend((address, -size, 0, self._mark, time.time_ns() // 1000))

    # --- Recorder -----------------------------------------------------------

    def start(self) -> array[int]:
        """Begin a trace; what is alive goes on being known."""
        del self._rows[:]
        alive = array("q")
        for address, (size, _) in self._alive.items():
            alive.extend((address, size, 0))
        return alive

    def drain(self) -> array[int]:
        """Events since the last drain."""
        rows, self._rows = self._rows, array("q")
        return rows

    def alive(self, started: array[int]) -> npt.NDArray[Any]:
        """As columns."""
        return columns(started, BLOCK)

    def events(self, drained: array[int]) -> npt.NDArray[Any]:
        """As columns."""
        return columns(drained, EVENT)

    def stop(self) -> None:
        """Nothing to do: it records for as long as it is entered."""

    def stamp(self, mark: int) -> None:
        """Tag from now on; a CPU's backward runs on the thread that calls it."""
        self._mark = mark

    def address(self, tensor: torch.Tensor) -> int:
        """The storage object's address; 0 on another device.

        A tensor no operator has returned (mapped from a file) is counted now.
        """
        if tensor.device.type != self._device_type:
            return 0
        self.see(tensor)
        return int(tensor.untyped_storage()._cdata)

    def allocated_bytes(self) -> int:
        """Sum over the storages alive."""
        return self._allocated

    def peak_bytes(self) -> int:
        """Highest sum since `reset_peak`."""
        return self._peak

    def reserved_bytes(self) -> int | None:
        """There is no caching allocator."""
        return None

    def reset_peak(self) -> None:
        """Start again from what is alive."""
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
