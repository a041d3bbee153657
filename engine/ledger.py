"""The fold: from a stream of allocations to bytes by category, layer and owner.

Nothing here knows where the stream came from. A block's category follows from
who owned its address, and otherwise from its lifetime and from what was running
when it was made and freed. The one invariant: at every event, the sum over the
categories is the allocator's own count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .events import EVENT, MADE, N_CATEGORIES, Category, Made, Phase, StepTrace

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Bytes = dict[Category, int]

LOGITS = "logits"
"""Name of the output embedding's output."""

LOSS = "loss"
"""Name of the part of the model's forward that follows the output embedding."""

OUTPUT_LOSS = "outputs.loss"
"""Name of the loss as the model has returned it: with it the graph is kept."""

BLOCK_ROW = np.dtype(
    [
        ("address", "u8"),
        ("bytes", "i8"),
        ("slack", "i8"),
        ("born", "i8"),  # event index; -1: alive when the trace began
        ("died", "i8"),  # event index; number of events: still alive
        ("born_mark", "i8"),
        ("died_mark", "i8"),  # -1: still alive
        ("category", "u1"),
        ("name", "i4"),
        ("made", "i4"),  # index of its description; -1: none
    ]
)

OTHER_MODEL = ": "
"""Stands between the name of another model than the one that is trained and those of its tensors."""

_PARAMETER = re.compile(r"\.(?:weight|bias)(?:\.|$)")
_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")
_NUMBERED = re.compile(r"^(.*\.)\d+$")
_CACHED = "layers."
"""The name of a KV cache's layers, of which the cache knows nothing but the number."""

_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
_INNER_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
"""Stand before any module's name that is wrapped, not only before the model's own."""


NAMES = 2**15
"""So many names' forms are kept: a model has thousands, asked for again with every trace and every run."""


@lru_cache(NAMES)
def layer_of(name: str) -> str:
    """The layer a module or parameter belongs to.

    `gpt_neox.layers.3.mlp.dense.weight` -> `gpt_neox.layers.3`; outside the
    repeated layers the module itself: `lm_head.weight` -> `lm_head`. Another
    model is one layer: `teacher: gpt_neox.layers.3.mlp.dense.weight` -> `teacher`.
    """
    other, colon, _ = name.partition(OTHER_MODEL)
    if colon:
        return other
    # What an optimizer keeps carries its own name behind its parameter's.
    module = _PARAMETER.split(strip_wrappers(name), maxsplit=1)[0]
    match = _LAYER.match(module)
    return match.group(1) if match else module


@lru_cache(NAMES)
def strip_wrappers(name: str) -> str:
    """A module's name in the model itself, whatever wraps it (PEFT, DDP, FSDP, compile)."""
    dotted = _INNER_WRAPPERS.sub("", f"{name}.")
    for wrapper in _WRAPPERS:
        if wrapper.startswith(dotted):
            return ""  # the wrapper itself stands for the model
        dotted = dotted.removeprefix(wrapper)
    return dotted[:-1]


@lru_cache(maxsize=16)
def numbered_layers(names: tuple[str, ...]) -> list[str]:
    """The repeated layers of a model, in order: those of the most frequent prefix, a KV cache's own aside."""
    groups: dict[str, list[str]] = {}
    for layer in dict.fromkeys(map(layer_of, names)):
        if match := _NUMBERED.match(layer):
            groups.setdefault(match.group(1), []).append(layer)
    found = max(groups, key=lambda prefix: (len(groups[prefix]), prefix != _CACHED), default=None)
    return sorted(groups[found], key=lambda layer: int(layer.rsplit(".", 1)[1])) if found is not None else []


class LiveBlock(NamedTuple):
    """One block alive at an event.

    Attributes:
        bytes: Asked for, without slack.
        category: What it is there for.
        name: Its owner; where nobody owns it, the module that made it.
        phase: In which it was made; idle if before the trace began.
        micro_batch: Likewise, from 0.
        module: That made it; empty if it was made before the trace began.
        operator: That made it, `aten.mm`; empty where operators were not watched.
        dtype: Empty for a buffer that no operator returned.
        shape: Of the tensor in the block.
    """

    bytes: int
    category: Category
    name: str
    phase: Phase
    micro_batch: int
    module: str = ""
    operator: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Peak:
    """The instant of a step with most bytes allocated.

    Attributes:
        event: Index of the event after which it held; -1: before the first.
        bytes: Allocated, slack included.
        phase: What the loop was doing.
        micro_batch: From 0.
        module: Module or optimizer at work.
        by_category: Sums to `bytes`.
    """

    step: int
    event: int
    bytes: int
    phase: Phase
    micro_batch: int
    module: str
    by_category: Bytes


