"""A source without an engine: believable steps of a small transformer, one publication at a time.

Nothing here runs by itself; a test says `advance()` and the next trace, gauge
and milestones are there. Sizes follow the configuration, so that flipping a
technique changes what is shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from gpumem_tui.engine import techniques
from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import RunConfig, UserError
from gpumem_tui.engine.events import (
    BLOCK,
    COMPLETE,
    EVENT,
    MARK,
    OPEN,
    OWNER,
    Ending,
    EndKind,
    Environment,
    Gauge,
    Phase,
    PhaseSpan,
    StepTrace,
)
from gpumem_tui.engine.feed import Command, Feed, Pause, Published, Save, Start, Stop, ViewerRole
from gpumem_tui.engine.out_of_memory.report import OutOfMemoryReport
from gpumem_tui.engine.run_events import (
    Loaded,
    OutOfMemory,
    Paused,
    Recomputed,
    Resumed,
    RunEnded,
    RunFailed,
    RunStarted,
    Saved,
    StepEnded,
)
from gpumem_tui.profiles import run_fields

MIB = 1 << 20
GPU = Environment("cuda:0", "NVIDIA H100 80GB HBM3", 80 << 30, "9.0", "570.1", {"peft": "0.18", "bitsandbytes": "0.49"},
                  host_bytes=32 << 30)  # fmt: skip
CPU = Environment("cpu", "CPU x86_64, 8 cores", 16 << 30, packages={"peft": "0.18"})


class Sim:
    """An allocator, a clock and a tracer in one."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {"": 0}
        self.live: dict[int, int] = {}
        self.free: dict[int, list[int]] = {}
        self.next_address, self.now_us = 1 << 20, 1_000_000

    @property
    def allocated(self) -> int:
        return sum(self.live.values())

    def begin(self, step: int, micro_batches: int) -> None:
        self.step, self.micro_batches = step, micro_batches
        self.start = np.array([(a, size, 0, -1) for a, size in self.live.items()], BLOCK)
        self.events: list[tuple[int, int, int, int, int, int]] = []
        self.marks: list[tuple[int, int, int]] = [(Phase.IDLE, 0, 0)]
        self.owners: list[tuple[int, int, int, int]] = []
        self.spans: list[tuple[Phase, int, int, int]] = []
        self.done: list[PhaseSpan] = []

    def name(self, name: str) -> int:
        return self.names.setdefault(name, len(self.names))

    def mark(self, phase: Phase, micro_batch: int, module: str) -> None:
        self.marks.append((phase, micro_batch, self.name(module)))

    def alloc(self, size: int) -> int:
        reuse = self.free.get(size)
        address = reuse.pop() if reuse else self.next_address
        if address == self.next_address:
            self.next_address += size + 512
        self.live[address] = size
        self._event(address, size)
        return address

    def drop(self, address: int) -> None:
        size = self.live.pop(address)
        self.free.setdefault(size, []).append(address)
        self._event(address, -size)

    def _event(self, address: int, size: int) -> None:
        self.now_us += 40
        self.events.append((address, size, 0, len(self.marks) - 1, self.now_us, -1))

    def own(self, address: int, category: Category, name: str) -> None:
        self.owners.append((address, len(self.marks) - 1, category, self.name(name)))

    def enter(self, phase: Phase, micro_batch: int = 0, module: str = "") -> None:
        self.spans.append((phase, micro_batch, len(self.events), self.now_us))
        self.mark(phase, micro_batch, module)

    def leave(self) -> None:
        phase, micro_batch, begin, begin_us = self.spans.pop()
        self.now_us += 100
        self.done.append(PhaseSpan(phase, micro_batch, begin, len(self.events), begin_us, self.now_us))
        self.mark(Phase.BACKWARD if phase is Phase.RECOMPUTE else Phase.IDLE, micro_batch, "")

    def trace(self, open_: bool) -> StepTrace:
        still = [PhaseSpan(p, m, b, len(self.events), b_us, self.now_us) for p, m, b, b_us in self.spans]
        return StepTrace(
            step=self.step,
            events=np.array(self.events, EVENT),
            marks=np.array(self.marks, MARK),
            begin=self.start,
            owners=np.array([(*owner, -1) for owner in self.owners], OWNER),
            names=tuple(self.names),
            phases=tuple(sorted(self.done + still, key=lambda s: s.begin)),
            ending=OPEN if open_ else COMPLETE,
            micro_batches=self.micro_batches,
        )


