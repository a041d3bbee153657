"""Q8_0 and Q4_0: how llama.cpp's files store weights, by its own Python package."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..scheme import Quantized, Scheme

if TYPE_CHECKING:
    from ..piece import Piece

BLOCK = 32
SOURCE = "https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/quants.py"


def _quantize(piece: Piece, kind: str) -> Quantized:
    import numpy as np
    import torch
    from gguf import GGMLQuantizationType, quants

    which = GGMLQuantizationType[kind]
    # A block whose largest weight is 0, or whose scale is beyond float16: handled there, not worth a warning.
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        stored = quants.quantize(piece.values.numpy().reshape(1, -1), which)  # it works row by row, 16 at a time
        restored = quants.dequantize(stored, which)
    blocks = stored.reshape(piece.values.numel() // BLOCK, -1)
    packed, ascending = blocks[:, 2:], None  # after the scale in float16
    if kind == "Q8_0":
        codes = packed.view(np.int8).astype(np.int16) + 127
    else:
        codes = np.stack([packed & 15, packed >> 4], 1)  # a byte is of one weight of either half
        # The scale is negative where the largest weight is positive: then the lowest code is the highest level.
        mirrored = np.ascontiguousarray(blocks[:, :2]).view(np.float16) < 0
        ascending = np.where(mirrored, -restored.reshape(-1, BLOCK), restored.reshape(-1, BLOCK))
    return Quantized(
        torch.from_numpy(codes.astype(np.uint8).reshape(-1)),
        torch.from_numpy(restored.reshape(piece.values.shape)),
        ascending=None if ascending is None else torch.from_numpy(ascending.reshape(piece.values.shape)),
    )


def _unsuited(_rows: int, columns: int) -> str | None:
    return f"rows of {columns} are no multiple of {BLOCK}" if columns % BLOCK else None


SCHEMES = (
    Scheme(
        key="gguf-q8_0",
        title="GGUF Q8_0",
        order=130,
        code_bits=8,
        codes=range(255),
        formula="q = round(127 w / max|w of 32|)",
        explanation="Absmax in blocks of 32 with the scale in float16: 34 bytes to 32 weights, 8.5 bits each. As good "
        "as 8 bits get with even levels.",
        source=SOURCE,
        package="gguf",
        quantize=lambda piece: _quantize(piece, "Q8_0"),
        storage_bytes=lambda rows, columns: rows * columns // BLOCK * 34,
        unsuited=_unsuited,
    ),
    Scheme(
        key="gguf-q4_0",
        title="GGUF Q4_0",
        order=131,
        code_bits=4,
        codes=range(16),
        formula="q = round(8 + w / d), d = -(the largest) / 8",
        explanation="Sixteen even levels in blocks of 32, scaled so that the weight of largest magnitude falls on the "
        "outermost level, -8, with its sign: no level is wasted. 18 bytes to 32 weights, 4.5 bits each.",
        source=SOURCE,
        package="gguf",
        quantize=lambda piece: _quantize(piece, "Q4_0"),
        storage_bytes=lambda rows, columns: rows * columns // BLOCK * 18,
        unsuited=_unsuited,
    ),
)
