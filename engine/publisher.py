"""The publishing of a run while it trains: written once, for the engine's own loop and for a watched script.

    publisher = RunPublisher(feed)
    publisher.look_around(device)               environment and meter; the gauge may be read
    publisher.begin(config, kind, text)         a run
    publisher.attach(recorder, tracer, every)   where its allocations are seen
    publisher.loaded(...), .stepped(...), .recomputed(...), .out_of_memory(...)

Loads no torch until there is a device to look at.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from threading import Event
from typing import TYPE_CHECKING

import msgspec

from .config import RunConfig, one_line, printable
from .events import Gauge, Phase, Recompute, StepTrace
from .feed import Feed
from .meter import LIBRARIES_LOADED, Meter
from .out_of_memory.growth import AT_LEAST, LiveBytes
from .out_of_memory.report import size_text
from .out_of_memory.reporting import report_of, what_grows
from .run import Run, RunKind
from .run_events import Loaded, LossNotFinite, MemoryLeak, Note, OutOfMemory, Recomputed, RunStarted, StepEnded
from .techniques import unsound

if TYPE_CHECKING:
    import torch

    from .tracing.recorder import Recorder
    from .tracing.tracer import Tracer
    from .train import StepResult

GAUGE_EVERY_S = 0.1
TRACE_SHARE = 0.01
"""Share of the run's wall time that tracing may take when left to the governor."""
LEAK_WITHIN_STEPS = 1_000_000
"""A leak that would take longer to fill the device is none worth telling of."""


