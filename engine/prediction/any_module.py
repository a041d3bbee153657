"""Any PyTorch module before it is run: somebody's own functions over fake tensors, on a modelled GPU.

    model, optimizer, batch, step    the script's own, run as they are
    cuda_names                       `cuda` is the GPU that is predicted for
    WatchedLoop                      what is watched in a real loop: phases, steps, micro-batches
    rehearsed, came_to               blocks get their places, and figures come of it, as for any prediction

Every layer is traced: nobody knows which of somebody's modules are alike.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch.utils import _pytree as pytree

from ..categories import Category
from ..config import RunConfig, UserError, Value, kind_and_line, one_line
from ..events import Phase, Recompute, StepTrace
from ..tracing import owners
from ..tracing.hooks import unguarded
from ..tracing.module_hooks import module_hooks
from ..tracing.tracer import Tracer
from ..train import StepResult
from ..watch.checkpoints import observed_checkpoints
from ..watch.describe import admitted, optimizers_in
from ..watch.leftovers import name_leftovers
from ..watch.loop import WatchedLoop
from . import bitsandbytes_cuda
from .alloc_requests import AllocRequests
from .assumptions import Assumptions, place_of_error
from .cuda_kernels import kernels, take_workspaces
from .cuda_names import cuda_names
from .cuda_patches import pytorch_paths, transformers_paths
from .fake_cuda import DEVICE, FakeCuda
from .gpus import Gpu, understand
from .op_cache import op_cache
from .outcome import Prediction
from .predict import came_to
from .rehearsal import Counts, Rehearsal, rehearsed

MOVED = "as written, the model stays on the CPU: it is predicted as if it and its batches were put on cuda"

STEPS = 3
"""A step's tail behind `optimizer.step()` is the next one's: two of them are seen, and two whole steps."""


class Training(NamedTuple):
    """Somebody's training, as the functions that it is made of.

    They are run as they are: what they put on `cuda` is on the GPU predicted for,
    what they leave on the host is there. If none of the model's parameters is on
    `cuda`, model and batches are moved there.

    Attributes:
        model: Builds the model.
        optimizer: From the model, its optimizer, several in a list, or None: it is used and not trained.
        batch: The next batch, whatever it is.
        step: One training step with the model, the optimizer and a batch: forward,
            backward, `optimizer.step()`. Several micro-batches are several passes in it.
    """

    model: Callable[[], torch.nn.Module]
    optimizer: Callable[[torch.nn.Module], Any]
    batch: Callable[[], Any]
    step: Callable[[torch.nn.Module, Any, Any], Any]


def predict(
    model: Callable[[], torch.nn.Module],
    optimizer: Callable[[torch.nn.Module], Any],
    batch: Callable[[], Any],
    step: Callable[[torch.nn.Module, Any, Any], Any],
    *,
    gpu: str | Gpu = "H100 80GB",
    name: str = "",
    steps: int = STEPS,
) -> Prediction:
    """Predict the memory of a training loop of one's own, on a machine without its GPU.

    Args:
        model: See `Training`; likewise `optimizer`, `batch` and `step`.
        optimizer: From the model.
        batch: The next one.
        step: One training step.
        gpu: A name as `--gpu` takes it: `A100`, `24GB`, `RTX 4090:20GiB`.
        name: What to call it; the model's class if empty.
        steps: How many to go through, from 2 on.

    Raises:
        UserError: It cannot be predicted; the line names the place in the script.
    """
    began = time.perf_counter()
    card = gpu if isinstance(gpu, Gpu) else understand(gpu).gpu
    rehearsing = _Rehearsing(Training(model, optimizer, batch, step), card, steps)
    gc.freeze()  # so that collecting afterwards looks at what was made here only
    try:
        done = rehearsing.run()
    except UserError:
        raise
    except Exception as error:  # whatever the functions raise
        raise UserError(f"{place_of_error(error) or name or 'the training'}: {_why(error)}") from error
    finally:
        gc.collect()
        gc.unfreeze()
    config = rehearsing.listener.config
    assert config is not None
    named = dataclasses.replace(config, model=name or config.model, device=str(DEVICE))
    return came_to(named, card, done, began, rehearsing.assumptions.notes)


def training_of(script: str) -> Training:
    """The training that a function of a script returns.

    Args:
        script: `FILE:FUNCTION`. The file is imported, so what it does under `__main__` is not done.

    Raises:
        UserError: There is no such file or function, it raises, or it returns no training.
    """
    path, _, function = script.rpartition(":")
    if Path(script).is_file():
        raise UserError(f"--script {script}: say which of its functions returns the training: {script}:FUNCTION")
    if not path or not Path(path).is_file():
        raise UserError(f"--script {script}: write it as FILE:FUNCTION; there is no file {path or script}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"--script {path}: no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).resolve().parent))  # as Python does for a script
    try:
        spec.loader.exec_module(module)
        if not callable(found := getattr(module, function, None)):
            raise UserError(f"--script {path}: it has no function {function!r}")
        parts = found()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{place_of_error(error) or path}: {kind_and_line(error)}") from error
    if not (isinstance(parts, tuple) and len(parts) == len(Training._fields) and all(map(callable, parts))):
        raise UserError(f"--script {script}: it returns no gpumem_tui.predict.Training(model, optimizer, batch, step)")
    return Training(*parts)


def _why(error: Exception) -> str:
    """The reason why something cannot be predicted, in half a sentence."""
    if isinstance(error, DynamicOutputShapeException):
        return f"the shape of what {error.func} returns depends on data: this cannot be predicted"
    if isinstance(error, DataDependentOutputException):
        return f"what {error.func} returns depends on data: this cannot be predicted"
    if isinstance(error, UnsupportedOperatorException):
        return f"{error.func} has no fake kernel (torch.library.register_fake): this cannot be predicted"
    said = one_line(error)
    if "no fake impl" in said:
        return f"an operator of its own has no fake kernel ({said})"
    if any(words in said for words in ("data pointer", "Cannot access data", ".numpy()", "FakeTensor")):
        return f"code of its own reads a tensor's memory, of which there is none here ({said})"
    return kind_and_line(error)


class _Enough(BaseException):
    """The last step has ended: what the script would do after it is not asked for."""


class _Listener:
    """Told by the loop what a watched script's source is told."""

    def __init__(self, steps: int, ended: Callable[[], None]) -> None:
        self.config: RunConfig | None = None
        self.steps: list[StepResult] = []
        self.micro_batches: dict[int, int] = {}
        self.publisher = SimpleNamespace(wants=lambda _: True, managed_bytes=0)
        self._wanted, self._ended = steps, ended

    @property
    def run(self) -> RunConfig | None:
        """The run's configuration, once it has begun."""
        return self.config

    def begin_run(self, config: RunConfig, model: torch.nn.Module) -> None:
        """The first forward pass shows what is trained."""
        del model
        self.config = config

    def learn(self, **found: Value | None) -> None:
        """More is known now."""
        assert self.config is not None
        self.config = self.config.with_(dict(admitted({k: v for k, v in found.items() if v})))

    def say_compiled(self, modules: int, only_returned: bool) -> None:
        """Compiled modules are run as they are written."""

    def stepped(self, result: StepResult) -> None:
        """A step has ended; after the last one nothing more is done."""
        self.steps.append(result)
        if result.step == self._wanted:
            self._ended()
            raise _Enough

    def out_of_memory(self, error: BaseException | None, step: int, phase: Phase) -> None:
        """Never: there is always more."""


