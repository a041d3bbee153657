"""The fold: from a stream of allocations to bytes by category, layer and owner.

Nothing here knows where the stream came from. A block's category follows from
who owned its address, and otherwise from its lifetime and from what was running
when it was made and freed. The one invariant: at every event, the sum over the
categories is the allocator's own count.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .allocation_keys import described
from .block_lives import paired
from .block_naming import name_by_life, name_owned
from .categories import N_CATEGORIES, Category
from .events import AllocatorPool, Made, Phase, StepTrace
from .module_names import CACHED, LOSS, OUTPUT_LOSS, layer_of, modules_of, numbered_layers
from .pool_bytes import PoolBytes, by_pool

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Bytes = dict[Category, int]


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
        pool: That it is cut from; None: not known.
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
    pool: AllocatorPool | None = None


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
        self.claimed = name_owned(trace, self.blocks)
        name_by_life(trace, self.blocks, self.claimed)

    # --- the fold -----------------------------------------------------------

    @cached_property
    def curve(self) -> Ints:
        """Bytes by category after each event, shape [N_CATEGORIES, events + 1].

        Column 0 is the state when the trace began; column i + 1 after event i.
        """
        n = len(self.trace.events)
        deltas = np.zeros((N_CATEGORIES, n + 2), np.int64)
        blocks, flat = self.blocks, deltas.reshape(-1)
        # NumPy adds up fast in one dimension, and what stands side by side, which fields of rows do not.
        sizes, slack = blocks["bytes"].copy(), blocks["slack"].copy()
        row = blocks["category"].astype(np.int64) * (n + 2)
        for add, when in ((np.add, blocks["born"] + 1), (np.subtract, blocks["died"] + 1)):
            add.at(flat, row + when, sizes)
            add.at(deltas[Category.SLACK], when, slack)
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

    def pools(self, event: int) -> list[PoolBytes]:
        """Bytes that each pool of the caching allocator holds after an event, in the order they came up."""
        return by_pool(self.trace, event, self.alive(event))

    @cached_property
    def pools_at_peak(self) -> list[PoolBytes]:
        """Bytes that each pool of the caching allocator holds at the peak."""
        return self.pools(self.peak.event)

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
        rows_by_layer = zip(layers, table.tolist(), strict=True)
        return {
            layer: {c: size for c, size in zip(Category, row, strict=True) if size}
            for layer, row in rows_by_layer
            if any(row)
        }

    def by_name(self, event: int, category: Category) -> dict[str, int]:
        """Bytes of one category after an event by owner or module, largest first; slack by whose block it follows."""
        blocks, column = self.alive(event), "slack"
        if category is not Category.SLACK:
            blocks, column = blocks[blocks["category"] == category], "bytes"
        sums = np.bincount(blocks["name"], weights=blocks[column], minlength=len(self.trace.names))
        held = np.flatnonzero(sums)
        order = held[np.argsort(-sums[held], kind="stable")].tolist()
        return {self.trace.names[i]: int(sums[i]) for i in order}

    @cached_property
    def layers(self) -> list[str]:
        """The layer of each of the trace's names; a KV cache's keys and values are the layer's they are of."""
        cached = {OUTPUT_LOSS: LOSS} | {
            f"{CACHED}{layer.rsplit('.', 1)[1]}": layer for layer in numbered_layers(self.modules)
        }
        return [cached.get(layer, layer) for layer in map(layer_of, self.modules)]

    @cached_property
    def modules(self) -> tuple[str, ...]:
        """The module that each of the trace's names belongs to."""
        names, owners = self.trace.names, self.trace.owners
        of_modules = np.isin(owners["category"], (Category.PARAMETERS, Category.BUFFERS, Category.GRADIENTS))
        return modules_of(names, frozenset(names[i] for i in np.unique(owners["name"][of_modules]).tolist()))

    @cached_property
    def made(self) -> Ints:
        """See `described`."""
        return described(self.trace, self.blocks)

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
        pool = trace.pools[row["pool"]] if row["pool"] >= 0 else None
        return LiveBlock(
            int(row["bytes"]), Category(int(row["category"])), name, phase, micro_batch, module, *made, pool
        )  # fmt: skip
