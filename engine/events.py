"""The units that travel: what an engine tells, and everything else reads.

None of these ever holds a tensor, a module or a device: a reference would
itself keep memory alive. Loads neither torch nor textual.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

Whole = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]
"""A whole number whose sums, too, 64 bits hold; what arrives beyond is refused."""


class Phase(enum.IntEnum):
    """A part of the training loop."""

    LOAD = 0
    DATA = 1
    FORWARD = 2
    BACKWARD = 3
    RECOMPUTE = 4
    OPTIMIZER = 5
    ZERO_GRAD = 6
    IDLE = 7

    @property
    def title(self) -> str:
        """Name for people: `optimizer step`."""
        return {Phase.OPTIMIZER: "optimizer step", Phase.ZERO_GRAD: "zero_grad", Phase.DATA: "batch"}.get(
            self, self.name.lower()
        )


EVENT = np.dtype(
    [("address", "u8"), ("bytes", "i8"), ("slack", "i8"), ("mark", "i8"), ("time_us", "i8"), ("pool", "i2")]
)
"""One allocation (`bytes` > 0) or free (`bytes` < 0), in the order they happened.

`bytes` is what was asked for; `slack` (same sign) what the allocator handed out
beyond it, so that `bytes + slack` is what its own counter moved by. `mark`
indexes the trace's marks: what was running. `pool` indexes the trace's pools:
whose memory the block is cut from; -1: not known, or there is no caching allocator.
"""

MARK = np.dtype([("phase", "u1"), ("micro_batch", "i2"), ("module", "i4")])
"""The work going on from one tag to the next. `module` indexes the names."""

BLOCK = np.dtype([("address", "u8"), ("bytes", "i8"), ("slack", "i8"), ("pool", "i2")])
"""A block that was alive when the trace began."""

SEGMENT = np.dtype([("event", "i8"), ("pool", "i2"), ("bytes", "i8")])
"""Memory that a pool takes from the device (`bytes` > 0) or gives back, in the order it happens.

It happens just before an event, or after the last one that there is; at -1 stands
what each pool held when the trace began.
"""

OWNER = np.dtype([("address", "u8"), ("mark", "i4"), ("category", "u1"), ("name", "i4"), ("made", "i4")])
"""The owner of an address at a mark: a parameter, a `.grad`, an optimizer's tensor.

It speaks of the block alive at that address when the mark was set; addresses
are reused within a step, so the address alone says nothing. `made` indexes the
trace's descriptions of tensors.
"""

MADE = np.dtype(
    [("phase", "u1"), ("micro_batch", "i2"), ("module", "i4"), ("bytes", "i8"), ("nth", "i4"), ("made", "i4")]
)
"""The description of the `nth` allocation of so many bytes by a module in a phase.

Learned once, in a step whose operators were watched (`tracing/describe.py`);
the steps of a run repeat one another, so it holds for the others.
"""


class AllocatorPool(NamedTuple):
    """A pool of the caching allocator: what is freed in one, no request of another is given.

    Attributes:
        stream: That was current when its blocks were asked for, as CUDA numbers it; 0: the default one.
        size_class: `small`: of requests up to 1 MiB; or `large`.
        private: Identity of a pool apart, of a CUDA graph or a `torch.cuda.MemPool`; (0, 0): it is none.
    """

    stream: Whole
    size_class: str
    private: tuple[Whole, Whole] = (0, 0)

    @property
    def name(self) -> str:
        """Name among the stream's pools: `small`, `large (0, 3)`."""
        return self.size_class if self.private == (0, 0) else f"{self.size_class} {self.private}"


class Made(NamedTuple):
    """A tensor's description, or that of a buffer inside an operator.

    Attributes:
        operator: What made it, as PyTorch spells it: `aten.mm`; empty where
            nobody watched.
        dtype: `float16`; empty for a buffer that no operator returned.
        shape: Of the tensor; of packed weights that of the packed storage.
    """

    operator: str = ""
    dtype: str = ""
    shape: tuple[int, ...] = ()


class Counted(NamedTuple):
    """The allocator's own counters for a step, to hold the ledger's sums against.

    Attributes:
        end_bytes: Allocated when the step ended.
        peak_bytes: The most since the step began; None where the counter was
            not reset then: for a load, in somebody else's script.
    """

    end_bytes: Whole
    peak_bytes: Whole | None