class Ledger:
    """Every block of a step with its life and its name, and the sums over them.

    Args:
        trace: The step. It is not copied and must not change.

    Attributes:
        blocks: dtype BLOCK_ROW, one row a block.
        claimed: Which of them somebody owns; the others are named by their lives.
        unmatched_frees: Frees of addresses nobody had allocated: events were
            lost. 0 in a sound trace.
    """

    def __init__(self, trace: StepTrace) -> None:
        self.trace = trace
        self.blocks, self.unmatched_frees = paired(trace)
        self.claimed = np.zeros(len(self.blocks), bool)
        self._name_owned()
        self._name_rest()

    # --- the fold -----------------------------------------------------------

    @cached_property
    def curve(self) -> Ints:
        """Bytes by category after each event, shape [N_CATEGORIES, events + 1].

        Column 0 is the state when the trace began; column i + 1 after event i.
        """
        n = len(self.trace.events)
        deltas = np.zeros((N_CATEGORIES, n + 2), np.int64)
        blocks = self.blocks
        for sign, when in ((1, blocks["born"] + 1), (-1, blocks["died"] + 1)):
            np.add.at(deltas, (blocks["category"], when), sign * blocks["bytes"])
            np.add.at(deltas[Category.SLACK], when, sign * blocks["slack"])
        return np.cumsum(deltas[:, : n + 1], axis=1)

    @cached_property
    def total(self) -> Ints:
        """Bytes allocated after each event, shape [events + 1]."""
        total: Ints = self.curve.sum(axis=0)
        return total

    def at(self, event: int) -> Bytes:
        """Composition after an event; -1 is the state when the trace began."""
        return dict(zip(Category, self.curve[:, event + 1].tolist(), strict=True))

    @cached_property
    def end(self) -> Bytes:
        """Composition after the last event; of all that can be asked the cheapest, and asked at every refresh."""
        alive = self.blocks[self.blocks["died"] >= len(self.trace.events)]
        sizes = np.zeros(N_CATEGORIES, np.int64)
        np.add.at(sizes, alive["category"], alive["bytes"])
        sizes[Category.SLACK] += alive["slack"].sum()
        return dict(zip(Category, sizes.tolist(), strict=True))

    def after(self, phase: Phase) -> Bytes | None:
        """Composition at the end of the last such phase; None if there was none."""
        spans = [span for span in self.trace.phases if span.phase is phase]
        return self.at(spans[-1].end - 1) if spans else None

    @cached_property
    def peak(self) -> Peak:
        """The first instant with most bytes allocated."""
        event = int(np.argmax(self.total)) - 1
        phase, micro_batch, module = self.where(event)
        return Peak(
            self.trace.step, event, int(self.total[event + 1]), phase, micro_batch, module, self.at(event)
        )  # fmt: skip

    @cached_property
    def fullest_by_phase(self) -> dict[Phase, Bytes]:
        """Composition at the first instant of each phase with most bytes allocated, in the order they began."""
        columns: dict[Phase, int] = {}
        for span in self.trace.phases:
            column = span.begin + int(np.argmax(self.total[span.begin : span.end + 1]))
            if span.phase not in columns or self.total[column] > self.total[columns[span.phase]]:
                columns[span.phase] = column
        return {phase: self.at(column - 1) for phase, column in columns.items()}

    @cached_property
    def highest_by_phase(self) -> dict[Phase, int]:
        """The most allocated while each phase went on, in the order they began."""
        return {phase: sum(sizes.values()) for phase, sizes in self.fullest_by_phase.items()}

    @cached_property
    def saved_by_layer(self) -> dict[str, int] | None:
        """Activations that each layer keeps for backward as the last forward ends; None: no forward has ended."""
        phases = self.trace.phases if self.trace.is_complete else self.trace.phases[:-1]  # in the last one it broke off
        ends = [span.end for span in phases if span.phase is Phase.FORWARD]
        if not ends:
            return None
        kept = {layer: sizes.get(Category.ACTIVATIONS, 0) for layer, sizes in self.by_layer(ends[-1] - 1).items()}
        return {layer: size for layer, size in kept.items() if size}

    def where(self, event: int) -> tuple[Phase, int, str]:
        """Phase, micro-batch and module at work when an event happened."""
        phase, micro_batch = Phase.IDLE, 0
        for span in self.trace.phases:
            if span.phase is not Phase.RECOMPUTE and span.begin <= event < span.end:
                phase, micro_batch = span.phase, span.micro_batch
                break
        if event < 0 or not len(self.trace.marks):
            return phase, micro_batch, ""
        mark = self.trace.marks[self.trace.events["mark"][event]]
        if mark["phase"] == Phase.RECOMPUTE:
            phase = Phase.RECOMPUTE
        return phase, micro_batch, self.trace.names[mark["module"]]

    @property
    def mismatch_bytes(self) -> int:
        """Bytes by which the sums miss the allocator's own counters: 0 in a sound trace.

        At the end of the step, and at its peak where that was counted.
        """
        counted = self.trace.counted
        if counted is None:
            return 0
        at_peak = 0 if counted.peak_bytes is None else abs(self.peak.bytes - counted.peak_bytes)
        return max(abs(int(self.total[-1]) - counted.end_bytes), at_peak)

    # --- who is alive -------------------------------------------------------

    def alive(self, event: int) -> npt.NDArray[Any]:
        """The blocks alive after an event, dtype BLOCK_ROW."""
        return self.blocks[self.is_alive(event)]

    def is_alive(self, event: int) -> Bools:
        """A mask over `blocks` of those alive after an event."""
        mask: Bools = (self.blocks["born"] <= event) & (self.blocks["died"] > event)
        return mask

    def largest(self, event: int, count: int = 10) -> list[LiveBlock]:
        """The largest blocks alive after an event, largest first."""
        alive = np.flatnonzero(self.is_alive(event))
        rows = alive[np.argsort(-self.blocks["bytes"][alive], kind="stable")[:count]]
        return [self.describe(int(row)) for row in rows]

    def by_layer(self, event: int) -> dict[str, Bytes]:
        """Composition after an event by layer, in the model's order; sums to `at`."""
        blocks = self.alive(event)
        layers = list(dict.fromkeys(self.layers))
        index = {layer: i for i, layer in enumerate(layers)}
        codes = np.asarray([index[layer] for layer in self.layers], np.int64)
        table = np.zeros((len(layers), N_CATEGORIES), np.int64)
        rows = codes[blocks["name"]]
        np.add.at(table, (rows, blocks["category"]), blocks["bytes"])
        np.add.at(table, (rows, Category.SLACK), blocks["slack"])
        return {
            layer: {c: int(row[c]) for c in Category if row[c]}
            for layer, row in zip(layers, table, strict=True)
            if row.any()
        }

    def by_name(self, event: int, category: Category) -> dict[str, int]:
        """Bytes of one category after an event by owner or module, largest first; slack by whose block it follows."""
        blocks, column = self.alive(event), "slack"
        if category is not Category.SLACK:
            blocks, column = blocks[blocks["category"] == category], "bytes"
        sums = np.bincount(blocks["name"], weights=blocks[column], minlength=len(self.trace.names))
        order = np.argsort(-sums, kind="stable")
        return {self.trace.names[i]: int(sums[i]) for i in order if sums[i]}

    @cached_property
    def layers(self) -> list[str]:
        """The layer of each of the trace's names; a KV cache's keys and values are the layer's they are of."""
        cached = {OUTPUT_LOSS: LOSS} | {
            f"{_CACHED}{layer.rsplit('.', 1)[1]}": layer for layer in numbered_layers(self.trace.names)
        }
        return [cached.get(layer, layer) for layer in map(layer_of, self.trace.names)]

    def describe(self, index: int) -> LiveBlock:
        """The facts known about a block, by its row."""
        trace, row, description = self.trace, self.blocks[index], int(self.made[index])
        born = int(row["born_mark"])
        phase, micro_batch, module = Phase.IDLE, 0, ""
        if born >= 0 and len(trace.marks):
            mark = trace.marks[born]
            phase, micro_batch = Phase(int(mark["phase"])), int(mark["micro_batch"])
            module = trace.names[mark["module"]]
        name = trace.names[row["name"]] if row["name"] >= 0 else ""
        made = trace.descriptions[description] if description >= 0 else Made()
        return LiveBlock(
            int(row["bytes"]), Category(int(row["category"])), name, phase, micro_batch, module, *made
        )  # fmt: skip

    # --- naming -------------------------------------------------------------

    def _outputs_alive_at_end(self) -> bool:
        """True if the logits are, or the loss with its graph, where logits are never made."""
        names, blocks = self.trace.names, self.blocks
        outputs = [names.index(name) for name in (LOGITS, OUTPUT_LOSS) if name in names]
        kept = (blocks["category"] == Category.LOGITS_LOSS) & np.isin(blocks["name"], outputs)
        return bool((kept & (blocks["died"] == len(self.trace.events))).any())

    def _name_owned(self) -> None:
        """Join the owners with the block alive at their address at their mark."""
        trace, blocks = self.trace, self.blocks
        if not len(trace.owners) or not len(blocks):
            return
        # Events carry non-decreasing marks, so a mark splits the events in two.
        when = np.searchsorted(_rising(trace.events["mark"]), trace.owners["mark"], side="right") - 1
        order = np.lexsort((blocks["born"], blocks["address"]))
        address, born = blocks["address"][order], blocks["born"][order]
        n = len(trace.events) + 2
        # One sortable key of (address, born): the last block at or before (address, when).
        unique, code = np.unique(address, return_inverse=True)
        at = np.searchsorted(unique, trace.owners["address"])
        known = (at < len(unique)) & (unique[np.minimum(at, len(unique) - 1)] == trace.owners["address"])
        slot = np.searchsorted(code * n + born + 1, at * n + when + 1, side="right") - 1
        row = order[np.maximum(slot, 0)]
        hit = known & (slot >= 0)
        hit &= (blocks["address"][row] == trace.owners["address"]) & (blocks["died"][row] > when)
        # The first to claim a block keeps it: owners are listed strongest first.
        last_wins = np.flatnonzero(hit)[::-1]
        self.claimed[row[last_wins]] = True
        blocks["category"][row[last_wins]] = trace.owners["category"][last_wins]
        blocks["name"][row[last_wins]] = trace.owners["name"][last_wins]
        blocks["made"][row[last_wins]] = trace.owners["made"][last_wins]

    def _name_rest(self) -> None:
        """Name what nobody owns by when it was made and when it was freed."""
        trace, blocks = self.trace, self.blocks
        # What is alive in a step that goes on, or that an error ended, has no lifetime to be judged by.
        unfinished = not trace.is_complete
        # An owner that calls its block unknown is believed too.
        free = (blocks["category"] == Category.UNKNOWN) & ~self.claimed
        # Outputs that the loop keeps hold their graph, and with it tensors that
        # outlive their own step: kept as Python attributes of autograd functions,
        # or leaves of the graph. They go when the next outputs replace them.
        outputs_kept = self._outputs_alive_at_end()
        held_over = free & (blocks["born"] < 0)
        graph_kept = trace.is_open or (trace.is_aborted and outputs_kept and len(trace.marks) > 0)
        held_over &= (blocks["died"] < len(trace.events)) | graph_kept
        blocks["category"][held_over] = Category.ACTIVATIONS
        free &= blocks["born"] >= 0
        if not free.any() or not len(trace.marks):
            return
        rows = np.flatnonzero(free)
        born = trace.marks[blocks["born_mark"][rows]]
        died_mark = blocks["died_mark"][rows]
        died = trace.marks[np.maximum(died_mark, 0)]
        lives_on = died_mark < 0
        died_phase = np.where(lives_on, -1, died["phase"].astype(np.int64))
        same_micro = born["micro_batch"] == died["micro_batch"]
        loss = trace.names.index(LOSS) if LOSS in trace.names else -1
        phase = born["phase"].astype(np.int64)
        blocks["name"][rows] = born["module"]

        forward, backward = phase == Phase.FORWARD, phase == Phase.BACKWARD
        recompute, optimizer = phase == Phase.RECOMPUTE, phase == Phase.OPTIMIZER
        category = np.full(len(rows), Category.UNKNOWN, np.int64)
        freed_here = (died_phase == phase) & same_micro
        # A block still alive in a trace of an open step may yet be freed in this phase;
        # made in forward, by far most of what is alive is there to be used in backward.
        kept = forward & ~freed_here & (~lives_on | unfinished | outputs_kept)
        kept |= backward & lives_on & outputs_kept & (not unfinished)  # the gradient of a leaf that is no parameter
        recomputed = recompute & ~freed_here & (~lives_on | unfinished)
        at_loss = (forward | backward) & (born["module"] == loss) & (~lives_on | unfinished)
        gone = freed_here | (~lives_on & (backward | optimizer | (phase == Phase.LOAD) | (phase == Phase.DATA)))
        gone |= ~lives_on & (phase == Phase.ZERO_GRAD)
        if unfinished:
            gone |= lives_on & (backward | optimizer)
            category[lives_on & (phase == Phase.LOAD)] = Category.PARAMETERS
            category[lives_on & (phase == Phase.DATA)] = Category.INPUTS
        category[gone] = Category.TEMPORARIES
        category[kept] = Category.ACTIVATIONS
        category[recomputed] = Category.RECOMPUTED
        category[at_loss] = Category.LOGITS_LOSS
        blocks["category"][rows] = category

    @cached_property
    def made(self) -> Ints:
        """Each block's description, -1 for none: its owner's, or what the same allocation was when it was watched."""
        trace, blocks = self.trace, self.blocks
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


