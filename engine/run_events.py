"""Typed events of a run: one frozen class a kind, the same on the wire, in recordings and in `--jsonl`.

An allocation is an event of a trace (`events.EVENT`); what is here is what a
run says of itself and must not be lost. Loads neither torch nor textual.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import msgspec

from .events import Whole
from .out_of_memory.report import OutOfMemoryReport


def _kind(class_name: str) -> str:
    """`StepEnded` -> `step_ended`: the kind in JSON."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", class_name).lower()


class RunEvent(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag=_kind):
    """Base of all; a feed gives it its place when it is told.

    Attributes:
        text: One line for people.
        index: Position in the source's log, from 0.
        time_s: Seconds on the engine's monotonic clock.
        run: Number of the run it belongs to, from 1; 0: of the engine, before any run.
    """

    text: str
    index: Whole = 0
    time_s: float = 0.0
    run: Whole = 0

    frequent: ClassVar[bool] = False
    """Comes with every step: a log that has grown long forgets the old ones."""

    @property
    def kind(self) -> str:
        """Name of the kind, as in JSON: `step_ended`."""
        return str(self.__struct_config__.tag)

    @property
    def words(self) -> str:
        """Name of the kind for people: `step ended`."""
        return self.kind.replace("_", " ")

    @property
    def is_problem(self) -> bool:
        """True if something went wrong."""
        return False

    def figures(self) -> dict[str, Any]:
        """Fields of this kind alone, by name."""
        return {name: getattr(self, name) for name in self.__struct_fields__ if name not in _COMMON}


_COMMON = frozenset(RunEvent.__struct_fields__)


class RunStarted(RunEvent, frozen=True):
    """The run has begun; its configuration is the run's (`Run.config`).

    Attributes:
        watched: The loop is somebody's own.
    """

    watched: bool = False


class Loaded(RunEvent, frozen=True):
    """The model is on the device.

    Attributes:
        parameters: Elements of all parameters.
        trainable_parameters: Elements of those that are trained.
        allocated_bytes: By the allocator, then.
        seconds: Loading took.
    """

    parameters: Whole
    trainable_parameters: Whole
    allocated_bytes: Whole | None = None
    seconds: float | None = None


class StepEnded(RunEvent, frozen=True):
    """An optimizer step has ended. None: not known, as of a prediction's loss.

    Attributes:
        step: From 1.
        loss: Mean over the micro-batches.
        seconds: It took.
        tokens: It trained on; None: its rows are no tokens.
        rows: It trained on, in all micro-batches; 0: not known.
        allocated_bytes: When it ended, by the allocator.
        peak_bytes: The most allocated since it began; None where the counter is not ours to reset.
        reserved_bytes: Held by the caching allocator; None without one.
        traced: Whether its allocations were recorded.
        trace_seconds: Spent on tracing since the run began.
    """

    step: Whole
    loss: float | None = None
    seconds: float | None = None
    tokens: Whole | None = 0
    rows: Whole = 0
    allocated_bytes: Whole | None = None
    peak_bytes: Whole | None = None
    reserved_bytes: Whole | None = None
    traced: bool = False
    trace_seconds: float | None = None

    frequent: ClassVar[bool] = True


class LossNotFinite(RunEvent, frozen=True):
    """The loss is no number any more: what is trained from here on is lost. Told once a run.

    Attributes:
        step: That ended with it.
        loss: `nan`, `inf` or `-inf`; JSON has no number for them.
    """

    step: Whole
    loss: str

    @property
    def is_problem(self) -> bool:
        """Always."""
        return True


class Recomputed(RunEvent, frozen=True):
    """A checkpointed segment was computed again during backward.

    Attributes:
        step: Optimizer step, from 1.
        micro_batch: From 0.
        layers: Of the segment, first to last.
        bytes: Held after the recompute and not before.
        ms: Duration; None: not known.
        early_stop: Whether it ended as soon as everything needed was there.
    """

    step: Whole
    micro_batch: Whole
    layers: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    bytes: Whole
    ms: float | None = None
    early_stop: bool = False

    frequent: ClassVar[bool] = True


class Paused(RunEvent, frozen=True):
    """The run is held at a micro-batch."""

    @property
    def words(self) -> str:
        """A run is held, while it is a view that is paused."""
        return "held"


