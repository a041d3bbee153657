"""A few runs in which every pair of variants that can be had together is together at least once.

Pairwise testing: with some twenty techniques the pairs are a thousand, the runs that
cover them a tenth of that.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Settings = dict[str, Any]


def covering(
    groups: Sequence[Sequence[Settings]],
    possible: Callable[[Settings], bool],
    wanted: Callable[[Settings], bool] = lambda _: True,
) -> list[Settings]:
    """Runs that between them have every possible pair of variants of different groups.

    Args:
        groups: Variants; a run has at most one of each group.
        possible: Whether settings can be had together.
        wanted: Of the possible pairs, which have to be covered.

    Returns:
        Settings of each run, the same every time.
    """
    variants = [(number, variant) for number, group in enumerate(groups) for variant in group]
    allowed = {
        (i, j): both
        for (i, (g, a)), (j, (h, b)) in itertools.combinations(enumerate(variants), 2)
        if g != h and (both := merged(a, b)) is not None and possible(both)
    }
    missing = {pair for pair, both in allowed.items() if wanted(both)}
    rows: list[Settings] = []
    while missing:
        row = list(min(missing))
        settings = allowed[row[0], row[1]]
        while True:
            best, larger = _extended(row, settings, variants, allowed, missing, possible)
            if larger is None:
                break
            row, settings = [*row, best], larger
        missing -= {tuple(sorted(pair)) for pair in itertools.combinations(row, 2)}  # type: ignore[arg-type]
        rows.append(settings)
    return rows


def _extended(
    row: list[int],
    settings: Settings,
    variants: Sequence[tuple[int, Settings]],
    allowed: Mapping[tuple[int, int], Settings],
    missing: set[tuple[int, int]],
    possible: Callable[[Settings], bool],
) -> tuple[int, Settings | None]:
    """The variant that covers most of what is missing, and the row with it; None: there is none."""
    gains = []
    for index in range(len(variants)):
        pairs = [(min(index, other), max(index, other)) for other in row]
        if index not in row and all(pair in allowed for pair in pairs):
            gains.append((sum(pair in missing for pair in pairs), -index))
    for gain, index in sorted(gains, reverse=True):
        larger = merged(settings, variants[-index][1]) if gain else None
        if larger is not None and possible(larger):
            return -index, larger
    return 0, None


def merged(a: Settings, b: Settings) -> Settings | None:
    """Both at once; None: they want contrary things."""
    return None if any(a[name] != b[name] for name in a.keys() & b.keys()) else a | b