@dataclass
class Model:
    """A transformer's tensors, and one run of a configuration over them."""

    config: RunConfig
    layers: int = 6
    unit: int = MIB
    sim: Sim = field(default_factory=Sim)

    def __post_init__(self) -> None:
        self.held: dict[str, tuple[int, Category]] = {}
        self.logits: int | None = None
        self.recomputed: list[dict[str, Any]] = []
        self.trains = not self.config["lora"]

    def layer(self, i: int) -> str:
        return f"gpt_neox.layers.{i}"

    def parameters(self) -> list[tuple[str, int]]:
        inner = [(f"{self.layer(i)}.mlp.weight", 6 * self.unit) for i in range(self.layers)]
        return [("gpt_neox.embed_in.weight", 8 * self.unit), *inner, ("lm_head.weight", 8 * self.unit)]

    def own(self) -> None:
        for name, (address, category) in self.held.items():
            if address in self.sim.live:
                self.sim.own(address, category, name.split(" ")[0])
        if self.logits is not None:
            self.sim.own(self.logits, Category.LOGITS_LOSS, "logits")

    def load(self) -> Iterator[None]:
        self.sim.begin(0, 1)
        self.sim.enter(Phase.LOAD)
        for name, size in self.parameters():
            self.held[name] = (self.sim.alloc(size), Category.PARAMETERS)
        self.sim.leave()
        self.own()
        yield

    def step(self, number: int) -> Iterator[None]:
        """One optimizer step; yields wherever a partial trace may be published."""
        sim, accumulation = self.sim, self.config.integer("accumulation")
        sim.begin(number, accumulation)
        self.own()
        for micro_batch in range(accumulation):
            yield from self._forward(micro_batch)
            yield from self._backward(micro_batch)
        yield from self._optimizer()
        sim.enter(Phase.ZERO_GRAD)
        for name in [n for n, (_, c) in self.held.items() if c is Category.GRADIENTS]:
            sim.drop(self.held.pop(name)[0])
        sim.leave()

    def _size(self, mib: float) -> int:
        return int(mib * self.unit * self.config.batch_size / 8)

    def _forward(self, micro_batch: int) -> Iterator[None]:
        sim, checkpointed = self.sim, self.config["checkpointing"] == "layers"
        sim.enter(Phase.FORWARD, micro_batch)
        self.saved: list[list[int]] = []
        for i in range(self.layers):
            sim.mark(Phase.FORWARD, micro_batch, f"{self.layer(i)}.mlp")
            scratch = sim.alloc(self._size(1))
            kept = [sim.alloc(self._size(2 if j == 0 else 4)) for j in range(3)]
            if checkpointed:
                for address in kept[1:]:
                    sim.drop(address)
            self.saved.append(kept[:1] if checkpointed else kept)
            sim.drop(scratch)
            yield
        sim.mark(Phase.FORWARD, micro_batch, "lm_head")
        before, self.logits = self.logits, sim.alloc(self._size(5))
        if before is not None:
            sim.drop(before)
        self.own()
        sim.leave()

    def _backward(self, micro_batch: int) -> Iterator[None]:
        sim, checkpointed = self.sim, self.config["checkpointing"] == "layers"
        sim.enter(Phase.BACKWARD, micro_batch, "loss")
        upcast = sim.alloc(self._size(10))
        sim.drop(upcast)
        for i in reversed(range(self.layers)):
            again = self._recompute(i, micro_batch) if checkpointed else []
            sim.mark(Phase.BACKWARD, micro_batch, f"{self.layer(i)}.mlp")
            scratch = sim.alloc(self._size(3))
            self._gradient(f"{self.layer(i)}.mlp.weight", 6 * self.unit)
            for address in [*again, *self.saved[i], scratch]:
                sim.drop(address)
            yield
        for name in ("gpt_neox.embed_in.weight", "lm_head.weight"):
            self._gradient(name, 8 * self.unit)
        sim.leave()

    def _recompute(self, i: int, micro_batch: int) -> list[int]:
        sim = self.sim
        sim.enter(Phase.RECOMPUTE, micro_batch, f"{self.layer(i)}.mlp")
        again = [sim.alloc(self._size(4)) for _ in range(2)]
        sim.leave()
        size = 2 * self._size(4)
        event = {"step": sim.step, "micro_batch": micro_batch, "layers": (self.layer(i),), "bytes": size}
        self.recomputed.append(event | {"ms": 1.25, "early_stop": True})
        return again

    def _gradient(self, name: str, size: int) -> None:
        if self.trains and f"{name} grad" not in self.held:
            self.held[f"{name} grad"] = (self.sim.alloc(size), Category.GRADIENTS)

    def _optimizer(self) -> Iterator[None]:
        sim = self.sim
        self.own()
        sim.enter(Phase.OPTIMIZER, module="AdamW")
        for name, size in self.parameters() if self.trains else []:
            for moment in ("exp_avg", "exp_avg_sq"):
                if f"{name} {moment}" not in self.held:
                    self.held[f"{name} {moment}"] = (sim.alloc(size), Category.OPTIMIZER_STATE)
        scratch = [sim.alloc(size) for _, size in self.parameters()] if self.trains else []
        for address in scratch:
            sim.drop(address)
        self.own()
        sim.leave()
        yield


