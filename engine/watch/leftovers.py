"""Naming what no rule names in a loop that is not ours."""

from __future__ import annotations

import dataclasses

import numpy as np

from ..events import OWNER, Category, StepTrace
from ..ledger import Ledger

SCRIPT = "held by the script"


def name_leftovers(trace: StepTrace) -> StepTrace:
    """Say of what is alive at the end and nobody owns that the script holds it.

    The model, the optimizer, the batch and the outputs have been asked, and
    what autograd or a library keeps has rules of its own: what is left are the
    script's own variables, a loss that is logged, an average, another model.
    """
    ledger = Ledger(trace)
    blocks = ledger.blocks
    left = blocks[(blocks["category"] == Category.UNKNOWN) & (blocks["died"] == len(trace.events))]
    if not len(left):
        return trace
    names = trace.names if SCRIPT in trace.names else (*trace.names, SCRIPT)
    rows = np.zeros(len(left), OWNER)
    if "made" in (OWNER.names or ()):
        rows["made"] = -1
    rows["address"], rows["mark"] = left["address"], max(len(trace.marks) - 1, 0)
    rows["category"], rows["name"] = Category.HELD_BY_SCRIPT, names.index(SCRIPT)
    return dataclasses.replace(trace, names=names, owners=np.concatenate([trace.owners, rows]))
