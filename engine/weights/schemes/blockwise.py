"""Levels that follow the weights, in 8 bit: quantiles of the tensor, and bitsandbytes' dynamic map."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

from ..scheme import Quantized, Scheme

if TYPE_CHECKING:
    import torch

    from ..piece import Piece

LEVELS = 256
BLOCK = 256


def _quantile(piece: Piece) -> Quantized:
    """A level at the middle of each of 256 equally full bins; what lies beyond the outermost is drawn to it.

    bitsandbytes scales a block by its largest weight. One is added that is as
    large as the tensor's, and all is one block.
    """
    import torch

    from ..blockwise_8bit import quantize_blockwise

    levels, largest = piece.quantiles, piece.bounds.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny)
    values = torch.cat([piece.values.reshape(-1), largest])
    codes = quantize_blockwise(values, code=levels / largest, blocksize=len(values))[0][:-1]
    return Quantized(codes, levels[codes.int()].reshape(piece.values.shape))


@cache
def _dynamic_map() -> torch.Tensor:
    from bitsandbytes.functional import create_dynamic_map

    table: torch.Tensor = create_dynamic_map()
    return table


def _dynamic(piece: Piece) -> Quantized:
    from bitsandbytes import functional

    from ..blockwise_8bit import quantize_blockwise

    codes, state = quantize_blockwise(piece.values, code=_dynamic_map(), blocksize=BLOCK)
    return Quantized(codes, functional.dequantize_blockwise(codes, state))


SCHEMES = (
    Scheme(
        key="int8-quantile-tensor",
        title="int8 quantile, tensor",
        order=30,
        code_bits=8,
        codes=range(LEVELS),
        formula="level i = quantile((i + 1/2) / 256)",
        explanation="Levels at the tensor's own quantiles: each is used by one weight in 256, so no bit is wasted "
        "(entropy 8). But most levels lie where weights are many; the few outliers are drawn to the outermost "
        "level, and they make the error.",
        source="https://arxiv.org/abs/2110.02861",
        package="bitsandbytes",
        quantize=_quantile,
        error_follows="nothing",
        elementwise=True,
        storage_bytes=lambda rows, columns: rows * columns + 4 * LEVELS,
    ),
    Scheme(
        key="int8-dynamic-block256",
        title="int8 dynamic, block 256",
        order=60,
        code_bits=8,
        codes=range(LEVELS),
        formula="level = ± 10^-e × fraction, times max|w of 256|",
        explanation="A code whose leading bits are an exponent: fine levels near 0, coarse ones near the block's "
        "largest weight. Made for optimizer states, which span many magnitudes; on weights even levels in small "
        "blocks do better. It also stores NF4's scales in double quantization.",
        source="https://arxiv.org/abs/2110.02861",
        package="bitsandbytes",
        quantize=_dynamic,
        storage_bytes=lambda rows, columns: rows * columns + 4 * math.ceil(rows * columns / BLOCK) + 4 * LEVELS,
    ),
)