class Resumed(RunEvent, frozen=True):
    """The run goes on."""

    @property
    def words(self) -> str:
        """Words for people."""
        return "goes on"


class OutOfMemory(RunEvent, frozen=True):
    """An allocation was refused.

    Attributes:
        step: Under way.
        phase: Of the loop, then: `backward`.
        requested_bytes: Asked for; None: not known.
        allocated_bytes: By the allocator, then.
        report: All that was to be known at that instant; None: nothing was, as in older recordings.
    """

    step: Whole
    phase: str
    requested_bytes: Whole | None = None
    allocated_bytes: Whole | None = None
    report: OutOfMemoryReport | None = None

    @property
    def is_problem(self) -> bool:
        """Always."""
        return True


class MemoryLeak(RunEvent, frozen=True):
    """A leak, told before it kills: bytes alive at the same point of every step grow from step to step.

    Attributes:
        step: That has ended.
        growth_bytes: A step.
        owner: What grows, as far as that was traced; empty: not known.
        steps_left: After which memory runs out at that pace; None: not known.
    """

    step: Whole
    growth_bytes: Whole
    owner: str = ""
    steps_left: Whole | None = None

    @property
    def is_problem(self) -> bool:
        """Always."""
        return True


class RunFailed(RunEvent, frozen=True):
    """The run ended by an error.

    Attributes:
        detail: The traceback, for the log.
        mistake: Nothing broke: the configuration cannot be run here, which the user can put right.
    """

    detail: str = ""
    mistake: bool = False

    @property
    def is_problem(self) -> bool:
        """Always."""
        return True


class Refused(RunEvent, frozen=True):
    """A command had no effect.

    Attributes:
        path: Of the recording, if saving one is what was refused.
        detail: More, for the log.
    """

    path: str = ""
    detail: str = ""

    @property
    def is_problem(self) -> bool:
        """Always."""
        return True


class RunEnded(RunEvent, frozen=True):
    """The run is over and everything was given back.

    Attributes:
        reason: `done`, `stopped` or `failed`.
        steps: That ended.
        leaked_bytes: Allocated beyond what was allocated before the run; None: not counted.
        workspace_bytes: Kept by libraries such as cuBLAS from run to run.
        managed_bytes: In CUDA managed memory, given back.
        pinned_bytes: Of the host's memory, page-locked by torch as the run ended; None: not counted.
    """

    reason: str
    steps: Whole = 0
    leaked_bytes: Whole | None = None
    workspace_bytes: Whole | None = None
    managed_bytes: Whole | None = None
    pinned_bytes: Whole | None = None

    @property
    def is_problem(self) -> bool:
        """A leak is one."""
        return bool(self.leaked_bytes)


class Saved(RunEvent, frozen=True):
    """A recording was written.

    Attributes:
        path: Of it.
    """

    path: str


class Note(RunEvent, frozen=True):
    """Something worth knowing.

    Attributes:
        path: Of the recording, if saving one was cancelled.
    """

    path: str = ""


class Output(RunEvent, frozen=True):
    """A line that the engine or its libraries printed."""


class EngineEnded(RunEvent, frozen=True):
    """The engine's process has ended.

    Attributes:
        by: Who ended it; empty: nobody did.
        detail: The last of its log, where nobody did.
    """

    by: str = ""
    detail: str = ""

    @property
    def is_problem(self) -> bool:
        """True if nobody ended it."""
        return not self.by


AnyRunEvent = (
    RunStarted | Loaded | StepEnded | LossNotFinite | Recomputed | Paused | Resumed | OutOfMemory | MemoryLeak
    | RunFailed | Refused | RunEnded | Saved | Note | Output | EngineEnded
)  # fmt: skip
"""Any event of a run, for a decoder: its `kind` says which."""


def placed(event: RunEvent, index: int, time_s: float, run: int) -> RunEvent:
    """The event with its place in a log."""
    return msgspec.structs.replace(event, index=index, time_s=time_s, run=run)


def from_plain(plain: Sequence[Mapping[str, Any]]) -> list[RunEvent]:
    """Events from JSON.

    Raises:
        msgspec.ValidationError: One of them is none.
    """
    return list(msgspec.convert(plain, list[AnyRunEvent]))


def to_plain(events: Sequence[RunEvent]) -> list[dict[str, Any]]:
    """Events ready for JSON; the inverse of `from_plain`."""
    return [msgspec.to_builtins(event) for event in events]