class PhaseSpan(NamedTuple):
    """One phase of a traced step: events `begin` to `end` (exclusive)."""

    phase: Phase
    micro_batch: Whole
    begin: Whole
    end: Whole
    begin_us: Whole
    end_us: Whole


class Recompute(NamedTuple):
    """One checkpointed segment computed again during backward.

    Attributes:
        step: Optimizer step, from 1.
        micro_batch: From 0.
        layers: The layers of the segment, first to last.
        bytes: Held after the recompute and not before: what was
            re-materialised.
        ms: Duration; on a GPU between two CUDA events on the stream.
        early_stop: Whether it ended as soon as everything needed was there.
    """

    step: int
    micro_batch: int
    layers: tuple[str, ...]
    bytes: int
    ms: float
    early_stop: bool


class EndKind(enum.StrEnum):
    """The state of a traced step at its last event."""

    OPEN = "open"
    COMPLETE = "complete"
    ABORTED = "aborted"


class Ending(NamedTuple):
    """The ending of a traced step, if it has one.

    Attributes:
        kind: Open: it goes on, what is alive may yet change category. Aborted: an
            error left it where it was.
        error: Which, in one line; empty unless aborted.
        requested_bytes: What was asked for when memory ran out; None: not known, or another error.
    """

    kind: EndKind
    error: str = ""
    requested_bytes: Whole | None = None


OPEN, COMPLETE = Ending(EndKind.OPEN), Ending(EndKind.COMPLETE)


