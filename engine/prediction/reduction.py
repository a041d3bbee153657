"""The scratch memory of a CUDA reduction: `setReduceConfig` of `aten/src/ATen/native/cuda/Reduce.cuh`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from .gpus import Gpu

MAX_THREADS = 512
WARP = 32
OUTPUT_VECTOR = 4
MIN_VALUES, MAX_VALUES = 16, 256


def scratch_bytes(gpu: Gpu, tensor: torch.Tensor, dims: Sequence[int] | int | None) -> tuple[int, int]:
    """Buffer and semaphores of a reduction split over thread blocks; (0, 0) if it is not.

    Args:
        gpu: How many blocks it wants.
        tensor: What is reduced.
        dims: Which dimensions; None or none: all.
    """
    order = tensor.dim()
    chosen = range(order) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    reduced = {d % order for d in chosen} if order else set()
    inputs = math.prod(tensor.shape[d] for d in reduced)
    outputs = tensor.numel() // max(1, inputs)
    if not outputs or inputs <= 1:
        return 0, 0
    strides = {d: tensor.stride(d) for d in range(order) if tensor.shape[d] > 1}
    kept = [s for d, s in strides.items() if d not in reduced]
    gone = [s for d, s in strides.items() if d in reduced]
    along_input = not kept or min(gone) < min(kept)
    fastest = min(gone) if along_input else min(kept)
    return _configured(gpu, inputs, outputs, along_input, fastest == 1, not kept)


def _configured(
    gpu: Gpu, inputs: int, outputs: int, along_input: bool, contiguous: bool, whole: bool
) -> tuple[int, int]:
    dim0, dim1 = (inputs, outputs) if along_input else (outputs, inputs)
    vector = 1
    if contiguous and along_input and whole and dim0 > 128:
        dim0 //= 4
    elif contiguous and not along_input:
        vector = next(v for v in (OUTPUT_VECTOR, 2, 1) if outputs % v == 0)
        dim0 //= vector
    limit = MAX_THREADS // vector
    pow0, pow1 = (min(limit, _last_power(d)) for d in (dim0, dim1))
    width = min(pow0, WARP)
    height = min(pow1, limit // width)
    width = min(pow0, limit // height)
    step_input, step_output = (width, 1) if along_input else (1, width)
    if -(-inputs // step_input) < min(height * 16, MAX_VALUES):
        return 0, 0  # each warp has an output of its own
    step_input *= height
    values = -(-inputs // step_input)
    grid = -(-(outputs // vector) // step_output)
    target = gpu.multiprocessors * (gpu.threads // (width * height))
    if values < MAX_VALUES or grid > target:
        return 0, 0
    blocks = max(min(-(-target // grid), -(-values // MIN_VALUES)), -(-values // MAX_VALUES))
    if blocks <= 1:
        return 0, 0
    buffer = 4 * outputs * blocks
    return (buffer if along_input else buffer * width * vector), 4 * grid


def _last_power(n: int) -> int:
    return 1 << (max(1, n).bit_length() - 1)
