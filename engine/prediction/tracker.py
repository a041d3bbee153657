"""The recorder of a prediction: fake tensors on a modelled CUDA device.

The device is `cpu:0`: to PyTorch a CPU, so that everything runs without CUDA,
yet another device than `cpu`, so that what stays on the host is told apart.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from functools import cache
from typing import Any
from weakref import ref as _weakref

import torch

from ..sources.op_tracker import OpTracker
from .caching_allocator import CachingAllocator
from .op_cache import OpCache

DEVICE = torch.device("cpu", 0)

Kernel = Callable[..., Any]
"""Stands in for an operator: called with the tracker and the operator's arguments."""


class FakeCuda(OpTracker):
    """Records what operators on fake tensors would allocate on a GPU.

    Args:
        allocator: The modelled one.
        kernels: Operators whose CUDA kernels allocate otherwise than their meta
            kernels say.

    Attributes:
        libraries: Python functions of operators that are no PyTorch's, by
            namespace and name.
    """

    def __init__(self, allocator: CachingAllocator, kernels: dict[Any, Kernel]) -> None:
        super().__init__(DEVICE.type)
        self.device = DEVICE
        self.allocator = allocator
        self._kernels = kernels
        self._in_library = False
        self._cache = OpCache()
        self.libraries: dict[str, dict[str, Callable[..., Any]]] = {}
        self._addresses: dict[int, tuple[int, int, Any]] = {}
        self._clock_us = 0
        self._sole = (0, 0)
        self._calibrating = False
        self._closed = False

    # --- seeing -------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and look at the storages it returns."""
        if func is _DEVICE_OF:
            return args[0].fake_device
        kernel = self._kernels.get(func)
        if kernel is not None:
            out = kernel(self, self._cached(func), args, kwargs or {})
        elif self.libraries and func.namespace in self.libraries:
            out = self._of_library(func, args, kwargs or {})
        elif self._in_library and _is_composite(func):
            with self:  # outside of a library, autograd has taken it apart before it comes here
                out = func.decompose(*args, **(kwargs or {}))
        else:
            out = self._cache.call(func, args, kwargs or {})
        if isinstance(out, torch.Tensor):
            self.see(out)
        elif isinstance(out, list | tuple):
            for part in out:
                if isinstance(part, torch.Tensor):
                    self.see(part)
        return out

    def _cached(self, func: Any) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._cache.call(func, args, kwargs)

        return call

    def _of_library(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a library's own function for an operator of its; what that calls is seen as well."""
        name = func._schema.name + (f".{func._overloadname}" if func._overloadname != "default" else "")
        function = self.libraries[func.namespace].get(name)
        if function is None:
            return func(*args, **kwargs)
        before, self._in_library = self._in_library, True
        try:
            with self:
                return function(*args, **kwargs)
        finally:
            self._in_library = before

    def see(self, tensor: torch.Tensor) -> None:
        """Count a tensor's storage if it is new and on the device."""
        if getattr(tensor, "fake_device", None) != DEVICE:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._addresses.get(key)
        size = storage.nbytes()
        if known is not None:
            if known[1] == size:
                return
            self._free(key)
        if size:
            reference = _weakref(storage, lambda _: self._free(key))
            self._addresses[key] = (self.allocate(size), size, reference)

    def allocate(self, size: int) -> int:
        """An allocation of a kernel's own; returns its address."""
        address, block = self.allocator.allocate(size)
        self._peak = max(self._peak, self.allocator.allocated_bytes)
        self._clock_us += 1
        self._rows.extend((address, size, block - size, self._mark, self._clock_us))
        return address

    def release(self, address: int) -> None:
        """The end of one."""
        size, block = self.allocator.free(address)
        self._clock_us += 1
        self._rows.extend((address, -size, size - block, self._mark, self._clock_us))

    def scratch(self, *sizes: int) -> None:
        """What a kernel takes and gives back before it returns."""
        for address in [self.allocate(size) for size in sizes if size][::-1]:
            self.release(address)

    def sole_owner(self, tensor: torch.Tensor) -> bool:
        """Whether autograd's buffer alone holds a gradient that it is about to add to.

        How many references that makes depends on how PyTorch calls in here; so
        it is seen once where it is known, in `calibrate`.
        """
        if getattr(tensor, "fake_device", None) != DEVICE:
            return False
        storage = tensor.untyped_storage()
        count = tensor._use_count(), torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined]
        if self._calibrating:
            self._sole = count
        dense = storage.nbytes() == tensor.numel() * tensor.element_size()
        return dense and count[0] <= self._sole[0] and count[1] <= self._sole[1]

    def calibrate(self) -> None:
        """Add up two gradients that nobody else holds."""
        self._calibrating = True
        for _ in range(2):  # the second time from the cache, as almost always
            x = torch.empty(2, device=DEVICE, requires_grad=True)
            h = x.sin()
            (h.cos() + h.exp()).sum().backward()
        self._calibrating = False

    def close(self) -> None:
        """See no further deaths: what happens to the allocator from now on is no run's."""
        self._closed = True

    def _free(self, key: int) -> None:
        if self._closed:
            return
        self.release(self._addresses.pop(key)[0])

    # --- Recorder -----------------------------------------------------------

    def start(self) -> array[int]:
        """Begin a trace; returns what the allocator holds."""
        del self._rows[:]
        return array("q", [x for row in self.allocator.alive() for x in row])

    def address(self, tensor: torch.Tensor) -> int:
        """The modelled address; 0 for what is on the host."""
        if getattr(tensor, "fake_device", None) != DEVICE:
            return 0
        known = self._addresses.get(tensor.untyped_storage()._cdata)
        return known[0] if known else 0

    def allocated_bytes(self) -> int:
        """`memory_allocated` of the model."""
        return self.allocator.allocated_bytes

    def reserved_bytes(self) -> int | None:
        """`memory_reserved` of the model."""
        return self.allocator.reserved_bytes

    def reset_peak(self) -> None:
        """Start again from what is alive."""
        self._peak = self.allocator.allocated_bytes


@cache
def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


_DEVICE_OF = torch.ops.prim.device.default
