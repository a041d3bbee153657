"""The result of `check`: for people, for programs, for a CI server and for a pull request's comment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

from ...engine.categories import Category
from ...engine.difference import Part, difference, from_document
from ..units import GIB, MIB, UNKNOWN, Unit
from ..units import difference as signed
from .wrapping import columns, within

SCHEMA = "gpumem-check/1"
NEW = "new, not in the base"
FIGURE, OVER = 10, "   OVER"
LAYERS = 12
"""So many layers are listed in a comment: those that differ most."""


@dataclass(frozen=True)
class Limits:
    """The memory that a run may take.

    Attributes:
        budget_bytes: The most at its peak; None: as much as it likes.
        max_growth: Share of the base's peak that it may grow by.
        gpu: On which it has to fit; None: on no one.
    """

    budget_bytes: int | None
    max_growth: float
    gpu: str | None = None


@dataclass(frozen=True)
class Checked:
    """A run that was predicted, and what it is held against.

    Attributes:
        name: Of the run.
        document: Of the prediction.
        base: Of the run before; None: there is none.
        limits: Of the run.
        is_new: There are runs before, and this is none of them.
        why_not: The reason why it does not fit; empty: it does.
    """

    name: str
    document: Mapping[str, Any]
    base: Mapping[str, Any] | None
    limits: Limits
    is_new: bool = False
    why_not: str = ""

    @property
    def peak_bytes(self) -> int:
        """The predicted peak."""
        return int(self.document["peak"]["allocated_bytes"])

    @property
    def bound_bytes(self) -> int:
        """The safe bound: a measured peak stays under it."""
        return int(self.document["safe_bound_bytes"])

    @property
    def base_bytes(self) -> int | None:
        """The peak of the base; None: there is no base."""
        return None if self.base is None else int(self.base["peak"]["allocated_bytes"])

    @property
    def growth_bytes(self) -> int:
        """Bytes beyond the base's peak; negative: less. 0 without a base."""
        return 0 if self.base_bytes is None else self.peak_bytes - self.base_bytes

    @property
    def parts(self) -> list[Part]:
        """The difference from the base by category; without a base, everything."""
        before = {} if self.base is None else from_document(self.base["peak"])
        return difference(before, from_document(self.document["peak"]))

    @property
    def layers(self) -> list[tuple[str, int, int]]:
        """Layers that differ from the base, with their bytes before and now, the largest difference first."""
        sizes = [
            {name: sum(held.values()) for name, held in document["peak"]["by_layer"].items()}
            for document in (self.base, self.document)
            if document is not None
        ]
        if len(sizes) < 2:
            return []
        before, now = sizes
        found = [(name, before.get(name, 0), now.get(name, 0)) for name in dict.fromkeys((*now, *before))]
        return sorted((row for row in found if row[1] != row[2]), key=lambda row: -abs(row[2] - row[1]))

    @property
    def violations(self) -> list[str]:
        """A line for every limit that is exceeded."""
        found, budget, base = [], self.limits.budget_bytes, self.base_bytes
        unit = unit_of([self])
        if self.limits.gpu is not None and self.why_not:
            found.append(f"{self.name}: does not fit on {self.limits.gpu}: {self.why_not}")
        if budget is not None and self.bound_bytes > budget:
            over = unit.full(self.bound_bytes - budget)
            found.append(
                f"{self.name}: up to {unit.full(self.bound_bytes)}, {over} over the budget of {unit.full(budget)}"
            )
        if base is not None and self.growth_bytes > base * self.limits.max_growth:
            most = max(self.parts, key=lambda part: part.difference_bytes)
            found.append(
                f"{self.name}: the peak grew by {self.growth_bytes:,} bytes ({_share(self.growth_bytes, base)}), "
                f"more than {100 * self.limits.max_growth:g} %; most of it is {most.category.info.title}"
            )
        return found

    @property
    def verdict(self) -> str:
        """The limits kept or not, in a word or two."""
        if self.violations:
            return "over"
        return NEW if self.is_new else "ok"

    @property
    def notes(self) -> list[str]:
        """Reasons why the figures compared are of unlike things."""
        devices = [(run or {}).get("environment", {}).get("device_name") for run in (self.base, self.document)]
        if None in devices or devices[0] == devices[1]:
            return []
        return [f"the figures before are of {devices[0]}, these of {devices[1]}"]

    def as_dict(self) -> dict[str, Any]:
        """The run's document, and what the check adds to it."""
        return {
            "name": self.name,
            "budget_bytes": self.limits.budget_bytes,
            "must_fit_on": self.limits.gpu,
            "max_growth": self.limits.max_growth,
            "base_bytes": self.base_bytes,
            "growth_bytes": None if self.base is None else self.growth_bytes,
            "violations": self.violations,
            "report": dict(self.document),
        }


def unit_of(checked: Sequence[Checked]) -> Unit:
    """One for all figures."""
    return Unit("GiB", GIB, 2) if max(one.peak_bytes for one in checked) >= GIB else Unit("MiB", MIB, 1)


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:+.2f} %" if whole else UNKNOWN


def _verdict(checked: Sequence[Checked]) -> str:
    failed = sum(bool(one.violations) for one in checked)
    runs = "1 run" if len(checked) == 1 else f"{len(checked)} runs"
    return f"{runs} within limits" if not failed else f"{failed} of {runs} over a limit"


