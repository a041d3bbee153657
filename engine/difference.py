"""The difference of two peaks, by category, made of named terms that all add up to the byte.

It is the same for two runs and for a run and its prediction, and takes bytes held
by category and owner from a ledger or from a document alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from .categories import Category
from .ledger import Ledger
from .module_names import NAMES, strip_wrappers

NAMED_TERMS = 5
"""So many terms of a category have their names, the largest ones; the others are one sum."""

_NUMBER = re.compile(r"\.\d+(?=\.|$)")

Owned = dict[Category, dict[str, int]]
"""Bytes by category and owner; nothing in it is 0."""


@lru_cache(NAMES)
def owner_kind(name: str) -> str:
    """An owner without its place among repeated layers, which do the same.

    `gpt_neox.layers.3.mlp.dense.weight` -> `gpt_neox.layers.*.mlp.dense.weight`
    """
    return _NUMBER.sub(".*", strip_wrappers(name))


def owned(ledger: Ledger, event: int) -> Owned:
    """Bytes held after an event, by category and owner; they sum to the ledger's composition there."""
    held: Owned = {}
    for category in Category:
        kinds: dict[str, int] = {}
        for name, size in ledger.by_name(event, category).items():
            kind = owner_kind(name)
            kinds[kind] = kinds.get(kind, 0) + size
        if kinds:
            held[category] = kinds
    return held


def from_document(peak: Mapping[str, Any]) -> Owned:
    """Bytes held at the peak, read from a document's `peak`."""
    categories = {category.key: category for category in Category}
    return {categories[key]: dict(kinds) for key, kinds in peak["by_owner"].items()}


class Term(NamedTuple):
    """A named part of a difference.

    Attributes:
        name: The owner; empty: the model itself. Of several owners it is `others`.
        base_bytes: Held in the run that is compared with.
        bytes: Held in the other.
        owners: How many are summed; 1 for a term with a name of its own.
    """

    name: str
    base_bytes: int
    bytes: int
    owners: int = 1

    @property
    def difference_bytes(self) -> int:
        """Held beyond the base; negative: less."""
        return self.bytes - self.base_bytes


class Part(NamedTuple):
    """The difference of one category.

    Attributes:
        terms: Largest difference first, then the sum of the others; their
            differences add up to the category's. Empty where no owner differs.
    """

    category: Category
    base_bytes: int
    bytes: int
    terms: tuple[Term, ...]

    @property
    def difference_bytes(self) -> int:
        """Held beyond the base; negative: less."""
        return self.bytes - self.base_bytes


def difference(base: Owned, other: Owned, named: int = NAMED_TERMS) -> list[Part]:
    """Bytes held beyond a base, by category and by owner.

    Args:
        base: What is compared with: the prediction, where a measured run is.
        other: What is compared.
        named: How many terms of a category have names.

    Returns:
        Every category that holds anything in one of them. Terms add up to
        their category, categories to the difference of the totals.
    """
    parts = []
    for category in Category:
        before, after = base.get(category, {}), other.get(category, {})
        if before or after:
            parts.append(Part(category, sum(before.values()), sum(after.values()), _terms(before, after, named)))
    return parts


def _terms(before: Mapping[str, int], after: Mapping[str, int], named: int) -> tuple[Term, ...]:
    """Terms for the owners that differ, the largest first; a single one left over keeps its name."""
    found = [Term(name, before.get(name, 0), after.get(name, 0)) for name in dict.fromkeys((*before, *after))]
    found = sorted((term for term in found if term.difference_bytes), key=lambda t: (-abs(t.difference_bytes), t.name))
    if len(found) <= named + 1:
        return tuple(found)
    rest = found[named:]
    others = Term("others", sum(t.base_bytes for t in rest), sum(t.bytes for t in rest), len(rest))
    return (*found[:named], others)


def compare(predicted: Mapping[str, Any], measured: Mapping[str, Any]) -> dict[str, Any]:
    """The difference of two documents of runs at their peaks, as a document.

    Args:
        predicted: A document of `run`, of a run that has not happened.
        measured: Likewise, of the same run as it was.

    Returns:
        Whole bytes, measured minus predicted; and where both peaks are, since
        that need not be the same place.
    """
    parts = difference(from_document(predicted["peak"]), from_document(measured["peak"]))
    return {
        "bytes": measured["peak"]["allocated_bytes"] - predicted["peak"]["allocated_bytes"],
        "predicted_peak": _place(predicted["peak"]),
        "measured_peak": _place(measured["peak"]),
        "by_category": {
            part.category.key: {
                "predicted_bytes": part.base_bytes,
                "measured_bytes": part.bytes,
                "bytes": part.difference_bytes,
                "terms": [
                    {"name": term.name, "bytes": term.difference_bytes, "owners": term.owners} for term in part.terms
                ],
            }
            for part in parts
        },
    }


def _place(peak: Mapping[str, Any]) -> dict[str, Any]:
    return {key: peak[key] for key in ("allocated_bytes", "step", "phase", "micro_batch", "module")}
