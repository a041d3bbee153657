"""Losses without logits as on a GPU: PyTorch's, whose source asks for the device's type, and Liger's, which needs one.

Of Liger's no code is run: what its `fused_linear_cross_entropy.py` (0.8.5) allocates is
written down here, its kernels allocate nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import CodeType, FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .stand_ins import standing_in

if TYPE_CHECKING:
    from .fake_cuda import FakeCuda


@contextmanager
def fused_losses(tracker: FakeCuda) -> Iterator[None]:
    """Have both behave so."""
    with ExitStack() as undo:
        if hasattr(torch.nn.functional, "linear_cross_entropy"):
            undo.enter_context(_pytorch(tracker))
        modules = {"liger_kernel": ModuleType("liger_kernel"), "liger_kernel.transformers": _liger()}
        undo.enter_context(standing_in(modules))
        yield


# --- PyTorch's ------------------------------------------------------------------------


@contextmanager
def _pytorch(tracker: FakeCuda) -> Iterator[None]:
    """Run the operator's Python, in which a device of the type `cpu` is a GPU."""
    from torch.nn.modules import linear_cross_entropy as source

    before = {f: f.__code__ for f in _functions(source)}
    operators = {name: vars(source)[name] for name in _OPERATORS if name in vars(source)}
    tracker.libraries["torch_nn"] = {name: operator._init_fn for name, operator in operators.items()}
    try:
        for function, code in before.items():
            function.__code__ = _for_a_gpu(code)
        yield
    finally:
        for function, code in before.items():
            function.__code__ = code
        tracker.libraries.pop("torch_nn", None)


_OPERATORS = ("_linear_cross_entropy_batch_chunked", "_linear_cross_entropy_batch_chunked_no_reduction")


def _functions(module: Any) -> Iterator[FunctionType]:
    """All functions of a module, its classes' too."""
    for value in vars(module).values():
        members = vars(value).values() if isinstance(value, type) and value.__module__ == module.__name__ else [value]
        for member in members:
            function = getattr(member, "__func__", member)
            if isinstance(function, FunctionType) and function.__module__ == module.__name__:
                yield function


def _for_a_gpu(code: CodeType) -> CodeType:
    return code.replace(co_consts=tuple("cpu" if constant == "cuda" else constant for constant in code.co_consts))


# --- Liger's --------------------------------------------------------------------------


def _liger() -> ModuleType:
    module = ModuleType("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss = _LigerLoss  # type: ignore[attr-defined]
    return module


class _LigerLoss:
    def __init__(self, softcap: float | None = None) -> None:
        self.softcap = softcap

    def __call__(self, weight: Tensor, hidden: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
        loss: Tensor = _LigerFunction.apply(hidden, weight, labels, bias)  # type: ignore[no-untyped-call]
        return loss


class _LigerFunction(torch.autograd.Function):
    """Gradients are made in forward, one chunk of tokens at a time, and multiplied in place in backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> Tensor:
        count, width = hidden.shape
        factor = -(-len(weight) // width)
        chunk = min(_next_power_of_2(-(-count // factor)), count)
        of_hidden = torch.zeros_like(hidden)
        of_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        of_bias = torch.zeros_like(bias) if bias is not None else None
        losses = torch.zeros(count, dtype=torch.float32, device=hidden.device)
        kept = labels != -100
        kept.sum()
        kind = hidden.device.type
        computed = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        same = hidden.dtype == weight.dtype == computed
        buffer = hidden.new_empty((chunk, len(weight))) if same else None
        for start in range(0, count, chunk):
            states = hidden[start : start + chunk]
            logits = buffer[: len(states)] if buffer is not None else states @ weight.t()
            if buffer is not None:
                torch.mm(logits, weight, out=of_hidden[start : start + chunk])
            else:
                of_hidden[start : start + chunk] = logits @ weight
            if of_weight is not None:
                _add_weights_gradient(of_weight, logits, states)
            if of_bias is not None:
                torch.add(of_bias, logits.sum(0), out=of_bias)
            del logits, states
        del buffer
        loss = losses.sum()
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradients[0] == 1.0).all()
        of_hidden, of_weight, of_bias = ctx.saved_tensors
        return of_hidden, of_weight, None, of_bias


def _add_weights_gradient(total: Tensor, logits: Tensor, states: Tensor) -> None:
    if logits.dtype in (torch.float16, torch.bfloat16):
        states = states.to(logits.dtype)
        if total.dtype == torch.float32:
            torch.addmm(total, logits.t(), states, out_dtype=torch.float32, out=total)
        else:
            torch.addmm(total, logits.t(), states, out=total)
    else:
        total += torch.mm(logits.t(), states).float()


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
