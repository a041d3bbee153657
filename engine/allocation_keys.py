"""Keys by which an allocation is known again in every step like the one that described it."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .events import MADE, StepTrace

KEY = np.dtype([(name, MADE[name]) for name in ("phase", "micro_batch", "module", "bytes", "nth")])


def allocation_keys(
    marks: npt.NDArray[Any], born_marks: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]
) -> npt.NDArray[Any]:
    """Keys that tell one allocation of a step from all others, in any step like it.

    Args:
        marks: dtype MARK.
        born_marks: The mark of each allocation, in the order they happened.
        sizes: Bytes asked for.

    Returns:
        dtype KEY, in the order given.
    """
    keys = np.zeros(len(sizes), KEY)
    for column in ("phase", "micro_batch", "module"):
        keys[column] = marks[column][born_marks]
    keys["bytes"] = sizes
    order = np.lexsort((keys["bytes"], keys["module"], keys["micro_batch"], keys["phase"]))
    ranked = keys[order]
    is_first = np.ones(len(keys), bool)
    is_first[1:] = ranked[1:] != ranked[:-1]
    position = np.arange(len(keys))
    keys["nth"][order] = position - np.maximum.accumulate(np.where(is_first, position, 0))
    return keys


def described(trace: StepTrace, blocks: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
    """Each block's description, -1 for none: its owner's, or what the same allocation was when it was watched.

    Args:
        trace: The step.
        blocks: Its blocks, dtype BLOCK_ROW.
    """
    made = blocks["made"].astype(np.int64)
    born = np.flatnonzero(blocks["born"] >= 0)
    if len(trace.made) and len(born):
        keys = allocation_keys(trace.marks, blocks["born_mark"][born], blocks["bytes"][born])
        known = trace.made[list(KEY.names or ())].astype(KEY)
        _, code = np.unique(np.concatenate([known, keys]), return_inverse=True)
        table = np.full(code.max() + 1, -1, np.int64)
        table[code[: len(known)]] = trace.made["made"]
        made[born] = np.where(made[born] < 0, table[code[len(known) :]], made[born])
    return made
