"""The recorder of a prediction: fake tensors on a modelled CUDA device.

The device is `cpu:0`: to PyTorch a CPU, so that everything runs without CUDA,
yet another device than `cpu`, so that what stays on the host is told apart.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from functools import cache, partial
from types import CodeType, FrameType
from typing import Any
from weakref import ref as _weakref

import numpy.typing as npt
import torch
from torch.distributed.tensor import DTensor

from ..config import UserError
from ..events import EVENT
from ..tracing.op_tracker import OpTracker, Rows
from ..tracing.recorder import columns
from .alloc_requests import InputBlocks, Kept
from .caching_allocator import DEFAULT_STREAM, rounded_bytes
from .op_cache import op_cache
from .pinned_memory import PinnedMemory

DEVICE = torch.device("cpu", 0)

Kernel = Callable[..., Any]
"""Stands in for an operator: called with the tracker and the operator's arguments."""


class FakeCuda(OpTracker):
    """Records what operators on fake tensors would allocate on a GPU.

    Blocks are numbered and not placed: an address is a number that is never
    used again. Where the caching allocator would put them is found out
    afterwards (`allocator_replay`), so its counters here are estimates.

    Args:
        kernels: Operators whose CUDA kernels allocate otherwise than their meta
            kernels say.

    Attributes:
        libraries: Python functions of operators that are no PyTorch's, by
            namespace and name.
        starts: Rows recorded before each `start`.
        inputs: By block, see `AllocRequests`.
        kept: See `AllocRequests`.
        stream: Number of the stream that is current.
        pinned: Of the host.
        ragged: Whether rows have several lengths: asked whether all of a mask is set, the answer is no.
        assume: Told of what depends on data and is taken to be something, in words.
    """

    def __init__(self, kernels: dict[Any, Kernel]) -> None:
        super().__init__(DEVICE.type)
        self.device = DEVICE
        self.starts: list[int] = []
        self.inputs: list[InputBlocks] = [0]
        self.kept: list[Kept] = []
        self.stream = DEFAULT_STREAM
        self._drained = 0
        self._sizes: dict[int, tuple[int, int]] = {}  # and as the allocator rounds it
        self._kernels = {id(operator): kernel for operator, kernel in kernels.items()}  # operators hash slowly
        self._in_library = False
        self._cache = op_cache()
        self.pinned = PinnedMemory()
        self.ragged = False
        self.libraries: dict[str, dict[str, Callable[..., Any]]] = {}
        self._addresses: dict[int, tuple[int, int, Any]] = {}
        self._clock_us = 0
        self._sole = (0, 0)
        self._engine_calls: tuple[CodeType, ...] = ()
        self._calibrating = False
        self._closed = False
        self.assume: Callable[[str], None] = lambda _: None

    # --- seeing -------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator and look at the storages it returns."""
        if func is _DEVICE_OF:
            return args[0].fake_device
        if DTensor in types:
            return NotImplemented  # it calls the operator on its local tensor, which then comes here
        kernel = self._kernels.get(id(func))
        if kernel is not None:
            out = kernel(self, self.cached(func), args, kwargs or {})
        elif self.libraries and func.namespace in self.libraries:
            out = self._of_library(func, args, kwargs or {})
        elif self._in_library and _is_composite(func):
            with self:  # outside of a library, autograd has taken it apart before it comes here
                out = func._op_dk(_COMPOSITE, *args, **(kwargs or {}))
        else:
            out = self._cache.call(func, args, kwargs or {})
        if isinstance(out, torch.Tensor):
            self.see(out, args)
            if kwargs and kwargs.get("pin_memory"):
                self.pinned.see(out)
        elif isinstance(out, list | tuple):
            for nth, part in enumerate(out):
                if isinstance(part, torch.Tensor):
                    self.see(part, args, nth)
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """False: nothing is compiled over fake tensors, and the wrapper against it takes its time."""
        return False

    def cached(self, func: Any) -> Callable[..., Any]:
        """An operator that is answered from memory, for kernels: nothing of it is seen."""

        def call(*args: Any, **kwargs: Any) -> Any:
            return self._cache.call(func, args, kwargs)

        return call

    def lifted(self, func: Any, made: torch.Tensor) -> Any:
        """See `OpCache.lifted`."""
        return self._cache.lifted(func, made)

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

    def see(self, tensor: torch.Tensor, made_of: Any = (), nth: int | None = None) -> None:
        """Count a tensor's storage if it is new and on the device.

        Args:
            tensor: What an operator returned.
            made_of: The operator's arguments.
            nth: Which of a list of tensors it is; None: the only one.
        """
        if getattr(tensor, "fake_device", None) != DEVICE:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._addresses.get(key)
        size = storage.nbytes()
        if known is not None:
            if known[1] == size:
                return
            self._forget(key)
        if size:
            reference = _weakref(storage, partial(self._forget, key))
            self._addresses[key] = (self.allocate(size, self._source(made_of, nth)), size, reference)

    def _source(self, made_of: Any, nth: int | None) -> InputBlocks:
        for argument in made_of:
            if isinstance(argument, torch.Tensor):
                return self.address(argument)
            if isinstance(argument, list | tuple) and argument and isinstance(argument[0], torch.Tensor):
                if nth is not None and nth < len(argument):
                    return self.address(argument[nth])
                return tuple(map(self.address, argument))
        return 0

    def allocate(self, size: int, source: InputBlocks = 0) -> int:
        """An allocation, of a kernel's own for example; returns its number."""
        block = len(self.inputs)
        self.inputs.append(source)
        rounded = rounded_bytes(size)
        self._sizes[block] = size, rounded
        self._allocated += rounded
        self._peak = max(self._peak, self._allocated)
        self._row(block, size, stream=self.stream)
        return block

    def release(self, block: int) -> None:
        """The end of one."""
        size, rounded = self._sizes.pop(block)
        self._allocated -= rounded
        self._row(block, -size)

    def empty_cache(self) -> None:
        """The allocator is asked to give back what is cached."""
        self._row(0, 0)

    def warm_up(self, wanted_bytes: int) -> None:
        """transformers is about to load so many bytes."""
        self._row(0, 0, wanted_bytes)

    def _row(self, block: int, size: int, said: int = 0, stream: int = DEFAULT_STREAM) -> None:
        self._clock_us += 1
        self._rows.extend((block, size, said, self._mark, self._clock_us, stream))

    def scratch(self, *sizes: int, source: InputBlocks = 0) -> None:
        """Memory that a kernel takes and gives back before it returns.

        Args:
            sizes: In bytes.
            source: The block that it works on, where that tells the layer.
        """
        for address in [self.allocate(size, source) for size in sizes if size][::-1]:
            self.release(address)

    def may_take(self, size: int, block: int = 0) -> None:
        """Note the most that a kernel may take and give back before it returns, where nobody knows how much.

        Args:
            size: In bytes.
            block: That it works on, where that tells the layer.
        """
        self._row(block, 0, -size)

    def may_keep(self, size: int) -> Callable[[], None]:
        """Note that so many bytes, given up now, may stay until the function returned is called.

        Args:
            size: As the allocator hands it out.
        """
        begin = len(self._rows) // _WIDTH
        return lambda: self.kept.append(Kept(size, begin, len(self._rows) // _WIDTH - 1))

    def called_by_autograd(self) -> bool:
        """True if autograd's engine called the kernel itself, and not Python that it runs: a hook, a custom backward.

        Between its engine and a kernel PyTorch has always the same functions; `calibrate` sees which.
        """
        frame: FrameType | None = sys._getframe(1)
        if self._calibrating:
            self._engine_calls = _callers(frame, _RUN_BACKWARD)
        for code in self._engine_calls:
            if frame is None or frame.f_code is not code:
                return False
            frame = frame.f_back
        return True

    def sole_owner(self, tensor: torch.Tensor) -> bool:
        """True if autograd's buffer alone holds a gradient that it is about to add to.

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
        """Add up two gradients that nobody else holds.

        Raises:
            UserError: This version of PyTorch does not do so in a way that is seen here.
        """
        self._calibrating = True
        for _ in range(2):  # the second time from the cache, as almost always
            x = torch.empty(2, device=DEVICE, requires_grad=True)
            h = x.sin()
            (h.cos() + h.exp()).sum().backward()
        self._calibrating = False
        if not (self._engine_calls and all(self._sole)):
            raise UserError(f"torch {torch.__version__} cannot be predicted: how it adds up gradients is not seen")

    def close(self) -> None:
        """See no further deaths: what happens from now on is no run's."""
        self._closed = True

    def _forget(self, key: int, _reference: Any = None) -> None:
        if self._closed:
            return
        self.release(self._addresses.pop(key)[0])

    # --- Recorder -----------------------------------------------------------

    def start(self) -> Rows:
        """Begin a trace; what is alive is in the rows before."""
        self._drained = len(self._rows)
        self.starts.append(self._drained // _WIDTH)
        return array("q"), array("q")

    def drain(self) -> Rows:
        """Rows since the last drain; they are all kept."""
        rows, self._drained = self._rows[self._drained :], len(self._rows)
        return rows, array("q")

    def rows(self) -> npt.NDArray[Any]:
        """All requests, dtype EVENT; see `AllocRequests`."""
        return columns(self._rows, EVENT)

    def address(self, tensor: torch.Tensor) -> int:
        """The block's number; 0 for what is on the host."""
        if getattr(tensor, "fake_device", None) != DEVICE:
            return 0
        known = self._addresses.get(tensor.untyped_storage()._cdata)
        return known[0] if known else 0


def _callers(frame: FrameType | None, outermost: CodeType | None) -> tuple[CodeType, ...]:
    """The code of a frame and of those that called it, up to `outermost`; none if that did not call it."""
    codes = []
    while frame is not None:
        codes.append(frame.f_code)
        if frame.f_code is outermost:
            return tuple(codes)
        frame = frame.f_back
    return ()


@cache
def _is_composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
"""Its kernel is what takes an operator apart on a GPU; `decompose` prefers those written in Python."""


_DEVICE_OF = torch.ops.prim.device.default
_RUN_BACKWARD: CodeType | None = getattr(getattr(torch.autograd.graph, "_engine_run_backward", None), "__code__", None)
_WIDTH = len(EVENT.names or ())
