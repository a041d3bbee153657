"""A loop that is not ours, followed by its hooks: phases, micro-batches and steps.

The model's first and last hook are the ends of a forward pass, the first node of
its graph to be executed is the beginning of backward, the optimizers' hooks are
the ends of their step, and with them a step of ours ends and the next begins.
Without an optimizer it is inference: a step is a forward pass, or all passes
that continue one another's KV cache.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any, Protocol

import torch

from ..categories import Category
from ..config import RunConfig, Value
from ..events import OPEN, Phase
from ..module_names import LOGITS, OUTPUT_LOSS
from ..recompute import in_backward
from ..tracing import owners
from ..tracing.module_hooks import keyword_arguments
from ..tracing.recorder import Recorder
from ..tracing.step_ending import StepLeft
from ..tracing.tracer import SETTLED_AFTER, Tracer
from ..train import StepResult
from .batch import Batch, batch_of, packing_of, rows_of, tensors_of
from .describe import config_of
from .loss import Losses
from .others import compiled_modules, find_others

Weak = tuple[Category, str, "weakref.ref[torch.Tensor]"]

MORE_HELD = 1.01
"""If a step ends with so many times what any before has ended with, somebody new holds it."""

LONGEST_PART, LEAST_PASSES = 10_000, 64
"""Marks and forward passes after which a step that has not ended is published as far as it is, and traced anew."""

MOST_MICRO_BATCHES = 2**15 - 1
"""That a mark can number; later ones count as the last."""

Guard = Callable[[Callable[..., Any]], Callable[..., Any]]


class Listener(Protocol):
    """The receiver of all that is told of a loop.

    Attributes:
        publisher: Says which steps are traced, and is told what is in managed memory.
        micro_batches: By step, as far as they are known.
    """

    publisher: Any
    micro_batches: dict[int, int]

    @property
    def run(self) -> object | None:
        """The run; None before the first forward pass."""
        ...

    def begin_run(self, config: RunConfig, model: torch.nn.Module) -> None:
        """The first forward pass begins."""
        ...

    def learn(self, **found: Value | None) -> None:
        """More is known of the run's configuration; told only of a run that has begun."""
        ...

    def say_compiled(self, modules: int, only_returned: bool) -> None:
        """So many modules are compiled."""
        ...

    def stepped(self, result: StepResult) -> None:
        """A step has ended."""
        ...

    def out_of_memory(self, error: BaseException | None, step: int, phase: Phase) -> None:
        """An allocation was refused."""
        ...


