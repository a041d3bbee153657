"""Numbers for people: one unit a screen, one width a column, an en dash for what is not known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

UNKNOWN = "–"

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


class Unit(NamedTuple):
    """A unit of bytes for a screen."""

    name: str
    bytes: int
    decimals: int

    def show(self, size: int | None) -> str:
        """A size without the unit's name; an en dash if it is not known."""
        return UNKNOWN if size is None else f"{size / self.bytes:.{self.decimals}f}"

    def full(self, size: int | None) -> str:
        """A size with the unit's name."""
        return UNKNOWN if size is None else f"{self.show(size)} {self.name}"


IN_KIB, IN_MIB, IN_GIB = Unit("KiB", KIB, 1), Unit("MiB", MIB, 1), Unit("GiB", GIB, 2)

SYSTEMS = {
    "GiB": (IN_KIB, IN_MIB, IN_GIB),
    "GB": (Unit("KB", 10**3, 1), Unit("MB", 10**6, 1), Unit("GB", 10**9, 2)),
}
"""By the setting `units`, from the smallest."""


def unit_for(largest_bytes: int, system: str = "GiB") -> Unit:
    """The unit of a list or table whose largest figure is this; its heading names it.

    A larger one from 4 of it on: below, its decimals would hide too much.
    """
    smallest, *larger = SYSTEMS[system]
    return next((unit for unit in reversed(larger) if largest_bytes >= 4 * unit.bytes), smallest)


def difference(size: int | None, base: int | None, unit: Unit) -> str:
    """Signed; 0 without a sign, a dash where one of them is not known."""
    if size is None or base is None:
        return UNKNOWN
    text = f"{(size - base) / unit.bytes:+.{unit.decimals}f}"
    return text.lstrip("+-") if not float(text) else text


def rate(per_second: float | None) -> str:
    """Tokens or rows a second: `2.5`, `987`, `21.8k`, `1.3M`."""
    if per_second is None:
        return UNKNOWN
    for limit, divisor, suffix in ((1e3, 1.0, ""), (1e6, 1e3, "k"), (float("inf"), 1e6, "M")):
        if per_second < limit:
            return f"{per_second / divisor:.{1 if suffix or per_second < 10 else 0}f}{suffix}"
    return UNKNOWN


def duration(seconds: float | None) -> str:
    """A time: `0.4 ms`, `94 ms`, `3.12 s`."""
    if seconds is None:
        return UNKNOWN
    if seconds < 0.01:
        return f"{seconds * 1e3:.1f} ms"
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


def clock(seconds: float) -> str:
    """Time since the engine began: `0:07`, `12:31`, `1:02:09`."""
    whole = int(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def count(number: int | None) -> str:
    """A whole number with thousands separated."""
    return UNKNOWN if number is None else f"{number:,}"


def percent(part: int | None, whole: int) -> str:
    """A share in whole percent: `39%`, `<1%`; nothing for nothing."""
    if not part or not whole:
        return ""
    share = round(100 * part / whole)
    return f"{share}%" if share else "<1%"


def shorten(text: str, width: int) -> str:
    """A text that fits, its end cut off."""
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"[: min(width, 1)]


def whole_parts(parts: Sequence[str], separator: str, width: int, counted: bool = False) -> str:
    """The first of some parts, as many as fit whole; the first in any case, its end cut off if it must be.

    Args:
        parts: The most important first.
        separator: Between two.
        width: Cells.
        counted: Say how many are left out: `B8×S256 lora +2`.
    """
    for n in range(len(parts), 0, -1):
        left_out = f" +{len(parts) - n}" * (counted and n < len(parts))
        text = separator.join(parts[:n]) + left_out
        if len(text) <= width:
            return text
    return shorten(separator.join(parts), width) if parts else ""


def tail(text: str, width: int) -> str:
    """A module's name that fits, its beginning cut off, at a dot if there is one."""
    while len(text) > width and "." in text[1:]:
        text = "…" + text.split(".", 1)[1]
        if len(text) <= width:
            return text
        text = text[1:]
    return text if len(text) <= width else "…"[: min(width, 1)] + text[len(text) - max(width - 1, 0) :]
