"""`nn.LSTM`, `nn.GRU` and `nn.RNN` as cuDNN computes them, whole layers in one call.

`_cudnn_impl`, `_cudnn_rnn` and `_cudnn_rnn_backward` of `aten/src/ATen/native/cudnn/RNN.cpp`,
`_cudnn_rnn_cast_reflatten` of `aten/src/ATen/cudnn/AutocastRNN.cpp`, and
`flatten_parameters` of `torch.nn.RNNBase`. How much cuDNN itself takes is in `cudnn_rnn`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..config import UserError
from ..tracing.owners import DROPOUT_STATE
from .assumptions import place_of_frame
from .cudnn_rnn import GRU, LSTM, RELU, TANH, RecurrentLayers, dropout_state_bytes
from .fake_cuda import DEVICE
from .gpus import Gpu
from .packed_sequences import sizes_of

if TYPE_CHECKING:
    from .fake_cuda import FakeCuda, Kernel

aten = torch.ops.aten
Tensor = torch.Tensor
MODES = {"lstm": LSTM, "gru": GRU, "rnn_tanh": TANH, "rnn_relu": RELU}
FLATTENED = (torch.float16, torch.float32, torch.float64)
"""`torch.backends.cudnn.is_acceptable`; bfloat16 is not, its weights are copied in each forward pass."""

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


def register(library: torch.library.Library, tracker: FakeCuda, gpu: Gpu, undo: ExitStack) -> None:
    """Take these paths for tensors on the modelled device.

    Args:
        library: Of aten, for as long as they are to be taken.
        tracker: Records for the device.
        gpu: Which one it is.
        undo: Puts PyTorch's own `flatten_parameters` back.
    """

    @cache
    def dropout_state() -> Tensor:
        return _dropout_state(tracker, gpu)

    for name, mode in MODES.items():
        packet = getattr(aten, name)
        for operator in (packet.input, packet.data):
            overload = f"{name}.{operator._overloadname}"
            library.impl(overload, _layers(operator, mode, gpu, dropout_state), "AutogradCPU")
    library.impl("_cudnn_rnn", _under_autocast, "AutocastCPU")
    layers: Any = torch.nn.RNNBase
    undo.callback(setattr, layers, "flatten_parameters", layers.flatten_parameters)
    layers.flatten_parameters = _flatten_parameters


def kernels(gpu: Gpu) -> dict[Any, Kernel]:
    """cuDNN's operators, that PyTorch's meta kernels know no workspace of."""

    def forward(tracker: FakeCuda, _func: Any, args: Any, _kwargs: Any) -> Any:
        with tracker:
            return _forward(tracker, gpu, *args)

    def backward(tracker: FakeCuda, _func: Any, args: Any, _kwargs: Any) -> Any:
        with tracker:
            return _backward(tracker, gpu, *args)

    return {aten._cudnn_rnn.default: forward, aten._cudnn_rnn_backward.default: backward}


class _How(NamedTuple):
    """Arguments of `_cudnn_rnn` behind its tensors."""

    mode: int
    hidden_size: int
    proj_size: int
    layers: int
    batch_first: bool
    dropout: float
    train: bool
    bidirectional: bool
    batch_sizes: list[int]
    dropout_state: Tensor | None

    def layers_for(self, x: Tensor) -> RecurrentLayers:
        """The layers, called with an input whose time steps come first."""
        sizes = (self.mode, x.shape[-1], self.hidden_size, self.proj_size, self.layers, 1 + self.bidirectional)
        steps, rows = (len(self.batch_sizes), self.batch_sizes[0]) if self.batch_sizes else x.shape[:2]
        dropout = self.train and self.dropout > 0
        return RecurrentLayers(*sizes, x.dtype, steps, rows, dropout, bool(self.batch_sizes), self.train)


# --- who calls cuDNN ---------------------------------------------------------------


def _layers(operator: Any, mode: int, gpu: Gpu, dropout_state: Callable[[], Tensor]) -> Callable[..., Any]:
    """`lstm.input` for example, of an input, hidden states, weights and how to compute; `lstm.data` if it is packed."""

    def call(x: Tensor, *rest: Any) -> Any:
        if x.device != DEVICE:
            return operator.decompose(x, *rest)
        if not torch.backends.cudnn.enabled or (x.dtype is torch.bfloat16 and gpu.capability < (8, 0)):
            name = operator._schema.name.partition("::")[2]
            raise UserError(f"{place_of_frame(sys._getframe())}: what {name} holds without cuDNN is not known here")
        if operator._overloadname == "data":
            sizes, (hx, weights, has_biases, layers, dropout, train, bidirectional) = sizes_of(rest[0]), rest[1:]
            batch_first = False
        else:
            sizes, (hx, weights, has_biases, layers, dropout, train, bidirectional, batch_first) = [], rest
        hx, cx = hx if mode == LSTM else (hx, None)
        out_size = hx.shape[2]
        hidden_size = out_size if cx is None else cx.shape[2]
        proj_size = out_size if hidden_size != out_size else 0
        state = dropout_state() if train and dropout else None
        how = _How(mode, hidden_size, proj_size, layers, batch_first, dropout, train, bidirectional, sizes, state)
        flat = _flat_buffer(weights, how.layers_for(x).weights)
        stride = (4 if has_biases else 2) + (proj_size > 0)
        out, hy, cy, _, _ = aten._cudnn_rnn(x, weights, stride, flat, hx, cx, *how)
        return (out, hy, cy) if mode == LSTM else (out, hy)

    return call


def _dropout_state(tracker: FakeCuda, gpu: Gpu) -> Tensor:
    """Kept by PyTorch for the device as long as the process lives."""
    torch.empty((), dtype=torch.int64, device=DEVICE)  # a seed is drawn
    state = torch.empty(dropout_state_bytes(gpu.multiprocessors, gpu.threads), dtype=torch.uint8, device=DEVICE)
    tracker.workspaces[tracker.address(state)] = DROPOUT_STATE
    return state


def _flat_buffer(weights: list[Tensor], elements: int) -> Tensor | None:
    """The one buffer in which all weights lie; None if they do not."""
    first = weights[0]
    storages = {weight.untyped_storage()._cdata for weight in weights}
    if len(storages) > 1 or first.untyped_storage().nbytes() < elements * first.element_size():
        return None
    return first.detach().as_strided([elements], [1], 0)


def _flatten_parameters(layers: torch.nn.RNNBase) -> None:
    """Move the parameters into one buffer: it is there beside the old ones while they are copied."""
    weights: list[Any] = layers._flat_weights
    if not torch.backends.cudnn.enabled or not all(isinstance(w, Tensor) and w.device == DEVICE for w in weights):
        return
    first, places = weights[0], {(w.untyped_storage()._cdata, w.storage_offset()) for w in weights}
    if first.dtype not in FLATTENED or any(w.dtype != first.dtype for w in weights) or len(places) < len(weights):
        return
    mode = {"LSTM": LSTM, "GRU": GRU}.get(layers.mode, TANH)
    sizes = (layers.input_size, layers.hidden_size, layers.proj_size, layers.num_layers, 1 + layers.bidirectional)
    with torch.no_grad():
        flat = first.new_zeros(RecurrentLayers(mode, *sizes, first.dtype).weights)
        for weight, place in zip(weights, _places(flat, weights), strict=True):
            weight.data = place


def _places(flat: Tensor, weights: list[Tensor]) -> list[Tensor]:
    """The parts of a flat buffer in the shapes of weights, in their order."""
    begins = accumulate((weight.numel() for weight in weights), initial=0)
    return [flat.narrow(0, n, w.numel()).view(w.shape) for n, w in zip(begins, weights, strict=False)]


def _under_autocast(x: Tensor, weights: list[Tensor], stride: int, flat: Any, hx: Tensor, cx: Any, *how: Any) -> Any:
    """cuDNN computes in float16 whatever autocast's dtype is; weights are cast into a buffer in each forward pass."""
    with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
        if _is_cast(weights[0]):
            flat = weights[0].new_zeros(_How(*how).layers_for(x).weights, dtype=torch.float16)
            weights = [place.detach().copy_(w) for place, w in zip(_places(flat, weights), weights, strict=True)]
        cx, hx, x = (t.half() if t is not None and _is_cast(t) else t for t in (cx, hx, x))
        return aten._cudnn_rnn(x, weights, stride, flat, hx, cx, *how)


