"""The training loop, top to bottom, of a run and of a prediction alike.

    load                              parameters, buffers
    for every step:
        for every micro-batch:
            batch                     inputs
            outputs = model(batch)    activations, logits, KV cache; and from the
                                      second time on the previous outputs, which
                                      live until this line has returned
            scaler.scale(loss).backward()   gradients; activations go
        scaler.step(optimizer)        optimizer state; temporaries
        optimizer.zero_grad()         gradients go

`tracer` is told what is being done; with a tracer that does nothing this is an
ordinary loop.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from .categories import Category
from .config import RunConfig
from .events import Phase
from .module_names import LOSS
from .tracing import owners
from .tracing.tracer import Tracer
from .workload import Plan, Workload, build


@dataclass(frozen=True, slots=True)
class StepResult:
    """The results of one optimizer step.

    Attributes:
        step: From 1.
        loss: Mean over the micro-batches; None: not known, in somebody else's loop.
        seconds: Wall time, until the loss was on the host.
        tokens: Tokens trained on; None: the rows are no tokens.
        rows: Rows trained on.
        allocated_bytes: After `optimizer.step()`, before `zero_grad()`: where
            the article measures.
        peak_bytes: The most allocated during the step; None where the counter is not ours to reset.
        reserved_bytes: After `optimizer.step()`; None without a caching allocator.
    """

    step: int
    loss: float | None
    seconds: float
    tokens: int | None
    rows: int
    allocated_bytes: int
    peak_bytes: int | None
    reserved_bytes: int | None


class Held:
    """The loop's own variables, so that a tracer can name what they hold alive."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler
        self.batch: dict[str, Any] = {}
        self.outputs: Any = None
        self.losses: list[torch.Tensor] = []

    def owned(self) -> Iterator[owners.Owned]:
        """Everything held, by category."""
        yield from owners.of_tensors(Category.INPUTS, owners.tensors_in(self.batch))
        yield from owners.of_outputs(self.outputs)
        yield from owners.of_scaler(self.scaler)
        yield from owners.of_tensors(Category.LOGITS_LOSS, [(LOSS, loss) for loss in self.losses])


@contextmanager
def loaded(plan: Plan, tracer: Tracer, between: Callable[[], None] = lambda: None) -> Iterator[Workload]:
    """Load a run's model, traced as step 0, and have the tracer's hooks on it for as long as it is trained.

    Args:
        plan: The run.
        tracer: Told what is being done.
        between: Called before every module's weights; raises to end the loading.

    Raises:
        UserError: As `build`.
    """
    with tracer.step(0, 1, True, tuple):
        with tracer.phase(Phase.LOAD):
            tag = tracer.loader(plan.shell)

            def reading(module: str) -> None:
                between()
                tag(module)

            workload = build(plan, reading)
        tracer.adopt(workload.model, workload.optimizer)
        tracer.reduced_by(workload.call)
    with tracer.attached():
        try:
            yield workload
        finally:
            workload.release()


def train(
    config: RunConfig,
    workload: Workload,
    tracer: Tracer,
    want_trace: Callable[[int], bool],
    between: Callable[[], None],
    on_step: Callable[[StepResult], None],
) -> None:
    """Train until `config.steps` are done, or for ever if that is 0.

    Args:
        config: The run.
        workload: What `build` made of it.
        tracer: Told what is being done.
        want_trace: Whether to trace a step.
        between: Called before every micro-batch; holds the loop while it is
            paused, raises to end it.
        on_step: Called after every step.
    """
    recipe, recorder, held = workload.recipe, tracer.recorder, Held(workload.scaler)
    for step in itertools.count(1) if not config.steps else range(1, config.steps + 1):
        between()
        recorder.reset_peak()
        with tracer.step(step, recipe.accumulation, want_trace(step), held.owned):
            began = time.perf_counter()
            held.losses.clear()
            for micro_batch in range(recipe.accumulation):
                if micro_batch:
                    began += _timed(between)  # a run that is held takes no time
                _train_on_next(workload, tracer, held, micro_batch)
            with tracer.phase(Phase.OPTIMIZER):
                recipe.parallelism.step(workload.call, workload.scaler, workload.optimizer)
            allocated, _, reserved = recorder.counters()
            with tracer.phase(Phase.ZERO_GRAD):
                recipe.parallelism.zero_grad(workload.optimizer)
            peak = recorder.counters().peak_bytes
        # Waits for the device. By now the step's trace has been taken: while the
        # device was still busy, and so at no cost to it.
        loss_value = sum(part.item() for part in held.losses)
        seconds = time.perf_counter() - began
        rows, of_row = recipe.accumulation * config.batch_size, workload.batches.tokens
        tokens = None if of_row is None else rows * of_row
        on_step(StepResult(step, loss_value, seconds, tokens, rows, allocated, peak, reserved))


def _train_on_next(workload: Workload, tracer: Tracer, held: Held, micro_batch: int) -> None:
    """One micro-batch, from its data to its gradients."""
    call, recipe = workload.call, workload.recipe
    recipe.parallelism.begin(call, last=micro_batch == recipe.accumulation - 1)
    with tracer.phase(Phase.DATA, micro_batch):
        held.batch = workload.batches.next()
        tracer.own_batch(held.batch)
    with tracer.phase(Phase.FORWARD, micro_batch), autocast(workload):
        held.outputs = call(**held.batch)
        loss = held.outputs.loss / recipe.accumulation
        tracer.own_outputs(held.outputs, loss)
    with tracer.phase(Phase.BACKWARD, micro_batch):
        held.losses.append(loss.detach())
        loss = workload.scaler.scale(loss)
        tracer.backward_of(loss)
        recipe.parallelism.backward(call, loss)
    if not recipe.keep_outputs:
        held.outputs = None


def _timed(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def autocast(workload: Workload) -> Any:
    """The context of a forward pass."""
    dtype = workload.recipe.autocast
    return torch.autocast(workload.device.type, dtype) if dtype is not None else nullcontext()
