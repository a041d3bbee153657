"""Naming what no rule names in a loop that is not ours."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import numpy as np
import torch

from ..categories import Category
from ..events import OWNER, StepTrace
from ..ledger import Ledger
from ..prediction.cudnn_rnn import dropout_state_bytes
from ..tracing.owners import DROPOUT_STATE

SCRIPT = "held by the script"


Blocks = frozenset[tuple[int, int]]
"""Address and size of each."""


def leftovers(trace: StepTrace) -> Blocks:
    """Blocks that the script held when a step ended, by a trace in which they are named."""
    blocks = Ledger(trace).blocks
    held = blocks[(blocks["category"] == Category.HELD_BY_SCRIPT) & (blocks["died"] == len(trace.events))]
    return frozenset(zip(held["address"].tolist(), held["bytes"].tolist(), strict=True))


def kept_by_libraries(device: torch.device) -> dict[int, str]:
    """Names of what libraries keep on a device and give nobody, by its bytes."""
    if device.type != "cuda":
        return {}
    card = torch.cuda.get_device_properties(device)
    return {dropout_state_bytes(card.multi_processor_count, card.max_threads_per_multi_processor): DROPOUT_STATE}


def libraries_blocks(named: StepTrace, libraries: Iterable[str]) -> dict[int, str]:
    """Names of those blocks that `name_leftovers` has found to be libraries', by their addresses."""
    known = {named.names.index(name): name for name in libraries if name in named.names}
    kept = named.owners[np.isin(named.owners["name"], list(known))]
    return {address: known[name] for address, name in zip(kept["address"].tolist(), kept["name"].tolist(), strict=True)}


def name_leftovers(
    trace: StepTrace, before: Blocks = frozenset(), libraries: Mapping[int, str] = MappingProxyType({})
) -> StepTrace:
    """Say of what is alive at the end and nobody owns that the script holds it.

    The model, the optimizer, the batch and the outputs have been asked, and
    what autograd or a library keeps has rules of its own: what is left are the
    script's own variables, a loss that is logged, an average, another model.

    Args:
        trace: The step.
        before: What it held when the step before ended. A step that an error ended cannot tell that
            from what the outputs keep until the next forward.
        libraries: Names of what libraries keep and give nobody, by its bytes.
    """
    if not len(trace.marks):  # a snapshot: it is not known what was made in the step under way
        return trace
    ledger = Ledger(trace)
    blocks = ledger.blocks
    free = blocks["category"] == Category.UNKNOWN
    if trace.is_aborted and before:
        old = zip(blocks["address"].tolist(), blocks["bytes"].tolist(), strict=True)
        known = np.fromiter((block in before for block in old), bool, len(blocks))
        free |= known & (blocks["born"] < 0) & (blocks["category"] == Category.ACTIVATIONS)
    left = blocks[free & (blocks["died"] == len(trace.events))]
    if not len(left):
        return trace
    owned_by = [libraries.get(size, SCRIPT) for size in left["bytes"].tolist()]
    names = tuple(dict.fromkeys((*trace.names, *owned_by)))
    rows = np.zeros(len(left), OWNER)
    if "made" in (OWNER.names or ()):
        rows["made"] = -1
    rows["address"], rows["mark"] = left["address"], max(len(trace.marks) - 1, 0)
    rows["category"] = [Category.HELD_BY_SCRIPT if name == SCRIPT else Category.WORKSPACE for name in owned_by]
    rows["name"] = [names.index(name) for name in owned_by]
    return dataclasses.replace(trace, names=names, owners=np.concatenate([trace.owners, rows]))
