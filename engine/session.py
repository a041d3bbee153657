"""The engine thread: one at a time, it starts, holds, restarts and ends runs.

It owns torch, the model and the device. Everything it has to say goes through
the feed; whatever goes wrong in a run ends that run as a milestone, never the
thread. Importing this module loads no torch: the thread does.
"""

from __future__ import annotations

import gc
import queue
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import techniques
from .config import RunConfig, UserError, one_line, show
from .events import Gauge, Kind, Phase, Recompute, StepTrace
from .feed import Command, Feed, Pause, Published, Save, Start, Stop, ViewerRole, peak_bytes
from .meter import LIBRARIES_LOADED, Meter
from .recording import save, write
from .report import Report

if TYPE_CHECKING:
    import torch

    from .tracing.owners import Paged
    from .tracing.recorder import Recorder
    from .tracing.tracer import Tracer
    from .train import StepResult
    from .workload import Plan, Workload

GAUGE_EVERY_S = 0.1
TRACE_SHARE = 0.01
"""Of the run's wall time that tracing may take when left to the governor."""


class _Ended(BaseException):
    """Raised inside the loop to leave it: no error, and not to be caught as one."""


class Session(Published):
    """An engine in this process; a `Source`.

    Args:
        device: `auto`, `cpu`, `cuda` or `cuda:<i>`.
        on_trace: See `Feed`.
    """

    live = True
    role = ViewerRole.OWNER

    def __init__(self, device: str = "auto", on_trace: Callable[[StepTrace], None] | None = None) -> None:
        self._wanted = device
        self._feed = Feed(on_trace)
        self._commands: queue.Queue[Start | Stop | None] = queue.Queue()
        self._resume = threading.Event()
        self._resume.set()
        self._recorder: Recorder | None = None
        self._tracer: Tracer | None = None
        self._meter: Meter | None = None
        self._device: torch.device | None = None
        self._managed: list[Paged] = []
        self._managed_bytes = 0
        self._steps = 0
        self._refused: str | None = None
        self._good: RunConfig | None = None
        self._changing = threading.Lock()
        self._running = False
        self._leaving: list[torch.utils.hooks.RemovableHandle] = []
        self._closing = threading.Event()
        self._idle = threading.Event()
        self._thread = threading.Thread(target=self._main, name="engine", daemon=True)
        self._thread.start()

    # --- Source -------------------------------------------------------------

    def command(self, command: Command) -> None:
        """Ask for something.

        Raises:
            UserError: The configuration cannot run; nothing was stopped for it.
        """
        if self._refused is not None:
            raise UserError(self._refused)
        match command:
            case Start(config):
                techniques.check(config, self._feed.environment)
                self._idle.clear()
                self._interrupt(command)
            case Stop():
                self._interrupt(command)
            case Pause(paused):
                (self._resume.clear if paused else self._resume.set)()
                self._feed.milestone(Kind.PAUSED if paused else Kind.RESUMED, "held" if paused else "goes on")
            case Save():
                threading.Thread(target=self._save, args=(command,), name="save", daemon=True).start()

    def save(self, path: Path) -> None:
        """Write a recording of the run so far, or of the one that ended last.

        Raises:
            OSError: It cannot be written there.
            UserError: There is nothing to save yet.
        """
        write(path, self, self._feed.training_gauge)

    # --- for whoever made the session -----------------------------------------

    def close(self, timeout_s: float = 30.0) -> None:
        """End the run and the thread; returns when they have ended."""
        self._closing.set()
        self._interrupt(None)
        self._thread.join(timeout_s)

    def tell(self, kind: Kind, text: str, **data: Any) -> None:
        """Add a milestone from outside of the engine's thread."""
        self._feed.milestone(kind, text, **data)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until there is nothing left to run; False if that took too long."""
        return self._idle.wait(timeout_s)

    def _interrupt(self, command: Start | Stop | None) -> None:
        """Have a command taken: the run under way is left where its next module or optimizer begins, or weight loads.

        The hooks are there from here on only: on every step of a launch-bound run they would cost 2 %.
        """
        self._commands.put(command)
        self._resume.set()
        with self._changing:
            if self._running and not self._leaving:
                from torch.nn.modules.module import register_module_forward_pre_hook
                from torch.optim.optimizer import register_optimizer_step_pre_hook

                self._leaving = [register(self._leave_if_asked) for register in (
                    register_module_forward_pre_hook, register_optimizer_step_pre_hook
                )]  # fmt: skip

    # --- the thread -----------------------------------------------------------

    def _main(self) -> None:
        try:
            self._look_around()
        except Exception as error:  # a refusal, or a torch that does not load: nothing can ever run here
            self._refused = one_line(error)
            self._feed.milestone(Kind.REFUSED, self._refused)
            self._idle.set()
            return
        threading.Thread(target=self._gauge_forever, name="gauge", daemon=True).start()
        while (command := self._commands.get()) is not None:
            if isinstance(command, Start):
                try:
                    self._run_and_report(command.config)
                except Exception as error:  # a device that has failed fails again when it is cleaned up
                    self._feed.milestone(Kind.RUN_FAILED, one_line(error), detail=traceback.format_exc())
            if self._commands.empty():
                self._idle.set()
        self._idle.set()

    def _look_around(self) -> None:
        from . import device

        self._device = device.select(self._wanted)
        if self._device.type == "cpu":
            device.leave_a_core()
        self._feed.environment = environment = device.environment(self._device)
        nvml = device.Nvml(self._device) if self._device.type == "cuda" else None
        self._meter = Meter(nvml, environment.device_total_bytes)

    def _run_and_report(self, config: RunConfig) -> None:
        """Run once; whatever happens becomes milestones."""
        try:
            techniques.check(config, self._feed.environment)  # which may not have been known when it was asked for
        except UserError as error:
            self._feed.milestone(Kind.REFUSED, str(error))
            return
        self._feed.begin_run(config)
        self._feed.milestone(Kind.RUN_STARTED, describe(config), config=config.as_dict())
        problem = self._run(config)
        steps = self._steps
        if problem is None or steps:
            self._good = config if steps else self._good
            return
        if self._good is not None and self._good != config and self._commands.empty():
            self._feed.milestone(Kind.NOTE, f"going back to the run before: {describe(self._good)}")
            self._commands.put(Start(self._good))

    def _run(self, config: RunConfig) -> str | None:
        """Run, free everything, count what leaks.

        Returns:
            Why it failed, or None.
        """
        import torch

        from .tracing.allocator_trace import AllocatorTrace
        from .tracing.op_tracker import OpTracker
        from .tracing.tracer import DESCRIBED, Tracer
        from .workload import prepare

        assert self._device is not None
        self._steps, problem = 0, None
        recorder: Recorder
        recording_ops: AbstractContextManager[object]
        if self._device.type == "cuda":
            # One for all runs: the first thing on the device are its workspaces.
            recorder, recording_ops = self._recorder or AllocatorTrace(self._device), nullcontext()
        else:
            recorder = recording_ops = OpTracker()
        baseline = recorder.allocated_bytes()
        self._recorder = recorder
        self._measure_context()
        publish_every_s = GAUGE_EVERY_S if recorder.always_on else 1.0
        described = min(DESCRIBED, config.steps or DESCRIBED)
        self._tracer = tracer = Tracer(
            recorder, self._feed.publish_trace, self._recomputed, publish_every_s, described
        )  # fmt: skip
        self._running = True
        try:
            # Outside the recording: importing libraries makes tensors that stay.
            plan = prepare(config, self._device)
            gc.freeze()  # so that collecting afterwards looks at what the run has made and not at the libraries
            with recording_ops:
                self._train(config, plan, tracer)
            tracer.settle()
        except _Ended:
            pass
        except UserError as error:
            problem = str(error)
            self._feed.milestone(Kind.RUN_FAILED, problem, detail="")
        except torch.OutOfMemoryError as error:
            problem = one_line(error)
            tracer.settle()
            self._feed.milestone(
                Kind.OUT_OF_MEMORY, problem, step=tracer.step_now, phase=tracer.failed_in.title,
                requested_bytes=recorder.refused_bytes, allocated_bytes=recorder.allocated_bytes(),
            )  # fmt: skip
        except Exception as error:
            problem = one_line(error)
            self._feed.milestone(Kind.RUN_FAILED, problem, detail=traceback.format_exc())
        with self._changing:
            self._running = False
            for hook in self._leaving:
                hook.remove()
            self._leaving.clear()
        tracer.release()
        self._clean_up(config, recorder, baseline, problem)
        return problem

    def _clean_up(self, config: RunConfig, recorder: Recorder, baseline: int, problem: str | None) -> None:
        """Give everything back and count what does not come."""
        import torch

        from .tracing.owners import drop_library_caches, free_paged

        with ThreadPoolExecutor(1) as aside:  # sums up while the driver takes the memory back
            memory = aside.submit(self._memory)
            drop_library_caches()
            # A backward pass that was left leaves what was next in a queue of this thread's, and with it the
            # graph and the model; the next pass on the thread drops it.
            torch.zeros((), requires_grad=True).backward()
            gc.collect()
            gc.unfreeze()
            if self._device is not None and self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
                torch.cuda.empty_cache()
        managed, self._managed_bytes = self._managed_bytes, free_paged(self._managed)
        self._managed.clear()
        leaked = recorder.allocated_bytes() - baseline + self._managed_bytes
        reason = "failed" if problem else "stopped" if config.steps == 0 or self._steps < config.steps else "done"
        note = f", {baseline / 2**20:.1f} MiB kept by cuBLAS" if baseline else ""
        self._feed.milestone(
            Kind.RUN_ENDED, f"run {reason} after {self._steps} steps, {leaked} bytes leaked{note}",
            reason=reason, leaked_bytes=leaked, workspace_bytes=baseline, managed_bytes=managed, steps=self._steps,
            memory=memory.result(),
        )  # fmt: skip

    def _memory(self) -> dict[str, Any] | None:
        """What is left of a run for whoever comes later: its traces go when the next one begins."""
        traces = self._feed.traces()
        if not traces or not traces[-1].step:
            return None
        report, highest = Report(), max(traces, key=peak_bytes)
        for trace in traces:
            if trace.step <= 1 or trace is highest:
                report.add(trace)
        return report.memory()

    def _train(self, config: RunConfig, plan: Plan, tracer: Tracer) -> None:
        from .tracing.owners import paged
        from .train import train
        from .workload import build

        began = time.perf_counter()

        with tracer.step(0, 1, True, tuple):
            with tracer.phase(Phase.LOAD):
                tag = tracer.loader(plan.shell)

                def reading(module: str) -> None:
                    self._leave_if_asked()
                    tag(module)

                workload = build(plan, reading)
            tracer.adopt(workload.model, workload.optimizer)
        self._loaded(workload, tracer, time.perf_counter() - began)

        def on_step(result: StepResult) -> None:
            if result.step == 1:
                self._managed = paged(workload.optimizer)
                self._managed_bytes = sum(allocation.bytes for allocation in self._managed)
                self._note_paging(config)
            self._stepped(result, tracer)

        with tracer.attached():
            train(config, workload, tracer, self._governor(config, tracer), self._between, on_step)

    def _governor(self, config: RunConfig, tracer: Tracer) -> Callable[[int], bool]:
        """Decides which steps are traced, so that tracing stays under its share."""
        began, cost_before = time.perf_counter(), tracer.cost_s

        def want(step: int) -> bool:
            if config.trace == "every" or tracer.recorder.always_on or step <= 2:
                return True
            return tracer.cost_s - cost_before < TRACE_SHARE * (time.perf_counter() - began)

        return want

    def _between(self) -> None:
        """Before every micro-batch: hold while paused, leave when asked to."""
        self._resume.wait()
        self._leave_if_asked()

    def _leave_if_asked(self, *_: object) -> None:
        if not self._commands.empty():
            raise _Ended

    # --- what a run has to say --------------------------------------------------

    def _loaded(self, workload: Workload, tracer: Tracer, seconds: float) -> None:
        parameters, trainable = workload.parameters, workload.trainable_parameters
        allocated = tracer.recorder.allocated_bytes()
        size = f"{allocated / 2**30:.3f} GiB" if allocated >= 2**30 else f"{allocated / 2**20:.1f} MiB"
        self._feed.milestone(
            Kind.LOADED,
            f"{parameters:,} parameters, {trained(parameters, trainable)}, {size}, {seconds:.1f} s",
            parameters=parameters, trainable_parameters=trainable, allocated_bytes=allocated, seconds=seconds,
        )  # fmt: skip

    def _stepped(self, result: StepResult, tracer: Tracer) -> None:
        self._steps = result.step
        self._feed.milestone(
            Kind.STEP_ENDED, f"step {result.step}: loss {result.loss:.4f}, {result.seconds * 1e3:.0f} ms",
            step=result.step, loss=result.loss, seconds=result.seconds, tokens=result.tokens,
            allocated_bytes=result.allocated_bytes, peak_bytes=result.peak_bytes,
            reserved_bytes=result.reserved_bytes, traced=tracer.last_traced == result.step,
            trace_seconds=tracer.cost_s,
        )  # fmt: skip
        if result.step <= LIBRARIES_LOADED:
            self._measure_context()
        if self._feed.training_gauge is None:  # a run may be over before the gauge's first tick in it
            self._feed.training_gauge = self._read_gauge()

    def _recomputed(self, event: Recompute) -> None:
        layers = event.layers[0] if len(event.layers) == 1 else f"{event.layers[0]} to {event.layers[-1]}"
        self._feed.milestone(
            Kind.RECOMPUTED, f"step {event.step}: {layers}, {event.bytes / 2**20:.1f} MiB in {event.ms:.2f} ms",
            **(event._asdict() | {"layers": list(event.layers)}),
        )  # fmt: skip

    def _note_paging(self, config: RunConfig) -> None:
        if config.text("optimizer").startswith("paged") and not self._managed_bytes:
            self._feed.milestone(
                Kind.NOTE, "paged optimizer: nothing was paged; bitsandbytes pages tensors of 100,000 elements or more"
            )

    # --- gauge and saving -------------------------------------------------------

    def _gauge_forever(self) -> None:
        while not self._closing.wait(GAUGE_EVERY_S):
            self._feed.publish_gauge(self._read_gauge())

    def _read_gauge(self) -> Gauge:
        assert self._meter is not None
        return self._meter.read(self._feed.clock_s(), self._recorder, self._tracer, self._managed_bytes)

    def _measure_context(self) -> None:
        """Kernels are loaded when they are first used: once at a run's start, and again after its first steps."""
        assert self._meter is not None
        assert self._recorder is not None
        if not self._meter.measure_context(self._recorder) and self._steps == 1:
            self._feed.milestone(
                Kind.NOTE, "NVML shows no processes here (a container?): CUDA context and others are one figure"
            )

    def _save(self, command: Save) -> None:
        self._feed.milestone(*save(command, self, self._feed.training_gauge), path=str(command.path))


def trained(parameters: int, trainable: int) -> str:
    """How many of the parameters are trained."""
    if trainable == parameters:
        return "all trained"
    return f"{trainable:,} trained ({100 * trainable / parameters:.4f} %)"


def describe(config: RunConfig) -> str:
    """A run in one line: the model, and what differs from the defaults."""
    changes = " ".join(f"{name}={show(value)}" for name, value in techniques.changed(config))
    return f"{config.model} {changes}".strip()