KEY = np.dtype([(name, MADE[name]) for name in ("phase", "micro_batch", "module", "bytes", "nth")])


def allocation_keys(marks: npt.NDArray[Any], born_marks: Ints, sizes: Ints) -> npt.NDArray[Any]:
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


def _rising(marks: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return np.maximum.accumulate(marks) if len(marks) else marks


def paired(trace: StepTrace) -> tuple[npt.NDArray[Any], int]:
    """Join allocs with their frees: one row a block, all UNKNOWN, names 0.

    Returns:
        The rows in order of birth, and the number of frees without an alloc.
    """
    events, begin = trace.events, trace.begin
    n_begin, n = len(begin), len(events)
    stream = np.zeros(n_begin + n, EVENT)
    for column in ("address", "bytes", "slack"):
        stream[column][:n_begin] = begin[column]
    stream[n_begin:] = events
    order = np.lexsort((np.arange(len(stream)), stream["address"]))
    is_alloc = stream["bytes"][order] >= 0
    follows_same = np.zeros(len(stream), bool)
    if len(stream) > 1:
        follows_same[:-1] = stream["address"][order[1:]] == stream["address"][order[:-1]]
    # Whatever happens next at an address ends the block there: normally its
    # free; another alloc means the free was lost.
    ends = np.full(len(stream), n_begin + n, np.int64)
    ends[:-1] = np.where(follows_same[:-1], order[1:], n_begin + n)
    previous_is_alloc = np.zeros(len(stream), bool)
    previous_is_alloc[1:] = follows_same[:-1] & is_alloc[:-1]
    unmatched = int(np.count_nonzero(~is_alloc & ~previous_is_alloc))

    allocs = np.flatnonzero(is_alloc)
    allocs = allocs[np.argsort(order[allocs], kind="stable")]
    rows = np.zeros(len(allocs), BLOCK_ROW)
    position, end = order[allocs], ends[allocs]
    for column in ("address", "bytes", "slack"):
        rows[column] = stream[column][position]
    rows["born"] = np.maximum(position - n_begin, -1)
    rows["died"] = end - n_begin
    rows["born_mark"] = np.where(position >= n_begin, stream["mark"][position], -1)
    dies = end < n_begin + n
    rows["died_mark"] = np.where(dies, stream["mark"][np.minimum(end, max(len(stream) - 1, 0))], -1) if n else -1
    rows["category"] = Category.UNKNOWN
    rows["made"] = -1
    return rows, unmatched
