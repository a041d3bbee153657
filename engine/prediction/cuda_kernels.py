"""Memory that CUDA's kernels allocate beyond the tensors they return, operator by operator.

Found in PyTorch's sources and in allocator traces of a GPU; where a size depends
on the device, the formula is the kernel's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..allocator_settings import MIN_BLOCK_BYTES
from ..tracing.owners import CUBLAS
from . import attention, convolutions, packed_sequences, recurrent_cells, recurrent_layers
from .gpus import Gpu
from .reduction import scratch_bytes

if TYPE_CHECKING:
    from .fake_cuda import FakeCuda, Kernel

aten = torch.ops.aten
Tensor = torch.Tensor


def kernels(gpu: Gpu) -> dict[Any, Kernel]:
    """Operators that a GPU runs in another way than the meta kernels say."""

    def reduction(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        dims = args[1] if len(args) > 1 and isinstance(args[1], list | tuple | int) else kwargs.get("dim")
        tracker.see(out)
        tracker.scratch(*scratch_bytes(gpu, args[0], dims))
        return out

    reductions = (aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim, aten.amax.default)
    return {
        **attention.KERNELS,
        **convolutions.kernels(gpu),
        **recurrent_cells.kernels(gpu),
        **recurrent_layers.kernels(gpu),
        **packed_sequences.kernels(),
        **dict.fromkeys(reductions, reduction),
        aten._local_scalar_dense.default: _item,
        aten.lift_fresh.default: _lift_fresh,
        aten.rand.default: _rand,
        aten._to_copy.default: _to_copy,
        aten.add.Tensor: _add,
        aten.add_.Tensor: _add_in_place,
        aten.native_layer_norm.default: _layer_norm,
        aten._softmax.default: _softmax,
        aten._log_softmax.default: _softmax,
        aten._softmax_backward_data.default: _softmax_backward,
        aten.cumsum.default: _cumsum,
        aten._grouped_mm.default: _grouped_mm,
        aten.any.default: _any,
        aten.all.default: _all,
        aten.nonzero.default: _nonzero,
        aten.native_dropout.default: _dropout,
        aten.mm.dtype_out: _into_out,
        aten.addmm.dtype_out: _into_out,
        aten.embedding_dense_backward.default: _embedding_backward,
        aten._fft_r2c.default: _fourier,
        aten._fft_c2r.default: _fourier,
        aten._fft_c2c.default: _fourier,
    }


def take_workspaces(gpu: Gpu, tracker: FakeCuda) -> None:
    """Allocate the workspaces of cuBLAS and cuBLASLt, the loop's thread's and autograd's.

    `getChosenWorkspaceSize` of `aten/src/ATen/cuda/CublasHandlePool.cpp`: 32 MiB
    from sm_90 on, else :4096:2:16:8. The order is that of `AllocatorTrace`'s
    first products, a small tensor of which keeps the 1 MiB of the two threads
    in segments of their own.
    """
    tracker.calibrate()
    tracker.empty_cache()
    first = tracker.allocate(MIN_BLOCK_BYTES)
    cublas = CUBLAS_BYTES_SM90 if gpu.capability >= (9, 0) else CUBLAS_BYTES
    for size in (CUBLASLT_BYTES, cublas, cublas, CUBLASLT_BYTES):
        tracker.workspaces[tracker.allocate(size)] = CUBLAS
    tracker.release(first)


_HOST = torch.device("cpu")

CUBLAS_BYTES = 8_519_680
CUBLAS_BYTES_SM90 = 32 << 20
CUBLASLT_BYTES = 1 << 20


def _item(_tracker: FakeCuda, _func: Any, args: Any, _kwargs: Any) -> Any:
    """A number read from a tensor: what it is where it is known, and otherwise one that changes no course."""
    (tensor,) = args
    if (constant := getattr(tensor, "constant", None)) is not None:
        with torch._C._DisableTorchDispatch():
            return constant.item()
    if getattr(tensor, "is_any", False):
        return False
    return True if tensor.dtype is torch.bool else 0.0 if tensor.dtype.is_floating_point else 0


def _lift_fresh(tracker: FakeCuda, func: Any, args: Any, _kwargs: Any) -> Any:
    """A tensor made of the host's numbers."""
    (made,) = args
    plain = type(made) is Tensor and made.is_contiguous() and made.device == _HOST and not made.requires_grad
    return tracker.lifted(func, made) if plain else func(made)


