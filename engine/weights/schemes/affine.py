"""Evenly spaced levels, by torchao: min-max and absmax, of a tensor, its rows or blocks of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..scheme import Quantized, Scheme

if TYPE_CHECKING:
    import torch

    from ..piece import Piece

SOURCE = "https://docs.pytorch.org/ao/stable/"
SCALE_BYTES = 4
ZERO_POINT_BYTES = 1


def _library() -> Any:
    from torchao.quantization import quant_primitives

    return quant_primitives


def _quantize(values: torch.Tensor, bounds: torch.Tensor, low: int, high: int, asymmetric: bool) -> Quantized:
    """Store groups by their bounds.

    Args:
        values: [n, w].
        bounds: Smallest and largest weight of the group each row of values is of: [n, 2], or [1, 2] for one of all.
        low: Lowest code.
        high: Highest code.
        asymmetric: Whether the levels span the bounds, or are symmetric about 0.
    """
    import torch

    ao = _library()
    mapping = ao.MappingType.ASYMMETRIC if asymmetric else ao.MappingType.SYMMETRIC
    scale, zero = ao.choose_qparams_affine(
        bounds, mapping, (1, 2), torch.int8, low, high, eps=torch.finfo(torch.float32).tiny
    )
    group = (1, values.shape[1]) if len(bounds) > 1 or len(values) == 1 else tuple(values.shape)
    codes = ao.quantize_affine(values, group, scale, zero, torch.int8, low, high)
    restored = ao.dequantize_affine(codes, group, scale, zero, torch.int8, low, high)
    return Quantized((codes.to(torch.int16) - low).to(torch.uint8), restored)


def _tensor(piece: Piece, low: int, asymmetric: bool) -> Quantized:
    return _quantize(piece.values, piece.bounds, low, 127, asymmetric)


def _row(piece: Piece) -> Quantized:
    import torch

    values, absmax = piece.by_row()
    found = _quantize(values, torch.cat([-absmax, absmax], 1), -127, 127, asymmetric=False)
    return Quantized(found.codes, found.restored.reshape(piece.values.shape))


def _block(piece: Piece, block: int, low: int, high: int, asymmetric: bool) -> Quantized:
    import torch

    values = piece.values.reshape(-1, block)
    bounds = torch.stack([values.amin(1), values.amax(1)], 1)
    found = _quantize(values, bounds, low, high, asymmetric)
    return Quantized(found.codes, found.restored.reshape(piece.values.shape))


def _in_blocks(block: int) -> Any:
    def unsuited(_rows: int, columns: int) -> str | None:
        return f"rows of {columns} are no multiple of {block}" if columns % block else None

    return unsuited


def _int4(block: int, order: int) -> Scheme:
    return Scheme(
        key=f"int4-affine-block{block}",
        title=f"int4 affine, block {block}",
        order=order,
        code_bits=4,
        codes=range(16),
        formula="q = round(w / s) + z, s = (max - min) / 15",
        explanation="Sixteen evenly spaced levels between the smallest and the largest weight of a block. "
        "A scale and a zero point in bfloat16 cost 32 bits a block. Even levels suit small blocks, whose weights "
        "spread over their range; NF4 wins in larger ones.",
        source=SOURCE,
        package="torchao",
        quantize=lambda piece: _block(piece, block, -8, 7, asymmetric=True),
        storage_bytes=lambda rows, columns: rows * columns // 2 + 4 * (rows * columns // block),
        unsuited=_in_blocks(block),
        usual=block == 64,
    )


SCHEMES = (
    Scheme(
        key="int8-minmax-tensor",
        title="int8 min-max, tensor",
        order=20,
        code_bits=8,
        codes=range(256),
        formula="q = round(w / s) + z, s = (max - min) / 255",
        explanation="256 even levels from the smallest to the largest weight of the tensor. A lopsided tensor loses "
        "nothing, but one outlier stretches every step: most weights then share few levels around 0.",
        source=SOURCE,
        package="torchao",
        quantize=lambda piece: _tensor(piece, -128, asymmetric=True),
        error_follows="nothing",
        elementwise=True,
        storage_bytes=lambda rows, columns: rows * columns + SCALE_BYTES + ZERO_POINT_BYTES,
    ),
    Scheme(
        key="int8-absmax-tensor",
        title="int8 absmax, tensor",
        order=10,
        code_bits=8,
        codes=range(255),
        formula="q = round(127 w / max|w|)",
        explanation="255 even levels, symmetric about 0, the outermost at the largest magnitude of the tensor. "
        "One scale for all: a single outlier makes every step coarse, and the levels between it and the rest "
        "are never used.",
        source=SOURCE,
        package="torchao",
        quantize=lambda piece: _tensor(piece, -127, asymmetric=False),
        error_follows="nothing",
        elementwise=True,
        storage_bytes=lambda rows, columns: rows * columns + SCALE_BYTES,
    ),
    Scheme(
        key="int8-absmax-row",
        title="int8 absmax, row",
        order=40,
        code_bits=8,
        codes=range(255),
        formula="q = round(127 w / max|w of the row|)",
        explanation="A scale for each row of the matrix, that is for each output: an outlier coarsens its own row "
        "and no other. Costs 32 bits a row, nearly nothing.",
        source=SOURCE,
        package="torchao",
        quantize=_row,
        error_follows="row",
        storage_bytes=lambda rows, columns: rows * columns + SCALE_BYTES * rows,
    ),
    Scheme(
        key="int8-absmax-block64",
        title="int8 absmax, block 64",
        order=50,
        code_bits=8,
        codes=range(255),
        formula="q = round(127 w / max|w of 64|)",
        explanation="A scale for each 64 weights: an outlier coarsens its own block and no other, and every block "
        "uses all its levels. Half a bit a weight for the scales.",
        source=SOURCE,
        package="torchao",
        quantize=lambda piece: _block(piece, 64, -127, 127, asymmetric=False),
        storage_bytes=lambda rows, columns: rows * columns + SCALE_BYTES * (rows * columns // 64),
        unsuited=_in_blocks(64),
    ),
    _int4(128, 120),
    _int4(64, 121),
    _int4(32, 122),
)