class FakeSource(Published):
    """A `Source` that a test drives.

    Args:
        environment: Where it pretends to run.
        live: False: a recording.
        unit: Bytes of a "MiB" of the model: larger for a screen in GiB.
        layers: Of the model.
    """

    role = ViewerRole.OWNER
    gone = False

    def __init__(self, environment: Environment = CPU, live: bool = True, unit: int = MIB, layers: int = 6) -> None:
        self.live = live
        self.feed = self._feed = Feed()
        self.feed.environment = environment
        self.unit, self.layers = unit, layers
        self.commands: list[Command] = []
        self.refuse: str | None = None
        self.saves_slowly = False
        self.paused = False
        self.model: Model | None = None
        self._work: Iterator[None] = iter(())
        self._step = 0

    # --- Source -------------------------------------------------------------

    def command(self, command: Command) -> None:
        if not self.live:
            raise UserError("this is a recording: there is no engine to command")
        if self.refuse is not None:
            raise UserError(self.refuse)
        self.commands.append(command)
        match command:
            case Pause(paused):
                self.paused = paused
                self.feed.tell(Paused(text="held") if paused else Resumed(text="goes on"))
            case Save(path=path, work=work):
                if self.saves_slowly:
                    return
                work.over = True
                self.feed.tell(Saved(text=f"saved {path}", path=str(path)))

    # --- what a test says -----------------------------------------------------

    def obey(self) -> None:
        """Do what the latest Start or Stop asked for."""
        last = next(c for c in reversed(self.commands) if isinstance(c, Start | Stop))
        if self.model is not None:
            self.end("stopped")
        if isinstance(last, Start):
            self.start(last.config)

    def start(self, config: RunConfig | None = None, **settings: Any) -> None:
        """Begin a run: loaded, before its first step."""
        config = config or techniques.configure(run_fields("polyglot-ko-1.3b"), settings)
        self.model = Model(config, self.layers, self.unit)
        self._work, self._step = iter(()), 0
        self.feed.begin_run(config)
        self.feed.tell(RunStarted(text=f"run of {config.model}"))
        for _ in self.model.load():
            pass
        self.feed.publish_trace(self.model.sim.trace(open_=False))
        self.feed.tell(
            Loaded(text="1,331,810,304 parameters", parameters=1_331_810_304, trainable_parameters=1_331_810_304,
                   allocated_bytes=self.model.sim.allocated, seconds=1.0)
        )  # fmt: skip
        self._read_gauge(Phase.LOAD)

    def advance(self, times: int = 1) -> None:
        """Publish the next partial trace, or finish the step."""
        for _ in range(times):
            self._advance()

    def _advance(self) -> None:
        model = self.model
        assert model is not None
        if self.paused:
            return
        try:
            next(self._work)
        except StopIteration:
            if self._step:
                self._step_ended()
            self._step += 1
            self._work = model.step(self._step)
            next(self._work)
        self._tell_recomputes()
        model.own()
        self.feed.publish_trace(model.sim.trace(open_=True))
        phase = model.sim.spans[-1][0] if model.sim.spans else Phase.IDLE
        self._read_gauge(phase)

    def finish_step(self) -> None:
        """Run on until a step has ended."""
        model = self.model
        assert model is not None
        if not self._step:
            self._advance()
        for _ in self._work:
            pass
        self._tell_recomputes()
        self._step_ended()
        self._step += 1
        self._work = model.step(self._step)

    def _step_ended(self) -> None:
        model = self.model
        assert model is not None
        self._tell_recomputes()
        trace = model.sim.trace(open_=False)
        self.feed.publish_trace(trace)
        peak = int(trace.begin["bytes"].sum() + max(0, trace.events["bytes"].cumsum().max()))
        self.feed.tell(
            StepEnded(text=f"step {self._step}: loss 10.3100, 94 ms", step=self._step, loss=10.31 - self._step / 100,
                      seconds=0.094, tokens=2048, allocated_bytes=model.sim.allocated, peak_bytes=peak,
                      reserved_bytes=peak, traced=True, trace_seconds=0.001 * self._step)
        )  # fmt: skip
        self._read_gauge(Phase.IDLE)

    def _tell_recomputes(self) -> None:
        model = self.model
        assert model is not None
        for event in model.recomputed:
            self.feed.tell(Recomputed(text=f"step {event['step']}: {event['layers'][0]}", **event))
        model.recomputed.clear()

    def abort_step(self, error: str = "out of memory", requested_bytes: int | None = None) -> None:
        """End the step under way by an error, in the middle of whatever it does."""
        model = self.model
        assert model is not None
        trace = model.sim.trace(open_=True)
        self.feed.publish_trace(replace(trace, ending=Ending(EndKind.ABORTED, error, requested_bytes)))

    def fail(self, kind: type[RunFailed | OutOfMemory] = RunFailed, text: str = "RuntimeError: it broke") -> None:
        """End the run with a failure."""
        if kind is OutOfMemory:
            self.feed.tell(
                OutOfMemory(text=text, step=self._step, phase="backward", requested_bytes=1 << 30,
                            allocated_bytes=79 << 30)
            )  # fmt: skip
        else:
            detail = 'Traceback (most recent call last):\n  File "x.py"\nRuntimeError: it broke'
            self.feed.tell(RunFailed(text=text, detail=detail))
        self.end("failed")

    def run_out_of_memory(self, report: OutOfMemoryReport) -> None:
        """End the run in the middle of a step, as an allocation that is refused does."""
        self.abort_step("CUDA out of memory", report.asked_bytes)
        self.feed.tell(OutOfMemory(text="CUDA out of memory. Tried to allocate 512 MiB", step=report.step,
                                   phase=report.phase, requested_bytes=report.asked_bytes, report=report))  # fmt: skip
        self.end("failed")

    def end(self, reason: str, leaked: int = 0) -> None:
        """End the run."""
        self.feed.tell(
            RunEnded(text=f"run {reason} after {self._step} steps, {leaked} bytes leaked", reason=reason,
                     steps=self._step, leaked_bytes=leaked, workspace_bytes=0, managed_bytes=0)
        )  # fmt: skip
        if self.model is not None:
            self.model.sim.live.clear()
            self._read_gauge(Phase.IDLE)
        self.model = None

    def _read_gauge(self, phase: Phase) -> None:
        environment, model = self.feed.environment, self.model
        assert environment is not None and model is not None
        allocated = model.sim.allocated
        reserved = allocated + 96 * self.unit if environment.on_gpu else None
        process = (reserved or allocated) + 480 * MIB
        used = process + 256 * MIB
        gauge = Gauge(
            self.feed.clock_s(), allocated, reserved, 0, process, used,
            environment.device_total_bytes, phase, self._step,
            None if process is None or reserved is None else process - reserved,
        )  # fmt: skip
        self.feed.publish_gauge(gauge)
