"""From a recorder's events to traces: steps, phases, tags and owners.

The training loop says what it does (`step`, `phase`, `own`), the hooks say
which module runs, the recorder says what was allocated; the tracer joins them
into `StepTrace`s and hands those on.
"""

from __future__ import annotations

import time
import traceback
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .. import recompute
from ..events import MARK, OWNER, Category, Phase, PhaseSpan, Recompute, StepTrace
from ..ledger import LOSS, strip_wrappers
from . import owners
from .hooks import tag_modules
from .recorder import Recorder, Timer, columns

Publish = Callable[[StepTrace], None]
SETTLED_AFTER = 2
"""Step after which model and optimizer make no new tensors that stay."""

OnRecompute = Callable[[Recompute], None]


@dataclass
class _Span:
    """A phase under way: marks and times of its ends; -1 while it is open."""

    phase: Phase
    micro_batch: int
    first_mark: int
    begin_us: int
    last_mark: int = -1
    end_us: int = -1


@dataclass
class _Recomputing:
    """A recompute that has ended on the host and perhaps not yet on the device."""

    layers: tuple[str, ...]
    micro_batch: int
    bytes: int
    timer: Timer
    early_stop: bool


@dataclass
class _Step:
    """A traced step under construction."""

    number: int
    micro_batches: int
    begin: npt.NDArray[Any]
    first_mark: int
    chunks: list[npt.NDArray[Any]] = field(default_factory=list)
    marks: array[int] = field(default_factory=lambda: array("q"))
    fixed: list[npt.NDArray[Any]] = field(default_factory=list)
    owners: array[int] = field(default_factory=lambda: array("q"))
    spans: list[_Span] = field(default_factory=list)


