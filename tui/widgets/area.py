"""A stacked area over the events of a step, eight levels to a cell."""

from __future__ import annotations

import numpy as np
from rich.style import Style

from ...engine.categories import N_CATEGORIES, Category
from ...engine.ledger import Ints
from ..draw import Row
from ..palette import EIGHTHS_UP, Palette

EIGHTHS = 8


def columns(total: Ints, width: int) -> Ints:
    """The instants that stand for the columns of a chart, shape [width].

    Each column shows the highest instant of its share, so no peak is lost.

    Args:
        total: Bytes at every instant, as in `Ledger.total` or a part of it.
        width: Columns.
    """
    n = len(total)
    edges = np.linspace(0, n, width + 1).astype(np.int64)
    begins = np.minimum(edges[:-1], n - 1)
    ends = np.maximum(edges[1:], begins + 1)
    return np.array([b + int(np.argmax(total[b:e])) for b, e in zip(begins, ends, strict=True)], np.int64)


def column_of(event: int, width: int, n_instants: int) -> int:
    """The column in which an instant lies."""
    edges = np.linspace(0, n_instants, width + 1).astype(np.int64)
    return int(np.clip(np.searchsorted(edges, event, side="right") - 1, 0, width - 1))


def area(curve: Ints, scale: int, height: int, palette: Palette) -> list[Row]:
    """Stacked categories as rows, the topmost first.

    Args:
        curve: Bytes by category and column, shape [N_CATEGORIES, width].
        scale: Bytes at the top.
        height: Rows.
        palette: Colours and letters.
    """
    width = curve.shape[1]
    levels = np.cumsum(curve, axis=0) * (height * EIGHTHS) / max(scale, 1)
    tops = np.minimum(np.rint(levels), height * EIGHTHS).astype(np.int64)
    bottoms = np.vstack((np.zeros((1, width), np.int64), tops[:-1]))
    rows = []
    for cell in range(height - 1, -1, -1):
        low = cell * EIGHTHS
        # Eighths of each category within this row of cells, shape [N_CATEGORIES, width].
        share = np.clip(np.minimum(tops, low + EIGHTHS) - np.maximum(bottoms, low), 0, EIGHTHS)
        rows.append(_row(share, cell, palette))
    return rows


def _row(share: Ints, cell: int, palette: Palette) -> Row:
    row = Row()
    text, style = "", Palette.plain
    largest, filled = share.argmax(axis=0), share.sum(axis=0)
    for x in range(share.shape[1]):
        if not filled[x]:
            glyph, glyph_style = " ", Palette.plain
        else:
            glyph, glyph_style = _cell(share[:, x], int(largest[x]), int(filled[x]), (x + 3 * cell) % 7 == 0, palette)
        if glyph_style is not style:
            row.add(text, style)
            text, style = "", glyph_style
        text += glyph
    return row.add(text, style)


def _cell(share: Ints, largest: int, filled: int, lettered: bool, palette: Palette) -> tuple[str, Style]:
    """One cell: a category, or the two that meet in it."""
    category = Category(largest)
    if palette.ascii or palette.mono:
        visible = 2 * filled >= EIGHTHS
        return (category.info.letter, palette.texture[category]) if visible else (" ", Palette.plain)
    if share[largest] == EIGHTHS:
        return (category.info.letter if lettered else category.info.texture), palette.texture[category]
    if filled < EIGHTHS:
        return EIGHTHS_UP[filled], palette.ink[category]
    # Of three or more in one cell, the two largest are drawn.
    second = int(np.where(np.arange(N_CATEGORIES) == largest, -1, share).argmax())
    lower, upper = sorted((largest, second))
    below = max(1, min(EIGHTHS - 1, round(EIGHTHS * int(share[lower]) / int(share[lower] + share[upper]))))
    return EIGHTHS_UP[below], palette.over(Category(lower), Category(upper))
