"""The tracer: it makes `StepTrace`s of a recorder's events, with phases, tags and owners.

The training loop says what it does (`step`, `phase`, `own_batch`), the hooks say
which module runs, the recorder says what was allocated; all of it is written down
by a `StepWriter`, and the tracer hands that on to be assembled into `StepTrace`s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from .. import activation_offload, recompute
from ..categories import Category
from ..events import COMPLETE, OPEN, Ending, Phase
from ..module_names import LOSS
from ..out_of_memory.refusal import Refusal
from . import owners, sharding, zero
from .assembly import Assembler, Publish
from .buckets import reducers
from .describe import OperatorWatch
from .hooks import Guard, unguarded
from .model_tagging import ModelTagging
from .recompute_log import OnRecompute, RecomputeLog
from .recorder import Recorder
from .refusal_log import RefusalLog
from .step_ending import aborted, ending_by
from .step_writer import StepWriter, TracedStep

SETTLED_AFTER = 2
"""Step after which model and optimizer make no new tensors that stay."""

DESCRIBED = 2
"""The step whose operators are watched: the first that is like those after it."""


class Tracer:
    """Traces one run.

    Args:
        recorder: Where allocations are seen.
        publish: Gets every trace, those of a step under way too.
        on_recompute: Gets every recompute, in traced steps and in others.
        publish_every_s: How often a step under way is published; the trace is
            read inside the step for it.
        described: The step whose operators are watched.
        counts_peaks: Whether somebody resets the allocator's peak with every step.

    Attributes:
        failed_in: The phase that an exception ended.
        last_traced: The last step that was recorded.
    """

    def __init__(
        self,
        recorder: Recorder,
        publish: Publish,
        on_recompute: OnRecompute,
        publish_every_s: float,
        described: int = DESCRIBED,
        counts_peaks: bool = True,
    ) -> None:
        self.recorder = recorder
        self.failed_in = Phase.IDLE
        self.last_traced = -1
        self._publish_every_s, self._described = publish_every_s, described
        self._cost_s = 0.0
        self._optimizer_name = 0
        self._model: torch.nn.Module | None = None
        self._assembler = Assembler(recorder, publish)
        self._writer = StepWriter(recorder, self._publish_step, counts_peaks)
        self._refusals = RefusalLog(self._writer, recorder, self._assembler)
        self._recomputes = RecomputeLog(self._writer, recorder, on_recompute)
        self._tagging = ModelTagging(self._writer)

    @property
    def cost_s(self) -> float:
        """Seconds spent on tracing so far, by this thread and the one that assembles."""
        return self._cost_s + self._assembler.cost_s

    @property
    def step_now(self) -> int:
        """The step under way, traced or not."""
        return self._writer.number

    @property
    def phase_now(self) -> Phase:
        """The phase that the loop is in, traced or not."""
        return self._writer.phase

    @property
    def module_now(self) -> str:
        """Name of the module at work in the step under way; empty: none, or the step is not traced."""
        return self._writer.module_now

    @property
    def marks_in_step(self) -> int:
        """Number of marks in the trace of the step under way; 0 if it is not traced."""
        step = self._writer.step
        return len(step.marks) if step is not None else 0

    # --- whose tensors ------------------------------------------------------

    def adopt(self, model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        """Know whose parameters, gradients and state to look for."""
        self._model = model
        self._optimizer_name = self._writer.name(type(optimizers[0]).__name__) if optimizers else 0
        self._writer.owners.adopt(model, optimizers)

    def reduced_by(self, call: object) -> None:
        """Know whose buckets to look for, if a model is called through DDP."""
        if hasattr(call, "reducer"):
            self._writer.reduced_by(call)

    def beside(
        self,
        models: Iterable[tuple[str, torch.nn.Module]],
        optimizers: Iterable[torch.optim.Optimizer],
        scalers: Iterable[torch.amp.GradScaler],
    ) -> None:
        """See `OwnerRegistry.beside`."""
        self._writer.owners.beside(models, optimizers, scalers)

    # --- from attaching to release ------------------------------------------

    def loader(self, shell: torch.nn.Module) -> Callable[[str], None]:
        """Hooks that tag the modules of a model about to be loaded, as their weights are read.

        Args:
            shell: The model without its weights. Its modules are named first, since
                names stand in the model's order and weights may be read in another.
        """
        writer = self._writer
        for name, _ in shell.named_modules():
            writer.name(name)
        return lambda module: writer.tag(Phase.LOAD, writer.name(module))

    @contextmanager
    def attached(self, guard: Guard = unguarded, observer: recompute.Observer | None = None) -> Iterator[None]:
        """See the adopted model's recomputes, and while steps are traced tag its modules; undone on leaving.

        Args:
            guard: See `tag_modules`.
            observer: Stands around every recompute instead of `recomputing`.
        """
        if self._model is None:
            raise RuntimeError("adopt a model first")
        with (
            recompute.observers.heard_by(observer or self.recomputing),
            activation_offload.observers.heard_by(self._writer.offloaded),
            sharding.observed(self._model, guard(self.own_held)),
            zero.observed(self._model, guard(self.own_held)),
            reducers.heard_by(guard(self._writer.making_buckets)),
            self._tagging.attached(self._model, guard),
        ):
            yield

    def recomputing(self, layers: tuple[str, ...]) -> AbstractContextManager[None]:
        """See `RecomputeLog.recomputing`."""
        return self._recomputes.recomputing(layers)

    def settle(self) -> None:
        """Wait until every trace taken so far has been published."""
        self._assembler.settle()

    def forget(self) -> None:
        """Stop recording and forget the model and the optimizer: a reference would keep their memory alive."""
        self._model = None
        self._writer.release()
        self._refusals.release()
        self._recomputes.clear()
        self.recorder.stop()

    def release(self) -> None:
        """Forget likewise, and wait until what was taken so far has been published."""
        self.forget()
        self._assembler.close()

    # --- steps and phases ---------------------------------------------------

    @contextmanager
    def step(
        self, number: int, micro_batches: int, traced: bool, held: Callable[[], Iterable[owners.Owned]]
    ) -> Iterator[None]:
        """One optimizer step (0: loading the model).

        Args:
            number: From 1; 0 is loading.
            micro_batches: How many the step has.
            traced: Whether to record it.
            held: What the loop holds besides the model and the optimizer: the
                outputs of the step before, the data set.
        """
        self._writer.number = number
        self._refusals.begin_step(held)
        if number > 1:
            self._assembler.go_on()
        if not traced and self.last_traced == number - 1:
            self._tagging.off()
            self.recorder.stop()
        if traced:
            self._trace_step(number, micro_batches, held)
        watching = traced and number == self._described
        try:
            with self._watch() if watching else nullcontext():
                yield
        except BaseException as error:
            self._end_step(held, ending_by(error, self.refusal))
            raise
        self._end_step(held, COMPLETE)

    @contextmanager
    def phase(self, phase: Phase, micro_batch: int = 0) -> Iterator[None]:
        """One phase of the loop."""
        writer, span = self._writer, None
        writer.phase, writer.micro_batch = phase, micro_batch
        if writer.step is not None:
            if phase is Phase.OPTIMIZER:
                writer.own_gradients()
            span = writer.begin_span(phase)
            writer.step.spans.append(span)
            writer.tag(phase, self._optimizer_name if phase is Phase.OPTIMIZER else 0)
        try:
            yield
        except BaseException:
            self.failed_in = phase
            raise
        finally:
            if span is not None:
                writer.end_span(span)
                writer.tag(Phase.IDLE, 0)
            writer.phase = Phase.IDLE
            self._recomputes.flush(wait=False)

    def tag_loss(self, phase: Phase) -> None:
        """The loss is computed from here on, or its backward."""
        self._writer.tag(phase, self._writer.name(LOSS))

    def backward_of(self, loss: torch.Tensor) -> None:
        """Tag the backward about to start on whichever thread will run it."""
        if self._writer.tagging and loss.grad_fn is not None:
            loss.grad_fn.register_prehook(lambda _: self.tag_loss(Phase.BACKWARD) if self._writer.tagging else None)

    # --- what the loop holds ------------------------------------------------

    def own_batch(self, batch: dict[str, Any]) -> None:
        """Name the inputs of a micro-batch."""
        self.own_held(owners.of_tensors(Category.INPUTS, owners.tensors_in(batch)))

    def own_held(self, owned: Iterable[owners.Owned]) -> None:
        """Name whatever the loop knows the owner of."""
        if self._writer.tagging:
            self._writer.own_all(owned)

    def own_outputs(self, outputs: Any, loss: torch.Tensor) -> None:
        """Name the logits, the loss and the KV cache of a forward pass."""
        self.own_held(owners.of_outputs(outputs))
        self.own_held([(Category.LOGITS_LOSS, LOSS, loss)])

    # --- refusals -----------------------------------------------------------

    @property
    def refusal(self) -> Refusal | None:
        """The last allocation that was refused in the step under way, or in the one that ended last."""
        return self._refusals.latest

    def forget_refusal(self) -> None:
        """The asker has found another way."""
        self._refusals.latest = None

    def aborted(self, error: BaseException | None) -> Ending:
        """See `step_ending.aborted`."""
        return aborted(error, self.refusal)

    def _watch(self) -> OperatorWatch:
        return OperatorWatch(self._writer, self._writer.owners.parameter_names(), alone=not self.recorder.always_on)

    # --- handing on ---------------------------------------------------------

    def _trace_step(self, number: int, micro_batches: int, held: Callable[[], Iterable[owners.Owned]]) -> None:
        self.last_traced = number
        with self._costing():
            self._tagging.on()
            self._assembler.begin(self.recorder.start())
            self._writer.due_s = time.perf_counter() + self._publish_every_s
            self._writer.begin(number, micro_batches)
            self._writer.own_all(held())
            self._writer.own_model(anew=False)

    def _publish_step(self) -> None:
        """Hand on the step under way, unless its stack may be unwinding."""
        writer = self._writer
        if writer.step is None or self._refusals.pending:
            return
        with self._costing():
            writer.own_gradients()
            writer.own_all(self._refusals.held())  # a KV cache has grown since the step began
            self._take(writer.step, OPEN)
        self._assembler.go_on()
        writer.due_s = time.perf_counter() + self._publish_every_s

    def _end_step(self, held: Callable[[], Iterable[owners.Owned]], ending: Ending) -> None:
        writer = self._writer
        if not writer.number:
            self._assembler.keep_still()  # Python launches a run's first step, and is slower than the device
        if not self._refusals.end_step(ending) and writer.step is not None:
            with self._costing():
                writer.own_model(anew=writer.step.number <= SETTLED_AFTER)
                writer.own_all(held())
                self._take(writer.step, ending)
        writer.end()
        self._refusals.forget_step()
        self._recomputes.flush(wait=ending is COMPLETE)

    def _take(self, step: TracedStep, ending: Ending) -> None:
        """Hand on the step as far as it has come."""
        self._refusals.hand_on()
        self._assembler.add(self._writer.taken(step, ending))

    @contextmanager
    def _costing(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._cost_s += time.perf_counter() - began
