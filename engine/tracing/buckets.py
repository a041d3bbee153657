"""The buckets in which DDP's reducer sums gradients over ranks.

They belong to C++, which gives nobody their addresses. They are known by their
sizes, which the reducer logs, and where they come anew: in the second forward of
a model, before its own begins, in the order in which gradients became ready.
With `gradient_as_bucket_view` they are the gradients themselves.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..events import OWNER, Category, StepTrace
from ..ledger import Ledger
from .wrapped_functions import WrappedFunctions, wrap

DDP = "torch.nn.parallel.distributed"
BUCKETS = "DistributedDataParallel.buckets"
"""Name of the buckets, and of what runs while they are made."""

USED_MAP_ITEM_BYTES = 4
"""The reducer notes of every parameter whether it has been used."""


class Buckets(NamedTuple):
    """The buckets of one model.

    Attributes:
        sizes: Bytes of each, those of the first iteration included.
        are_gradients: Whether the gradients are views into them.
    """

    sizes: tuple[int, ...]
    are_gradients: bool


def _wrap_all(undo: ExitStack) -> None:
    if (module := sys.modules.get(DDP)) is not None:
        wrap(
            undo,
            module.DistributedDataParallel,
            "_pre_forward",
            before=lambda ddp, *_, **__: _tell(ddp, begins=True),
            after=lambda _, ddp, *__, **___: _tell(ddp, begins=False),
        )


def _tell(ddp: Any, begins: bool) -> None:
    for listener in reducers.listeners:
        listener(ddp, begins)


reducers: WrappedFunctions[Any] = WrappedFunctions(_wrap_all)
"""Tells of every DDP module when its forward begins: before and after its buckets may be made anew."""


def buckets_of(ddp: Any) -> Buckets:
    """Buckets of a DDP module's reducer, as it has logged them."""
    logged = ddp._get_ddp_logging_data()
    listed = (logged.get(name, "") for name in ("bucket_sizes", "rebuilt_bucket_sizes"))
    sizes = [int(size) for text in listed for size in text.split(",") if size.strip()]
    used_map = USED_MAP_ITEM_BYTES * sum(1 for p in ddp.parameters() if p.requires_grad)
    return Buckets((*sizes, used_map), bool(logged.get("gradient_as_bucket_view")))


def name_buckets(trace: StepTrace, known: tuple[Buckets, ...]) -> StepTrace:
    """A trace with the blocks that are buckets owned, as far as nobody else owns them."""
    ledger = Ledger(trace)
    blocks, name = ledger.blocks, trace.names.index(BUCKETS) if BUCKETS in trace.names else -1
    made_anew, given_up = (_within(trace, blocks[end], name) for end in ("born_mark", "died_mark"))
    if made_anew.any():  # NCCL may keep what is given up until its next collective
        given_up |= blocks["born"] < 0
    stays = blocks["died"] == len(trace.events)
    candidates = np.flatnonzero(~ledger.claimed & (stays | given_up))
    found: dict[int, Category] = {}
    for buckets in known:
        category = Category.GRADIENTS if buckets.are_gradients else Category.COMMUNICATION
        left = Counter(buckets.sizes)
        for row in candidates.tolist():
            size = int(blocks["bytes"][row])
            if row not in found and (left[size] > 0 or (made_anew[row] and stays[row])):
                left[size] -= 1
                found[row] = category
    if not found:
        return trace
    rows = np.zeros(len(found), OWNER)
    names = trace.names if name >= 0 else (*trace.names, BUCKETS)
    rows["made"], rows["name"] = -1, names.index(BUCKETS)
    rows["address"] = blocks["address"][list(found)]
    rows["category"] = list(found.values())
    # Of one address, the block that was there when the step began, or the one that is there as it ends.
    rows["mark"] = np.where(blocks["born"][list(found)] < 0, -1, max(len(trace.marks) - 1, 0))
    return dataclasses.replace(trace, names=names, owners=np.concatenate([trace.owners, rows]))


def _within(trace: StepTrace, marks: npt.NDArray[Any], name: int) -> npt.NDArray[np.bool_]:
    """A mask of the marks of a module."""
    if name < 0 or not len(trace.marks):
        return np.zeros(len(marks), bool)
    within: npt.NDArray[np.bool_] = (marks >= 0) & (trace.marks["module"][np.maximum(marks, 0)] == name)
    return within
