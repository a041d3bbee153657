"""What a watched script shows: a `Source`, its gauge, and the socket, on threads of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
import time
from pathlib import Path
from typing import Any

import torch

from .. import device as devices
from .. import wire
from ..advice import advice
from ..config import RunConfig, UserError, one_line
from ..engine_registry import EngineLock
from ..events import Gauge, Kind, Phase, Recompute, StepTrace
from ..feed import Command, Feed, Published, Save, ViewerRole
from ..meter import LIBRARIES_LOADED, Meter
from ..recording import write
from ..server import Server
from ..service import version
from ..session import GAUGE_EVERY_S, describe, trained
from ..tracing.recorder import Recorder
from ..tracing.tracer import Tracer
from .describe import script_name
from .fault_barrier import FaultBarrier, log
from .leftovers import name_leftovers

LAST_ANSWERS_S = 0.5
"""How long viewers have to ask for what was said last."""


class WatchedSource(Published):
    """A watched script as a `Source`, and its socket.

    Args:
        name: In `gpumem-tui ps`; the script's if None.

    Attributes:
        barrier: Between all of this and the script.
        micro_batches: By step, as far as they are known.
        managed_bytes: In CUDA managed memory.
    """

    live = True
    role = ViewerRole.WATCHING

    def __init__(self, name: str | None) -> None:
        self._name = name or script_name()
        self._feed = Feed()
        self.micro_batches: dict[int, int] = {}
        self.managed_bytes = 0
        self.barrier = FaultBarrier(self.failed)
        self._recorder: Recorder | None = None
        self._tracer: Tracer | None = None
        self._meter: Meter | None = None
        self._server: Server | None = None
        self._engine_lock: EngineLock | None = None
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []

    # --- Source -------------------------------------------------------------

    def command(self, command: Command) -> None:
        """Refuse, with advice; only saving is ours to do.

        Raises:
            UserError: The loop is the script's own.
        """
        if not isinstance(command, Save):
            raise UserError(advice(command, self))
        write(command.path, self, self._feed.training_gauge)

    # --- what the watcher tells -------------------------------------------------

    def open(self, recorder: Recorder, tracer: Tracer, device: torch.device) -> None:
        """Begin to read the gauge and to serve.

        A socket that cannot be had is said in one line; the watching goes on for what it is worth.
        """
        self._recorder, self._tracer = recorder, tracer
        self._feed.environment = environment = devices.environment(device)
        nvml = devices.Nvml(device) if device.type == "cuda" else None
        self._meter = Meter(nvml, environment.device_total_bytes)
        self._run_thread("gpumem-tui gauge", self._gauge_forever)
        try:
            self._engine_lock = engine_lock = EngineLock(self._name, "watch", wire.PROTOCOL, version())
            info = engine_lock.engine_dir.info()
            assert info is not None
            self._server = Server(self, info, engine_lock.engine_dir.socket, Path(os.devnull), None)
        except (OSError, UserError) as error:
            log.warning("gpumem-tui: nobody can attach: %s", error)
            return
        self._run_thread("gpumem-tui service", self._serve)

    @property
    def attach_name(self) -> str | None:
        """The name to attach to; None if nobody can."""
        return self._engine_lock.engine_dir.name if self._engine_lock is not None else None

    def begin_run(self, config: RunConfig, model: torch.nn.Module) -> None:
        """The loop has begun, and this is what could be told of it."""
        self._feed.begin_run(config)
        self._feed.milestone(Kind.RUN_STARTED, f"watching {describe(config)}", config=config.as_dict(), watched=True)
        parameters = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        self._feed.milestone(
            Kind.LOADED, f"{parameters:,} parameters, {trained(parameters, trainable)}",
            parameters=parameters, trainable_parameters=trainable,
            allocated_bytes=self._recorder.allocated_bytes() if self._recorder else 0, seconds=0.0,
        )  # fmt: skip

    def publish(self, trace: StepTrace) -> None:
        """A trace, with what the script holds named and its micro-batches counted."""
        count = self.micro_batches.get(trace.step, 1)
        if not trace.partial:
            self.micro_batches = {step: n for step, n in self.micro_batches.items() if step > trace.step}
        self._feed.publish_trace(dataclasses.replace(name_leftovers(trace), micro_batches=count))

    def stepped(self, *, step: int, loss: float | None, seconds: float, **data: Any) -> None:
        """A step of the optimizer has ended."""
        said = "" if loss is None else f"loss {loss:.4f}, "
        text = f"step {step}: {said}{seconds * 1e3:.0f} ms"
        if self._meter is not None and self._recorder is not None and step <= LIBRARIES_LOADED:
            self._meter.measure_context(self._recorder)
        if self._feed.training_gauge is None:
            self._feed.publish_gauge(dataclasses.replace(self._read_gauge(), phase=Phase.OPTIMIZER))
        self._feed.milestone(Kind.STEP_ENDED, text, step=step, loss=loss, seconds=seconds, **data)

    def recomputed(self, event: Recompute) -> None:
        """A checkpointed segment was computed again."""
        self._feed.milestone(
            Kind.RECOMPUTED,
            f"step {event.step}: {event.layers[0]}, {event.bytes / 2**20:.1f} MiB in {event.ms:.2f} ms",
            **(event._asdict() | {"layers": list(event.layers)}),
        )  # fmt: skip

    def out_of_memory(self, error: BaseException, tracer: Tracer, step: int, phase: Phase) -> None:
        """The script ran out of memory."""
        recorder = tracer.recorder
        self._feed.milestone(
            Kind.OUT_OF_MEMORY, one_line(error), step=step, phase=phase.title,
            requested_bytes=recorder.refused_bytes, allocated_bytes=recorder.allocated_bytes(),
        )  # fmt: skip

    def failed(self, text: str, detail: str) -> None:
        """Watching itself has failed; the script goes on and viewers keep what they have."""
        self._feed.milestone(Kind.REFUSED, f"watching failed, the script goes on: {text}", detail=detail)

    def close(self, steps: int, error: BaseException | None) -> None:
        """The loop is over: say so, and leave nothing behind."""
        if self._closing.is_set():
            return
        reason = "failed" if error is not None else "done"
        self._feed.milestone(Kind.RUN_ENDED, f"the loop has ended after {steps} steps", reason=reason, steps=steps)
        self._closing.set()
        if self._server is not None:
            self._server.wake()
        for thread in self._threads:
            thread.join(10.0)
        self._recorder = self._tracer = None

    # --- threads ----------------------------------------------------------------

    def _run_thread(self, name: str, target: Any) -> None:
        thread = threading.Thread(target=target, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self) -> None:
        server, engine_lock = self._server, self._engine_lock
        assert server is not None
        assert engine_lock is not None
        try:
            while not self._closing.is_set():
                server.serve(1.0)
            until_s = time.monotonic() + LAST_ANSWERS_S
            while server.viewers and (left_s := until_s - time.monotonic()) > 0:
                server.serve(left_s)
        except Exception:
            log.warning("gpumem-tui: the service has failed; the run goes on", exc_info=True)
        finally:
            engine_lock.release()
            with contextlib.suppress(OSError):
                server.close()

    def _gauge_forever(self) -> None:
        read = self.barrier.guard(self._read_gauge)
        while not self._closing.wait(GAUGE_EVERY_S) and (gauge := read()) is not None:
            self._feed.publish_gauge(gauge)

    def _read_gauge(self) -> Gauge:
        assert self._meter is not None
        return self._meter.read(self._feed.clock_s(), self._recorder, self._tracer, self.managed_bytes)
