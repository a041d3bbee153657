"""Keys and values kept while text is generated: as they come, in tensors as long as they will be, or in 4 bit.

Shapes: B rows, H heads of keys, L tokens, D head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicCache, QuantizedLayer, StaticCache

BITS, GROUP, RESIDUAL = 4, 64, 128
"""transformers' defaults of a quantized cache: numbers that share a scale, and tokens kept as they are."""


def kv_cache(kind: str, architecture: Any, longest: int) -> Cache:
    """An empty cache.

    Args:
        kind: `dynamic`, `static` or `quantized`.
        architecture: The model's transformers configuration.
        longest: Tokens that a static one has room for.
    """
    if kind == "static":
        return StaticCache(config=architecture, max_cache_len=longest)
    if kind == "quantized":
        return Cache(layers=[FourBitLayer() for _ in range(architecture.get_text_config().num_hidden_layers)])
    return DynamicCache(config=architecture)


class FourBitLayer(QuantizedLayer):  # type: ignore[misc]
    """A layer of a quantized cache that needs no other package: 4-bit codes with a scale and an offset a group."""

    def __init__(self) -> None:
        super().__init__(nbits=BITS, q_group_size=GROUP, residual_length=RESIDUAL)

    def _quantize(self, tensor: torch.Tensor, axis: int) -> Any:
        del axis
        groups = tensor.reshape(-1, math.gcd(tensor.shape[-1], GROUP))
        low = groups.amin(1, keepdim=True)
        scale = groups.amax(1, keepdim=True).sub_(low).div_(2**BITS - 1).clamp_(min=1e-6)
        codes = groups.sub(low).div_(scale).round_().to(torch.uint8)
        return codes[:, ::2] | codes[:, 1::2] << BITS, scale, low, tensor.shape

    def _dequantize(self, q_tensor: Any) -> torch.Tensor:
        packed, scale, low, shape = q_tensor
        codes = torch.stack([packed & (2**BITS - 1), packed >> BITS], -1).flatten(1)
        return codes.to(scale.dtype).mul_(scale).add_(low).view(shape)


def grow(cache: Cache, tokens: int) -> None:
    """Have a cache hold so many tokens more, of which nobody knows what they say."""
    for layer in cache.layers:
        if isinstance(layer, FourBitLayer):
            held = layer.keys.shape[-2] if layer.keys.dim() == 4 else 0
            later = min(tokens, RESIDUAL - 1)  # so that the next token fills what is kept as it is
            if later < RESIDUAL - 1 and held + tokens < RESIDUAL:
                later = 0
            for some in (tokens - later, later):
                _update(layer, layer._quantized_keys[-1], some)
        elif hasattr(layer, "max_cache_len"):
            layer.cumulative_length.add_(tokens)
        else:
            _update(layer, layer.keys.shape, tokens)


def _update(layer: Any, shape: torch.Size, tokens: int) -> None:
    batch, heads, _, size = shape
    if tokens:
        keys, values = (
            torch.zeros(batch, heads, tokens, size, dtype=layer.keys.dtype, device=layer.keys.device) for _ in range(2)
        )
        layer.update(keys, values)
