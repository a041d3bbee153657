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

    bitsandbytes scales a block by its largest weight. A column is added that
    holds the tensor's, so that all blocks have that scale.
    """
    import torch

    from ..blockwise_8bit import quantize_blockwise

    middles = (torch.arange(LEVELS) + 0.5) / LEVELS
    levels = piece.ordered[(middles * len(piece.ordered)).long()]
    largest = piece.bounds.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
    values = torch.cat([piece.values, largest.expand(len(piece.values), 1)], 1)
    codes, _ = quantize_blockwise(values, code=levels / largest, blocksize=values.shape[1])
    codes = codes[:, :-1].contiguous()
    return Quantized(codes, levels[codes.int()])


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
