"""fp8, by torch's own conversion, which is what torchao's float8 training rounds with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..scheme import Quantized, Scheme

if TYPE_CHECKING:
    from ..piece import Piece

SOURCE = "https://arxiv.org/abs/2209.05433"
SIGN, LARGEST = 0x80, 0x7E
"""Codes; the two above LARGEST, of either sign, mean NaN and do not occur."""


def _quantize(piece: Piece, by_row: bool) -> Quantized:
    import torch

    kind = torch.float8_e4m3fn
    largest = torch.finfo(kind).max
    values, absmax = piece.by_row() if by_row else (piece.values, piece.bounds.abs().amax(1, keepdim=True))
    scale = largest / absmax.clamp(min=torch.finfo(torch.float32).tiny * largest)
    stored = (values * scale).clamp(-largest, largest).to(kind)
    restored = (stored.float() / scale).reshape(piece.values.shape)
    return Quantized(stored.view(torch.uint8).reshape(-1), restored)


def _scheme(key: str, title: str, order: int, by_row: bool) -> Scheme:
    of = "of the row" if by_row else "of all"
    return Scheme(
        key=key,
        title=title,
        order=order,
        code_bits=8,
        codes=(*range(SIGN + LARGEST, SIGN - 1, -1), *range(LARGEST + 1)),
        formula=f"e4m3 of 448 w / max|w {of}|",
        explanation="A sign, four bits of exponent, three of mantissa: each weight keeps three bits of its own, "
        "however small it is, so an outlier costs the others little. But around the many middling weights even "
        "levels would be finer.",
        source=SOURCE,
        package="torch",
        quantize=lambda piece: _quantize(piece, by_row),
        storage_bytes=lambda rows, columns: rows * columns + 4 * (rows if by_row else 1),
        elementwise=not by_row,
    )


SCHEMES = (
    _scheme("fp8-e4m3-tensor", "fp8 e4m3, tensor", 80, by_row=False),
    _scheme("fp8-e4m3-row", "fp8 e4m3, row", 81, by_row=True),
)
