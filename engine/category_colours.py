"""The colours of the categories on dark and on light, the same in the terminal and on a page.

Searched for so that neighbours stay apart for readers with protanopia and
deuteranopia too, and legible on every background (tests/test_themes.py).
"""

from __future__ import annotations

from .events import Category


def by_category(*values: str) -> dict[Category, str]:
    """A value for each category, in their order."""
    return dict(zip(Category, values, strict=True))


# P B G O U A R K L I T C W H s ?
DARK = by_category(
    "#7199fe", "#bbe8fb", "#fec965", "#cdc4fe", "#ffff33", "#bffee6", "#a3951d", "#3d9bd4",
    "#ec968d", "#aaf2b3", "#ec60c7", "#d4ff8c", "#d6c5a1", "#9cbc00", "#989292", "#fa5cf8",
)  # fmt: skip

LIGHT = by_category(
    "#3e4ffe", "#416698", "#9e5712", "#7306ad", "#593e49", "#0d7677", "#734d0c", "#073c60",
    "#200000", "#130099", "#50073d", "#2b2bd9", "#553f01", "#000079", "#1e191b", "#ca1779",
)  # fmt: skip
