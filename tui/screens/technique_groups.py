"""The rows of the techniques screen's list: settings under their group, and groups folded that there is no room for."""

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
    """The rows of a list: as many groups open as there is room for, the selected line's before all others.

    Args:
        groups: Of each line, lines of one group together.
        selected: The line whose group is open in any case.
        room: Rows there are; only the last, shortest arrangement may have more.
    """
    names, opened = list(dict.fromkeys(groups)), {groups[selected]}
    settings = {name: [ListRow(Kind.SETTING, name, i) for i, of in enumerate(groups) if of == name] for name in names}
    room_left = room - len(names) - len(settings[groups[selected]])
    if room_left < 0:
        return [ListRow(Kind.TABS, groups[selected]), *settings[groups[selected]]]
    for name in names:  # from the top, as many as there is room for
        if name not in opened and len(settings[name]) <= room_left:
            opened.add(name)
            room_left -= len(settings[name])
    rows: list[ListRow] = []
    for name in names:
        rows += [ListRow(Kind.HEADING, name), *settings[name]] if name in opened else [ListRow(Kind.FOLDED, name)]
    return rows


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
