"""Pictures of a tensor under a scheme: its weights over the levels, its codes, every scheme's bits against its SQNR."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from rich.style import Style

from ...engine.weights.report import Fidelity, TensorReport
from ...engine.weights.scheme import Scheme
from ..draw import Row
from ..palette import EIGHTHS_UP, Palette
from ..units import UNKNOWN, shorten, tail

LEFT = 10
"""Cells before a picture."""

DECADES = 6.0
"""Shares that a logarithmic bar spans: an outlier in a million is still to be seen."""

CELL = 4
"""Cells of one scheme in the map of tensors."""

NAMES = 19
"""Cells of a tensor's name beside it, at least."""

POOR_DB, FAIR_DB, GOOD_DB = 15.0, 20.0, 30.0


def _bars(heights: Sequence[float], height: int, style: Style, palette: Palette) -> list[Row]:
    """Columns from 0 to 1, upright; what is more than nothing shows at least an eighth."""
    eighths = [min(8 * height, max(value > 0, round(value * 8 * height))) for value in heights]
    rows = []
    for cell in range(height - 1, -1, -1):
        inside = [max(0, min(8, value - 8 * cell)) for value in eighths]
        text = "".join("#" if part >= 4 or (part and not cell) else " " for part in inside) if palette.ascii else (
            "".join(EIGHTHS_UP[part] for part in inside)
        )  # fmt: skip
        rows.append(Row().to(LEFT).add(text, style))
    return rows


def density(report: TensorReport, fidelity: Fidelity, width: int, height: int, palette: Palette) -> list[Row]:
    """A histogram of the weights, and beneath it the levels that they become.

    A scheme's levels may span a small part of the tensor's range, which a few
    weights stretch: then that part is shown, and how many weights are beyond it.
    """
    columns = width - LEFT - 2
    values = [value for value in fidelity.level_values if value is not None]
    edge = 1.25 * max((abs(value) for value in values), default=0.0)
    low, high = max(report.low, -edge), min(report.high, edge)
    if not high > low:
        return [Row().to(LEFT).add("every weight is 0", palette.dim)]
    shares, beyond = _columns_of(report, low, high, columns)
    logs = [1 + math.log10(share) / DECADES if share > 10**-DECADES else (share > 0) * 1e-9 for share in shares]
    rows = _bars(logs, height - 2, palette.accent, palette)
    _label(rows, 0, "weights")
    _label(rows, 1, "log scale", palette)
    marks = [" "] * columns
    for value in values:
        marks[_column(value, low, high, columns)] = "|"
    rows.append(Row().add(f" {'levels':<{LEFT - 1}}").add("".join(marks), palette.busy))
    rows.append(_axis(low, high, columns, beyond, palette))
    return rows


def _columns_of(report: TensorReport, low: float, high: float, columns: int) -> tuple[list[float], float]:
    """Shares of the weights in columns from low to high, and of those beyond."""
    edges = np.linspace(report.low, report.high, len(report.density) + 1)
    below = np.concatenate([[0.0], np.cumsum(report.density)])
    found = np.diff(np.interp(np.linspace(low, high, columns + 1), edges, below))
    return found.tolist(), max(0.0, float(below[-1] - found.sum()))


def _column(value: float, low: float, high: float, columns: int) -> int:
    return min(max(int((value - low) / (high - low) * columns), 0), columns - 1)


def _axis(low: float, high: float, columns: int, beyond: float, palette: Palette) -> Row:
    left, right = f"{low:.3g}", f"{high:.3g}"
    if beyond > 10**-DECADES:
        right = f"{100 * beyond:.2g}% beyond · {right}"
    row = Row().to(LEFT).add(left, palette.dim)
    zero = LEFT + _column(0.0, low, high, columns)
    if row.width < zero < LEFT + columns - len(right) - 1:
        row.to(zero).add("0", palette.dim)
    return row.right(right, LEFT + columns, palette.dim)


