"""The reasons why the peak is where it is, in a sentence or two. Says only what the ledger says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ..engine.categories import Category
from ..engine.events import Phase
from ..engine.ledger import Bytes, Ledger, Peak
from .units import Unit

LARGE_SHARE = 0.1
"""A category below this share of what the peak adds is not worth a word."""


def explain(ledger: Ledger, unit: Unit) -> str:
    """The peak of a step in a sentence: where it is, and what it is the sum of.

    `242.1 MiB = 113.7 from before the step + activations 80.4 + logits and loss 48.0 (64.0 - 16.0)`:
    in brackets the row of the category at the peak, less what it held when the step began.

    Args:
        ledger: The step.
        unit: For the figures.
    """
    return explanations(ledger, unit)[0]


def explanations(ledger: Ledger, unit: Unit) -> list[str]:
    """The sentence of `explain`, then ever shorter ones: no brackets, fewer categories with a name, no module."""
    peak = ledger.peak
    before = ledger.at(-1)
    added = {c: peak.by_category[c] - before[c] for c in Category if peak.by_category[c] > before[c]}
    if not added:
        return [f"The step never holds more than the {unit.full(peak.bytes)} it began with."]
    by_size = [c for c in sorted(added, key=added.__getitem__, reverse=True) if float(unit.show(added[c]))]
    named = sum(added[c] >= LARGE_SHARE * sum(added.values()) for c in by_size)
    if named == len(by_size) - 1:  # what is left over is one category, which has a name
        named += 1
    place = where(peak, ledger)
    sentence = partial(_sentence, ledger, unit, before, added)
    shorter = [sentence(place, by_size[:n], False) for n in range(named, 0, -1) if n != len(by_size) - 1]
    last = sentence(where(replace(peak, module=""), ledger), by_size[:1] if len(by_size) != 2 else by_size, False)
    return [sentence(place, by_size[:named], True), *shorter, last]


def _sentence(
    ledger: Ledger, unit: Unit, before: Bytes, added: Bytes, place: str, named: Sequence[Category], operands: bool
) -> str:
    """The sum of some categories by name and of the others together."""
    peak = ledger.peak
    figures = [f"{c.info.title.replace(',', ' and')} {unit.show(added[c])}"
               + _comparison(c, peak, before, unit) * operands for c in named]  # fmt: skip
    if peak.phase is Phase.LOAD:
        return f"The peak is {place}: {_listed(figures or ['many small things'])} {unit.name}."
    rest = unit.show(sum(added.values()) - sum(added[c] for c in named))
    figures += [f"others {rest}"] if float(rest) else []
    steady = sum(min(peak.by_category[c], max(before[c], 0)) for c in Category)
    terms = " + ".join([f"{unit.show(steady)} from before the step", *figures])
    return f"The peak is {place}: {unit.full(peak.bytes)} = {terms}."


def where(peak: Peak, ledger: Ledger) -> str:
    """Phase, module and micro-batch of a peak: `in backward of lm_head, micro-batch 2 of 4`."""
    if peak.phase is Phase.OPTIMIZER:
        return f"inside {peak.module or 'the optimizer'}.step()"
    if peak.phase is Phase.IDLE:
        return "between two phases"
    text = {Phase.LOAD: "while loading", Phase.RECOMPUTE: "in the recompute"}.get(peak.phase, f"in {peak.phase.title}")
    if peak.module:
        text += f" at {peak.module}" if peak.phase is Phase.LOAD else f" of {peak.module}"
    if ledger.trace.micro_batches > 1:
        text += f", micro-batch {peak.micro_batch + 1} of {ledger.trace.micro_batches}"
    return text


def _comparison(category: Category, peak: Peak, before: Bytes, unit: Unit) -> str:
    """The operands of a figure that is a difference; for the optimizer's temporaries, their ratio to the gradients."""
    gradients = peak.by_category[Category.GRADIENTS]
    if float(unit.show(before[category])):
        return f" ({unit.show(peak.by_category[category])} - {unit.show(before[category])})"
    if category is not Category.TEMPORARIES or peak.phase is not Phase.OPTIMIZER or not gradients:
        return ""
    return f" ({peak.by_category[category] / gradients:.1f} x the gradients)"


def _listed(items: list[str]) -> str:
    if len(items) <= 1:
        return "".join(items)
    return ", ".join(items[:-1]) + " and " + items[-1]