def _rand(_tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """One number drawn on the host decides something, such as dropping a layer: it is what can be expected."""
    if kwargs.get("device") in (None, torch.device("cpu")) and not args[0]:
        return torch.tensor(0.5, dtype=kwargs.get("dtype"))
    return func(*args, **kwargs)


def _to_copy(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """A host constant copied to the device is there: fake tensors would leave it on the host."""
    (tensor,) = args
    if kwargs.get("device") == tracker.device and getattr(tensor, "constant", None) is not None:
        empty, dtype = tracker.cached(aten.empty.memory_format), kwargs.get("dtype") or tensor.dtype
        return empty(list(tensor.shape), dtype=dtype, device=tracker.device)
    return func(*args, **kwargs)


def _add(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """Autograd adds up gradients in place where nobody else holds the first.

    `InputBuffer::accumulate` never does so for subclasses of Tensor, as fake
    tensors are.
    """
    mine, other = args[:2]
    if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled() or not isinstance(other, Tensor):
        return func(*args, **kwargs)
    if not tracker.called_by_autograd():
        return func(*args, **kwargs)
    if tracker.sole_owner(mine) and mine.shape == other.shape and _keeps_dtype(mine, other):
        return tracker.cached(aten.add_.Tensor)(mine, other)
    return func(*args, **kwargs)


def _add_in_place(_tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """A number of the host that is known, such as an optimizer counts its steps with, goes on being known."""
    mine, other = args
    if getattr(mine, "constant", None) is None or isinstance(other, Tensor):
        return func(*args, **kwargs)
    with torch._C._DisableTorchDispatch():
        mine.constant.add_(other, **kwargs)
    return mine


def _keeps_dtype(mine: Tensor, other: Tensor) -> bool:
    """True if the sum of two tensors of one shape has the first's dtype."""
    return mine.dtype == other.dtype or mine.dtype == torch.promote_types(mine.dtype, other.dtype)


def _layer_norm(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """Mean and deviation are in float32; a CPU's have the input's dtype."""
    out, *others = func(*args, **kwargs)
    cast = tracker.cached(aten._to_copy.default)
    return out, *(x if x.dtype is torch.float32 else cast(x, dtype=torch.float32) for x in others)


def _softmax(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """Scores of another layout, such as those of images with their channels last, are copied (`SoftMax.cu`)."""
    (x, *_) = args
    out = func(*args, **kwargs)
    tracker.see(out)
    if not x.is_contiguous():
        tracker.scratch(x.numel() * x.element_size())
    return out


def _softmax_backward(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """The product of gradient and output is made first (`softmax_backward_cuda_out` of `SoftMax.cu`)."""
    grad, output = args[:2]
    out = func(*args, **kwargs)
    tracker.see(out)
    tracker.scratch(out.numel() * torch.result_type(grad, output).itemsize)
    return out


def _embedding_backward(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """Many indices are sorted and summed up in segments (`EmbeddingBackwardKernel.cu`)."""
    grad, indices, weights = args[:3]
    count, width = indices.numel(), grad.shape[-1]
    if count <= SORTED_INDICES:
        return func(*args, **kwargs)
    held = [tracker.allocate(count * indices.element_size()) for _ in range(2)]
    tracker.scratch(count * indices.element_size(), _sort_scratch_bytes(count))
    out = func(*args, **kwargs)
    tracker.see(out)
    held += [tracker.allocate(size) for size in (count * 8, 8)]
    tracker.scratch(count * 8, CUB_SCAN_BYTES)
    held += [tracker.allocate(size) for size in (count * 8, count * 8)]
    tracker.scratch(CUB_SCAN_BYTES)
    partial = count // 10 + min(count, weights)  # NROWS_PER_THREAD
    tracker.scratch(8, partial * 8, partial * -(-width // 32) * 32 * 4)
    for address in held[::-1]:
        tracker.release(address)
    return out


SORTED_INDICES = 3072
CUB_SCAN_BYTES = 1279


def _sort_scratch_bytes(count: int) -> int:
    """Scratch of `cub::DeviceRadixSort::SortPairs` with 64-bit keys and values, to about a kilobyte."""
    return 16 * count + 18_000


def _dropout(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """The mask is made before the output."""
    out, mask = func(*args, **kwargs)
    tracker.see(mask)
    return out, mask


def _into_out(_tracker: FakeCuda, _func: Any, _args: Any, kwargs: Any) -> Any:
    """A product in another dtype than its factors': there is no meta kernel."""
    return kwargs["out"]


def _any(_tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """Asked whether there is any (outlier, NaN), the answer is no."""
    out = func(*args, **kwargs)
    out.is_any = True
    return out


def _all(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """Asked whether all of a mask is set, the answer is no where rows have several lengths."""
    out = func(*args, **kwargs)
    out.is_any = tracker.ragged
    return out


def _nonzero(tracker: FakeCuda, _func: Any, args: Any, _kwargs: Any) -> Any:
    """The result's size depends on the data; mostly it is empty."""
    (tensor,) = args
    tracker.assume("how many elements are selected depends on data: none is taken to be")
    return aten.empty.memory_format([0, tensor.dim()], dtype=torch.int64, device=tensor.fake_device)


def _fourier(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """cuFFT's work area depends on the length's factors; a transform to real numbers overwrites a copy of its input."""
    out = func(*args, **kwargs)
    tracker.see(out)
    tracker.may_take(_copies_bytes(args[0], out))
    return out


def _copies_bytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _cumsum(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """The input is converted first if the output has another dtype."""
    out = func(*args, **kwargs)
    tracker.see(out)
    if args[0].dtype != out.dtype:
        tracker.scratch(out.numel() * out.element_size())
    return out


def _grouped_mm(_tracker: FakeCuda, _func: Any, args: Any, kwargs: Any) -> Any:
    """A mixture of experts' product, in any dtype: the meta kernel knows bfloat16 only."""
    left, right = args[:2]
    groups = args[2] if len(args) > 2 else kwargs.get("offs")
    dtype = (args[4] if len(args) > 4 else kwargs.get("out_dtype")) or left.dtype
    shape = [left.shape[-2], right.shape[-1]]
    if left.dim() == right.dim():
        shape.insert(0, left.shape[0] if left.dim() == 3 else groups.shape[0])
    return aten.empty.memory_format(shape, dtype=dtype, device=left.fake_device)