@dataclass(frozen=True, slots=True, eq=False)
class StepTrace:
    """Every allocation of one step, as columns.

    Attributes:
        step: Optimizer step from 1; 0 is loading the model.
        events: dtype EVENT.
        marks: dtype MARK.
        begin: dtype BLOCK: alive when the trace began.
        owners: dtype OWNER.
        names: Modules and owners by index; `names[0]` is the model itself.
        phases: In order, none overlapping; recomputes lie inside backward.
        ending: How the step ended, if it has.
        micro_batches: Of this step.
        counted: By the allocator itself; None while the step goes on.
        made: dtype MADE.
        descriptions: What `made` and the owners index.
        segments: dtype SEGMENT.
        pools: Of the caching allocator, by index; empty: it has none, or nobody knows them.
    """

    step: int
    events: npt.NDArray[Any]
    marks: npt.NDArray[Any]
    begin: npt.NDArray[Any]
    owners: npt.NDArray[Any]
    names: tuple[str, ...]
    phases: tuple[PhaseSpan, ...]
    ending: Ending = COMPLETE
    micro_batches: int = 1
    counted: Counted | None = None
    made: npt.NDArray[Any] = field(default_factory=lambda: np.empty(0, MADE))
    descriptions: tuple[Made, ...] = ()
    segments: npt.NDArray[Any] = field(default_factory=lambda: np.empty(0, SEGMENT))
    pools: tuple[AllocatorPool, ...] = ()

    @property
    def held_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes allocated, slack included: when the trace began, and after each event [events + 1]."""
        held = np.zeros(len(self.events) + 1, np.int64)
        held[0] = self.begin["bytes"].sum() + self.begin["slack"].sum()
        held[1:] = self.events["bytes"]
        held[1:] += self.events["slack"]
        return held.cumsum()

    @property
    def is_open(self) -> bool:
        """True if the step goes on."""
        return self.ending.kind is EndKind.OPEN

    @property
    def is_aborted(self) -> bool:
        """True if an error ended the step where it was."""
        return self.ending.kind is EndKind.ABORTED

    @property
    def is_complete(self) -> bool:
        """True if the step went through to its end."""
        return self.ending.kind is EndKind.COMPLETE


class CacheState(NamedTuple):
    """The caching allocator at an instant.

    Attributes:
        reserved_bytes: Held from the device.
        allocated_bytes: Handed out, of that.
        largest_free_block_bytes: The largest piece of the rest.
        gaps_bytes: Free between blocks in use: their segments cannot be given back, and no larger request
            fits in. With expandable segments there are hardly any.
    """

    reserved_bytes: Whole
    allocated_bytes: Whole
    largest_free_block_bytes: Whole
    gaps_bytes: Whole


@dataclass(frozen=True, slots=True)
class Gauge:
    """The cheap reading, ten times a second. None: not known on this machine.

    Attributes:
        time_s: Seconds on the engine's monotonic clock.
        allocated_bytes: By the allocator's own counter.
        reserved_bytes: Held by the caching allocator; None without one.
        managed_bytes: CUDA managed memory of paged optimizers.
        process_bytes: On the device by this process (NVML); on CPU its RSS.
        device_used_bytes: By everybody.
        device_total_bytes: Capacity.
        phase: What the loop is doing now.
        step: Step under way.
        context_bytes: CUDA context and libraries: this process's bytes beyond
            torch's and NCCL's buffers, measured when a run began and again when its first
            steps had loaded their kernels, NCCL's among them.
        nccl_bytes: Buffers of NCCL's communicators, taken then too, by its own count or log;
            None: there are none, or NCCL does not tell, and they are among the context's.
        pinned_bytes: Of the host's memory, page-locked by torch: what was offloaded, and cached for it.
        cache: The caching allocator as it was when the last traced step was at its peak.
    """

    time_s: float
    allocated_bytes: Whole
    reserved_bytes: Whole | None
    managed_bytes: Whole
    process_bytes: Whole | None
    device_used_bytes: Whole | None
    device_total_bytes: Whole
    phase: Phase = Phase.IDLE
    step: Whole = 0
    context_bytes: Whole | None = None
    nccl_bytes: Whole | None = None
    pinned_bytes: Whole = 0
    cache: CacheState | None = None

    @property
    def cached_bytes(self) -> int | None:
        """Reserved by the allocator but not allocated: free for this process only."""
        return None if self.reserved_bytes is None else self.reserved_bytes - self.allocated_bytes

    @property
    def usable_bytes(self) -> int | None:
        """The most that one request can be given now: the device's free bytes, and of the cache what is no gap.

        The gaps are those that the last traced step had at its peak; where nothing is allocated there are none.
        """
        if self.device_used_bytes is None:
            return None
        cached, gaps, largest = self.cached_bytes or 0, 0, 0
        if self.cache is not None and self.allocated_bytes:
            gaps, largest = self.cache.gaps_bytes, min(self.cache.largest_free_block_bytes, cached)
        free = max(0, self.device_total_bytes - self.device_used_bytes)
        return max(free + max(0, cached - gaps), largest)

    @property
    def beyond_torch_bytes(self) -> int | None:
        """This process's bytes that torch does not hold: context, libraries, and what nobody accounts for."""
        if self.process_bytes is None or self.reserved_bytes is None:
            return None
        return self.process_bytes - self.reserved_bytes

    @property
    def unaccounted_bytes(self) -> int | None:
        """Bytes the process holds now beyond torch's and beyond the context as it was measured."""
        if self.beyond_torch_bytes is None or self.context_bytes is None:
            return None
        return self.beyond_torch_bytes - self.context_bytes - (self.nccl_bytes or 0)

    @property
    def others_bytes(self) -> int | None:
        """Used on the device by other processes; managed memory NVML counts to none."""
        if self.process_bytes is None or self.device_used_bytes is None:
            return None
        return max(0, self.device_used_bytes - self.process_bytes - self.managed_bytes)


@dataclass(frozen=True, slots=True)
class Environment:
    """The machine and device of a run: enough to say which settings can run there, and why others cannot.

    Attributes:
        device: `cpu` or `cuda:0`.
        device_name: As the vendor calls it.
        device_total_bytes: Capacity.
        capability: CUDA compute capability, `9.0`; None on CPU.
        driver: NVIDIA driver version, if any.
        packages: Installed version by distribution name; absent if missing.
        python: Version.
        gpus: GPUs of the machine that a job of several ranks would be on.
        host_bytes: The machine's own memory; 0: not known.
        host: The machine's name in its network; empty: not known.
    """

    device: str
    device_name: str
    device_total_bytes: Whole
    capability: str | None = None
    driver: str | None = None
    packages: dict[str, str] = field(default_factory=dict)
    python: str = ""
    gpus: Whole = 1
    host_bytes: Whole = 0
    host: str = ""

    @property
    def on_gpu(self) -> bool:
        """True if runs happen on a CUDA device."""
        return self.device.startswith("cuda")
