"""A snapshot as steps that the ledger folds.

Phases come from the frames (`frames.py`), steps end with the optimizer's. What
the frames tell for certain is owned; the rest has its category from its
lifetime, as in any trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..block_lives import paired
from ..categories import Category
from ..events import BLOCK, EVENT, MARK, OWNER, Phase, PhaseSpan, StepTrace
from ..module_names import LOSS
from .entries import ALLOC, FREE_COMPLETED, FREE_REQUESTED, OUT_OF_MEMORY, DeviceTrace, Snapshot
from .frames import Tag, tag
from .pools import Pooled, Segments, pooled

ROUNDED = 512
"""The allocator hands out multiples of this."""
LONGEST_STEP = 2_000_000
"""Events; where no optimizer is seen, a step ends after so many."""

Ints = npt.NDArray[np.int64]


class Columns(NamedTuple):
    """The allocations and frees of a device.

    Attributes:
        events: dtype EVENT; marks are to come.
        begin: dtype BLOCK, alive before the first event.
        kinds: Of the events and, behind them, of `begin`: indices into the tags.
        pooled: Of the pools.
    """

    events: npt.NDArray[Any]
    begin: npt.NDArray[Any]
    kinds: Ints
    pooled: Pooled


class Tags:
    """Tags of each combination of stack and text, worked out once."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.tags: list[Tag] = []
        self.names: dict[str, int] = {"": 0}
        self._snapshot = snapshot
        self._index: dict[tuple[int, int], int] = {}

    def of(self, stacks: Ints, said: Ints) -> Ints:
        """Indices into `tags`."""
        if not len(stacks):
            return np.empty(0, np.int64)
        pairs, which = np.unique(np.stack([stacks, said]), axis=1, return_inverse=True)
        known = [self._one(int(stack), int(text)) for stack, text in pairs.T.tolist()]
        found: Ints = np.asarray(known, np.int64)[which.ravel()]
        return found

    def _one(self, stack: int, text: int) -> int:
        found = self._index.get((stack, text))
        if found is None:
            made = tag(self._snapshot.stacks[stack], self._snapshot.texts.said[text])
            found = self._index[stack, text] = len(self.tags)
            self.tags.append(made)
            for name in (made.module, made.owner):
                self.names.setdefault(name, len(self.names))
        return found


def steps_of(snapshot: Snapshot, device: int) -> list[StepTrace]:
    """The steps of one device, in order."""
    tags = Tags(snapshot)
    columns = _columns(snapshot, device, tags)
    phases = _phases(columns, tags.tags)
    cuts = _cuts(phases)
    whole = StepTrace(0, columns.events, np.zeros(1, MARK), columns.begin, np.empty(0, OWNER), ("",), ())
    blocks, _ = paired(whole)
    born, died = blocks["born"], blocks["died"]
    known = _categories(columns, phases, cuts, blocks, tags.tags)
    first_number = 0 if _is_load(phases[: cuts[1]]) else 1
    return [
        _step(columns, phases, tags, blocks[(born < end) & (died >= begin)], known[(born < end) & (died >= begin)],
              begin, end, first_number + number)
        for number, (begin, end) in enumerate(pairwise(cuts))
    ]  # fmt: skip


# --- columns ----------------------------------------------------------------------------


def _columns(snapshot: Snapshot, device: int, tags: Tags) -> Columns:
    trace = snapshot.devices[device] if device < len(snapshot.devices) else DeviceTrace()
    table = (
        np.frombuffer(trace.columns, np.int64).reshape(-1, DeviceTrace.FIELDS)
        if len(trace)
        else np.empty((0, DeviceTrace.FIELDS), np.int64)
    )
    entries = table
    freed = FREE_REQUESTED if (table[:, 0] == FREE_REQUESTED).any() else FREE_COMPLETED
    table = table[(table[:, 0] == ALLOC) | (table[:, 0] == freed)]
    alive = np.array(snapshot.alive.get(device, []), np.int64).reshape(-1, 5)
    is_alloc, exact = table[:, 0] == ALLOC, snapshot.says_owners
    events = np.zeros(len(table), EVENT)
    events["address"], events["time_us"] = table[:, 1], table[:, 3]
    events["bytes"] = np.where(is_alloc, table[:, 2], -table[:, 2])
    events["slack"] = 0 if exact else np.where(is_alloc, 1, -1) * (-table[:, 2] % ROUNDED)
    begin = _begin(table, is_alloc, alive, exact)
    if not exact:
        _slack_at_end(events, is_alloc, alive)
    stacks, said = table[:, 4], table[:, 5]
    kinds = tags.of(np.concatenate([stacks, begin[:, 3]]), np.concatenate([said, begin[:, 4]]))
    blocks = np.zeros(len(begin), BLOCK)
    blocks["address"], blocks["bytes"], blocks["slack"] = begin[:, 0], begin[:, 1], begin[:, 2]
    found = pooled(entries, freed, begin[:, [0, 1, 5]], _segments(snapshot, device))
    events["pool"], blocks["pool"] = found.of_events, found.of_begin
    return Columns(events, blocks, kinds, found)


