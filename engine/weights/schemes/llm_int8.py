"""LLM.int8(): how bitsandbytes stores a Linear8bitLt's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..scheme import Quantized, Scheme

if TYPE_CHECKING:
    from ..piece import Piece


def _quantize(piece: Piece) -> Quantized:
    """Quantize by rows in float16.

    A column is added that holds the row's largest weight, so that the scale is that of the whole row.
    """
    import torch
    from bitsandbytes import functional

    values, largest = piece.by_row()
    codes, scales, _ = functional.int8_vectorwise_quant(torch.cat([values, largest], 1).half())
    restored = functional.int8_vectorwise_dequant(codes, scales)[:, :-1]
    return Quantized((codes[:, :-1].to(torch.int16) + 127).to(torch.uint8), restored.reshape(piece.values.shape))


SCHEMES = (
    Scheme(
        key="llm-int8",
        title="LLM.int8(), row",
        order=70,
        code_bits=8,
        codes=range(255),
        formula="q = round(127 w / max|w of the row|)",
        explanation="Weights as int8 absmax by rows. What sets it apart is at run time: columns of the input with an "
        "activation above 6 are multiplied in 16 bit, since those outliers would coarsen the input's own int8.",
        source="https://arxiv.org/abs/2208.07339",
        package="bitsandbytes",
        quantize=_quantize,
        error_follows="row",
        storage_bytes=lambda rows, columns: rows * columns + 4 * rows,
        setting=(("quantization", "int8"),),
    ),
)
