"""The report of an allocation that was refused: plain figures, the same on the wire, in a recording and in JSON.

Loads neither torch nor textual.
"""

from __future__ import annotations

import enum

import msgspec

from ..config import Value
from ..events import Whole


class Verdict(enum.StrEnum):
    """The reason why an allocation was refused."""

    TOO_BIG = "too_big"
    """It alone is more than the device could ever give to torch."""
    FULL = "full"
    """All that is free, cached or not, is less than what was asked for."""
    FRAGMENTED = "fragmented"
    """As much is free in torch's cache, but in no piece that is large enough."""
    STRANDED = "stranded"
    """A piece that is large enough is free, but in another stream's or another pool's cache."""
    SOMEBODY_ELSES = "somebody_elses"
    """It would have fitted, were it not for what other processes hold."""
    GROWN = "grown"
    """Full, and from step to step more stays alive: a leak."""
    MOVED = "moved"
    """Full, in a step that holds what the steps before did not: optimizer state, gradients, kept outputs."""

    @property
    def words(self) -> str:
        """Words for people: `somebody else's`."""
        said = {Verdict.SOMEBODY_ELSES: "somebody else's", Verdict.MOVED: "came later"}
        return said.get(self, self.value.replace("_", " "))


class LargestTensor(msgspec.Struct, frozen=True, kw_only=True):
    """One of the largest tensors alive.

    Attributes:
        bytes: Asked for.
        category: A category's key: `activations`.
        owner: The tensor's name, if it has an owner: `layers.0.mlp.weight`; else empty.
        module: That made it; empty where that was not traced.
        description: Operator, dtype and shape as far as they are known: `aten.mm [8192, 16384] bfloat16`.
    """

    bytes: Whole
    category: str
    owner: str = ""
    module: str = ""
    description: str = ""


class Pool(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes that the caching allocator holds free for one stream, in one pool.

    Attributes:
        stream: As the allocator numbers it; 0: the default stream.
        pool: `large` or `small`, with its owner's number in brackets if it is a private one (a CUDA graph's).
        cached_bytes: Reserved and free.
        largest_free_block_bytes: The largest piece of that.
    """

    stream: Whole
    pool: str
    cached_bytes: Whole
    largest_free_block_bytes: Whole


class Fix(msgspec.Struct, frozen=True, kw_only=True):
    """A change of the configuration, with what it is predicted to need.

    Attributes:
        set: Value by option.
        peak_bytes: Predicted.
        fits: Whether that is within the device.
        keeps_mathematics: Whether the training computes the same.
        text: In a few words: what it costs, or the line to write in a script.
    """

    set: dict[str, Value]
    peak_bytes: Whole
    fits: bool
    keeps_mathematics: bool
    text: str = ""


class OutOfMemoryReport(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of an allocation that was refused. None: not known.

    Attributes:
        asked_bytes: Asked of the allocator.
        verdict: Why it was refused.
        reason: The verdict in one sentence, with bytes.
        phase: Of the loop: `backward`.
        module: That was running; empty: none, or not known.
        operator: That asked: `aten.mm`; empty: not known.
        dtype: Of the tensor it was to be for; empty: not known.
        shape: Of that tensor.
        step: Under way, from 1; 0: loading.
        micro_batch: From 0.
        rank: Of the job.
        device: `cuda:0`.
        traced: Whether the step's allocations were recorded: else what had no owner yet is `unknown`.
        allocated_bytes: By the allocator, then.
        by_category: Bytes by category's key; they sum to `allocated_bytes`.
        largest: The ten largest tensors alive, largest first.
        cached_bytes: Reserved by the allocator and free.
        free_bytes: Of the device, that nobody has reserved; within the limit if there is one.
        largest_free_block_bytes: In the cache, of any pool.
        pools: The cache by stream and pool.
        total_bytes: Of the device.
        limit_bytes: That torch may reserve; None: no limit is set.
        outside_torch_bytes: Of the device, neither torch's nor free: the next three and what nobody accounts for.
        context_bytes: Of this process and not torch's: CUDA's context and libraries.
        nccl_bytes: Of that, NCCL's.
        others_bytes: Of other processes.
        expandable_segments: Whether the allocator's segments can grow, so that it hardly fragments.
        growth_bytes: A step, if live bytes rise from step to step; else 0.
        growth_owner: What grows, as far as that was traced.
        error: What the exception says.
    """

    asked_bytes: Whole
    verdict: Verdict
    reason: str
    phase: str
    step: Whole
    allocated_bytes: Whole
    by_category: dict[str, Whole]
    total_bytes: Whole
    module: str = ""
    operator: str = ""
    dtype: str = ""
    shape: tuple[Whole, ...] = ()
    micro_batch: Whole = 0
    rank: Whole = 0
    device: str = ""
    traced: bool = True
    largest: tuple[LargestTensor, ...] = ()
    cached_bytes: Whole = 0
    free_bytes: Whole = 0
    largest_free_block_bytes: Whole = 0
    pools: tuple[Pool, ...] = ()
    limit_bytes: Whole | None = None
    outside_torch_bytes: Whole | None = None
    context_bytes: Whole | None = None
    nccl_bytes: Whole | None = None
    others_bytes: Whole | None = None
    expandable_segments: bool = False
    growth_bytes: Whole = 0
    growth_owner: str = ""
    error: str = ""

    @property
    def room_bytes(self) -> int:
        """The most that this process may hold in torch: the limit, or the device without what lies outside."""
        room = self.total_bytes - (self.outside_torch_bytes or 0)
        return room if self.limit_bytes is None else min(room, self.limit_bytes)


def size_text(size: int) -> str:
    """Bytes for people: `1.50 GiB`, `12.0 MiB`, `512 bytes`."""
    for unit, bytes_each, digits in (("GiB", 1 << 30, 2), ("MiB", 1 << 20, 1), ("KiB", 1 << 10, 1)):
        if abs(size) >= bytes_each:
            return f"{size / bytes_each:.{digits}f} {unit}"
    return f"{size} bytes"
