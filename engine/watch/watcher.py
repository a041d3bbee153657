"""`with watch(model, optimizer):` around any PyTorch loop.

Nobody tells us what the loop is doing, so hooks do. This installs them and
takes them away again; what they tell becomes steps in `loop`.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from types import TracebackType
from typing import Any, ClassVar, Self

import torch

from ..config import MEMORY_LIMIT_VARIABLE, parse_bytes
from ..events import Recompute
from ..forks import in_child
from ..out_of_memory.memory_limit import limited
from ..publisher import GAUGE_EVERY_S
from ..tracing import owners, zero
from ..tracing.module_hooks import module_hooks
from ..tracing.recorder import Recorder
from ..tracing.tracer import Tracer
from .checkpoints import observed_checkpoints
from .describe import accumulation_of, device_of, optimizers_in
from .exec_report import note_watched
from .loop import WatchedLoop
from .recorders import GuardedOpTracker, LateAllocatorTrace
from .tracebacks import hide_our_frames, our_frames_hidden
from .watched_source import WatchedSource


class watch:  # noqa: N801 (it is used like a function: with watch(model, optimizer))
    """Watch a training loop; `gpumem-tui attach` in another terminal shows it.

    Use it as a context manager around the loop, or call `begin` and `end`. What
    fails in here is logged once and switched off; the loop goes on.

    A watched model is pickled, copied, compiled, traced and exported as an
    unwatched one.

    Args:
        model: Whose modules are tagged.
        optimizer: Whose `step` ends a step; accelerate's wrapper is fine. A list
            of several: a step ends when all of them have stepped. None: inference
            is watched; a step is a forward pass, or all passes of a generation.
        name: Of the engine in `gpumem-tui ps`; the script's name if None.
        every_step: Trace every step on a GPU, whatever it costs, instead of
            as many as take 1 % of the time.
        accumulation: Micro-batches a step; None: the first step shows it.
        memory_limit: Have the device behave as one with so much memory, `24GiB`;
            None: as the environment variable GPUMEM_MEMORY_LIMIT says, if it does.

    Raises:
        TypeError: The optimizer is none of torch's.
        UserError: The memory limit is no size.
    """

    begun: ClassVar[bool] = False
    """True once anything of this process has been watched."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Any = None,
        *,
        name: str | None = None,
        every_step: bool = False,
        accumulation: int | None = None,
        memory_limit: str | None = None,
    ) -> None:
        memory_limit = memory_limit or os.environ.get(MEMORY_LIMIT_VARIABLE)
        self._memory_limit_bytes = parse_bytes(memory_limit, "memory limit") if memory_limit else 0
        self._model, self._optimizers = model, optimizers_in(optimizer)
        self._every_step = every_step
        self._accumulation = accumulation or accumulation_of(optimizer)
        self.source = WatchedSource(name, self._memory_limit_bytes)
        self.barrier = self.source.barrier
        self._undo = ExitStack()
        self._loop: WatchedLoop | None = None
        self._tracer: Tracer | None = None
        self._recorder: Recorder | None = None
        self._hooked: list[torch.nn.Module] = []
        self._removed = self._in_child = False

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

    def begin(self, *forward: Any) -> None:
        """Watch from here on.

        Args:
            forward: The module and the positional arguments of a forward pass of the model
                that is beginning now, for which hooks come too late.
        """
        watch.begun = True
        note_watched()
        self.barrier.guard(self._begin)(forward)
        if self.barrier.off:
            self._remove()

    def end(self, error: BaseException | None = None) -> None:
        """Until here; the model and the optimizer are as they were."""
        self._end_watching(error)

    def _end_watching(self, error: BaseException | None, ends: bool = False) -> None:
        atexit.unregister(self._at_exit)
        self.barrier.guard(self._end)(error)
        self._remove()
        self.barrier.off = True
        steps = self._loop.steps if self._loop is not None else 0
        if not self._in_child:  # its locks may be held by threads that only the parent has
            self.barrier.finish(lambda: self.source.close(steps, error, ends))
        # Whoever keeps this object is not to keep the model with it.
        for name in ("_model", "_optimizers", "_loop", "_hooked"):
            vars(self).pop(name, None)

    def _at_exit(self) -> None:
        """The script has ended without ending this: the step it was in is nobody's, unless it ran out of memory."""
        if self._tracer is not None and self._tracer.refusal is not None:
            self._end_watching(getattr(sys, "last_value", None), ends=True)
            return
        self.barrier.off = True
        self._end_watching(None, ends=True)

    def _begin(self, forward: tuple[Any, ...]) -> None:
        device = device_of(self._model)
        self._undo.enter_context(limited(device, self._memory_limit_bytes))
        if device.type == "cuda":
            recorder: Recorder = LateAllocatorTrace(device)
        else:
            recorder = tracker = GuardedOpTracker(self.barrier, self._memory_limit_bytes)
            tracker.begin(_there_already(self._model, self._optimizers))
        self._recorder = recorder
        every_s = GAUGE_EVERY_S if recorder.always_on else 1.0
        # A dispatch mode in somebody's loop could end up between two of the loop's own: no step is described.
        self._tracer = tracer = Tracer(
            recorder, self._publish, self._recomputed, every_s, described=0, counts_peaks=recorder.always_on
        )
        if recorder.on_refused is not None:
            recorder.on_refused = self.barrier.guard(recorder.on_refused)
        tracer.adopt(self._model, *self._optimizers)
        self._loop = loop = WatchedLoop(
            self._model, self._optimizers, recorder, tracer, self.source,
            self.barrier.guard, self._hook, self._accumulation,
        )  # fmt: skip
        self._install(loop, tracer)
        self.source.open(recorder, tracer, device, self._every_step)
        atexit.register(self._at_exit)
        in_child(self._forget_in_child)
        loop.begin()
        if forward:
            loop.forward_begins(*forward)
        self.source.say_how_to_attach(self._model)

    def _install(self, loop: WatchedLoop, tracer: Tracer) -> None:
        """Every hook, each with its removal pushed right after it."""
        guard, undo = self.barrier.guard, self._undo
        self._hook(self._model)
        undo.enter_context(
            tracer.attached(guard, lambda layers: self.barrier.around(partial(tracer.recomputing, layers)))
        )
        for optimizer in self._optimizers:
            begins, ends = guard(loop.optimizer_begins), guard(loop.optimizer_ends)
            undo.enter_context(zero.steps_hooked(optimizer, begins, ends))
        undo.enter_context(observed_checkpoints(self._model))
        undo.enter_context(our_frames_hidden())

    def _hook(self, module: torch.nn.Module) -> None:
        """Have the loop told when a module is called, the model or what is called instead of it."""
        if self._loop is None or any(known is module for known in self._hooked):
            return
        self._hooked.append(module)
        guard, loop = self.barrier.guard, self._loop
        before = self._removing(guard(loop.forward_begins))
        self._undo.callback(module_hooks.add(module, before, guard(loop.forward_ends)))

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
        """A data loader's worker is not watched, nor does it end the watching."""
        self.barrier.off = self._removed = self._in_child = True
        atexit.unregister(self._at_exit)

    def _end(self, error: BaseException | None) -> None:
        if self._loop is None or self._tracer is None:
            return
        self._loop.end(error)
        self._tracer.settle()

    def _publish(self, trace: Any) -> None:
        self.barrier.guard(self.source.publish)(trace)

    def _recomputed(self, event: Recompute) -> None:
        self.source.recomputed(event)


def _there_already(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> Iterator[torch.Tensor]:
    """Tensors from before the first step: weights, and the state of optimizers that go on."""
    yield from model.parameters()
    yield from model.buffers()
    for optimizer in optimizers:
        for state in optimizer.state.values():
            yield from (tensor for _, tensor in owners.tensors_in(state))
