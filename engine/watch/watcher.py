"""`with watch(model, optimizer):` around any PyTorch loop.

Nobody tells us what the loop is doing, so hooks do: the model's first and last
hook are the ends of a forward pass, the first node of its graph to be executed
is the beginning of backward, the optimizer's hooks are the ends of its step,
and with them a step of ours ends and the next begins.
"""

from __future__ import annotations

import atexit
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from itertools import chain
from types import TracebackType
from typing import Any, Self

import torch

from .. import recompute
from ..events import OPEN, Category, Phase, Recompute
from ..forks import in_child
from ..ledger import LOGITS, LOSS, OUTPUT_LOSS
from ..publisher import GAUGE_EVERY_S
from ..recompute import in_backward
from ..tracing import owners
from ..tracing.recorder import Recorder
from ..tracing.tracer import SETTLED_AFTER, StepLeft, Tracer, aborted
from ..train import StepResult
from .describe import config_of, device_of, optimizers_in
from .loss import Losses
from .others import find_others
from .recorders import GuardedOpTracker, LateAllocatorTrace
from .tracebacks import hide_our_frames, our_frames_hidden
from .watched_source import WatchedSource

MORE_HELD = 1.01
"""If a step ends with so many times what any before has ended with, somebody new holds it."""

Weak = tuple[Category, str, "weakref.ref[torch.Tensor]"]