def as_text(checked: Sequence[Checked]) -> str:
    """A line a run, then a line a violation, within the terminal's width: a name too long has lines of its own."""
    unit = unit_of(checked)
    corner, heads = f"{unit.name}, predicted", ("peak", "at most", "before", "growth", "budget")
    room = columns() - len(heads) * FIGURE - len(OVER)
    width = max([len(corner), *(len(one.name) for one in checked if len(one.name) <= room)])
    lines = [f"{corner:<{width}}" + "".join(f"{head:>{FIGURE}}" for head in heads)]
    for one in checked:
        growth = UNKNOWN if one.base is None else signed(one.peak_bytes, one.base_bytes, unit)
        cells = (unit.show(one.peak_bytes), unit.show(one.bound_bytes), unit.show(one.base_bytes), growth,
                 unit.show(one.limits.budget_bytes))  # fmt: skip
        name = one.name if len(one.name) <= width else ""
        lines += [] if name else within(columns(), one.name)
        lines.append(
            f"{name:<{width}}" + "".join(f"{cell:>{FIGURE}}" for cell in cells) + (OVER if one.violations else "")
        )
    for one in checked:
        for line in (*one.violations, *one.notes, *[f"{one.name}: {NEW}"] * one.is_new):
            said = line if len(checked) > 1 else line.removeprefix(f"{one.name}: ")
            lines += within(columns(), said, "  ", "    ")
        if one.base is not None and one.growth_bytes:
            lines += [f"    {line}" for line in _terms(one, unit)]
    for line in _about_budgets(checked):
        lines += within(columns(), line)
    return "\n".join([*lines, _verdict(checked)]) + "\n"


def _about_budgets(checked: Sequence[Checked]) -> list[str]:
    """The sentence that says of what a budget is, where there is one."""
    if all(one.limits.budget_bytes is None for one in checked):
        return []
    where = next((f"for {one.limits.gpu}" for one in checked if one.limits.gpu), "where --gpu names a GPU")
    return [f"A budget is of what is allocated at the peak. More is reserved: that it fits is checked {where}."]


def _terms(one: Checked, unit: Unit) -> list[str]:
    """The categories that differ by more than the unit's last digit."""
    return [
        f"{part.category.info.title:<14}{signed(part.bytes, part.base_bytes, unit):>10} {unit.name}"
        for part in one.parts
        if unit.show(abs(part.difference_bytes)) != unit.show(0)
    ]


def as_json(checked: Sequence[Checked]) -> str:
    """The document that a later `--against` reads."""
    return json.dumps({"schema": SCHEMA, "runs": [one.as_dict() for one in checked]}, indent=1) + "\n"


def as_junit(checked: Sequence[Checked]) -> str:
    """A test case a run, for CI servers."""
    failed = sum(bool(one.violations) for one in checked)
    counts = {"tests": str(len(checked)), "failures": str(failed), "errors": "0"}
    top = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(top, "testsuite", {"name": "gpumem-tui check"} | counts)
    for one in checked:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "gpumem-tui", "name": one.name})
        if one.violations:
            failure = ElementTree.SubElement(case, "failure", {"message": one.violations[0]})
            failure.text = "\n".join(one.violations)
        said = ElementTree.SubElement(case, "system-out")
        said.text = as_text([one])
    ElementTree.indent(top)
    return ElementTree.tostring(top, encoding="unicode", xml_declaration=True) + "\n"


def as_markdown(checked: Sequence[Checked]) -> str:
    """A comment for a pull request: the runs in a table, each run's difference folded below."""
    unit = unit_of(checked)
    lines = [f"### GPU memory: {_verdict(checked)}", ""]
    lines += _markdown_table(
        (f"run ({unit.name}, predicted)", "peak", "at most", "before", "growth", "budget", ""),
        [
            (
                one.name,
                unit.show(one.peak_bytes),
                unit.show(one.bound_bytes),
                unit.show(one.base_bytes),
                UNKNOWN if one.base_bytes is None else f"{signed(one.peak_bytes, one.base_bytes, unit)} "
                f"({_share(one.growth_bytes, one.base_bytes)})",
                unit.show(one.limits.budget_bytes),
                "**over**" if one.violations else one.verdict,
            )
            for one in checked
        ],
    )  # fmt: skip
    lines += [line for sentence in _about_budgets(checked) for line in ("", _escaped(sentence))]
    for one in checked:
        said = [*one.violations, *(f"{one.name}: {note}" for note in one.notes)]
        lines += ["", *(f"- {_escaped(line)}" for line in said)] if said else []
        lines += ["", "<details>", f"<summary>{_escaped(one.name)}: by category and layer</summary>", ""]
        lines += [*_categories(one, unit), *_layers(one, unit), "", "</details>"]
    return "\n".join(lines) + "\n"


def _categories(one: Checked, unit: Unit) -> list[str]:
    now, before = one.document["peak"]["by_category"], one.base and one.base["peak"]["by_category"]
    rows = []
    for category in Category:
        size, base = now.get(category.key, 0), before.get(category.key, 0) if before else None
        if size or base:
            rows.append((category.info.title, unit.show(base), unit.show(size), signed(size, base, unit)))
    return _markdown_table(("category", "before", "now", "difference"), rows)


def _layers(one: Checked, unit: Unit) -> list[str]:
    rows = [
        (name or "the model", unit.show(before), unit.show(now), signed(now, before, unit))
        for name, before, now in one.layers
    ]
    more = len(rows) - LAYERS
    table = _markdown_table(("layer", "before", "now", "difference"), rows[:LAYERS])
    return ["", *table, *([f"and {more} more layers"] if more > 0 else [])] if rows else []


def _markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    rule = "|".join(["---", *["---:"] * (len(heads) - 1)])
    listed = [f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in rows]
    return [f"| {' | '.join(heads)} |", f"|{rule}|", *listed]


def _escaped(text: str) -> str:
    """A name as text: neither a table's cell nor a tag."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


FORMATS = {"text": as_text, "json": as_json, "junit": as_junit, "markdown": as_markdown}
