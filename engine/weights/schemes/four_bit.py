"""NF4 and FP4: how bitsandbytes stores a Linear4bit's weights, with and without double quantization."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ..scheme import Quantized, Scheme

if TYPE_CHECKING:
    import torch

    from ..piece import Piece

BLOCK = 64
NESTED_BLOCK = 256
TABLE_BYTES, NESTED_TABLE_BYTES, OFFSET_BYTES = 16 * 4, 256 * 4, 4
"""Bytes of the levels' tables, which bitsandbytes keeps with each tensor, and of the scales' mean."""

FP4_ORDER = (11, 10, 13, 12, 15, 14, 9, 8, 0, 1, 6, 7, 4, 5, 2, 3)
"""Codes in the order of their values, from -1 to 1: the bits are a sign, an exponent and a mantissa."""

QLORA = "https://arxiv.org/abs/2305.14314"


def _packed(piece: Piece, kind: str, block: int) -> tuple[torch.Tensor, Any]:
    from bitsandbytes import functional

    def quantize(piece: Piece) -> tuple[torch.Tensor, Any]:
        packed, state = functional.quantize_4bit(piece.values, blocksize=block, quant_type=kind)
        return packed, state

    return piece.once(f"{kind}-{block}", quantize)


def _codes(packed: torch.Tensor, count: int) -> torch.Tensor:
    """Two to a byte, the first in the upper half."""
    import torch

    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], 1).reshape(-1)[:count]


def _single(piece: Piece, kind: str, block: int) -> Quantized:
    from bitsandbytes import functional

    packed, state = _packed(piece, kind, block)
    restored = functional.dequantize_4bit(packed, state).reshape(piece.values.shape)
    return Quantized(_codes(packed, piece.values.numel()), restored)


def _double(piece: Piece, kind: str) -> Quantized:
    """Quantize as `quantize_4bit(compress_statistics=True)` does, with the mean of all the tensor's scales."""
    from bitsandbytes import functional

    from ..blockwise_8bit import quantize_blockwise

    packed, state = _packed(piece, kind, BLOCK)
    nested, nested_state = quantize_blockwise(state.absmax - piece.absmax_mean, None, NESTED_BLOCK)
    absmax = functional.dequantize_blockwise(nested, nested_state) + piece.absmax_mean
    stored = functional.QuantState(
        absmax, shape=state.shape, code=state.code, blocksize=BLOCK, quant_type=kind, dtype=state.dtype
    )
    restored = functional.dequantize_4bit(packed, stored).reshape(piece.values.shape)
    return Quantized(_codes(packed, piece.values.numel()), restored, (state.absmax, absmax))


def _single_bytes(rows: int, columns: int, block: int) -> int:
    count = rows * columns
    return math.ceil(count / 2) + 4 * math.ceil(count / block) + TABLE_BYTES


def _double_bytes(rows: int, columns: int) -> int:
    scales = math.ceil(rows * columns / BLOCK)
    nested = scales + 4 * math.ceil(scales / NESTED_BLOCK)
    return math.ceil(rows * columns / 2) + nested + TABLE_BYTES + NESTED_TABLE_BYTES + OFFSET_BYTES


def _nf4(block: int, key: str, order: int) -> Scheme:
    return Scheme(
        key=key,
        title=f"nf4, block {block}",
        order=order,
        code_bits=4,
        codes=range(16),
        formula=f"level nearest to w / max|w of {block}|",
        explanation="Sixteen levels at the quantiles of a normal distribution, one of them 0, times the block's "
        "largest magnitude. Trained weights are nearly normal, so the levels are used nearly alike: entropy "
        "close to 4 bits.",
        source=QLORA,
        package="bitsandbytes",
        quantize=lambda piece: _single(piece, "nf4", block),
        storage_bytes=lambda rows, columns: _single_bytes(rows, columns, block),
        setting=(("quantization", "nf4"), ("quantization.double", False)) if block == BLOCK else (),
        usual=block == BLOCK,
    )


SCHEMES = (
    Scheme(
        key="fp4",
        title="fp4, block 64",
        order=90,
        code_bits=4,
        codes=FP4_ORDER,
        formula="± {0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1} max|w of 64|",
        explanation="A sign, two bits of exponent, one of mantissa, times the block's largest magnitude. Two of its "
        "codes mean 0, and its levels crowd at the ends rather than where normal weights are: worse than NF4 at "
        "the same size.",
        source=QLORA,
        package="bitsandbytes",
        quantize=lambda piece: _single(piece, "fp4", BLOCK),
        storage_bytes=lambda rows, columns: _single_bytes(rows, columns, BLOCK),
        setting=(("quantization", "fp4"), ("quantization.double", False)),
    ),
    _nf4(128, "nf4-block128", 99),
    _nf4(64, "nf4", 100),
    _nf4(32, "nf4-block32", 102),
    Scheme(
        key="nf4-double",
        title="nf4, double quant",
        order=101,
        code_bits=4,
        codes=range(16),
        formula="NF4; scale = 8-bit code × max of 256 scales + their mean",
        explanation="NF4 whose scales are quantized as well: 8 bits each instead of 32, by the dynamic map in blocks "
        "of 256. Saves 0.37 bits a weight: 4.13 instead of 4.5. The scales' own error is far below NF4's.",
        source=QLORA,
        package="bitsandbytes",
        quantize=lambda piece: _double(piece, "nf4"),
        storage_bytes=_double_bytes,
        setting=(("quantization", "nf4"), ("quantization.double", True)),
    ),
)
