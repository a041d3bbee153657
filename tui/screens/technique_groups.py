"""The rows of the techniques screen's list: every setting under its group, or one group open and the others folded."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

from rich.style import Style

from ..draw import Row
from ..palette import Palette
from ..units import shorten

SHORT = {"memory for time": "memory", "several GPUs": "GPUs"}
"""Names in a row of all groups, where the whole ones are too long."""

NAME_CELLS = 17


class Kind(Enum):
    """The kind of a row of the list."""

    SETTING = 1
    HEADING = 2
    FOLDED = 3
    TABS = 4


class ListRow(NamedTuple):
    """One row of the list.

    Attributes:
        kind: What it is.
        group: Whose setting or name.
        line: Of a setting, the number of its line.
    """

    kind: Kind
    group: str
    line: int = -1


def arranged(groups: Sequence[str], selected: int, room: int) -> list[ListRow]:
    """The rows of a list, as much of it as there is room for at a glance.

    Args:
        groups: Of each line, lines of one group together.
        selected: The line whose group is open where not all can be.
        room: Rows there are; only the last, shortest arrangement may have more.
    """
    names, opened = list(dict.fromkeys(groups)), groups[selected]
    settings = {name: [ListRow(Kind.SETTING, name, i) for i, of in enumerate(groups) if of == name] for name in names}
    whole = [row for name in names for row in (ListRow(Kind.HEADING, name), *settings[name])]
    if len(whole) <= room:
        return whole
    folded: list[ListRow] = []
    for name in names:
        folded += [ListRow(Kind.HEADING, name), *settings[name]] if name == opened else [ListRow(Kind.FOLDED, name)]
    return folded if len(folded) <= room else [ListRow(Kind.TABS, opened), *settings[opened]]


class Told(NamedTuple):
    """One setting in a group's row.

    Attributes:
        text: `checkpointing layers`.
        style: How it is drawn.
        is_default: Whether it may be left out where there is no room.
    """

    text: str
    style: Style
    is_default: bool


def folded_row(name: str, told: Sequence[Told], change: str, edge: int, palette: Palette) -> Row:
    """One group in a row: what is set in it, and what its best change would do.

    Args:
        name: Of the group.
        told: Its settings.
        change: To the predicted peak; empty: none is known.
        edge: Where the row ends, and that.
        palette: Colours.
    """
    row = Row().add(f" {name:<{NAME_CELLS - 1}}", palette.dim)
    room = edge - NAME_CELLS - (len(change) + 1 if change else 0)
    kept = list(told)
    while len(kept) > 1 and sum(len(one.text) + 3 for one in kept) - 3 + 4 * (len(kept) < len(told)) > room:
        spare = [i for i, one in enumerate(kept) if one.is_default]
        del kept[spare[-1] if spare else -1]
    for i, one in enumerate(kept):
        row.add(" · " * (i > 0), palette.dim).add(shorten(one.text, room), one.style)
    if len(kept) < len(told):
        row.add(f" +{len(told) - len(kept)}", palette.dim)
    return row.right(change, edge, palette.dim) if change else row


def tabs_row(names: Sequence[str], opened: str, counts: Sequence[int], palette: Palette) -> Row:
    """All groups in a row: which is open, and in how many settings each differs from the defaults."""
    row = Row()
    for name, count in zip(names, counts, strict=True):
        text = SHORT.get(name, name) + (f" {count}" if count else "")
        row.add(f"[{text}]" if name == opened else f" {text} ", palette.bold if name == opened else palette.dim)
    return row
