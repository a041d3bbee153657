"""LSTM and GRU cells as CUDA computes them: two products, and one kernel that keeps a workspace for backward.

`LSTMCell` and `GRUCell` of `aten/src/ATen/native/RNN.cpp`, the kernels of
`aten/src/ATen/native/cuda/RNN.cu`. On a CPU each gate is a tensor of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import linear

from ..config import UserError
from .assumptions import place_of_frame
from .fake_cuda import DEVICE
from .gpus import Gpu
from .reduction import scratch_bytes

if TYPE_CHECKING:
    from .fake_cuda import FakeCuda, Kernel

aten = torch.ops.aten
Tensor = torch.Tensor
GRU_WORKSPACE = 5
"""Hidden sizes that the kernel keeps: of its three gates, the state and the new gate's product."""


def register(library: torch.library.Library) -> None:
    """Take these paths for tensors on the modelled device."""
    library.impl("lstm_cell", _on_cuda(aten.lstm_cell.default, _lstm_cell), "AutogradCPU")
    library.impl("gru_cell", _on_cuda(aten.gru_cell.default, _gru_cell), "AutogradCPU")


def kernels(gpu: Gpu) -> dict[Any, Kernel]:
    """Operators that PyTorch has no meta kernels of, or whose kernels take more than they return."""

    def lstm_backward(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
        grads = func(*args, **kwargs)
        for grad in grads[:2]:
            if grad is not None:
                tracker.see(grad)
        if grads[2] is not None:
            tracker.see(grads[2])
            tracker.scratch(*scratch_bytes(gpu, grads[0], 0))
        return grads

    return {
        aten._thnn_fused_lstm_cell_backward_impl.default: lstm_backward,
        aten._thnn_fused_gru_cell.default: _fused_gru,
        aten._thnn_fused_gru_cell_backward.default: _fused_gru_backward,
    }


def _on_cuda(operator: Any, path: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        if args[0].device != DEVICE:
            return operator.decompose(*args)
        if torch.is_autocast_enabled(DEVICE.type):
            name = operator._schema.name.partition("::")[2]
            raise UserError(f"{place_of_frame(sys._getframe())}: what autocast keeps of {name} is not known here")
        return path(*args)

    return call


def _lstm_cell(x: Tensor, state: list[Tensor], w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
    hidden, cell = state
    return aten._thnn_fused_lstm_cell(linear(x, w_ih), linear(hidden, w_hh), cell, b_ih, b_hh)[:2]


def _gru_cell(x: Tensor, hidden: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any = None, b_hh: Any = None) -> Any:
    return aten._thnn_fused_gru_cell(linear(x, w_ih), linear(hidden, w_hh), hidden, b_ih, b_hh)[0]


def _fused_gru(tracker: FakeCuda, _func: Any, args: Any, _kwargs: Any) -> Any:
    hidden = args[2]
    workspace = hidden.new_empty([hidden.shape[0], GRU_WORKSPACE * hidden.shape[1]])
    tracker.see(workspace)
    return torch.empty_like(hidden, memory_format=torch.contiguous_format), workspace


def _fused_gru_backward(tracker: FakeCuda, _func: Any, args: Any, _kwargs: Any) -> Any:
    """The gradients of the two products, of the state and of the two biases."""
    grad, workspace, has_bias = args
    shape = [workspace.shape[0], 3 * workspace.shape[1] // GRU_WORKSPACE]
    gates = [workspace.new_empty(shape) for _ in range(2)]
    grad_hidden = torch.empty_like(grad, memory_format=torch.contiguous_format)
    for made in (*gates, grad_hidden):
        tracker.see(made)
    with tracker:  # their reductions take scratch
        biases = [gate.sum(0) for gate in gates] if has_bias else [None, None]
    return *gates, grad_hidden, *biases
