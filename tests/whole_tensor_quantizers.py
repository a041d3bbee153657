"""Whole tensors quantized and restored by each library's own functions, in one call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from bitsandbytes import functional


def _affine(weights: torch.Tensor, group: tuple[int, ...], low: int, high: int, symmetric: bool) -> torch.Tensor:
    ao = pytest.importorskip("torchao.quantization.quant_primitives")
    mapping = ao.MappingType.SYMMETRIC if symmetric else ao.MappingType.ASYMMETRIC
    scale, zero = ao.choose_qparams_affine(weights, mapping, group, torch.int8, low, high)
    codes = ao.quantize_affine(weights, group, scale, zero, torch.int8, low, high)
    restored: torch.Tensor = ao.dequantize_affine(codes, group, scale, zero, torch.int8, low, high)
    return restored


def _four_bit(weights: torch.Tensor, kind: str, block: int = 64, double: bool = False) -> torch.Tensor:
    packed, state = functional.quantize_4bit(weights, blocksize=block, quant_type=kind, compress_statistics=double)
    restored: torch.Tensor = functional.dequantize_4bit(packed, state)
    return restored


def _dynamic(weights: torch.Tensor) -> torch.Tensor:
    codes, state = functional.quantize_blockwise(weights, blocksize=256)
    restored: torch.Tensor = functional.dequantize_blockwise(codes, state)
    return restored


def _llm_int8(weights: torch.Tensor) -> torch.Tensor:
    codes, scales, _ = functional.int8_vectorwise_quant(weights.half())
    restored: torch.Tensor = functional.int8_vectorwise_dequant(codes, scales)
    return restored


def _gguf(weights: torch.Tensor, kind: str) -> torch.Tensor:
    gguf = pytest.importorskip("gguf")
    which = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(weights.numpy(), which), which))


def _fp8(weights: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    return (weights * (448 / largest)).to(torch.float8_e4m3fn).float() * (largest / 448)


AT_ONCE: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "int8-absmax-tensor": lambda w: _affine(w, tuple(w.shape), -127, 127, True),
    "int8-minmax-tensor": lambda w: _affine(w, tuple(w.shape), -128, 127, False),
    "int8-absmax-row": lambda w: _affine(w, (1, w.shape[1]), -127, 127, True),
    "int8-absmax-block64": lambda w: _affine(w, (1, 64), -127, 127, True),
    "int8-dynamic-block256": _dynamic,
    "llm-int8": _llm_int8,
    "fp8-e4m3-tensor": lambda w: _fp8(w, w.abs().max()),
    "fp8-e4m3-row": lambda w: _fp8(w, w.abs().amax(1, keepdim=True)),
    "fp4": lambda w: _four_bit(w, "fp4"),
    "nf4-block128": lambda w: _four_bit(w, "nf4", 128),
    "nf4": lambda w: _four_bit(w, "nf4"),
    "nf4-block32": lambda w: _four_bit(w, "nf4", 32),
    "nf4-double": lambda w: _four_bit(w, "nf4", double=True),
    "int4-affine-block128": lambda w: _affine(w, (1, 128), -8, 7, False),
    "int4-affine-block64": lambda w: _affine(w, (1, 64), -8, 7, False),
    "int4-affine-block32": lambda w: _affine(w, (1, 32), -8, 7, False),
    "gguf-q8_0": lambda w: _gguf(w, "Q8_0"),
    "gguf-q4_0": lambda w: _gguf(w, "Q4_0"),
}
"""Every scheme whose library quantizes a whole tensor in one call: all but the quantiles, which none has any more."""
