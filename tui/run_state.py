"""The state of one run, folded from its events one by one."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import median

from ..engine.config import RunConfig
from ..engine.run import Run, RunKind
from ..engine.run_events import (
    EngineEnded,
    Loaded,
    LossNotFinite,
    OutOfMemory,
    Paused,
    Recomputed,
    Resumed,
    RunEnded,
    RunEvent,
    RunFailed,
    RunStarted,
    StepEnded,
)

RECENT_STEPS = 64
"""Steps whose times are kept, for their median."""

STEADY_STEPS = 2
"""The step from which on a run holds all it will hold."""


@dataclass
class LayerRecomputes:
    """Recomputes of one layer.

    Attributes:
        count: How often in this run.
        bytes: What the latest one held afterwards; None: it is part of a
            segment, and counted at the segment's first layer.
        timed: Recomputes whose times are known and in `seconds`. Those of the first
            step, which loads kernels, are dropped once a later step has been timed.
        seconds: The sum of their times; None: no time is known.
    """

    count: int = 0
    bytes: int | None = None
    timed: int = 0
    seconds: float | None = None
    _warm: bool = False

    @property
    def mean_ms(self) -> float | None:
        """Milliseconds of one recompute."""
        return None if self.seconds is None else self.seconds * 1e3 / self.timed

    def time(self, event: Recomputed) -> None:
        """Take in how long one took; a predicted one says nothing of it."""
        if event.ms is None:
            return
        if event.step > 1 and not self._warm:
            self.timed, self.seconds, self._warm = 0, None, True
        self.timed += 1
        self.seconds = (self.seconds or 0.0) + event.ms / 1e3


@dataclass
class RunState:
    """One run, as far as its events tell.

    Attributes:
        run: Whose; None before the first.
        status: loading, training, held, stopped, done, failed, ended, predicted; starting
            before the first run.
        step: Last step that ended; 0 before the first.
        loss: Of that step.
        lost_loss: `nan` or `inf`, once the loss was no number.
        seconds: It took.
        recent_seconds: The last steps took.
        tokens: It trained on; None: its rows are no tokens.
        rows: It trained on.
        traced: Whether it was traced.
        train_seconds: Of all steps together.
        trace_seconds: Of these, spent on tracing.
        peak_bytes: Highest of all steps by the allocator's own counter.
        peak_step: Where that was.
        loaded_bytes: Allocated after loading.
        pinned_bytes: Of the host's memory, page-locked as it ended.
        parameters: Of the model.
        trainable: Of these, trained.
        recomputes: By layer.
        lit: Layers recomputed so far in the micro-batch under way, in order.
        last_recompute: The latest.
        refused: An allocation was, and the run has not gone on since.
        began_s: When it was started, on the engine's clock.
        next_index: Of the first event that is not folded yet.
    """

    run: Run | None = None
    status: str = "starting"
    step: int = 0
    loss: float | None = None
    lost_loss: str = ""
    seconds: float | None = None
    recent_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))
    tokens: int | None = 0
    rows: int = 0
    traced: bool = False
    train_seconds: float = 0.0
    trace_seconds: float | None = None
    peak_bytes: int | None = None
    peak_step: int = 0
    loaded_bytes: int | None = None
    pinned_bytes: int = 0
    parameters: int | None = None
    trainable: int | None = None
    recomputes: dict[str, LayerRecomputes] = field(default_factory=dict)
    lit: list[str] = field(default_factory=list)
    last_recompute: Recomputed | None = None
    refused: bool = False
    began_s: float = 0.0
    next_index: int = 0

    @property
    def number(self) -> int:
        """Number of the run, from 1; 0 before the first."""
        return self.run.id.number if self.run is not None else 0

    @property
    def config(self) -> RunConfig | None:
        """The run's configuration; None before the first run."""
        return self.run.config if self.run is not None else None

    @property
    def watched(self) -> bool:
        """True if the loop is somebody's own."""
        return self.run is not None and self.run.kind is RunKind.WATCHED

    @property
    def predicted(self) -> bool:
        """True if it has not happened."""
        return self.run is not None and self.run.kind is RunKind.PREDICTED

    @property
    def imported(self) -> bool:
        """True if it is a snapshot of PyTorch's, whose settings nobody knows."""
        return self.run is not None and self.run.kind is RunKind.IMPORTED

    @property
    def median_seconds(self) -> float | None:
        """The median time of the last steps; None: no time is known."""
        return median(self.recent_seconds) if self.recent_seconds else None

    @property
    def tokens_per_s(self) -> float | None:
        """Throughput of the last step; None where rows are no tokens."""
        return self.tokens / self.seconds if self.seconds and self.tokens else None

    @property
    def rows_per_s(self) -> float | None:
        """Throughput of the last step in rows."""
        return self.rows / self.seconds if self.seconds and self.rows else None

    @property
    def trace_share(self) -> float | None:
        """Part of the time so far that tracing took, 0 to 1."""
        if self.trace_seconds is None or not self.train_seconds:
            return None
        return min(1.0, self.trace_seconds / self.train_seconds)

    def fold_new(self) -> bool:
        """Fold what the run has told since the last call; returns whether that was anything."""
        events = self.run.events(self.next_index) if self.run is not None else ()
        for event in events:
            self.next_index = event.index + 1
            self.fold(event)
        return bool(events)

    def fold(self, event: RunEvent) -> None:
        """Take in one event of this run."""
        match event:
            case RunStarted():
                self.status, self.began_s = "loading", event.time_s
            case Loaded():
                self.parameters, self.trainable = event.parameters, event.trainable_parameters
                self.loaded_bytes, self.status = event.allocated_bytes, "training"
            case Paused():
                self.status = "held" if self.running else self.status
            case Resumed():
                self.status = "training" if self.status == "held" else self.status
            case StepEnded():
                self._fold_step(event)
            case LossNotFinite():
                self.lost_loss = event.loss
            case Recomputed():
                self._fold_recompute(event)
            case OutOfMemory() | RunFailed():
                self.status, self.refused = "failed", isinstance(event, OutOfMemory)
            case EngineEnded() if event.by:
                self.status = "ended"
            case EngineEnded() if self.running or self.status == "starting":
                self.status = "failed"
            case RunEnded():
                self.status, self.pinned_bytes = event.reason, event.pinned_bytes or 0
            case _:
                pass

    @property
    def steady(self) -> bool:
        """True if it has gone through all it will hold: the second step runs beside what the first has left."""
        return self.step >= STEADY_STEPS

    @property
    def running(self) -> bool:
        """True if there is something to hold or stop."""
        return self.status in ("loading", "training", "held")

    def _fold_step(self, event: StepEnded) -> None:
        if self.refused:  # a loop of somebody's own has caught the error and goes on
            self.status, self.refused = "training", False
        self.step, self.loss, self.seconds = event.step, event.loss, event.seconds
        self.tokens, self.rows = event.tokens, event.rows
        self.traced, self.trace_seconds = event.traced, event.trace_seconds
        if event.seconds is not None:
            self.recent_seconds.append(event.seconds)
            self.train_seconds += event.seconds
        peak = event.peak_bytes
        if peak is not None and (self.peak_bytes is None or peak > self.peak_bytes):
            self.peak_bytes, self.peak_step = peak, event.step

    def _fold_recompute(self, event: Recomputed) -> None:
        last = self.last_recompute
        if last is None or (last.step, last.micro_batch) != (event.step, event.micro_batch):
            self.lit.clear()
        self.last_recompute = event
        self.lit.extend(event.layers)
        for position, layer in enumerate(event.layers):
            known = self.recomputes.setdefault(layer, LayerRecomputes())
            known.count += 1
            if position == 0:
                known.bytes = event.bytes
                known.time(event)


def state_of(run: Run) -> RunState:
    """The state of a run, with all that it has told."""
    state = RunState(run)
    state.fold_new()
    return state