def _is_cast(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.bfloat16)


# --- what is allocated ---------------------------------------------------------------


def _workspace(tracker: FakeCuda, gpu: Gpu, x: Tensor, shape: RecurrentLayers, forward: bool) -> Tensor:
    workspace = x.new_empty(shape.workspace_bytes(gpu, forward), dtype=torch.uint8)
    tracker.may_take(shape.unsure_bytes(gpu, forward), tracker.address(x))
    return workspace


def _forward(
    tracker: FakeCuda, gpu: Gpu, x: Tensor, _weights: Any, _stride: int, flat: Any, hx: Tensor, cx: Any, *rest: Any
) -> Any:
    """The output, the states, the reserve and the buffer of weights."""
    how = _How(*rest)
    x = (x.transpose(0, 1) if how.batch_first else x).contiguous()
    shape = how.layers_for(x)
    out = x.new_empty([*x.shape[:-1], shape.directions * hx.shape[2]])
    hy = hx.new_empty(hx.shape)
    cy = hx.new_empty([0]) if cx is None else cx.new_empty(cx.shape)
    if flat is None:
        flat = x.new_empty([shape.weights])
    workspace = _workspace(tracker, gpu, x, shape, forward=True)
    reserve = x.new_empty([shape.reserve_bytes if how.train else 0], dtype=torch.uint8)
    del workspace
    return out.transpose_(0, 1) if how.batch_first else out, hy, cy, reserve, flat


