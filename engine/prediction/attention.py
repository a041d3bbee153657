"""The attention kernel that CUDA would choose, and the memory it allocates.

The choice follows `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp`, the
order of the allocations `attention.cu`, `attention_backward.cu` and the
libraries behind them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from .gpus import Gpu

if TYPE_CHECKING:
    from .fake_cuda import FakeCuda

aten = torch.ops.aten
Tensor = torch.Tensor

HALF = (torch.float16, torch.bfloat16)


def _wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def use_cudnn(gpu: Gpu, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """cuDNN comes first on sm_90 and sm_100 (`check_prefer_cudnn_attention`)."""
    limit = 256 if gpu.capability == (9, 0) else 128
    return (
        gpu.capability[0] in (9, 10)
        and q.dtype in HALF
        and q.shape[-1] <= limit
        and v.shape[-1] <= limit
        and q.shape[-1] % 8 == 0
        and v.shape[-1] % 8 == 0
        and k.shape[2] != 1
    )


def use_flash(gpu: Gpu, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool) -> bool:
    """FlashAttention 2: 16 bit, no mask, from sm_80 on."""
    size = q.shape[-1]
    if gpu.capability < (8, 0) or q.dtype not in HALF or mask is not None:
        return False
    if not (size == k.shape[-1] == v.shape[-1] and size <= 256):
        return False
    small = (8, 6) <= gpu.capability <= (8, 9) or gpu.capability >= (12, 0)
    if small and size > 192 and _wants_grad(q, k, v) and (dropout > 0 or size <= 224):
        return False
    return not causal or q.shape[-2] == k.shape[-2]


def use_efficient(gpu: Gpu, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """The memory-efficient kernel; it wants as many heads of keys as of queries."""
    allowed = (*HALF, torch.float32) if gpu.capability >= (8, 0) else (torch.float16, torch.float32)
    half = q.dtype in HALF
    alignment = 4 if gpu.capability >= (8, 0) else 1
    if gpu.capability >= (8, 0) or (gpu.capability >= (7, 0) and half):
        alignment = max(alignment, 8 if half else 4)
    return (
        q.dtype in allowed
        and q.shape[-1] == k.shape[-1]
        and q.shape[-1] % alignment == 0
        and v.shape[-1] % alignment == 0
        and q.shape[1] == k.shape[1] == v.shape[1]
    )


def fusable(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """True where a fused kernel takes these strides (`check_last_dim_stride_equals_1_dense`).

    T5's bias is a permuted view of a table, heads last, and so not fusable.
    """
    return all(t.stride(-1) == 1 for t in (q, k, v, mask) if t is not None)


def sdpa(
    gpu: Gpu,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` as it dispatches on a GPU."""
    grad = _wants_grad(query, key, value)
    if query.dim() == 4 and key.dim() == 4 and fusable(query, key, value, attn_mask):
        # A bias that is trained is the memory-efficient kernel's alone.
        trained = attn_mask is not None and _wants_grad(attn_mask)
        if not trained and use_cudnn(gpu, query, key, value):
            out: Tensor = aten._scaled_dot_product_cudnn_attention(
                query, key, value, _additive(attn_mask, query), grad, dropout_p, is_causal, False, scale=scale
            )[0]
            return out
        if use_flash(gpu, query, key, value, attn_mask, dropout_p, is_causal):
            size = query.shape[-1]
            padded = [torch.nn.functional.pad(t, (0, -size % 8)) if size % 8 else t for t in (query, key, value)]
            scale = scale if scale is not None else 1 / math.sqrt(size)
            out = aten._scaled_dot_product_flash_attention(*padded, dropout_p, is_causal, False, scale=scale)[0]
            return out[..., :size] if size % 8 else out
        if use_efficient(gpu, query, key, value):
            mask = _expanded(_additive(attn_mask, query), query, key)
            kernel: Any = aten._scaled_dot_product_efficient_attention
            out, *_ = kernel(query, key, value, mask, grad, dropout_p, is_causal, scale=scale)
            return out
    return _math(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def flash_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """`flash_attn.flash_attn_func`: the kernel that PyTorch has from there, whatever it is built with.

    Queries, keys and values are [batch, tokens, heads, head size] in 16 bit; the rest decides what is computed
    and not what is allocated.
    """
    del window_size, softcap, deterministic
    size = query.shape[-1]
    q, k, v = (torch.nn.functional.pad(t, (0, -size % 8)) if size % 8 else t for t in (query, key, value))
    scale = softmax_scale if softmax_scale is not None else 1 / math.sqrt(size)
    out: Tensor = aten._scaled_dot_product_flash_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), dropout_p, causal, False, scale=scale
    )[0]
    return out[..., :size].transpose(1, 2)