def _segments(snapshot: Snapshot, device: int) -> Segments:
    return Segments(np.array(snapshot.segments.get(device, ()), np.int64).reshape(-1, 3), [*snapshot.pools])


def _begin(table: Ints, is_alloc: npt.NDArray[np.bool_], alive: Ints, exact: bool) -> Ints:
    """Blocks from before the trace: freed in it without having been made in it, or there all along.

    Fields of `Alive`, and the stream (-1: that of its segment).
    """
    _, first = np.unique(table[:, 1], return_index=True)
    freed = table[first[~is_alloc[first]]]
    slack = np.zeros(len(freed), np.int64) if exact else -freed[:, 2] % ROUNDED
    before = np.column_stack([freed[:, 1], freed[:, 2], slack, np.zeros(len(freed), np.int64), freed[:, 5:7]])
    there = alive[~np.isin(alive[:, 0], table[:, 1])]
    return np.concatenate([before, np.column_stack([there, np.full(len(there), -1)])])


def _slack_at_end(events: npt.NDArray[Any], is_alloc: npt.NDArray[np.bool_], alive: Ints) -> None:
    """Fill in the slack of blocks alive at the end, from the snapshot: a remainder too small to split off is in it."""
    last = np.flatnonzero(is_alloc)[::-1]
    address, where = np.unique(events["address"][last], return_index=True)
    at = np.searchsorted(address, alive[:, 0].astype(np.uint64))
    hit = at < len(address)
    hit[hit] = address[at[hit]] == alive[hit, 0].astype(np.uint64)
    rows = last[where[at[hit]]]
    same = events["bytes"][rows] == alive[hit, 1]
    events["slack"][rows[same]] = alive[hit, 2][same]


# --- phases and steps ---------------------------------------------------------------------


def _phases(columns: Columns, tags: Sequence[Tag]) -> Ints:
    """The phase at every event.

    Where no frame tells, the one before goes on. CUDA's backward runs on a
    thread without Python frames: an allocation of nobody after a forward is its.
    """
    n = len(columns.events)
    if not n:
        return np.empty(0, np.int64)
    told = np.array([-1 if t.phase is None else int(t.phase) for t in tags], np.int64)[columns.kinds[:n]]
    bare = np.array([t.phase is None and t.category is None and not t.module for t in tags])[columns.kinds[:n]]
    scripted = np.array([t.phase is None and t.category is None and bool(t.module) for t in tags])[columns.kinds[:n]]
    is_alloc = columns.events["bytes"] >= 0
    # A free tells where its site is, which is where a reference was dropped: of use for what only frees.
    told[~is_alloc & (told != Phase.ZERO_GRAD)] = -1
    phases = _carried(told, Phase.IDLE)
    # A script's own code between two steps makes the next batch; within a forward it goes on with that.
    between = np.isin(phases, (Phase.IDLE, Phase.LOAD, Phase.OPTIMIZER, Phase.ZERO_GRAD))
    told[is_alloc & (told < 0) & scripted & between] = Phase.DATA
    silent = is_alloc & bare & ((phases == Phase.FORWARD) | (phases == Phase.RECOMPUTE))
    told[silent] = Phase.BACKWARD
    return _carried(told, Phase.IDLE)


