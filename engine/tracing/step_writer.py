"""The step under way, written down as it happens: marks, owners, spans and operators.

The modules' hooks and the operators' watch talk to it directly, since theirs is
the path that every allocation of a traced step takes.
"""

from __future__ import annotations

import time
import weakref
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ..categories import Category
from ..events import COMPLETE, OPEN, Counted, Ending, Made, Phase
from . import owners
from .assembly import MODULE_BITS, Span, Taken, pack
from .buckets import BUCKETS, buckets_of
from .labels import Labels
from .owner_registry import OwnerRegistry, OwnerRows
from .recorder import Recorder
from .storages import parts_of

STASH = "stash"
"""Behind the name of the module that made it: an activation that is being copied to the host."""


@dataclass
class TracedStep:
    """A traced step under construction."""

    number: int
    micro_batches: int
    first_mark: int
    marks: array[int] = field(default_factory=lambda: array("q"))
    owners: OwnerRows = field(default_factory=OwnerRows)
    spans: list[Span] = field(default_factory=list)
    operators: array[int] = field(default_factory=lambda: array("q"))
    outputs: array[int] = field(default_factory=lambda: array("q"))


class StepWriter:
    """Writes down the steps of one run; of one that is not traced, where the loop is.

    Args:
        recorder: Stamped with every mark.
        due: Called with a mark when the step under way is due to be published.
        counts_peaks: Whether somebody resets the allocator's peak with every step.

    Attributes:
        tagging: Whether a step is being traced.
        last_node: The node of the graph that a hook tagged last.
        last_plain: The last output that required no gradient, and the module that it is of.
        step: That is being traced; None: none is.
        number: The step under way, traced or not.
        phase: What the loop is doing, traced or not.
        micro_batch: It is in, from 0.
        due_s: When the step under way is due to be published, by `time.perf_counter`.
        labels: Names and descriptions.
        owners: The owners that are known.
    """

    _marks_given = 0

    def __init__(self, recorder: Recorder, due: Callable[[], None], counts_peaks: bool) -> None:
        self.tagging = False
        self.last_node = -1
        self.last_plain: tuple[Callable[[], torch.Tensor | None], int] = (lambda: None, 0)
        self.step: TracedStep | None = None
        self.number = self.micro_batch = 0
        self.phase = Phase.IDLE
        self.due_s = 0.0
        self.labels = Labels()
        self.owners = OwnerRegistry(recorder, self.labels)
        self._recorder, self._due, self._counts_peaks = recorder, due, counts_peaks
        self._reducers: weakref.WeakSet[Any] = weakref.WeakSet()
        # Threads of autograd's own keep the last mark they were given, also from a run before this one.
        self._next_mark = StepWriter._marks_given

    @property
    def module_now(self) -> str:
        """Name of the module at work in the step under way; empty: none, or the step is not traced."""
        step = self.step
        return self.name_of(step.marks[-1] >> MODULE_BITS) if step is not None and step.marks else ""

    @property
    def operator_now(self) -> str:
        """The operator that makes what is allocated now; empty: operators are not watched."""
        step = self.step
        if step is None or not step.operators or step.operators[-2] != self._next_mark - 1:
            return ""
        return self.labels.descriptions[step.operators[-1]].operator

    # --- from the first step to the last --------------------------------------

    def begin(self, number: int, micro_batches: int) -> None:
        """Trace a step."""
        self.step = TracedStep(number, micro_batches, self._next_mark)
        self.tagging = True
        self.tag(Phase.IDLE, 0)

    def end(self) -> None:
        """Trace the step no longer."""
        self.tagging, self.step = False, None

    def release(self) -> None:
        """Forget the model and the optimizers: a reference would keep their memory alive."""
        self.step = None
        self.owners.release()
        StepWriter._marks_given = max(StepWriter._marks_given, self._next_mark)

    # --- what the hooks call --------------------------------------------------

    def name(self, name: str) -> int:
        """The index of a name, without the prefixes that wrappers put before it."""
        return self.labels.name(name)

    def name_of(self, index: int) -> str:
        """The name behind an index."""
        return self.labels.name_of(index)

    def leaf(self, name: str, tensor: torch.Tensor) -> None:
        """Remember, without holding it, a tensor that will be given a `.grad`."""
        self.owners.leaf(name, tensor)

    def tag(self, phase: Phase, module: int) -> None:
        """Give this thread's allocations a new mark from here on."""
        step = self.step
        if step is None:
            return
        step.marks.append(pack(phase, self.micro_batch, module))
        mark = self._next_mark
        self._next_mark = mark + 1
        self._recorder.stamp(mark)
        if time.perf_counter() >= self.due_s and phase is not Phase.IDLE:
            self._due()

    def own(self, category: Category, name: str, tensor: torch.Tensor) -> None:
        """The block alive at the tensor's address belongs to a category from now on."""
        if self.step is not None:
            self.owners.note(self.step.owners, self._mark(self.step), [(category, name, tensor)])

    def step_in_backward(self, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        """An optimizer steps as a part of backward; returns what ends that."""
        step = self.step
        if step is None or not step.marks:
            return lambda: None
        module = step.marks[-1] >> MODULE_BITS
        self.owners.note_gradients_of(step.owners, self._mark(step), optimizer)
        self.tag(Phase.OPTIMIZER, self.name(type(optimizer).__name__))
        return lambda: self.tag(Phase.BACKWARD, module)

    def offloaded(self, tensor: torch.Tensor, stashed: bool) -> None:
        """An activation is on the device until it is on the host, or has come back for the module at work."""
        if self.step is not None:
            name = f"{self.module_now}.{STASH}" if stashed else self.module_now
            self.own_all([(Category.ACTIVATIONS, name, tensor)])

    def making_buckets(self, ddp: Any, begins: bool) -> None:
        """DDP is about to make its buckets anew, if ever, or is past that."""
        self.reduced_by(ddp)
        if self.tagging:
            self.tag(self.phase, self.name(BUCKETS) if begins else 0)

    def reduced_by(self, ddp: Any) -> None:
        """Look for the buckets of a DDP module."""
        self._reducers.add(ddp)

    # --- what the operators' watch calls --------------------------------------

    def operator(self, name: str) -> None:
        """Name the operator that makes what is allocated from here on."""
        step = self.step
        if step is not None:
            self._bump()
            step.operators.extend((self._next_mark - 1, self.labels.description(Made(name))))

    def returned(self, name: str, tensor: torch.Tensor) -> None:
        """It returned this tensor."""
        step = self.step
        if step is None:
            return
        for part in parts_of(tensor):
            if address := self._recorder.address(part):
                step.outputs.extend((self._next_mark - 1, address, self.labels.tensor(name, part)))

    # --- owners and spans -----------------------------------------------------

    def own_model(self, anew: bool) -> None:
        """Note the tensors of models and optimizers; see `OwnerRegistry.note_all`."""
        step = self.step
        if step is not None:
            self.owners.note_all(step.owners, self._mark(step), anew)
            self._bump()

    def own_gradients(self) -> None:
        """Note the gradients there are."""
        step = self.step
        if step is not None:
            self.owners.note_gradients(step.owners, self._mark(step))
            self._bump()

    def own_all(self, owned: Iterable[owners.Owned]) -> None:
        """Note tensors whose owners are known."""
        step = self.step
        if step is not None:
            self.owners.note(step.owners, self._mark(step), owned)
            self._bump()

    def begin_span(self, phase: Phase) -> Span:
        """A phase that begins with the next mark; the step has it when it is in `spans`."""
        return Span(phase, self.micro_batch, self._next_mark, _now_us())

    def end_span(self, span: Span) -> None:
        """It ends before the next mark."""
        span.last_mark, span.end_us = self._next_mark, _now_us()

    # --- handing on -----------------------------------------------------------

    def taken(self, step: TracedStep, ending: Ending, drained: bool = True) -> Taken:
        """The step as far as it has come: what goes on changing is copied.

        Args:
            step: Which.
            ending: How it ended, if it has.
            drained: Whether it is traced.
        """
        counted = None
        if ending is COMPLETE:
            allocated, peak, _ = self._recorder.counters()
            counted = Counted(allocated, peak if self._counts_peaks and step.number else None)
        return Taken(
            number=step.number,
            micro_batches=step.micro_batches,
            first_mark=step.first_mark,
            drained=self._recorder.drain() if drained else None,
            marks=step.marks[:],
            owners=step.owners.noted[:],
            fixed=list(step.owners.repeated),
            spans=[replace(span) for span in step.spans],
            names=self.labels.names,
            descriptions=self.labels.descriptions,
            counted=counted,
            ending=ending,
            operators=step.operators[:],
            outputs=step.outputs[:],
            buckets=tuple(map(buckets_of, self._reducers)),
            taken_us=_now_us(),
        )

    def taken_untraced(self, owned: Iterable[owners.Owned]) -> Taken:
        """A step that is not traced, of which only the owners of what is alive are known.

        Args:
            owned: Owners besides the models and the optimizers.
        """
        nothing = TracedStep(self.number, 1, self._next_mark)
        self.owners.note_all(nothing.owners, -1, anew=True)
        self.owners.note(nothing.owners, -1, owned)
        return self.taken(nothing, OPEN, drained=False)

    def _mark(self, step: TracedStep) -> int:
        """The mark that was set last."""
        return self._next_mark - 1 - step.first_mark

    def _bump(self) -> None:
        """A new mark that says the same as the last.

        What is allocated from here on is not what the addresses just noted meant.
        """
        step = self.step
        if step is not None and step.marks:
            step.marks.append(step.marks[-1])
            self._recorder.stamp(self._next_mark)
            self._next_mark += 1


def _now_us() -> int:
    return time.time_ns() // 1000
