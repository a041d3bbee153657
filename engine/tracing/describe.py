"""Watching operators for one step, to learn which allocation is which tensor.

The allocator's trace knows bytes and no tensors. A dispatch mode sees every
operator and what it returns, at twice a step's time, so one step of a run is
watched and the others, which repeat it, are described by it.
"""

from __future__ import annotations

from typing import Any, Protocol, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .gradient_sums import GradientSums


class Watcher(Protocol):
    """The listener that the mode talks to."""

    def operator(self, name: str) -> None:
        """An operator is about to run on this thread."""
        ...

    def returned(self, name: str, tensor: torch.Tensor) -> None:
        """It has returned this."""
        ...


class OperatorWatch(TorchDispatchMode):
    """Tells a watcher about every operator while it is entered, on autograd's threads too.

    Args:
        watcher: Told.
        parameters: Names by storage, as `torch.UntypedStorage._cdata`: an
            operator on a parameter (autocast's copy, bitsandbytes'
            dequantization) is named after it.
        alone: No other step of the run has a dispatch mode on, so that this one's is not to be noticed.
    """

    def __init__(self, watcher: Watcher, parameters: dict[int, str], alone: bool = False) -> None:
        TorchDispatchMode.__init__(self)
        self._watcher, self._parameters = watcher, parameters
        self._sums = GradientSums() if alone else None

    def __enter__(self) -> Self:
        super().__enter__()  # type: ignore[no-untyped-call]
        if self._sums is not None:
            self._sums.calibrate()
        return self

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Let compiled regions run as such, and see of them what they return."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator between two words to the watcher."""
        if self._sums is not None and self._sums.may_be_in_place(func, args, kwargs):
            func = torch.ops.aten.add_.Tensor
        if self._sums is not None and self._sums.calibrating:
            return func(*args, **(kwargs or {}))
        name = str(func.overloadpacket)
        if args and isinstance(args[0], torch.Tensor):
            of = self._parameters.get(args[0].untyped_storage()._cdata)
            name = f"{name} of {of}" if of else name
        self._watcher.operator(name)
        out = func(*args, **(kwargs or {}))
        for leaf in (out,) if isinstance(out, torch.Tensor) else tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._watcher.returned(name, leaf)
        return out