class RunPublisher:
    """Publishes one run after another to a feed.

    Args:
        feed: Gets everything.

    Attributes:
        recorder: Where allocations are seen; None before the first run.
        managed_bytes: In CUDA managed memory, outside of the allocator.
        steps: That ended in this run.
    """

    def __init__(self, feed: Feed) -> None:
        self.feed = feed
        self.recorder: Recorder | None = None
        self.managed_bytes = 0
        self.steps = 0
        self._tracer: Tracer | None = None
        self._meter: Meter | None = None
        self._every_step = self._loss_is_lost = False
        self._began_s = self._cost_before_s = 0.0
        self._device_total_bytes = 0
        self._live_bytes, self._leak_told, self._largest_batch = LiveBytes(), False, 0

    def look_around(self, device: torch.device) -> None:
        """Publish the environment, and be able to read the device's gauge."""
        from . import device as devices

        self.feed.environment = environment = devices.environment(device)
        nvml = devices.Nvml(device) if device.type == "cuda" else None
        self._meter = Meter(nvml, environment.device_total_bytes)
        self._device_total_bytes = environment.device_total_bytes

    def limit_memory(self, limit_bytes: int) -> None:
        """Have the device count as one with so much memory from the next run on; 0: as it is."""
        environment = self.feed.environment
        assert environment is not None
        assert self._meter is not None
        total = limit_bytes or self._device_total_bytes
        self.feed.environment = dataclasses.replace(environment, device_total_bytes=total)
        self._meter.limit(limit_bytes)

    def attach(self, recorder: Recorder, tracer: Tracer, every_step: bool) -> None:
        """Read from these from now on.

        Args:
            recorder: Where allocations are seen.
            tracer: Which phase it is, and what tracing costs.
            every_step: Whether every step is to be traced, whatever that costs.
        """
        self.recorder, self._tracer, self._every_step = recorder, tracer, every_step
        self._began_s, self._cost_before_s = time.perf_counter(), tracer.cost_s

    def detach(self) -> None:
        """Refer to nothing of the run any more."""
        self.recorder = self._tracer = None

    # --- a run ------------------------------------------------------------------------

    def begin(self, config: RunConfig, kind: RunKind, text: str) -> Run:
        """A run begins."""
        self.steps, self.managed_bytes, self._loss_is_lost = 0, 0, False
        self._live_bytes, self._leak_told, self._largest_batch = LiveBytes(), False, 0
        run = self.feed.begin_run(config, kind)
        self.feed.tell(RunStarted(text=text, watched=kind is RunKind.WATCHED))
        return run

    def loaded(self, parameters: int, trainable: int, seconds: float | None) -> None:
        """The model is there.

        Args:
            parameters: Elements of all parameters.
            trainable: Elements of those that are trained.
            seconds: Loading took; None: it was there before.
        """
        allocated = self.recorder.allocated_bytes() if self.recorder is not None else None
        words = [f"{parameters:,} parameters", trained(parameters, trainable)]
        if seconds is not None and allocated is not None:
            size = f"{allocated / 2**30:.3f} GiB" if allocated >= 2**30 else f"{allocated / 2**20:.1f} MiB"
            words += [size, f"{seconds:.1f} s"]
        self.feed.tell(
            Loaded(
                text=", ".join(words),
                parameters=parameters,
                trainable_parameters=trainable,
                allocated_bytes=allocated,
                seconds=seconds,
            )
        )

    def wants(self, step: int) -> bool:
        """The governor: whether a step is traced, so that tracing stays under its share of the time.

        On a CPU every one, since the op tracker cannot be switched off between steps.
        """
        recorder, tracer = self.recorder, self._tracer
        assert recorder is not None
        assert tracer is not None
        if self._every_step or recorder.always_on or step <= 2:
            return True
        elapsed_s = time.perf_counter() - self._began_s
        return tracer.cost_s - self._cost_before_s < TRACE_SHARE * elapsed_s

    def stepped(self, result: StepResult) -> None:
        """An optimizer step has ended."""
        tracer, run = self._tracer, self.feed.run
        assert tracer is not None
        assert run is not None
        self.steps = result.step
        said = "" if result.loss is None else f"loss {result.loss:.4f}, "
        self.feed.tell(
            StepEnded(
                text=f"step {result.step}: {said}{result.seconds * 1e3:.0f} ms",
                step=result.step,
                loss=result.loss,
                seconds=result.seconds,
                tokens=result.tokens,
                rows=result.rows,
                allocated_bytes=result.allocated_bytes,
                peak_bytes=result.peak_bytes,
                reserved_bytes=result.reserved_bytes,
                traced=tracer.last_traced == result.step,
                trace_seconds=tracer.cost_s - self._cost_before_s,
            )
        )
        self._look_at_loss(result, run.config)
        self._look_for_a_leak(result, run)
        if result.step <= LIBRARIES_LOADED:
            self.measure_context()
        if run.training_gauge is None:  # a run may be over before the gauge's first tick in it
            run.training_gauge = self.read_gauge()

    def _look_at_loss(self, result: StepResult, config: RunConfig) -> None:
        """Say once that the loss is no number, and why, if the configuration is a reason."""
        if result.loss is None or math.isfinite(result.loss) or self._loss_is_lost:
            return
        self._loss_is_lost = True
        why = "".join(f": {reason}" for reason in unsound(config)[:1])
        text = f"step {result.step}: the loss is {result.loss}{why}"
        self.feed.tell(LossNotFinite(text=text, step=result.step, loss=str(result.loss)))

    def recomputed(self, event: Recompute) -> None:
        """A checkpointed segment was computed again."""
        layers = event.layers[0] if len(event.layers) == 1 else f"{event.layers[0]} to {event.layers[-1]}"
        text = f"step {event.step}: {layers}, {event.bytes / 2**20:.1f} MiB in {event.ms:.2f} ms"
        self.feed.tell(Recomputed(text=text, **event._asdict()))

    def _look_for_a_leak(self, result: StepResult, run: Run) -> None:
        """Say once that more is alive after every step, while there is memory left for some."""
        size = result.tokens or result.rows
        if size > self._largest_batch > 0:  # of more than ever, more may be alive
            self._largest_batch = size
            return
        self._largest_batch = max(size, self._largest_batch)
        self._live_bytes.add(result.allocated_bytes)
        rise = None if self._leak_told else self._live_bytes.rise()
        if rise is None:
            return
        left = self._left_bytes() // max(rise.bytes, 1)
        if left > LEAK_WITHIN_STEPS:
            return
        self._leak_told = True
        owner = what_grows(run)
        what = f" ({owner})" if owner else ""
        text = (
            f"step {result.step}: {size_text(rise.bytes)} more are alive after every step{what}; "
            f"at that pace memory lasts for {left:,} steps"
        )
        self.feed.tell(MemoryLeak(text=text, step=result.step, growth_bytes=rise.bytes, owner=owner, steps_left=left))

    def _left_bytes(self) -> int:
        """The most bytes that a run could still take."""
        gauge = self.read_gauge()
        return max(0, gauge.device_total_bytes - (gauge.device_used_bytes or 0) + (gauge.cached_bytes or 0))

    def out_of_memory(self, error: BaseException | None, step: int, phase: Phase) -> None:
        """An allocation was refused, and the trace of the step that it ended has been published.

        Args:
            error: Which; None: somebody has caught it.
            step: That it ended.
            phase: Of the loop, then.
        """
        recorder, tracer, run = self.recorder, self._tracer, self.feed.run
        assert recorder is not None
        assert tracer is not None
        said = printable(str(error), 2000) if error is not None else ""
        report, refusal = None, tracer.refusal
        if refusal is not None and refusal.step == step and run is not None:
            report = report_of(refusal, run, self.read_gauge(), self._live_bytes.rise(AT_LEAST), said)
        told = OutOfMemory(
            text=one_line(error) if error is not None else "",
            step=step,
            phase=phase.title,
            allocated_bytes=recorder.allocated_bytes(),
        )
        if report is not None:
            where = ", ".join(part for part in (report.phase, report.module) if part)
            asked = f"out of memory: asked for {size_text(report.asked_bytes)} in {where}; {report.verdict.words}: "
            told = msgspec.structs.replace(
                told,
                text=asked + report.reason,
                phase=report.phase,
                requested_bytes=report.asked_bytes,
                allocated_bytes=report.allocated_bytes,
                report=report,
            )
        self.feed.tell(told)

    def publish_trace(self, trace: StepTrace) -> None:
        """Hand on a trace."""
        self.feed.publish_trace(trace)

    # --- the gauge --------------------------------------------------------------------

    def read_gauge(self) -> Gauge:
        """Read the counters now."""
        assert self._meter is not None
        return self._meter.read(self.feed.clock_s(), self.recorder, self._tracer, self.managed_bytes)

    def pinned_bytes(self) -> int:
        """Bytes of the host's memory that torch has page-locked."""
        return self._meter.pinned_bytes() if self._meter is not None else 0

    def gauge_forever(self, closing: Event, read: Callable[[], Gauge | None] | None = None) -> None:
        """Publish readings, until it is over or none can be had.

        Args:
            closing: Set when it is over.
            read: Instead of `read_gauge`: None ends it.
        """
        read = read or self.read_gauge
        while not closing.wait(GAUGE_EVERY_S) and (gauge := read()) is not None:
            self.feed.publish_gauge(gauge)

    @property
    def context_is_known(self) -> bool:
        """True if it has been measured, in this run or before."""
        return self._meter is not None and self._meter.context_is_known

    def measure_context(self) -> None:
        """Kernels load when they are first used: once before the first run, and again after the first steps of each."""
        if self._meter is None or self.recorder is None:
            return
        if not self._meter.measure_context(self.recorder) and self.steps == 1:
            text = "NVML shows no processes here (a container?): CUDA context and others are one figure"
            self.feed.tell(Note(text=text))


def trained(parameters: int, trainable: int) -> str:
    """The number of parameters trained, for people."""
    if trainable == parameters:
        return "all trained"
    return f"{trainable:,} trained ({100 * trainable / parameters:.4f} %)"