def _carried(values: Ints, first: int) -> Ints:
    """Each value, or the last one before it that is not -1."""
    at = np.maximum.accumulate(np.where(values >= 0, np.arange(len(values)), -1))
    return np.where(at >= 0, values[np.maximum(at, 0)], first)


def _cuts(phases: Ints) -> list[int]:
    """The events that steps begin at, and the end: behind the loading, and behind each optimizer."""
    n = len(phases)
    forward = np.flatnonzero(phases == Phase.FORWARD)
    loads = np.flatnonzero(phases[: forward[0]] == Phase.LOAD) if len(forward) else forward
    ends = np.isin(phases, (Phase.OPTIMIZER, Phase.ZERO_GRAD))
    starts = np.isin(phases, (Phase.FORWARD, Phase.DATA))
    last = _carried(np.where(ends, 1, np.where(starts, 0, -1)), 0)
    found = np.flatnonzero(starts[1:] & (last[:-1] == 1)) + 1
    cuts = [0]
    for at in [*(loads[-1:] + 1).tolist(), *found.tolist(), n]:
        while at - cuts[-1] > LONGEST_STEP:
            cuts.append(cuts[-1] + LONGEST_STEP)
        if at > cuts[-1]:
            cuts.append(at)
    return cuts if len(cuts) > 1 else [0, n]


def _is_load(phases: Ints) -> bool:
    """True if it is the loading."""
    return bool((phases == Phase.LOAD).any() and not np.isin(phases, (Phase.FORWARD, Phase.BACKWARD)).any())


def _step(
    columns: Columns, phases: Ints, tags: Tags, blocks: npt.NDArray[Any], known: Ints, begin: int, end: int, number: int
) -> StepTrace:
    """One step: every event has a mark of its own, so that an owner says of which block it is."""
    n = end - begin
    events = columns.events[begin:end].copy()
    events["mark"] = np.arange(1, n + 1)
    kinds = columns.kinds[begin:end]
    module = np.array([tags.names[t.module] for t in tags.tags] or [0], np.int64)
    owner = np.array([tags.names[t.owner or t.module] for t in tags.tags] or [0], np.int64)
    marks = np.zeros(n + 1, MARK)
    marks["phase"][0] = Phase.IDLE
    marks["phase"][1:], marks["module"][1:] = phases[begin:end], module[kinds]
    micro = _micro_batches(phases[begin:end])
    marks["micro_batch"][1:] = micro
    before = blocks[blocks["born"] < begin]
    alive = np.zeros(len(before), BLOCK)
    for column in ("address", "bytes", "slack", "pool"):
        alive[column] = before[column]
    owned = np.flatnonzero(known >= 0)
    owners = np.zeros(len(owned), OWNER)
    owners["address"], owners["category"] = blocks["address"][owned], known[owned]
    born, made = blocks["born"][owned], blocks["made"][owned]
    place = np.where(born >= 0, born, len(columns.events) + made)
    owners["mark"] = np.maximum(born - begin + 1, 0)
    owners["name"], owners["made"] = owner[columns.kinds[place]], -1
    spans = _spans(phases[begin:end], micro, events["time_us"])
    most = int(micro.max(initial=0)) + 1
    return StepTrace(
        number,
        events,
        marks,
        alive,
        owners,
        tuple(tags.names),
        spans,
        micro_batches=most,
        segments=columns.pooled.segments_of(begin, end),
        pools=columns.pooled.pools,
    )


def _micro_batches(phases: Ints) -> Ints:
    """Micro-batches from 0; one more with each forward that follows a backward."""
    main = _carried(np.where(np.isin(phases, (Phase.FORWARD, Phase.BACKWARD)), phases, -1), -1)
    again = (main[1:] == Phase.FORWARD) & (main[:-1] == Phase.BACKWARD)
    return np.concatenate([np.zeros(min(len(main), 1), np.int64), np.cumsum(again)])


def _spans(phases: Ints, micro: Ints, times: Ints) -> tuple[PhaseSpan, ...]:
    """Runs of one phase; a recompute lies within its backward."""
    outer = np.where(phases == Phase.RECOMPUTE, Phase.BACKWARD, phases)
    return tuple(
        sorted(
            (*_runs(outer, micro, times), *_runs(phases, micro, times, Phase.RECOMPUTE)),
            key=lambda s: (s.begin, -s.end),
        )
    )