class Tracer:
    """Traces one run.

    Args:
        recorder: Where allocations are seen.
        publish: Gets every trace, partial ones too.
        on_recompute: Gets every recompute, in traced steps and in others.
        publish_every_s: How often a step under way is published; the trace is
            read inside the step for it.

    Attributes:
        tagging: Whether a step is being traced.
        phase_now: What the loop is doing, traced or not.
        failed_in: The phase that an exception ended.
        step_now: The step under way.
        last_traced: The last step that was recorded.
        cost_s: Seconds spent on tracing so far.
    """

    def __init__(self, recorder: Recorder, publish: Publish, on_recompute: OnRecompute, publish_every_s: float) -> None:
        self.recorder = recorder
        self.tagging = False
        self.phase_now = Phase.IDLE
        self.failed_in = Phase.IDLE
        self.step_now = 0
        self.last_traced = -1
        self.cost_s = 0.0
        self._publish, self._on_recompute, self._publish_every_s = publish, on_recompute, publish_every_s
        self._names: dict[str, int] = {"": 0}
        self._optimizer_name = 0
        self._micro_batch = 0
        self._next_mark = 0
        self._step: _Step | None = None
        self._model: torch.nn.Module | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._recomputed: list[_Recomputing] = []
        self._next_publish_s = 0.0
        self._leaves: list[tuple[str, weakref.ref[torch.Tensor]]] = []
        self._parameters: list[tuple[int, torch.nn.Parameter]] = []
        self._fixed = np.empty(0, OWNER)
        self._int8: list[tuple[str, torch.nn.Module]] = []

    # --- what the loop calls ------------------------------------------------

    def adopt(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Know whose parameters, gradients and state to look for."""
        self._model, self._optimizer = model, optimizer
        self._optimizer_name = self.name(type(optimizer).__name__)
        self._parameters = [(self.name(name), parameter) for name, parameter in model.named_parameters()]
        self._fixed = np.empty(0, OWNER)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Tag the adopted model's modules and see its recomputes; undone on leaving."""
        if self._model is None:
            raise RuntimeError("adopt a model first")
        with tag_modules(self._model, self), recompute.observer(self.recomputing):
            yield

    def release(self) -> None:
        """Stop recording and forget the model and the optimizer: a reference would keep their memory alive."""
        self._model = self._optimizer = self._step = None
        self._recomputed.clear()
        self._leaves.clear()
        self._fixed = np.empty(0, OWNER)
        self._int8.clear()
        self._parameters.clear()
        self.recorder.stop()

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
        self.step_now = number
        if not traced and self.last_traced == number - 1:
            self.recorder.stop()
        if traced:
            self.last_traced = number
            with self._costing():
                self._step = _Step(number, micro_batches, self.recorder.start(), self._next_mark)
                self._next_publish_s = time.perf_counter() + self._publish_every_s
                self.tagging = True
                self.tag(Phase.IDLE, 0)
                self._own_all(held())
                self._own_model()
        try:
            yield
        except BaseException:
            self._end_step(held, partial=True)
            raise
        self._end_step(held, partial=False)

    @contextmanager
    def phase(self, phase: Phase, micro_batch: int = 0) -> Iterator[None]:
        """One phase of the loop."""
        self.phase_now, self._micro_batch = phase, micro_batch
        span = None
        if self._step is not None:
            if phase is Phase.OPTIMIZER:
                self._own_gradients()
            span = _Span(phase, micro_batch, self._next_mark, _now_us())
            self._step.spans.append(span)
            self.tag(phase, self._optimizer_name if phase is Phase.OPTIMIZER else 0)
        try:
            yield
        except BaseException:
            self.failed_in = phase
            raise
        finally:
            if span is not None:
                span.last_mark, span.end_us = self._next_mark, _now_us()
                self.tag(Phase.IDLE, 0)
            self.phase_now = Phase.IDLE
            self._flush_recomputes(wait=False)

    def backward_of(self, loss: torch.Tensor) -> None:
        """Tag the backward about to start on whichever thread will run it."""
        if self.tagging and loss.grad_fn is not None:
            index = self.name(LOSS)
            loss.grad_fn.register_prehook(lambda _: self.tag(Phase.BACKWARD, index) if self.tagging else None)

    def own(self, category: Category, name: str, tensor: torch.Tensor) -> None:
        """The block alive at the tensor's address belongs to a category from now on."""
        step, address = self._step, self.recorder.address(tensor)
        if step is not None and address:
            step.owners.extend((address, self._next_mark - 1 - step.first_mark, category, self.name(name)))

    def own_batch(self, batch: dict[str, torch.Tensor]) -> None:
        """Name the inputs of a micro-batch."""
        if self.tagging:
            self._own_all(owners.of_tensors(Category.INPUTS, batch.items()))

    def own_held(self, owned: Iterable[owners.Owned]) -> None:
        """Name whatever the loop knows the owner of."""
        if self.tagging:
            self._own_all(owned)

    def own_outputs(self, outputs: Any, loss: torch.Tensor) -> None:
        """Name the logits, the loss and the KV cache of a forward pass."""
        if self.tagging:
            self._own_all(owners.of_outputs(outputs))
            self._own_all([(Category.LOGITS_LOSS, LOSS, loss)])

    # --- what the hooks call ------------------------------------------------

    def name(self, name: str) -> int:
        """The index of a name, without the prefixes that wrappers put before it."""
        return self._names.setdefault(strip_wrappers(name), len(self._names))

    def name_of(self, index: int) -> str:
        """The name behind an index."""
        return list(self._names)[index]

    def leaf(self, name: str, tensor: torch.Tensor) -> None:
        """Remember, without holding it, a tensor that will be given a `.grad`.

        `enable_input_require_grads`, which checkpointing a frozen model needs,
        makes such a leaf of the embedding's output.
        """
        self._leaves.append((name, weakref.ref(tensor)))

    def tag(self, phase: Phase, module: int) -> None:
        """From here on, this thread's allocations carry a new mark."""
        step = self._step
        if step is None:
            return
        step.marks.extend((phase, self._micro_batch, module))
        mark = self._next_mark
        self._next_mark = mark + 1
        self.recorder.stamp(mark)
        if time.perf_counter() >= self._next_publish_s and phase is not Phase.IDLE:
            with self._costing():
                self._publish(self._build(step, partial=True))
            self._next_publish_s = time.perf_counter() + self._publish_every_s

    @contextmanager
    def recomputing(self, layers: tuple[str, ...]) -> Iterator[None]:
        """A checkpointed segment is computed again in here."""
        before, timer, early_stop = self.recorder.allocated_bytes(), self.recorder.timer(), False
        span = _Span(Phase.RECOMPUTE, self._micro_batch, self._next_mark, _now_us())
        self.tag(Phase.RECOMPUTE, self.name(layers[0]))
        self.phase_now = Phase.RECOMPUTE
        try:
            yield
        except BaseException as error:
            early_stop = type(error).__name__ == "_StopRecomputationError"
            if early_stop:
                # The abandoned forward's frames still hold its temporaries.
                traceback.clear_frames(error.__traceback__)
            raise
        finally:
            timer.stop()
            held = self.recorder.allocated_bytes() - before
            self._recomputed.append(_Recomputing(layers, self._micro_batch, held, timer, early_stop))
            if self._step is not None:
                span.last_mark, span.end_us = self._next_mark, _now_us()
                self._step.spans.append(span)
            self.phase_now = Phase.BACKWARD
            self.tag(Phase.BACKWARD, self.name(layers[-1]))
            self._flush_recomputes(wait=False)

    # --- building -----------------------------------------------------------

    def _end_step(self, held: Callable[[], Iterable[owners.Owned]], partial: bool) -> None:
        self._flush_recomputes(wait=not partial)
        step = self._step
        if step is None:
            return
        with self._costing():
            self._own_model()
            self._own_all(held())
            self._publish(self._build(step, partial))
            self.tagging, self._step = False, None

    def _build(self, step: _Step, partial: bool) -> StepTrace:
        if partial:
            self._own_gradients()
        step.chunks.append(self.recorder.drain())
        events = np.concatenate(step.chunks) if len(step.chunks) > 1 else step.chunks[0]
        step.chunks = [events]
        relative = events.copy()
        relative["mark"] = _settle(events["mark"] - step.first_mark)
        return StepTrace(
            step=step.number,
            events=relative,
            marks=columns(step.marks, MARK),
            begin=step.begin,
            owners=np.concatenate([*step.fixed, columns(step.owners, OWNER)]),
            names=tuple(self._names),
            phases=_spans(step, relative["mark"]),
            partial=partial,
            micro_batches=step.micro_batches,
        )

    def _own_model(self) -> None:
        """The model, the optimizer and the libraries, whose tensors stay where they are.

        Looking all of them up takes longer than a small step's other tracing,
        so once nothing new comes (quantized weights move in the first forward,
        optimizer state is made in the first step) they are only repeated.
        """
        step = self._step
        if step is None:
            return
        settled = len(self._fixed) and step.number > SETTLED_AFTER
        if self._model is not None and self._optimizer is not None and not settled:
            first = len(step.owners)
            self._own_all(owners.of_model(self._model))
            self._own_all(owners.of_optimizer(self._model, self._optimizer))
            self._own_all(owners.of_libraries())
            self._fixed = columns(step.owners[first:], OWNER)
            self._int8 = owners.int8_modules(self._model)
        else:
            again = self._fixed.copy()
            again["mark"] = self._next_mark - 1 - step.first_mark
            step.fixed.append(again)
        mark, name = self._next_mark - 1 - step.first_mark, self.name("cuBLAS")
        for address in self.recorder.workspaces:
            step.owners.extend((address, mark, Category.WORKSPACE, name))
        self._own_all(owners.of_last_batch(self._int8))
        self._own_gradients()

    def _own_gradients(self) -> None:
        step = self._step
        if step is None:
            return
        mark, address_of = self._next_mark - 1 - step.first_mark, self.recorder.address
        for name, parameter in self._parameters:
            if parameter.grad is not None:
                step.owners.extend((address_of(parameter.grad), mark, Category.GRADIENTS, name))
        self._leaves = [(name, leaf) for name, leaf in self._leaves if leaf() is not None]
        for leaf_name, reference in self._leaves:
            leaf = reference()
            if leaf is not None:
                self.own(Category.ACTIVATIONS, leaf_name, leaf)
                if leaf.grad is not None:
                    self.own(Category.ACTIVATIONS, f"{leaf_name}.grad", leaf.grad)
        self._bump()

    def _own_all(self, owned: Iterable[owners.Owned]) -> None:
        for category, name, tensor in owned:
            self.own(category, name, tensor)
        self._bump()

    def _bump(self) -> None:
        """A new mark that says the same as the last.

        What is allocated from here on is not what the addresses just noted meant.
        """
        step = self._step
        if step is not None and step.marks:
            step.marks.extend(step.marks[-3:])
            self.recorder.stamp(self._next_mark)
            self._next_mark += 1

    def _flush_recomputes(self, wait: bool) -> None:
        while self._recomputed and (wait or self._recomputed[0].timer.done()):
            r = self._recomputed.pop(0)
            self._on_recompute(
                Recompute(self.step_now, r.micro_batch, r.layers, r.bytes, r.timer.ms(), r.early_stop)
            )  # fmt: skip

    @contextmanager
    def _costing(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.cost_s += time.perf_counter() - began


def _now_us() -> int:
    return time.time_ns() // 1000


def _settle(marks: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Marks that never fall back.

    A thread of autograd's own may still carry the tag it was last given when
    the main thread has moved on; the later tag is the true one.
    """
    return np.maximum(np.maximum.accumulate(marks), 0) if len(marks) else marks


def _spans(step: _Step, marks: npt.NDArray[np.int64]) -> tuple[PhaseSpan, ...]:
    """Phases as ranges of events, in the order they began."""
    spans = []
    for span in sorted(step.spans, key=lambda s: s.first_mark):
        begin = int(np.searchsorted(marks, span.first_mark - step.first_mark))
        open_ended = span.last_mark < 0
        end = len(marks) if open_ended else int(np.searchsorted(marks, span.last_mark - step.first_mark))
        spans.append(
            PhaseSpan(span.phase, span.micro_batch, begin, end, span.begin_us, _now_us() if open_ended else span.end_us)
        )
    return tuple(spans)
