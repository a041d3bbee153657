"""Memory of cuDNN's convolutions: a workspace for the result and for each gradient, one after another.

Kernels on tensor cores want channels last, and copy tensors in PyTorch's usual
layout into their workspace: cuDNN's documentation speaks of "padding, folding,
and NCHW-to-NHWC transformations to call the Tensor Core operations". These copies
are predicted. Whether a product is cut into parts that are added up afterwards is
the choice of cuDNN's heuristics for a GPU and version: that is in the bound alone.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from .gpus import Gpu

if TYPE_CHECKING:
    from .fake_cuda import FakeCuda, Kernel

aten = torch.ops.aten
Tensor = torch.Tensor

PADDED_CHANNELS = 4
"""Channels of a copy are padded to a multiple of it."""
WORD_BYTES = 4
"""The least that a thread copies to shared memory asynchronously: each channel's image has to begin at a multiple."""
TILE_BYTES = 128 * 128 * 4
"""The part of a product that a multiprocessor adds up by itself, in float32, where it is cut into parts."""


def kernels(gpu: Gpu) -> dict[Any, Kernel]:
    """A convolution and its backward pass, as a GPU runs them."""

    def product(tracker: FakeCuda, out: Tensor, workspace_bytes: int, *factors: Tensor) -> None:
        tracker.see(out)
        tracker.scratch(workspace_bytes)
        tracker.may_take(sum(map(_copy_bytes, (out, *factors))) + gpu.multiprocessors * TILE_BYTES)

    def forward(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        x, weight, _, stride, *_, groups = args
        workspace = _Workspace(gpu, x, weight, out, stride, groups)
        product(tracker, out, workspace.of_images_bytes, x, weight)
        return out

    def backward(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
        grad_x, grad_weight, _ = grads = func(*args, **kwargs)
        grad, x, weight, _, stride, *_, groups, _ = args
        workspace = _Workspace(gpu, x, weight, grad, stride, groups)
        if grad_x is not None:
            product(tracker, grad_x, workspace.of_images_bytes, grad, weight)
        if grad_weight is not None:
            product(tracker, grad_weight, workspace.of_weight_bytes, grad, x)
        return grads

    return {aten.convolution.default: forward, aten.convolution_backward.default: backward}


class _Workspace:
    """The least that kernels on tensor cores take for a convolution; nothing where they are not used.

    Args:
        gpu: Where.
        x: Its input, [batch, channels, height, width].
        weight: [channels out, channels / groups, ...].
        y: Its result, or the gradient of it.
        stride: Of it.
        groups: Of channels.

    Attributes:
        of_images_bytes: For the result, and likewise for the gradient of the input.
        of_weight_bytes: For the gradient of the weight.
    """

    def __init__(self, gpu: Gpu, x: Tensor, weight: Tensor, y: Tensor, stride: list[int], groups: int) -> None:
        self.of_images_bytes = self.of_weight_bytes = 0
        if not (_on_tensor_cores(gpu, x, groups) and _channels_first(x) and _channels_first(weight)):
            return
        copies = _copy_bytes(x) + _copy_bytes(y)
        if math.prod(weight.shape[2:]) > 1:
            self.of_images_bytes = self.of_weight_bytes = copies + _copy_bytes(weight)
        elif max(stride) > 1 or math.prod(x.shape[2:]) * x.element_size() % WORD_BYTES:
            self.of_images_bytes = self.of_weight_bytes = copies
        else:  # a matrix product for each image, no copies; the weight's gradient is added up in float32
            self.of_weight_bytes = min(copies, x.shape[0] * weight.numel() * 4)


def _on_tensor_cores(gpu: Gpu, x: Tensor, groups: int) -> bool:
    """True if they run a 2-D convolution: in half precision, or in float32 by TF32 with channels a multiple of four."""
    if groups > 1 or x.dim() != 4:
        return False
    if x.dtype is torch.float32:
        tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
        return tf32 and gpu.capability >= (8, 0) and x.shape[1] % PADDED_CHANNELS == 0
    since = {torch.float16: (7, 0), torch.bfloat16: (8, 0)}.get(x.dtype)
    return since is not None and gpu.capability >= since


def _channels_first(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or not tensor.is_contiguous(memory_format=torch.channels_last)


def _copy_bytes(tensor: Tensor) -> int:
    """Bytes of a copy with the channels last."""
    channels = tensor.shape[1]
    padded = -(-channels // PADDED_CHANNELS) * PADDED_CHANNELS
    return tensor.numel() // channels * padded * tensor.element_size()