def _runs(phases: Ints, micro: Ints, times: Ints, only: Phase | None = None) -> list[PhaseSpan]:
    if not len(phases):
        return []
    key = phases * (int(micro.max()) + 1) + micro
    starts = np.flatnonzero(np.append(True, key[1:] != key[:-1]))
    ends = [*starts[1:].tolist(), len(phases)]
    found = []
    for begin, end in zip(starts.tolist(), ends, strict=True):
        phase = Phase(int(phases[begin]))
        if phase is only or (only is None and phase is not Phase.IDLE):
            found.append(PhaseSpan(phase, int(micro[begin]), begin, end, int(times[begin]), int(times[end - 1])))
    return found


# --- categories -----------------------------------------------------------------------------


def _categories(
    columns: Columns, phases: Ints, cuts: Sequence[int], blocks: npt.NDArray[Any], tags: Sequence[Tag]
) -> Ints:
    """Category of each block that is known for certain, else -1; `made` becomes a block's place in `begin`."""
    n = len(columns.events)
    before = blocks["born"] < 0
    blocks["made"] = np.where(before, np.cumsum(before) - 1, 0)
    said = np.array([-1 if t.category is None else int(t.category) for t in tags] or [-1], np.int64)
    place = np.where(before, n + blocks["made"], blocks["born"])
    known = said[columns.kinds[place]] if len(blocks) else np.empty(0, np.int64)
    idle = np.full(1, Phase.IDLE, np.int64)
    born = np.append(phases, idle)[np.where(before, n, blocks["born"])]
    died = np.append(phases, -np.ones(1, np.int64))[np.minimum(blocks["died"], n)]
    # What was there before the trace has frames of its own if it was recorded: they tell when it was made.
    told = np.array([-1 if t.phase is None else int(t.phase) for t in tags] or [-1], np.int64)
    born = (
        np.where(before & (told[columns.kinds[place]] >= 0), told[columns.kinds[place]], born) if len(blocks) else born
    )
    leaves, lasts = died != born, blocks["died"] >= n
    for phase, category in (
        (Phase.LOAD, Category.PARAMETERS),
        (Phase.OPTIMIZER, Category.OPTIMIZER_STATE),
        (Phase.BACKWARD, Category.GRADIENTS),
    ):
        held = (known < 0) & (born == phase) & leaves
        if phase is Phase.BACKWARD:  # what goes in a recompute or the next forward was the graph's
            held &= (died != Phase.RECOMPUTE) & (died != Phase.FORWARD)
        known[held] = category
    # What outlives its step was kept by the script: the outputs of the model, and with them the graph.
    step_of = np.searchsorted(cuts, blocks["born"], side="right")
    outlives = (step_of != np.searchsorted(cuts, blocks["died"], side="right")) | lasts
    at_loss = np.array([t.module == LOSS for t in tags] or [False])[columns.kinds[place]]
    kept = (known < 0) & ((born == Phase.FORWARD) | (born == Phase.RECOMPUTE)) & outlives
    known[kept] = np.where(at_loss[kept], Category.LOGITS_LOSS, Category.ACTIVATIONS)
    first_forward = int(np.argmax(np.append(phases, Phase.FORWARD) == Phase.FORWARD))
    batch = (known < 0) & (born == Phase.DATA) & leaves
    known[batch & (~lasts | (blocks["born"] > first_forward))] = Category.INPUTS
    # Outside of every phase a lifetime tells nothing.
    known[(known < 0) & ((born == Phase.IDLE) | (born == Phase.DATA))] = Category.UNKNOWN
    return known


def refused_bytes(snapshot: Snapshot, device: int) -> tuple[int, int] | None:
    """Bytes the last failed allocation asked for, and bytes free on the device then; None: none failed."""
    trace = snapshot.devices[device].columns if device < len(snapshot.devices) else ()
    table = np.array(trace, np.int64).reshape(-1, DeviceTrace.FIELDS)
    failed = table[table[:, 0] == OUT_OF_MEMORY]
    return (int(failed[-1, 2]), int(failed[-1, 1])) if len(failed) else None