def codes(scheme: Scheme, fidelity: Fidelity, width: int, height: int, palette: Palette) -> list[Row]:
    """A histogram of the codes; were all used alike, no bit would be wasted."""
    columns = width - LEFT - 2
    levels = len(fidelity.shares)
    each = max(1, columns // levels)
    used = min(columns, each * levels)
    grouped = [0.0] * used
    for number, share in enumerate(fidelity.shares):
        if each > 1:
            grouped[number * each : (number + 1) * each - 1] = [share] * (each - 1)
        else:
            grouped[number * used // levels] += share
    top = max(grouped, default=0.0) or 1.0
    rows = _bars([share / top for share in grouped], height - 1, palette.accent, palette)
    _label(rows, 0, "codes")
    text = (
        f"{fidelity.levels_used} of {levels} used, entropy {fidelity.entropy_bits:.2f} of {scheme.code_bits} bits: "
        f"{fidelity.wasted_bits:.2f} wasted"
    )
    return [*rows, Row().to(LEFT).add(shorten(text, columns), palette.dim)]


class Point(NamedTuple):
    """A scheme in the plane: what it costs, and what it keeps."""

    letter: str
    bits: float
    sqnr_db: float


def bits_against_sqnr(points: Sequence[Point], chosen: str, width: int, height: int, palette: Palette) -> list[Row]:
    """Every scheme by its letter: bits a weight to the right, SQNR upwards."""
    columns, lines = width - LEFT - 2, height - 1
    if not points:
        return []
    bottom, top = min(p.sqnr_db for p in points), max(p.sqnr_db for p in points)
    left, right = min(p.bits for p in points), max(p.bits for p in points)
    cells: dict[tuple[int, int], str] = {}
    for point in sorted(points, key=lambda p: p.letter != chosen):
        y = round((top - point.sqnr_db) / ((top - bottom) or 1) * (lines - 1))
        x = round((point.bits - left) / ((right - left) or 1) * (columns - 1))
        while (x, y) in cells:  # beside those that are there already
            x = x + 1 if x + 1 < columns else 0
        cells[x, y] = point.letter
    rows = []
    for y in range(lines):
        row = Row().right({0: f"{top:.1f} dB", lines - 1: f"{bottom:.1f} dB"}.get(y, ""), LEFT - 1, palette.dim)
        for x in sorted(x for x, line in cells if line == y):
            letter = cells[x, y]
            row.to(LEFT + x).add(letter, palette.cursor if letter == chosen else palette.accent)
        rows.append(row)
    axis = Row().to(LEFT).add(f"{left:.2f} bits a weight", palette.dim)
    return [*rows, axis.right(f"{right:.2f}", LEFT + columns, palette.dim)]


def tensor_map(
    reports: Sequence[TensorReport],
    schemes: Mapping[str, Scheme],
    chosen: tuple[str, str],
    width: int,
    palette: Palette,
) -> list[Row]:
    """Tensors by schemes, coloured by SQNR in dB.

    Args:
        reports: In the order they are listed.
        schemes: By the letter above its column.
        chosen: Name of the tensor, key of the scheme.
        width: Of the rows.
        palette: Colours.
    """
    fitting = [*schemes.items()][: (width - NAMES) // CELL]
    names = width - 1 - CELL * len(fitting)
    head = Row().add(" SQNR in dB by scheme", palette.dim).to(names)
    for letter, scheme in fitting:
        head.add(" " * (CELL - 1)).add(letter, palette.cursor if scheme.key == chosen[1] else palette.dim)
    rows = [head]
    for report in reports:
        here = report.name == chosen[0]
        row = Row().add(f" {brief(report.name, names - 2):<{names - 1}}", palette.cursor if here else palette.plain)
        for _, scheme in fitting:
            found = report.schemes.get(scheme.key)
            db = found.sqnr_db if found is not None else None
            row.add(f"{UNKNOWN if db is None else f'{db:.0f}':>{CELL}}", rated(db, palette))
        rows.append(row)
    return rows


def brief(name: str, width: int) -> str:
    """A tensor's path, or the number of its layer and the end of it."""
    path = name.removesuffix(".weight")
    if len(path) <= width:
        return path
    number = next((part for part in path.split(".") if part.isdigit()), "")
    rest = path.split(f".{number}.")[-1] if number else path
    end = tail(rest, width - len(number) - 1).lstrip("….")
    return f"{number}.{end}" if number else tail(path, width)


def rated(sqnr_db: float | None, palette: Palette) -> Style:
    """The style of an SQNR: poor, middling, good."""
    if sqnr_db is None:
        return palette.dim
    if sqnr_db < POOR_DB:
        return palette.bad
    return palette.busy if sqnr_db < FAIR_DB else palette.good if sqnr_db >= GOOD_DB else palette.plain


def _label(rows: list[Row], at: int, text: str, palette: Palette | None = None) -> None:
    """Put a word before a row of a picture."""
    if at < len(rows):
        bar = rows[at].spans[1:]
        rows[at] = Row().add(f" {text}", palette.dim if palette else Palette.plain).to(LEFT)
        for span in bar:
            rows[at].add(*span)
