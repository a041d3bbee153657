"""The tracer: it makes `StepTrace`s of a recorder's events, with phases, tags and owners.

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
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from .. import activation_offload, recompute
from ..config import one_line
from ..events import COMPLETE, OPEN, Category, Counted, Ending, EndKind, Made, Phase
from ..ledger import LOSS
from ..out_of_memory.refusal import Refusal, Refused
from ..out_of_memory.report import size_text
from . import owners, sharding, zero
from .assembly import MODULE_BITS, Assembler, Publish, Span, Taken, pack
from .buckets import BUCKETS, buckets_of, reducers
from .describe import OperatorWatch
from .hooks import Guard, tag_modules, tag_steps_in_backward, unguarded
from .labels import Labels
from .owner_registry import OwnerRegistry, OwnerRows
from .recompute_log import OnRecompute, Recomputed, RecomputeLog
from .recorder import Recorder
from .storages import parts_of

SETTLED_AFTER = 2
"""Step after which model and optimizer make no new tensors that stay."""

STASH = "stash"
"""Behind the name of the module that made it: an activation that is being copied to the host."""

DESCRIBED = 2
"""The step whose operators are watched: the first that is like those after it."""


class _Instant(NamedTuple):
    """A step as it was when an allocation was refused.

    Attributes:
        holding: What was alive, where the step was not traced.
        taken: All else.
    """

    holding: Any
    taken: Taken


@dataclass
class _Step:
    """A traced step under construction."""

    number: int
    micro_batches: int
    first_mark: int
    marks: array[int] = field(default_factory=lambda: array("q"))
    owners: OwnerRows = field(default_factory=OwnerRows)
    spans: list[Span] = field(default_factory=list)
    operators: array[int] = field(default_factory=lambda: array("q"))
    outputs: array[int] = field(default_factory=lambda: array("q"))


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
        tagging: Whether a step is being traced.
        last_node: The node of the graph that a hook tagged last.
        last_plain: The last output that required no gradient, and the module that it is of.
        phase_now: What the loop is doing, traced or not.
        failed_in: The phase that an exception ended.
        step_now: The step under way.
        last_traced: The last step that was recorded.
        refusal: The last allocation that was refused in the step under way, or in the one that ended last.
    """

    _marks_given = 0

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
        self.tagging = False
        self.last_node = -1
        self.last_plain: tuple[Callable[[], torch.Tensor | None], int] = (lambda: None, 0)
        self.phase_now = Phase.IDLE
        self.failed_in = Phase.IDLE
        self.step_now = 0
        self.last_traced = -1
        self.refusal: Refusal | None = None
        self._cost_s = 0.0
        self._assembler = Assembler(recorder, publish)
        self._labels = Labels()
        self._owners = OwnerRegistry(recorder, self._labels)
        self._reducers: weakref.WeakSet[Any] = weakref.WeakSet()
        self._recomputes = RecomputeLog(on_recompute)
        self._publish_every_s, self._described, self._counts_peaks = publish_every_s, described, counts_peaks
        self._optimizer_name = 0
        self._micro_batch = 0
        # Threads of autograd's own keep the last mark they were given, also from a run before this one.
        self._next_mark = Tracer._marks_given
        self._step: _Step | None = None
        self._hooks: ExitStack | None = None
        self._hooked = False
        self._guard: Guard = unguarded
        self._model: torch.nn.Module | None = None
        self._next_publish_s = 0.0
        self._held: Callable[[], Iterable[owners.Owned]] = tuple
        self._refused_at: _Instant | None = None
        recorder.on_refused = self._refused

    @property
    def cost_s(self) -> float:
        """Seconds spent on tracing so far, by this thread and the one that assembles."""
        return self._cost_s + self._assembler.cost_s

    @property
    def marks_in_step(self) -> int:
        """Number of marks in the trace of the step under way; 0 if it is not traced."""
        return len(self._step.marks) if self._step is not None else 0

    @property
    def module_now(self) -> str:
        """Name of the module at work in the step under way; empty: none, or the step is not traced."""
        step = self._step
        return self.name_of(step.marks[-1] >> MODULE_BITS) if step is not None and step.marks else ""

    # --- what the loop calls ------------------------------------------------

    def adopt(self, model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        """Know whose parameters, gradients and state to look for."""
        self._model = model
        self._optimizer_name = self.name(type(optimizers[0]).__name__) if optimizers else 0
        self._owners.adopt(model, optimizers)

    def reduced_by(self, call: object) -> None:
        """Know whose buckets to look for, if a model is called through DDP."""
        if hasattr(call, "reducer"):
            self._reducers.add(call)

    def beside(
        self,
        models: Iterable[tuple[str, torch.nn.Module]],
        optimizers: Iterable[torch.optim.Optimizer],
        scalers: Iterable[torch.amp.GradScaler],
    ) -> None:
        """See `OwnerRegistry.beside`."""
        self._owners.beside(models, optimizers, scalers)

    def loader(self, shell: torch.nn.Module) -> Callable[[str], None]:
        """Hooks that tag the modules of a model about to be loaded, as their weights are read.

        Args:
            shell: The model without its weights. Its modules are named first, since
                names stand in the model's order and weights may be read in another.
        """
        for name, _ in shell.named_modules():
            self.name(name)
        return lambda module: self.tag(Phase.LOAD, self.name(module))

    @contextmanager
    def attached(self, guard: Guard = unguarded, observer: recompute.Observer | None = None) -> Iterator[None]:
        """See the adopted model's recomputes, and while steps are traced tag its modules; undone on leaving.

        Args:
            guard: See `tag_modules`.
            observer: Stands around every recompute instead of `recomputing`.
        """
        if self._model is None:
            raise RuntimeError("adopt a model first")
        self._guard = guard
        try:
            with (
                recompute.observer(observer or self.recomputing),
                activation_offload.observer(self.offloaded),
                sharding.observed(self._model, guard(self.own_held)),
                zero.observed(self._model, guard(self.own_held)),
                reducers.heard_by(guard(self._making_buckets)),
                ExitStack() as self._hooks,
            ):
                yield
        finally:
            self._hooks, self._hooked = None, False

    def settle(self) -> None:
        """Wait until every trace taken so far has been published."""
        self._assembler.settle()

    def release(self) -> None:
        """Stop recording and forget the model and the optimizer: a reference would keep their memory alive."""
        self._model = self._step = self._refused_at = None
        self._held = tuple
        self.recorder.on_refused = None
        self._recomputes.clear()
        self._owners.release()
        Tracer._marks_given = max(Tracer._marks_given, self._next_mark)
        self.recorder.stop()
        self._assembler.close()

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
        self.refusal, self._held = None, held
        if not traced and self.last_traced == number - 1:
            if self._hooks is not None:
                self._hooks.close()
                self._hooked = False
            self.recorder.stop()
        if traced:
            self.last_traced = number
            with self._costing():
                self._hook_modules()
                self._assembler.begin(self.recorder.start())
                self._step = _Step(number, micro_batches, self._next_mark)
                self._next_publish_s = time.perf_counter() + self._publish_every_s
                self.tagging = True
                self.tag(Phase.IDLE, 0)
                self._own_all(held())
                self._own_model(anew=False)
        watching = traced and number == self._described
        try:
            with self._watch() if watching else nullcontext():
                yield
        except BaseException as error:
            self._end_step(held, self._ending(error))
            raise
        self._end_step(held, COMPLETE)

    def aborted(self, error: BaseException | None) -> Ending:
        """The ending of a step that an error ended where it was.

        Args:
            error: Which; None: the refusal that somebody has made good.
        """
        asked = self.refusal.refused.asked_bytes if self.refusal is not None else None
        if error is None:
            return Ending(EndKind.ABORTED, f"out of memory: asked for {size_text(asked or 0)}", asked)
        return Ending(EndKind.ABORTED, one_line(error), asked if isinstance(error, torch.OutOfMemoryError) else None)

    def _ending(self, error: BaseException) -> Ending:
        """A step that is left on request never ends."""
        if isinstance(error, StepLeft):
            return error.ending
        return self.aborted(error) if isinstance(error, Exception) else OPEN

    def _hook_modules(self) -> None:
        """Only while steps are traced: idle hooks would cost the others of a launch-bound run 2 %."""
        if self._hooks is not None and self._model is not None and not self._hooked:
            self._hooks.enter_context(tag_modules(self._model, self, self._guard))
            self._hooks.enter_context(tag_steps_in_backward(self, self._guard))
            self._hooked = True

    @contextmanager
    def phase(self, phase: Phase, micro_batch: int = 0) -> Iterator[None]:
        """One phase of the loop."""
        self.phase_now, self._micro_batch = phase, micro_batch
        span = None
        if self._step is not None:
            if phase is Phase.OPTIMIZER:
                self._own_gradients()
            span = Span(phase, micro_batch, self._next_mark, _now_us())
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
            self._recomputes.flush(wait=False)

    def backward_of(self, loss: torch.Tensor) -> None:
        """Tag the backward about to start on whichever thread will run it."""
        if self.tagging and loss.grad_fn is not None:
            index = self.name(LOSS)
            loss.grad_fn.register_prehook(lambda _: self.tag(Phase.BACKWARD, index) if self.tagging else None)

    def own(self, category: Category, name: str, tensor: torch.Tensor) -> None:
        """The block alive at the tensor's address belongs to a category from now on."""
        if self._step is not None:
            self._owners.note(self._step.owners, self._mark(self._step), [(category, name, tensor)])

    def own_batch(self, batch: dict[str, Any]) -> None:
        """Name the inputs of a micro-batch."""
        if self.tagging:
            self._own_all(owners.of_tensors(Category.INPUTS, owners.tensors_in(batch)))

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
        return self._labels.name(name)

    def name_of(self, index: int) -> str:
        """The name behind an index."""
        return self._labels.name_of(index)

    def leaf(self, name: str, tensor: torch.Tensor) -> None:
        """Remember, without holding it, a tensor that will be given a `.grad`."""
        self._owners.leaf(name, tensor)

    def tag(self, phase: Phase, module: int) -> None:
        """Give this thread's allocations a new mark from here on."""
        step = self._step
        if step is None:
            return
        step.marks.append(pack(phase, self._micro_batch, module))
        mark = self._next_mark
        self._next_mark = mark + 1
        self.recorder.stamp(mark)
        due = time.perf_counter() >= self._next_publish_s
        if due and phase is not Phase.IDLE and self._refused_at is None:  # else its stack may be unwinding
            with self._costing():
                self._own_gradients()
                self._take(step, OPEN)
            self._next_publish_s = time.perf_counter() + self._publish_every_s

    def step_in_backward(self, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        """An optimizer steps as a part of backward; returns what ends that."""
        step = self._step
        if step is None or not step.marks:
            return lambda: None
        module = step.marks[-1] >> MODULE_BITS
        self._owners.note_gradients_of(step.owners, self._mark(step), optimizer)
        self.tag(Phase.OPTIMIZER, self.name(type(optimizer).__name__))
        return lambda: self.tag(Phase.BACKWARD, module)

    def offloaded(self, tensor: torch.Tensor, stashed: bool) -> None:
        """An activation is on the device until it is on the host, or has come back for the module at work."""
        if self._step is not None:
            name = f"{self.module_now}.{STASH}" if stashed else self.module_now
            self._own_all([(Category.ACTIVATIONS, name, tensor)])

    def _making_buckets(self, ddp: Any, begins: bool) -> None:
        """DDP is about to make its buckets anew, if ever, or is past that."""
        self._reducers.add(ddp)
        if self.tagging:
            self.tag(self.phase_now, self.name(BUCKETS) if begins else 0)

    # --- what the recorder calls ---------------------------------------------

    def _refused(self, refused: Refused) -> None:
        """An allocation is being refused on this thread: take what there is, before the stack unwinds."""
        step, module = self._step, self.module_now
        if step is not None:
            if step.operators and step.operators[-2] == self._next_mark - 1 and not refused.operator:
                refused = replace(refused, operator=self._labels.descriptions[step.operators[-1]].operator)
            self._own_model(anew=True)
            self._own_all(self._held())
            self._hand_on_instant()
            self._refused_at = _Instant(None, self._taken(step, OPEN))
        else:
            self._refused_at = self._snapshot()
        self.refusal = Refusal(
            refused=refused,
            allocated_bytes=self.recorder.allocated_bytes(),
            step=self.step_now,
            phase=self.phase_now,
            micro_batch=self._micro_batch,
            module=module,
            traced=step is not None,
        )

    def _snapshot(self) -> _Instant:
        """Blocks alive in a step that is not traced, and their owners."""
        nothing = _Step(self.step_now, 1, self._next_mark)
        self._owners.note_all(nothing.owners, -1, anew=True)
        self._owners.note(nothing.owners, -1, self._held())
        return _Instant(self.recorder.holding(), self._taken(nothing, OPEN, drained=False))

    # --- what the operators' watch calls ------------------------------------

    def operator(self, name: str) -> None:
        """Name the operator that makes what is allocated from here on."""
        step = self._step
        if step is not None:
            self._bump()
            step.operators.extend((self._next_mark - 1, self._labels.description(Made(name))))

    def returned(self, name: str, tensor: torch.Tensor) -> None:
        """It returned this tensor."""
        step = self._step
        if step is None:
            return
        for part in parts_of(tensor):
            if address := self.recorder.address(part):
                step.outputs.extend((self._next_mark - 1, address, self._labels.tensor(name, part)))

    def _watch(self) -> AbstractContextManager[Any]:
        return OperatorWatch(self, self._owners.parameter_names())

    @contextmanager
    def recomputing(self, layers: tuple[str, ...]) -> Iterator[None]:
        """A checkpointed segment is computed again in here."""
        self.last_node = -1  # this thread numbers nodes on its own
        before, timer, early_stop = self.recorder.allocated_bytes(), self.recorder.timer(), False
        span = Span(Phase.RECOMPUTE, self._micro_batch, self._next_mark, _now_us())
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
            self._recomputes.add(Recomputed(self.step_now, self._micro_batch, layers, held, timer, early_stop))
            if self._step is not None:
                span.last_mark, span.end_us = self._next_mark, _now_us()
                self._step.spans.append(span)
            self.phase_now = Phase.BACKWARD
            self.tag(Phase.BACKWARD, self.name(layers[-1]))
            self._recomputes.flush(wait=False)

    # --- handing on ---------------------------------------------------------

    def _end_step(self, held: Callable[[], Iterable[owners.Owned]], ending: Ending) -> None:
        step, refused_at = self._step, self._refused_at
        if refused_at is not None and ending.requested_bytes is not None:
            if refused_at.holding is not None:
                self._assembler.begin(refused_at.holding)
            self._assembler.add(replace(refused_at.taken, ending=ending))
        elif step is not None:
            with self._costing():
                self._own_model(anew=step.number <= SETTLED_AFTER)
                self._own_all(held())
                self._take(step, ending)
        self.tagging, self._step, self._refused_at, self._held = False, None, None, tuple
        self._recomputes.flush(wait=ending is COMPLETE)

    def _take(self, step: _Step, ending: Ending) -> None:
        """Hand on the step as far as it has come."""
        self._hand_on_instant()
        self._assembler.add(self._taken(step, ending))

    def _hand_on_instant(self) -> None:
        """If an allocation was refused and somebody has made that good, the step has gone on from there."""
        if self._refused_at is not None:
            self._assembler.add(self._refused_at.taken)
            self._refused_at = None

    def _taken(self, step: _Step, ending: Ending, drained: bool = True) -> Taken:
        """The step as far as it has come: what goes on changing is copied.

        Args:
            step: Which.
            ending: How it ended, if it has.
            drained: Whether it is traced.
        """
        counted = None
        if ending is COMPLETE:
            peak = self.recorder.peak_bytes() if self._counts_peaks and step.number else None
            counted = Counted(self.recorder.allocated_bytes(), peak)
        return Taken(
            number=step.number,
            micro_batches=step.micro_batches,
            first_mark=step.first_mark,
            drained=self.recorder.drain() if drained else None,
            marks=step.marks[:],
            owners=step.owners.noted[:],
            fixed=list(step.owners.repeated),
            spans=[replace(span) for span in step.spans],
            names=self._labels.names,
            descriptions=self._labels.descriptions,
            counted=counted,
            ending=ending,
            operators=step.operators[:],
            outputs=step.outputs[:],
            buckets=tuple(map(buckets_of, self._reducers)),
            taken_us=_now_us(),
        )

    def _own_model(self, anew: bool) -> None:
        step = self._step
        if step is not None:
            self._owners.note_all(step.owners, self._mark(step), anew)
            self._bump()

    def _own_gradients(self) -> None:
        step = self._step
        if step is not None:
            self._owners.note_gradients(step.owners, self._mark(step))
            self._bump()

    def _own_all(self, owned: Iterable[owners.Owned]) -> None:
        step = self._step
        if step is not None:
            self._owners.note(step.owners, self._mark(step), owned)
            self._bump()

    def _mark(self, step: _Step) -> int:
        """The mark that was set last."""
        return self._next_mark - 1 - step.first_mark

    def _bump(self) -> None:
        """A new mark that says the same as the last.

        What is allocated from here on is not what the addresses just noted meant.
        """
        step = self._step
        if step is not None and step.marks:
            step.marks.append(step.marks[-1])
            self.recorder.stamp(self._next_mark)
            self._next_mark += 1

    @contextmanager
    def _costing(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._cost_s += time.perf_counter() - began


def _now_us() -> int:
    return time.time_ns() // 1000


class StepLeft(BaseException):
    """Raised into `Tracer.step` by whoever leaves a step that is somebody else's.

    Never the script's own error: a context that an error passes through sets
    its traceback, and fails if it cannot.

    Args:
        ending: How the step ended.
    """

    def __init__(self, ending: Ending = OPEN) -> None:
        super().__init__()
        self.ending = ending
