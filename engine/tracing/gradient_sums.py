"""Sums of gradients under a dispatch mode, made where autograd makes them without one.

Autograd adds a gradient to another in place if nobody else has that other
(`InputBuffer::accumulate`), but never while a dispatch mode is on: a step whose
operators are watched would take more memory than those that are not, a whole
embedding's gradient where it is tied to the head.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any, NamedTuple

import torch

NONE = 0
"""No internal overlap, for certain."""


class _Holders(NamedTuple):
    """The holders of a tensor: C++ and Python references to it, references to its storage."""

    tensor: int
    python: int
    storage: int


class GradientSums:
    """Tells the sums that may be made in place.

    How many references a gradient has that autograd alone has depends on how
    PyTorch calls in here, as does what Python code that is called from; so both
    are seen once where they are known, in `calibrate`. Before that no sum is made in place.
    """

    def __init__(self) -> None:
        self.calibrating = False
        self._sole: _Holders | None = None
        self._callers: tuple[CodeType, ...] = ()

    def calibrate(self) -> None:
        """Add up two gradients that nobody else has; call it with the mode on."""
        self.calibrating = True
        try:
            with torch.inference_mode(mode=False), torch.enable_grad():
                leaf = torch.ones(2, device="cpu", requires_grad=True)
                twice = leaf.sin()
                (twice.cos() + twice.exp()).sum().backward()
        finally:
            self.calibrating = False

    def may_be_in_place(self, func: Any, args: Any, kwargs: Any) -> bool:
        """True of an operator, called by the mode's `__torch_dispatch__`, that is such a sum and nothing else.

        Args:
            func: The operator.
            args: The very tuple that the mode was called with: its own references are counted.
            kwargs: Likewise.
        """
        if func is not torch.ops.aten.add.Tensor or kwargs or len(args) != 2 or torch.is_grad_enabled():
            return False
        if self._sole is None and not self.calibrating:
            return False
        if torch._C._current_graph_task_id() == -1 or not all(type(part) is torch.Tensor for part in args):
            return False
        callers = _callers(sys._getframe(2))
        storage = args[0].untyped_storage()
        holders = _Holders(
            args[0]._use_count(), sys.getrefcount(args[0]), torch._C._storage_Use_Count(storage._cdata)
        )  # fmt: skip
        if self.calibrating:
            self._sole, self._callers = holders, callers
        if callers != self._callers:
            return False
        mine, other = args
        return (
            all(has <= sole for has, sole in zip(holders, self._sole or holders, strict=True))
            and (mine.shape, mine.dtype, mine.device) == (other.shape, other.dtype, other.device)
            and storage.nbytes() == mine.numel() * mine.element_size()
            and torch._debug_has_internal_overlap(mine) == NONE
        )


def _callers(frame: FrameType | None) -> tuple[CodeType, ...]:
    """The code between autograd and the mode; a GPU's backward runs on a thread that has no other."""
    codes = []
    while frame is not None and frame.f_code is not _RUN_BACKWARD:
        codes.append(frame.f_code)
        frame = frame.f_back
    return tuple(codes)


_RUN_BACKWARD = torch.autograd.graph._engine_run_backward.__code__
