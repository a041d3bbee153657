"""A strip with a mark for every layer: lit once it has been recomputed."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from itertools import groupby

from ...engine.categories import Category
from ..draw import Row
from ..palette import Palette


def ticks(layers: Sequence[str], lit: AbstractSet[str], latest: AbstractSet[str], width: int, palette: Palette) -> Row:
    """One cell a layer, first to last; several layers to a cell where there is no room.

    Args:
        layers: All of them, in order.
        lit: Recomputed in this micro-batch.
        latest: Of these, the segment just recomputed.
        width: Cells there are.
        palette: Colours.
    """
    row = Row()
    per_cell = -(-len(layers) // max(width, 1)) if layers else 1
    dark, on, newest = (".", "r", "R") if palette.ascii or palette.mono else ("▁", "▅", "█")
    ink = palette.ink[Category.RECOMPUTED]
    cells = [layers[start : start + per_cell] for start in range(0, len(layers), per_cell)]
    marks = "".join(
        newest if not latest.isdisjoint(cell) else on if not lit.isdisjoint(cell) else dark for cell in cells
    )
    for mark, run in groupby(marks):
        row.add("".join(run), palette.dim if mark == dark else ink)
    return row