class WatchedLoop:
    """A watched loop: makes a run's steps of what the hooks of a model and its optimizers are told.

    Args:
        model: That is trained, or used.
        optimizers: Whose `step` ends a step; none: it is used.
        recorder: Where allocations are seen.
        tracer: Told of phases, steps and owners.
        source: Told of what ended.
        guard: Stands around every hook.
        hook_too: Hooks a module that is called instead of the model.
        accumulation: Micro-batches a step, if that is known.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizers: list[torch.optim.Optimizer],
        recorder: Recorder,
        tracer: Tracer,
        source: Listener,
        guard: Guard,
        hook_too: Callable[[torch.nn.Module], None],
        accumulation: int | None = None,
    ) -> None:
        self._model, self._optimizers = model, optimizers
        self._recorder, self._tracer, self._source = recorder, tracer, source
        self._guard, self._hook_too = guard, hook_too
        self._accumulation = accumulation
        self.steps = 0
        self._phase = Phase.IDLE
        self._step_context: Any = None
        self._phase_context: Any = None
        self._inside: weakref.ref[torch.nn.Module] | None = None
        self._has_batch = self._loss_is_share = False
        self._micro_batch = self._forwards = self._rows = self._passes = 0
        self._tokens: int | None = None
        self._step_began_s = 0.0
        self._peak_before = self._highest = self._most_held_bytes = 0
        self._shape = Batch()
        self._batch: list[Weak] = []
        self._outputs: list[Weak] = []
        self._cache: int | None = None
        self._awaited = set(map(id, optimizers))
        self._stepped: set[int] = set()
        self._losses = Losses()
        self._found_early: dict[str, Value | None] = {}

    # --- from the first step to the last ------------------------------------------

    def begin(self) -> None:
        """The first step begins now."""
        self.look_for_others()
        self._begin_step()

    def end(self, error: BaseException | None) -> None:
        """The step under way is over: by an error, or because nobody goes on."""
        out_of_memory = isinstance(error, torch.OutOfMemoryError)
        if out_of_memory or self._tracer.refusal is not None:
            self._out_of_memory(error if out_of_memory else None)
        elif error is None and not self._optimizers and self._forwards:
            self._end_step(Phase.FORWARD)
        elif error is not None and isinstance(error, Exception):
            self._leave_step(StepLeft(self._tracer.aborted(error)))
        else:
            self._leave_step(StepLeft(OPEN))

    def _out_of_memory(self, error: BaseException | None) -> None:
        """An allocation was refused, and the step is left where it was then.

        Args:
            error: That says so; None: the script has caught it.
        """
        phase, step, tracer = self._phase, self._tracer.step_now, self._tracer
        self._leave_step(StepLeft(tracer.aborted(error)))
        tracer.settle()
        if self._source.run is not None:
            # It died of this batch and not of the first one, whose shape is the run's until now.
            self._source.learn(batch_size=self._shape.rows, seq_len=self._shape.seq_len)
            self._source.out_of_memory(error, step, phase)

    def _go_on(self) -> None:
        """If the script has caught what ran out of memory, tell of it and begin the step anew."""
        if self._tracer.refusal is not None:
            self._out_of_memory(None)
            self._begin_step()

    # --- what the hooks tell ----------------------------------------------------

    def forward_begins(self, module: torch.nn.Module, args: Any) -> None:
        """A forward pass of the model, or of what it is compiled to, begins."""
        if in_backward() or self._is_inside(module):  # it is computed again; it calls itself
            return
        self._go_on()
        self._inside = weakref.ref(module)
        kwargs = keyword_arguments()
        self._next_pass(kwargs)
        self._loss_is_share = kwargs.get("num_items_in_batch") is not None
        named = tensors_of(args, kwargs)
        self._shape = batch = batch_of(named)
        self._batch = [(Category.INPUTS, name, weakref.ref(tensor)) for name, tensor in named]
        if torch.is_grad_enabled() or not self._optimizers:
            self._rows += batch.rows
            self._tokens = batch.tokens if self._tokens is None else self._tokens + (batch.tokens or 0)
        if self._source.run is None:
            self._begin_run(batch)
            self._learn(packing=packing_of(named), **rows_of(named, batch.seq_len))
        elif not self._has_batch:
            self._learn(batch_size=batch.rows, seq_len=batch.seq_len)
        if self.steps == 1 and not self._forwards and self._optimizers:
            self._learn(keep_outputs=self._keeps_outputs())
        self._has_batch = True
        self._forwards += 1
        self._switch(Phase.FORWARD)
        self._tracer.own_batch(dict(named))
        self._tracer.own_held(owners.of_cache(_cache_in(kwargs)))

    def forward_ends(self, module: torch.nn.Module, _args: Any, outputs: Any) -> None:
        """It has returned; None: perhaps it has raised."""
        if self._inside is None or self._inside() is not module or in_backward():
            return
        self._inside = None
        if outputs is None:
            return
        self._tracer.forget_refusal()
        owned = list(_of_outputs(outputs))
        self._outputs = [(category, name, weakref.ref(tensor)) for category, name, tensor in owned]
        self._tracer.own_held(owned)
        for _, name, tensor in owned:
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(self._guard(self._backward_begins))
                if name == OUTPUT_LOSS:
                    self._losses.note(tensor, self._loss_is_share)
        # What follows the model's forward in the script is its loss, if anything.
        self._tracer.tag_loss(Phase.FORWARD)
        if not self._optimizers:
            cache = owners.cache_in(outputs)
            self._cache = id(cache) if cache is not None else None
            if cache is None and not torch.is_grad_enabled():
                self._end_step(Phase.FORWARD)

    def optimizer_begins(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """One of the optimizers is about to step."""
        if not in_backward():
            self._go_on()
        if id(optimizer) in self._stepped:  # the others do not step every time
            self._awaited &= self._stepped
            self._end_step(Phase.OPTIMIZER)
        if not in_backward():  # else it is a part of it: each parameter's as soon as it has its gradient
            self._switch(Phase.OPTIMIZER)

    def optimizer_ends(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """It has stepped."""
        self._stepped.add(id(optimizer))
        if not self._awaited <= self._stepped:
            return
        end = self._guard(lambda: self._end_step(Phase.OPTIMIZER))
        if in_backward():
            torch.autograd.Variable._execution_engine.queue_callback(end)
        else:
            end()

    def _backward_begins(self, _gradients: Any) -> None:
        if self._phase is not Phase.BACKWARD:
            self._switch(Phase.BACKWARD)
            self._tracer.tag_loss(Phase.BACKWARD)

    def _is_inside(self, module: torch.nn.Module) -> bool:
        """True if another module that stands for the model is running: one that compiles or wraps it."""
        outer = self._inside() if self._inside is not None else None
        return outer is not None and outer is not module

    def _keeps_outputs(self) -> bool:
        """True if the script still has more of the last outputs than their loss."""
        return any(name != OUTPUT_LOSS and tensor() is not None for _, name, tensor in self._outputs)

    # --- steps and micro-batches ----------------------------------------------------

    def _next_pass(self, kwargs: Mapping[str, Any]) -> None:
        """Begin the micro-batch, or the step, that a forward pass belongs to."""
        cache = _cache_in(kwargs)
        continues = cache is not None and id(cache) == self._cache
        if self._phase is Phase.BACKWARD or (continues and not self._optimizers):
            self._micro_batch += 1
        elif not self._optimizers and self._forwards:
            self._end_step(Phase.FORWARD)
        self._cache = id(cache) if cache is not None else None
        self._passes += 1
        if self._passes > LEAST_PASSES and self._tracer.marks_in_step > LONGEST_PART:
            self._leave_step(StepLeft(OPEN))
            self._trace_step()

    def _begin_run(self, batch: Batch) -> None:
        self._source.begin_run(config_of(self._model, self._optimizers, batch, self._accumulation), self._model)
        self._learn(**self._found_early)

    def _learn(self, **found: Value | None) -> None:
        """More is known of the run's configuration: the source is told, once there is a run."""
        if self._source.run is None:
            self._found_early |= found
        else:
            self._source.learn(**found)

    def _end_step(self, last: Phase) -> None:
        """A step has ended.

        Args:
            last: Its last phase; if another is under way, it is passed through now.
        """
        recorder = self._recorder
        if self._phase is not last:
            self._switch(last)
        if self._source.run is None:  # no forward pass was seen
            self._begin_run(Batch())
        allocated, peak, reserved = recorder.counters()
        seconds = time.perf_counter() - self._step_began_s
        if self.steps < SETTLED_AFTER or allocated > MORE_HELD * self._most_held_bytes:
            self.look_for_others()
        self._most_held_bytes = max(self._most_held_bytes, allocated)
        self._leave_step(None)
        self.steps += 1
        if self.steps == 1:
            self._learn_of_step()
        # A counter that is the script's own is not reset: it tells of a step that exceeds all before.
        counts = recorder.always_on or peak > self._peak_before
        self._source.stepped(
            StepResult(
                step=self.steps,
                loss=self._losses.read(),
                seconds=seconds,
                tokens=self._tokens,
                rows=self._rows,
                allocated_bytes=allocated,
                peak_bytes=max(peak, self._highest) if counts else None,
                reserved_bytes=reserved,
            )
        )
        self._begin_step()

    def _learn_of_step(self) -> None:
        """Learn what only a whole step shows: paged optimizer state, micro-batches a step."""
        states = chain.from_iterable(optimizer.state.values() for optimizer in self._optimizers)
        self._source.publisher.managed_bytes = owners.paged_bytes(states)
        if self._accumulation is None and self._optimizers:
            self._learn(accumulation=self._micro_batch + 1)

    def look_for_others(self) -> None:
        """Models and optimizers beside these, whose tensors are not the script's own."""
        others = find_others(self._model, self._optimizers)
        self._tracer.beside(others.models, others.optimizers, others.scalers)
        self._learn(loss_scaling=bool(others.scalers))
        for wrapper in others.compiled:
            self._hook_too(wrapper)
        self._source.say_compiled(len(others.compiled) + compiled_modules(self._model), self._recorder.always_on)

    def _begin_step(self) -> None:
        self._micro_batch = self._forwards = self._rows = self._highest = 0
        self._tokens = None
        self._stepped.clear()
        self._step_began_s = time.perf_counter()
        self._trace_step()

    def _trace_step(self) -> None:
        """Trace the step from here on."""
        recorder, tracer, number = self._recorder, self._tracer, self.steps + 1
        self._peak_before, self._passes = recorder.counters().peak_bytes, 0
        if recorder.always_on:
            self._highest = max(self._highest, self._peak_before) if self._forwards else 0
            recorder.reset_peak()
        context = tracer.step(number, 1, self._source.publisher.wants(number), self._held)
        context.__enter__()
        self._step_context = context
        self._switch(Phase.DATA)

    def _switch(self, phase: Phase) -> None:
        self._leave_phase(None)
        of_batch = phase in (Phase.FORWARD, Phase.BACKWARD)
        context = self._tracer.phase(phase, min(self._micro_batch, MOST_MICRO_BATCHES) if of_batch else 0)
        context.__enter__()
        self._phase_context, self._phase = context, phase

    def _leave_phase(self, error: StepLeft | None) -> None:
        context, self._phase_context, self._phase = self._phase_context, None, Phase.IDLE
        _leave(context, error)

    def _leave_step(self, error: StepLeft | None) -> None:
        self._leave_phase(error)
        self._source.micro_batches[self.steps + 1] = self._micro_batch + 1
        context, self._step_context = self._step_context, None
        _leave(context, error)

    def _held(self) -> Iterator[owners.Owned]:
        """Tensors of the last batch and outputs that the script still holds."""
        for category, name, reference in (*self._batch, *self._outputs):
            tensor = reference()
            if tensor is not None:
                yield category, name, tensor


def _leave(context: Any, error: StepLeft | None) -> None:
    """Leave a context as if its body had raised, without raising that again."""
    if context is None:
        return
    try:
        context.__exit__(type(error) if error else None, error, None)
    except StepLeft as same:
        if same is not error:
            raise


def _cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The KV cache that a forward pass is given, under either of transformers' names."""
    return kwargs.get("cache", kwargs.get("past_key_values"))


def _of_outputs(outputs: Any) -> Iterator[owners.Owned]:
    """Logits, loss and KV cache of transformers; of any other model what it returns is its logits."""
    owned = list(owners.of_outputs(outputs))
    if not owned:
        tensors = [outputs] if isinstance(outputs, torch.Tensor) else [t for _, t in owners.tensors_in(outputs)]
        owned = [(Category.LOGITS_LOSS, OUTPUT_LOSS if t.dim() == 0 else LOGITS, t) for t in tensors]
    yield from owned