class _Rehearsing:
    """One pass of somebody's loop.

    Args:
        training: The functions.
        gpu: Where it would run.
        steps: How many to go through.
    """

    def __init__(self, training: Training, gpu: Gpu, steps: int) -> None:
        self._training, self._gpu, self._steps = training, gpu, steps
        self._traces: list[StepTrace] = []
        self._recomputes: list[Recompute] = []
        self._recorder = FakeCuda(kernels(gpu))
        self._tracer = Tracer(
            self._recorder, self._keep, self._recomputes.append, float("inf"), described=-1, counts_peaks=False
        )
        self.assumptions = Assumptions()
        self.listener = _Listener(steps, self._ended)

    def run(self) -> Rehearsal:
        """Go through it; see `rehearsed`.

        Raises:
            Exception: Whatever the functions raise.
            UserError: They train nothing.
        """
        recorder = self._recorder
        try:
            with ExitStack() as undo:
                undo.enter_context(pytorch_paths(self._gpu, recorder))
                known = self._library_paths(undo, ())
                undo.enter_context(op_cache().mode)
                undo.enter_context(recorder)
                take_workspaces(self._gpu, recorder)
                workspace = recorder.allocated_bytes()
                recorder.assume = self.assumptions.say
                undo.enter_context(cuda_names(self._gpu, self.assumptions))
                undo.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")  # what kernels say about speed and fake tensors concerns nobody here
                model, optimizer, moved = self._load()
                self._library_paths(undo, known)  # what the functions have imported
                counts = self._train(model, optimizer, moved)
        finally:
            self._tracer.release()
        starts = recorder.starts[: len(self._traces)]
        requests = AllocRequests(
            recorder.rows(), list(zip(starts, self._traces, strict=True)), self._recomputes, recorder.inputs
        )
        done = rehearsed(requests, self.listener.steps, counts, workspace, self._gpu)
        return dataclasses.replace(done, traces=[name_leftovers(trace) for trace in done.traces])

    def _library_paths(self, undo: ExitStack, known: tuple[str, ...]) -> tuple[str, ...]:
        """Have those libraries that are loaded take the paths of a GPU; returns which."""
        paths = {
            "transformers": lambda: transformers_paths(self._gpu, self._recorder),
            bitsandbytes_cuda.PACKAGE: lambda: bitsandbytes_cuda.cuda_backend(self._gpu, self._recorder),
        }
        loaded = tuple(name for name in paths if name in sys.modules)
        for name in loaded:
            if name not in known:
                undo.enter_context(paths[name]())
        return loaded

    def _load(self) -> tuple[torch.nn.Module, Any, bool]:
        """Model and optimizer, traced as step 0; true if the model was not put on the GPU by its own function."""
        tracer, training = self._tracer, self._training
        with tracer.step(0, 1, True, tuple):
            with tracer.phase(Phase.LOAD):
                model = training.model()
                if not isinstance(model, torch.nn.Module):
                    raise UserError(f"the function that builds the model returns {type(model).__name__}, no Module")
                moved = not any(_on_gpu(tensor) for tensor in (*model.parameters(), *model.buffers()))
                if moved:
                    self.assumptions.say(MOVED, training.model)
                    model.to(DEVICE)
                optimizer = training.optimizer(model)
            tracer.adopt(model, *optimizers_in(optimizer))
        return model, optimizer, moved

    def _train(self, model: torch.nn.Module, optimizer: Any, moved: bool) -> Counts:
        with ExitStack() as undo:
            loop = self._loop(model, optimizers_in(optimizer), undo)
            loop.begin()
            batch = None
            try:
                for _ in range(self._steps + 1):
                    batch = self._training.batch()
                    if moved:
                        batch = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(DEVICE), batch)
                    self._tracer.own_held(_inputs(batch))
                    self._training.step(model, optimizer, batch)
            except _Enough:
                pass
            if len(self.listener.steps) < self._steps:
                raise UserError("the training step ends without optimizer.step() of any optimizer")
        parameters = [*model.parameters()]
        managed = sum(owners.paged_bytes(each.state.values()) for each in optimizers_in(optimizer))
        return Counts(
            sum(p.numel() for p in parameters),
            sum(p.numel() for p in parameters if p.requires_grad),
            managed,
            self._recorder.pinned.peak_bytes,
        )

    def _loop(self, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], undo: ExitStack) -> WatchedLoop:
        """The loop with its hooks, until undone; see `watch`."""
        hooked: list[torch.nn.Module] = []

        def hook(module: torch.nn.Module) -> None:
            if not any(known is module for known in hooked):
                hooked.append(module)
                undo.callback(module_hooks.add(module, loop.forward_begins, loop.forward_ends))

        loop = WatchedLoop(model, optimizers, self._recorder, self._tracer, self.listener, unguarded, hook)
        hook(model)
        undo.enter_context(self._tracer.attached())
        for optimizer in optimizers:
            undo.callback(optimizer.register_step_pre_hook(loop.optimizer_begins).remove)
            undo.callback(optimizer.register_step_post_hook(loop.optimizer_ends).remove)
        undo.enter_context(observed_checkpoints(model))
        return loop

    def _keep(self, trace: StepTrace) -> None:
        if not trace.is_open:
            self._traces.append(trace)

    def _ended(self) -> None:
        """While the loop still holds what it holds between steps."""
        self._recorder.close()
        self._tracer.settle()


def _on_gpu(tensor: Any) -> bool:
    return getattr(tensor, "fake_device", None) == DEVICE


def _inputs(batch: Any) -> Iterator[owners.Owned]:
    named = owners.tensors_in(batch if isinstance(batch, dict) else {"batch": batch})
    return owners.of_tensors(Category.INPUTS, named)