def _backward(
    tracker: FakeCuda, gpu: Gpu, x: Tensor, weights: list[Tensor], stride: int, flat: Tensor, hx: Tensor, cx: Any,
    out: Tensor, grad: Any, grad_hy: Any, grad_cy: Any, *rest: Any,
) -> Any:  # fmt: skip
    """The gradients of the input, the states and the weights."""
    *settings, _reserve, needed = rest
    how = _How(*settings)
    if not how.train:
        raise RuntimeError("cudnn RNN backward can only be called in training mode")
    given = ((grad, out), (grad_hy, hx), (grad_cy, cx))
    grad, grad_hy, grad_cy = (
        torch.zeros_like(like, memory_format=torch.contiguous_format) if one is None and like is not None else one
        for one, like in given
    )
    if how.batch_first:
        x, grad = x.transpose(0, 1), grad.transpose(0, 1)
    shape = how.layers_for(x)
    of_states = _backward_of_input(tracker, gpu, shape, x, hx, cx, grad, grad_hy, grad_cy)
    of_weights = _backward_of_weights(tracker, gpu, shape, x, weights, stride, flat) if needed[3] else []
    grad_x, *states = of_states
    del given, grad_cy, grad_hy, grad  # in the order in which C++ gives them back
    return grad_x.transpose_(0, 1) if how.batch_first else grad_x, *states, of_weights


def _backward_of_input(
    tracker: FakeCuda, gpu: Gpu, shape: RecurrentLayers, x: Tensor, hx: Tensor, cx: Any, *grads: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    copies = [x.contiguous(), *(grad.contiguous() for grad in grads[:1])]
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    copies += [grad.contiguous() for grad in grads[1:] if grad is not None]
    grad_hx = hx.new_empty(hx.shape)
    grad_cx = None if cx is None else cx.new_empty(cx.shape)
    _workspace(tracker, gpu, x, shape, forward=False)
    return grad_x, grad_hx, grad_cx


def _backward_of_weights(
    tracker: FakeCuda, gpu: Gpu, shape: RecurrentLayers, x: Tensor, weights: list[Tensor], stride: int, flat: Tensor
) -> list[Tensor]:
    """Views into one buffer; where there are no biases, copies of what lies in it."""
    x = x.contiguous()
    of_flat = torch.zeros_like(flat)
    workspace = _workspace(tracker, gpu, x, shape, forward=False)
    has_biases = stride >= 4
    grads = _places(of_flat, weights) if has_biases else [weight.new_empty(weight.shape) for weight in weights]
    del workspace, of_flat
    return grads
