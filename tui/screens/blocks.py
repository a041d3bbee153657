"""One live block in a row: what the step and the layers screen list."""

from __future__ import annotations

from collections.abc import Iterable

from ...engine.events import Phase
from ...engine.ledger import Ledger, LiveBlock
from ..draw import Row
from ..palette import Palette
from ..units import UNKNOWN, Unit, shorten, tail

SHAPE_WIDTH = 26

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
"""Data types where there is little room."""


def shape_of(block: LiveBlock) -> str:
    """`[8, 256, 2048] float16`; empty for a block that no operator was seen to return, whose shape is not known."""
    return f"{list(block.shape)} {block.dtype}" if block.dtype else ""


def why_no_shape(ledger: Ledger, blocks: Iterable[LiveBlock]) -> str:
    """The reason why some blocks have no shape; empty: all have, or those that have none are no operator's result.

    In a watched script operators are not looked at: shapes are those of tensors whose owner could be asked.
    """
    unwatched = not len(ledger.trace.made) and any(not block.dtype for block in blocks)
    return "no shape: its operator was not watched" if unwatched else ""


def _fitting(shape: str, cells: int) -> str:
    """A shape and type as they are, or else without spaces: `[8,256,2048] fp16`."""
    if len(shape) <= cells:
        return shape
    sizes, _, dtype = shape.rpartition(" ")
    return shorten(f"{sizes.replace(', ', ',')} {SHORT.get(dtype, dtype)}".strip(), cells)


def made_in(block: LiveBlock) -> str:
    """The phase it was made in, if that was within the step."""
    return "" if block.phase is Phase.IDLE else f"in {block.phase.title}"


def block_row(block: LiveBlock, unit: Unit, palette: Palette, width: int) -> Row:
    """Size, category, name, shape and type, and the phase it was made in."""
    info = block.category.info
    row = Row().right(unit.show(block.bytes), 8).add(" ").add(info.letter, palette.paint[block.category])
    row.add(f" {info.title:<13}", palette.dim)
    shape, made = shape_of(block), made_in(block)
    room = width - row.width - len(made) - 2
    shape = _fitting(shape, min(SHAPE_WIDTH, room // 2))
    row.add(tail(block.name or UNKNOWN, room - len(shape) - 2))
    return row.right(f"{shape}  {made}".rstrip(), width - 1, palette.dim)
