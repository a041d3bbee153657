"""The difference of two runs at their peaks in named terms, in whole bytes, so that it can be added up by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.style import Style

from ...engine.difference import Part
from ..draw import PLAIN, Row
from ..layer_table import NO_LAYER
from ..palette import Palette
from ..run_summary import RunSummary
from ..units import tail

FIGURE = 16
"""Cells of a figure."""

ROOMY = 76
"""Columns from which both runs' bytes stand beside their difference."""


def peak_rows(runs: Mapping[str, RunSummary], width: int, palette: Palette) -> list[Row]:
    """The place of each peak, which need not be the same, and the heads of the columns.

    Args:
        runs: The base and the other, by their letters.
        width: Columns of the screen.
        palette: Colours.
    """
    rows = []
    for letter, run in runs.items():
        module = f" of {run.peak_module}" if run.peak_module else ""
        rows.append(Row().add(f" {letter} ", palette.accent).add(f"peak in {run.peak_where}{module}", palette.dim))
    letters = list(runs)
    head = Row().to(_edge(width))
    for text in (*(letters if width >= ROOMY else ()), f"{letters[-1]} - {letters[0]}"):
        head.right(text, head.width + FIGURE, palette.dim)
    return [*rows, head]


def owner_rows(parts: Sequence[Part], marks: Sequence[str], width: int, palette: Palette) -> list[Row]:
    """Every category with the owners that differ, and the sum.

    Args:
        parts: The difference.
        marks: In front of the base's figures and of the other's.
        width: Columns of the screen.
        palette: Colours.
    """

    def row(begin: Row, name: str, base: int, size: int, style: Style = PLAIN) -> Row:
        edge = _edge(width)
        begin.add(tail(name, edge - begin.width - 1), style).to(edge)
        if width >= ROOMY:
            for mark, one in zip(marks, (base, size), strict=True):
                begin.right(f"{mark}{one:,}", begin.width + FIGURE, palette.plain if one else palette.dim)
        signed = palette.good if size < base else palette.busy if size > base else palette.dim
        return begin.right(f"{size - base:+,}" if size != base else "0", begin.width + FIGURE, signed)

    rows = []
    for part in parts:
        info = part.category.info
        letter = Row().add(" ").add(info.letter, palette.paint[part.category]).add(" ")
        rows.append(row(letter, info.title, part.base_bytes, part.bytes))
        for term in part.terms:
            name = f"{term.owners} others" if term.owners > 1 else term.name or NO_LAYER
            rows.append(row(Row().to(5), name, term.base_bytes, term.bytes, palette.dim))
    base, size = (sum(one) for one in zip(*((p.base_bytes, p.bytes) for p in parts), strict=True))
    return [*rows, row(Row().add(" "), "all", base, size, palette.bold)]


def _edge(width: int) -> int:
    """The column at which the figures begin."""
    return width - 1 - FIGURE * (3 if width >= ROOMY else 1)