class watch:  # noqa: N801 (it is used like a function: with watch(model, optimizer))
    """Watch a training loop; `gpumem-tui attach` in another terminal shows it.

    Use it as a context manager around the loop, or call `begin` and `end`. What
    fails in here is logged once and switched off; the loop goes on.

    Args:
        model: Whose modules are tagged.
        optimizer: Whose `step` ends a step; accelerate's wrapper is fine. A list
            of several: a step ends when all of them have stepped.
        name: Of the engine in `gpumem-tui ps`; the script's name if None.
        every_step: Trace every step on a GPU, whatever it costs, instead of
            as many as take 1 % of the time.

    Raises:
        TypeError: The optimizer is none of torch's.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: Any, *, name: str | None = None, every_step: bool = False
    ) -> None:
        self._model, self._optimizers = model, optimizers_in(optimizer)
        self._every_step = every_step
        self.source = WatchedSource(name)
        self.barrier = self.source.barrier
        self._undo = ExitStack()
        self._tracer: Tracer | None = None
        self._recorder: Recorder | None = None
        self._step_context: Any = None
        self._phase_context: Any = None
        self._phase = Phase.IDLE
        self._started = self._removed = False
        self._micro_batch = self._forwards = self._tokens = self._step = 0
        self._step_began_s = 0.0
        self._peak_before = self._most_held_bytes = 0
        self._batch: list[Weak] = []
        self._outputs: list[Weak] = []
        self._awaited = set(map(id, self._optimizers))
        self._stepped: set[int] = set()
        self._losses = Losses()

    # --- on and off -----------------------------------------------------------

    def __enter__(self) -> Self:
        self.begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(error)
        if error is not None:
            with suppress(Exception):
                hide_our_frames(error)

    def begin(self) -> None:
        """From here on."""
        self.barrier.guard(self._begin)()
        if self.barrier.off:
            self._remove()

    def end(self, error: BaseException | None = None) -> None:
        """Until here; the model and the optimizer are as they were."""
        atexit.unregister(self._at_exit)
        self.barrier.guard(self._end)(error)
        self._remove()
        self.barrier.off = True
        self.source.close(self._step, error)
        # Whoever keeps this object is not to keep the model with it.
        for name in ("_model", "_optimizers"):
            vars(self).pop(name, None)

    def _at_exit(self) -> None:
        """The script has ended without ending this: the step it was in is nobody's any more."""
        self.barrier.off = True
        self.end()

    def _begin(self) -> None:
        device = device_of(self._model)
        if device.type == "cuda":
            recorder: Recorder = LateAllocatorTrace(device)
        else:
            recorder = tracker = GuardedOpTracker(self.barrier)
            tracker.begin()
        self._recorder = recorder
        every_s = GAUGE_EVERY_S if recorder.always_on else 1.0
        # A dispatch mode in somebody's loop could end up between two of the loop's own: no step is described.
        self._tracer = tracer = Tracer(
            recorder, self._publish, self._recomputed, every_s, described=0, counts_peaks=recorder.always_on
        )
        tracer.adopt(self._model, *self._optimizers)
        self._look_for_others()
        self._install(tracer)
        self.source.open(recorder, tracer, device, self._every_step)
        atexit.register(self._at_exit)
        in_child(self._forget_in_child)
        self._begin_step()

    def _install(self, tracer: Tracer) -> None:
        """Every hook, each with its removal pushed right after it."""
        guard, undo = self.barrier.guard, self._undo
        model = self._model
        begins = self._removing(guard(self.forward_begins))
        undo.callback(model.register_forward_pre_hook(begins, with_kwargs=True).remove)
        undo.enter_context(
            tracer.attached(guard, lambda layers: self.barrier.around(partial(tracer.recomputing, layers)))
        )
        undo.callback(model.register_forward_hook(guard(self._forward_ends)).remove)
        for optimizer in self._optimizers:
            undo.callback(optimizer.register_step_pre_hook(guard(self._optimizer_begins)).remove)
            undo.callback(optimizer.register_step_post_hook(guard(self._optimizer_ends)).remove)
        undo.enter_context(_observed_checkpoints(model))
        undo.enter_context(our_frames_hidden())

    def _removing(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """Once something has failed, remove all hooks, here where nobody is in the middle of going through them."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.barrier.off:
                self._remove()
                return None
            return hook(*args, **kwargs)

        return call

    def _remove(self) -> None:
        """Take everything away; what cannot be now does nothing and is taken later."""
        if not self._removed:
            self._removed = True
            try:
                self._undo.close()
                if self._tracer is not None:
                    self._tracer.release()
            except Exception as error:
                self.barrier.failed(error)
        recorder = self._recorder
        if isinstance(recorder, GuardedOpTracker) and recorder.end():
            self._recorder = None

    def _forget_in_child(self) -> None:
        """A data loader's worker is not watched."""
        self.barrier.off = self._removed = True

    def _end(self, error: BaseException | None) -> None:
        tracer = self._tracer
        if tracer is None:
            return
        if isinstance(error, torch.OutOfMemoryError):
            phase, step = self._phase, tracer.step_now
            self._leave_step(StepLeft(aborted(error, tracer.recorder)))
            self.source.out_of_memory(error, step, phase)
        else:
            self._leave_step(StepLeft(aborted(error, tracer.recorder) if isinstance(error, Exception) else OPEN))
        settle = getattr(tracer, "settle", None)
        if settle is not None:
            settle()

    # --- what the hooks tell ----------------------------------------------------

    def forward_begins(self, _module: Any, args: Any, kwargs: Any) -> None:
        """The hook before the model's forward."""
        if self._phase is Phase.BACKWARD:
            self._micro_batch += 1
        batch = [(name or "input", tensor) for name, tensor in owners.tensors_in({**dict(enumerate(args)), **kwargs})]
        self._batch = [(Category.INPUTS, name, weakref.ref(tensor)) for name, tensor in batch]
        ids = [t for name, t in batch if not t.is_floating_point()] or [t for _, t in batch]
        self._tokens += ids[0].numel() if ids else 0
        if not self._started:
            self._started = True
            self.source.begin_run(config_of(self._model, self._optimizers[0], ids), self._model)
        self._switch(Phase.FORWARD)
        assert self._tracer is not None
        self._tracer.own_batch(dict(batch))

    def _forward_ends(self, _module: Any, _args: Any, outputs: Any) -> None:
        tracer = self._tracer
        assert tracer is not None
        self._forwards += 1
        owned = list(_of_outputs(outputs))
        self._outputs = [(category, name, weakref.ref(tensor)) for category, name, tensor in owned]
        tracer.own_held(owned)
        for _, name, tensor in owned:
            if tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(self.barrier.guard(self._backward_begins))
            if name == OUTPUT_LOSS:
                self._losses.note(tensor)
        # What follows the model's forward in the script is its loss, if anything.
        tracer.tag(Phase.FORWARD, tracer.name(LOSS))

    def _backward_begins(self, _gradients: Any) -> None:
        if self._phase is not Phase.BACKWARD and self._tracer is not None:
            self._switch(Phase.BACKWARD)
            self._tracer.tag(Phase.BACKWARD, self._tracer.name(LOSS))

    def _optimizer_begins(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if id(optimizer) in self._stepped:  # the others do not step every time
            self._awaited &= self._stepped
            self._step_ends()
        if not in_backward():  # else it is a part of it: each parameter's as soon as it has its gradient
            self._switch(Phase.OPTIMIZER)

    def _optimizer_ends(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._stepped.add(id(optimizer))
        if not self._awaited <= self._stepped:
            return
        if in_backward():
            torch.autograd.Variable._execution_engine.queue_callback(self.barrier.guard(self._step_ends))
        else:
            self._step_ends()

    def _step_ends(self) -> None:
        recorder, tracer = self._recorder, self._tracer
        assert recorder is not None
        assert tracer is not None
        if self._phase is not Phase.OPTIMIZER:  # they have stepped within backward; from here on it has been
            self._switch(Phase.OPTIMIZER)
        allocated, reserved, peak = recorder.allocated_bytes(), recorder.reserved_bytes(), recorder.peak_bytes()
        seconds = time.perf_counter() - self._step_began_s
        if self._step < SETTLED_AFTER or allocated > MORE_HELD * self._most_held_bytes:
            self._look_for_others()
        self._most_held_bytes = max(self._most_held_bytes, allocated)
        self._leave_step(None)
        self._step += 1
        if self._step == 1:
            states = chain.from_iterable(optimizer.state.values() for optimizer in self._optimizers)
            self.source.publisher.managed_bytes = owners.paged_bytes(states)
        # A counter that is the script's own is not reset: it tells of a step that exceeds all before.
        counts = recorder.always_on or peak > self._peak_before
        self.source.stepped(
            StepResult(
                step=self._step,
                loss=self._losses.read(),
                seconds=seconds,
                tokens=self._tokens,
                allocated_bytes=allocated,
                peak_bytes=peak if counts else None,
                reserved_bytes=reserved,
            )
        )
        self._begin_step()

    def _look_for_others(self) -> None:
        assert self._tracer is not None
        self._tracer.beside(*find_others(self._model, self._optimizers))

    # --- steps and phases ---------------------------------------------------------

    def _begin_step(self) -> None:
        recorder, tracer = self._recorder, self._tracer
        assert recorder is not None
        assert tracer is not None
        self._micro_batch = self._tokens = 0
        self._stepped.clear()
        if recorder.always_on:
            recorder.reset_peak()
        self._peak_before = recorder.peak_bytes()
        self._step_began_s = time.perf_counter()
        context = tracer.step(self._step + 1, 1, self.source.publisher.wants(self._step + 1), self._held)
        context.__enter__()
        self._step_context = context
        self._switch(Phase.DATA)

    def _switch(self, phase: Phase) -> None:
        assert self._tracer is not None
        self._leave_phase(None)
        of_batch = phase in (Phase.FORWARD, Phase.BACKWARD)
        context = self._tracer.phase(phase, self._micro_batch if of_batch else 0)
        context.__enter__()
        self._phase_context, self._phase = context, phase

    def _leave_phase(self, error: StepLeft | None) -> None:
        context, self._phase_context, self._phase = self._phase_context, None, Phase.IDLE
        _leave(context, error)

    def _leave_step(self, error: StepLeft | None) -> None:
        self._leave_phase(error)
        self.source.micro_batches[self._step + 1] = self._micro_batch + 1
        context, self._step_context = self._step_context, None
        _leave(context, error)

    def _held(self) -> Iterator[owners.Owned]:
        """What the script still holds of the batch and the outputs we saw last."""
        for category, name, reference in (*self._batch, *self._outputs):
            tensor = reference()
            if tensor is not None:
                yield category, name, tensor

    def _publish(self, trace: Any) -> None:
        self.barrier.guard(self.source.publish)(trace)

    def _recomputed(self, event: Recompute) -> None:
        self.source.recomputed(event)


def _leave(context: Any, error: StepLeft | None) -> None:
    """Leave a context as if its body had raised, without raising that again."""
    if context is None:
        return
    try:
        context.__exit__(type(error) if error else None, error, None)
    except StepLeft as same:
        if same is not error:
            raise


def _of_outputs(outputs: Any) -> Iterable[owners.Owned]:
    """Logits, loss and KV cache of transformers; of any other model what it returns is its logits."""
    owned = list(owners.of_outputs(outputs))
    if owned or outputs is None:
        return owned
    tensors = [t for _, t in owners.tensors_in(outputs)] if not isinstance(outputs, torch.Tensor) else [outputs]
    return [(Category.LOGITS_LOSS, OUTPUT_LOSS if t.dim() == 0 else LOGITS, t) for t in tensors]


@contextmanager
def _observed_checkpoints(model: torch.nn.Module) -> Iterator[None]:
    """Have transformers' layers that checkpoint themselves say when they are computed again."""
    with ExitStack() as undo:
        for name, layer in model.named_modules():
            checkpoint = vars(layer).get("_gradient_checkpointing_func")
            if checkpoint is not None and getattr(layer, "gradient_checkpointing", False):
                layer._gradient_checkpointing_func = partial(_checkpoint, checkpoint, name)
                undo.callback(setattr, layer, "_gradient_checkpointing_func", checkpoint)
        yield


def _checkpoint(checkpoint: Callable[..., Any], name: str, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(recompute.observed(run, (name,)), *args, **kwargs)
