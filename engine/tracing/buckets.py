"""The buckets in which DDP's reducer sums gradients over ranks.

They belong to C++, which gives nobody their addresses. They are known by their
sizes, which the reducer logs, and where they come anew: in the second forward of
a model, before its own begins, in the order in which gradients became ready.
With `gradient_as_bucket_view` they are the gradients themselves.

Those that go then may stay for a while: NCCL's process group keeps the tensors of a
collective that nobody has waited for until the first one after its watchdog has seen
the end.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..categories import Category
from ..events import OWNER, StepTrace
from ..ledger import Ledger
from .wrapped_functions import WrappedFunctions, wrap

DDP = "torch.nn.parallel.distributed"
BUCKETS = "DistributedDataParallel.buckets"
"""Name of the buckets, and of what runs while they are made."""

GIVEN_UP = f"{BUCKETS} (given up, held by NCCL)"
"""Name of a bucket that the reducer has replaced and that is there nevertheless."""

USED_MAP_ITEM_BYTES = 4
"""The reducer notes of every parameter whether it has been used."""


class Buckets(NamedTuple):
    """The buckets of one model.

    Attributes:
        sizes: Bytes of each, those of the first iteration included.
        are_gradients: Whether the gradients are views into them.
        first: Bytes of those of the first iteration.
    """

    sizes: tuple[int, ...]
    are_gradients: bool
    first: tuple[int, ...] = ()


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
    first, rebuilt = (
        tuple(int(size) for size in logged.get(name, "").split(",") if size.strip())
        for name in ("bucket_sizes", "rebuilt_bucket_sizes")
    )
    used_map = USED_MAP_ITEM_BYTES * sum(1 for p in ddp.parameters() if p.requires_grad)
    return Buckets((*first, *rebuilt, used_map), bool(logged.get("gradient_as_bucket_view")), first)


def name_buckets(trace: StepTrace, known: tuple[Buckets, ...]) -> StepTrace:
    """A trace with the blocks that are buckets owned: those that nobody else owns, and those that were given up."""
    ledger = Ledger(trace)
    blocks, name = ledger.blocks, trace.names.index(BUCKETS) if BUCKETS in trace.names else -1
    made_anew, given_up = (_within(trace, blocks[end], name) for end in ("born_mark", "died_mark"))
    stays = blocks["died"] == len(trace.events)
    free = ~ledger.claimed
    rebuilt = blocks["born"][made_anew].min(initial=len(trace.events))
    held = (blocks["born"] < 0) & (blocks["died"] > rebuilt) & ~stays & ~given_up
    held &= free | (blocks["category"] == Category.GRADIENTS)
    gone = Counter(blocks["bytes"][free & given_up].tolist())
    found: dict[int, tuple[Category, str]] = {}
    for buckets in known:
        found |= _held(blocks, np.flatnonzero(held).tolist(), Counter(buckets.first) - gone)
        category = Category.GRADIENTS if buckets.are_gradients else Category.COMMUNICATION
        left = Counter(buckets.sizes)
        for row in np.flatnonzero(free & (stays | given_up)).tolist():
            size = int(blocks["bytes"][row])
            if row not in found and (left[size] > 0 or (made_anew[row] and stays[row])):
                left[size] -= 1
                found[row] = category, BUCKETS
    if not found:
        return trace
    rows = np.zeros(len(found), OWNER)
    names = tuple(dict.fromkeys([*trace.names, *(called for _, called in found.values())]))
    rows["made"], rows["name"] = -1, [names.index(called) for _, called in found.values()]
    rows["address"] = blocks["address"][list(found)]
    rows["category"] = [category for category, _ in found.values()]
    # Of one address, the block that was there when the step began, or the one that is there as it ends.
    rows["mark"] = np.where(blocks["born"][list(found)] < 0, -1, max(len(trace.marks) - 1, 0))
    # A bucket that was given up is no gradient's any more: the first owner of a block has it.
    return dataclasses.replace(trace, names=names, owners=np.concatenate([rows, trace.owners]))


def _held(blocks: npt.NDArray[Any], rows: list[int], left: Counter[int]) -> dict[int, tuple[Category, str]]:
    """The buckets that outlive their replacement, by their sizes, among blocks that go later in the step."""
    found = {}
    for row in rows:
        size = int(blocks["bytes"][row])
        if left[size] > 0:
            left[size] -= 1
            found[row] = Category.COMMUNICATION, GIVEN_UP
    return found


def _within(trace: StepTrace, marks: npt.NDArray[Any], name: int) -> npt.NDArray[np.bool_]:
    """A mask of the marks of a module."""
    if name < 0 or not len(trace.marks):
        return np.zeros(len(marks), bool)
    within: npt.NDArray[np.bool_] = (marks >= 0) & (trace.marks["module"][np.maximum(marks, 0)] == name)
    return within