def _additive(mask: Tensor | None, query: Tensor) -> Tensor | None:
    """A boolean mask as numbers to add, by `convert_boolean_attn_mask`."""
    if mask is None or mask.dtype is not torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -math.inf)


def _expanded(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """`preprocess_mask`: the kernel wants rows aligned to 16 elements."""
    if mask is None:
        return None
    if mask.shape[-1] % 16:
        mask = torch.nn.functional.pad(mask, (0, 16 - mask.shape[-1] % 16))[..., : mask.shape[-1]]
    return mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])


def _math(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool,
    scale: float | None, gqa: bool,
) -> Tensor:  # fmt: skip
    """`_scaled_dot_product_attention_math`: written out, since subclasses take another path through it."""
    origin = query.dtype
    if origin in HALF:
        query, key, value = query.float(), key.float(), value.float()
    if gqa:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    factor = math.sqrt(scale if scale is not None else 1 / math.sqrt(query.shape[-1]))
    if causal:
        mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    mask = _additive(mask, query)
    query = query * factor
    scores = torch.matmul(query, key.transpose(-2, -1) * factor)
    if mask is not None:
        scores.add_(mask)
    scores = aten._safe_softmax(scores, -1)
    if dropout > 0:
        scores = torch.dropout(scores, dropout, True)
    return torch.matmul(scores, value).to(origin)


# --- what the kernels allocate ------------------------------------------------


def cudnn_forward(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """Seed, offset, output, log-sum-exp; a workspace of 256 bytes."""
    empty = tracker.cached(aten.empty.memory_format)
    seed, offset = (empty((), dtype=torch.int64, device=args[0].device) for _ in range(2))
    out = func(*args, **kwargs)
    for tensor in (seed, offset, out[0], out[1]):
        tracker.see(tensor)
    tracker.scratch(256)
    return (*out[:6], seed, offset, out[8])


def cudnn_backward(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """Gradients; a workspace with the query's gradient in float32 and a row sum."""
    _grad_out, query, key = args[:3]
    grads = func(*args, **kwargs)
    for tensor in grads:
        tracker.see(tensor)
    batch, heads, length, size = query.shape
    expanded = 2 * batch * heads * key.shape[2] * size * query.element_size() if key.shape[1] != heads else 0
    tracker.scratch(batch * heads * length * (size + 1) * 4 + expanded + 256)
    return grads


def flash_backward(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """Gradients, expanded ones for grouped queries, row sums and the query's gradient in float32."""
    _grad_out, query, key = args[:3]
    grads = func(*args, **kwargs)
    for tensor in grads:
        tracker.see(tensor)
    batch, heads, length, size = query.shape
    rows = -(-length // 128) * 128
    rounded = -(-size // 32) * 32 if size <= 128 else -(-size // 64) * 64
    expanded = batch * key.shape[2] * heads * size * query.element_size() if key.shape[1] != heads else 0
    tracker.scratch(batch * heads * rows * 4, batch * rows * heads * rounded * 4, expanded, expanded)
    return grads


def efficient_forward(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """Output and log-sum-exp; seed and offset stay on the host outside of CUDA graphs."""
    out, log_sum_exp, *_ = func(*args, **kwargs)
    empty = tracker.cached(aten.empty.memory_format)
    return out, log_sum_exp, *(empty([], dtype=torch.int64, device=torch.device("cpu")) for _ in range(2))


def efficient_backward(tracker: FakeCuda, func: Any, args: Any, kwargs: Any) -> Any:
    """Gradients; grad·out in float32 and its row sums, twice; a workspace of blocks of the query's gradient.

    `GradQTempStorage` of `mem_eff_attention/kernel_backward.h`: 64 rows and 16 bytes each.
    """
    grads = func(*args, **kwargs)
    for tensor in grads:
        if isinstance(tensor, Tensor):
            tracker.see(tensor)
    batch, heads, length, size = args[1].shape
    product, sums = args[1].numel() * 4, batch * heads * length * 4
    held = [tracker.allocate(bytes_) for bytes_ in (product, sums, sums)]
    tracker.release(held[1])
    tracker.release(held[0])
    width = next((w for w in (32, 64, 96, 128) if size <= w), -(-size // 8) * 8)
    workspace = tracker.allocate(batch * heads * -(-length // 64) * (64 * width * 4 + 16))
    tracker.release(held[2])
    tracker.release(workspace)
    return grads


KERNELS = {
    aten._scaled_dot_product_cudnn_attention.default: cudnn_forward,
    aten._scaled_dot_product_cudnn_attention_backward.default: cudnn_backward,
    aten._scaled_dot_product_flash_attention_backward.default: flash_backward,
    aten._scaled_dot_product_efficient_attention.default: efficient_forward,
    aten._scaled_dot_product_efficient_attention_backward.default: efficient_backward,
}
