"""Names and categories of blocks: by who owns them, and of all others by their lives."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .categories import Category
from .events import Phase, StepTrace
from .module_names import LOGITS, LOSS, OUTPUT_LOSS

Blocks = npt.NDArray[Any]
"""dtype BLOCK_ROW; `category`, `name` and `made` are filled in here."""

Bools = npt.NDArray[np.bool_]


def name_owned(trace: StepTrace, blocks: Blocks) -> Bools:
    """Join the owners with the block alive at their address at their mark.

    Returns:
        A mask of the blocks that somebody owns.
    """
    claimed = np.zeros(len(blocks), bool)
    if not len(trace.owners) or not len(blocks):
        return claimed
    # Events carry non-decreasing marks, so a mark splits the events in two.
    when = np.searchsorted(_rising(trace.events["mark"]), trace.owners["mark"], side="right") - 1
    order = np.argsort(blocks["address"], kind="stable")  # they come in the order of their births
    address, born = blocks["address"][order], blocks["born"][order]
    n = len(trace.events) + 2
    # One sortable key of (address, born): the last block at or before (address, when).
    first = np.ones(len(address), bool)
    first[1:] = address[1:] != address[:-1]
    unique, code = address[first], np.cumsum(first) - 1
    at = np.searchsorted(unique, trace.owners["address"])
    known = (at < len(unique)) & (unique[np.minimum(at, len(unique) - 1)] == trace.owners["address"])
    slot = np.searchsorted(code * n + born + 1, at * n + when + 1, side="right") - 1
    row = order[np.maximum(slot, 0)]
    hit = known & (slot >= 0)
    hit &= (blocks["address"][row] == trace.owners["address"]) & (blocks["died"][row] > when)
    # The first to claim a block keeps it: owners are listed strongest first.
    last_wins = np.flatnonzero(hit)[::-1]
    claimed[row[last_wins]] = True
    for column in ("category", "name", "made"):
        blocks[column][row[last_wins]] = trace.owners[column][last_wins]
    return claimed


def name_by_life(trace: StepTrace, blocks: Blocks, claimed: Bools) -> None:
    """Name what nobody owns by when it was made and when it was freed.

    Args:
        trace: The step.
        blocks: Its blocks.
        claimed: Those that somebody owns; an owner that calls its block unknown is believed too.
    """
    free = (blocks["category"] == Category.UNKNOWN) & ~claimed
    outputs_kept = _outputs_alive_at_end(trace, blocks)
    # Outputs that the loop keeps hold their graph, and with it tensors that
    # outlive their own step: kept as Python attributes of autograd functions,
    # or leaves of the graph. They go when the next outputs replace them.
    held_over = free & (blocks["born"] < 0)
    graph_kept = trace.is_open or (trace.is_aborted and outputs_kept and len(trace.marks) > 0)
    held_over &= (blocks["died"] < len(trace.events)) | graph_kept
    blocks["category"][held_over] = Category.ACTIVATIONS
    rows = np.flatnonzero(free & (blocks["born"] >= 0))
    if len(rows) and len(trace.marks):
        born = blocks["born_mark"][rows]
        blocks["name"][rows] = trace.marks["module"][born]
        blocks["category"][rows] = _category_by_life(trace, born, blocks["died_mark"][rows], outputs_kept)


def _category_by_life(
    trace: StepTrace, born_mark: npt.NDArray[np.int64], died_mark: npt.NDArray[np.int64], outputs_kept: bool
) -> npt.NDArray[np.int64]:
    """The category of blocks that were made in the step, by the phases that made and freed them."""
    # What is alive in a step that goes on, or that an error ended, has no lifetime to be judged by.
    unfinished = not trace.is_complete
    phases, micro_batches, modules = (
        np.ascontiguousarray(trace.marks[column]) for column in ("phase", "micro_batch", "module")
    )
    lives_on = died_mark < 0
    last_mark = np.maximum(died_mark, 0)
    phase = phases[born_mark].astype(np.int64)
    died_phase = np.where(lives_on, -1, phases[last_mark].astype(np.int64))
    loss = trace.names.index(LOSS) if LOSS in trace.names else -1

    forward, backward = phase == Phase.FORWARD, phase == Phase.BACKWARD
    recompute, optimizer = phase == Phase.RECOMPUTE, phase == Phase.OPTIMIZER
    load, data = phase == Phase.LOAD, phase == Phase.DATA
    freed_here = (died_phase == phase) & (micro_batches[born_mark] == micro_batches[last_mark])
    # A block still alive in a trace of an open step may yet be freed in this phase;
    # made in forward, by far most of what is alive is there to be used in backward.
    kept = forward & ~freed_here & (~lives_on | unfinished | outputs_kept)
    kept |= backward & lives_on & outputs_kept & (not unfinished)  # the gradient of a leaf that is no parameter
    gone = freed_here | (~lives_on & (backward | optimizer | load | data | (phase == Phase.ZERO_GRAD)))
    category = np.full(len(phase), Category.UNKNOWN, np.int64)
    if unfinished:
        gone |= lives_on & (backward | optimizer)
        category[lives_on & load] = Category.PARAMETERS
        category[lives_on & data] = Category.INPUTS
    category[gone] = Category.TEMPORARIES
    category[kept] = Category.ACTIVATIONS
    category[recompute & ~freed_here & (~lives_on | unfinished)] = Category.RECOMPUTED
    category[(forward | backward) & (modules[born_mark] == loss) & (~lives_on | unfinished)] = Category.LOGITS_LOSS
    return category


def _outputs_alive_at_end(trace: StepTrace, blocks: Blocks) -> bool:
    """True if the logits are, or the loss with its graph, where logits are never made."""
    outputs = [trace.names.index(name) for name in (LOGITS, OUTPUT_LOSS) if name in trace.names]
    kept = (blocks["category"] == Category.LOGITS_LOSS) & np.isin(blocks["name"], outputs)
    return bool((kept & (blocks["died"] == len(trace.events))).any())


def _rising(marks: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.maximum.accumulate(marks) if len(marks) else marks
