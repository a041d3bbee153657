"""What one run has told so far, folded from its milestones one by one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..engine import techniques
from ..engine.config import RunConfig, UserError
from ..engine.events import Kind, Milestone, Recompute
from ..profiles import resolved

STEADY_STEPS = 2
"""From this step on a run holds all it will hold."""


@dataclass
class LayerRecomputes:
    """Recomputes of one layer.

    Attributes:
        count: How often in this run.
        bytes: What the latest one held afterwards; None: it is part of a
            segment, and counted at the segment's first layer.
        timed: How many `seconds` is the sum of: not those of the run's first step,
            in which kernels are loaded, as soon as there are others.
        seconds: Of these together; None likewise.
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

    def time(self, event: Recompute) -> None:
        """Take in how long one took."""
        if event.step > 1 and not self._warm:
            self.timed, self.seconds, self._warm = 0, None, True
        self.timed += 1
        self.seconds = (self.seconds or 0.0) + event.ms / 1e3


@dataclass
class RunState:
    """One run.

    Attributes:
        number: From 1; 0 before the first.
        status: loading, training, held, stopped, done, failed, ended; starting
            before the first run.
        config: What it runs.
        watched: The loop is somebody's own: the configuration says what could be told of it.
        step: Last step that ended; 0 before the first.
        loss: Of that step.
        seconds: It took.
        tokens: It trained on.
        traced: Whether it was traced.
        train_seconds: Of all steps together.
        trace_seconds: Of these, spent on tracing.
        peak_bytes: Highest of all steps by the allocator's own counter.
        peak_step: Where that was.
        parameters: Of the model.
        trainable: Of these, trained.
        recomputes: By layer.
        lit: Layers recomputed so far in the micro-batch under way, in order.
        last_recompute: The latest.
        began_s: When it was started, on the engine's clock.
        memory: What the engine says of it once it has ended (`Report.memory`).
    """

    number: int = 0
    status: str = "starting"
    config: RunConfig | None = None
    watched: bool = False
    step: int = 0
    loss: float | None = None
    seconds: float | None = None
    tokens: int = 0
    traced: bool = False
    train_seconds: float = 0.0
    trace_seconds: float | None = None
    peak_bytes: int | None = None
    peak_step: int = 0
    parameters: int | None = None
    trainable: int | None = None
    recomputes: dict[str, LayerRecomputes] = field(default_factory=dict)
    lit: list[str] = field(default_factory=list)
    last_recompute: Recompute | None = None
    began_s: float = 0.0
    memory: dict[str, Any] | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Throughput of the last step."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def trace_share(self) -> float | None:
        """Part of the time so far that tracing took, 0 to 1."""
        if self.trace_seconds is None or not self.train_seconds:
            return None
        return min(1.0, self.trace_seconds / self.train_seconds)

    def fold(self, milestone: Milestone) -> None:
        """Take in one milestone of this run."""
        data = milestone.data
        match milestone.kind:
            case Kind.RUN_STARTED:
                self.status, self.config, self.began_s = "loading", _config_of(data), milestone.time_s
                self.watched = bool(data.get("watched"))
            case Kind.LOADED:
                self.parameters, self.trainable = data.get("parameters"), data.get("trainable_parameters")
                self.status = "training"
            case Kind.PAUSED:
                self.status = "held" if self.running else self.status
            case Kind.RESUMED:
                self.status = "training" if self.status == "held" else self.status
            case Kind.STEP_ENDED:
                self._fold_step(data)
            case Kind.RECOMPUTED:
                self._fold_recompute(data)
            case Kind.OUT_OF_MEMORY | Kind.RUN_FAILED:
                self.status = "failed"
            case Kind.ENGINE_ENDED if milestone.data.get("by"):
                self.status = "ended"
            case Kind.ENGINE_ENDED if self.running or self.status == "starting":
                self.status = "failed"
            case Kind.RUN_ENDED:
                self.status, self.memory = str(data.get("reason", "stopped")), data.get("memory")
            case _:
                pass

    @property
    def steady(self) -> bool:
        """Whether it has gone through all it will hold: the second step runs beside what the first has left."""
        return self.step >= STEADY_STEPS

    @property
    def running(self) -> bool:
        """Whether there is something to hold or stop."""
        return self.status in ("loading", "training", "held")

    def _fold_step(self, data: dict[str, Any]) -> None:
        self.step, self.loss = int(data["step"]), data.get("loss")
        self.seconds, self.tokens = data.get("seconds"), int(data.get("tokens") or 0)
        self.traced, self.trace_seconds = bool(data.get("traced")), data.get("trace_seconds")
        self.train_seconds += self.seconds or 0.0
        peak = data.get("peak_bytes")
        if peak is not None and (self.peak_bytes is None or peak > self.peak_bytes):
            self.peak_bytes, self.peak_step = int(peak), self.step

    def _fold_recompute(self, data: dict[str, Any]) -> None:
        event = Recompute(
            int(data["step"]), int(data["micro_batch"]), tuple(data["layers"]),
            int(data["bytes"]), float(data["ms"]), bool(data["early_stop"]),
        )  # fmt: skip
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


def _config_of(data: dict[str, Any]) -> RunConfig | None:
    try:
        return resolved(techniques.parse_config(data["config"], "the run"))
    except (KeyError, UserError):
        return None
