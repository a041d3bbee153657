"""Hooks on a model's modules that say what is running.

Forward: before and after every module's (`module_hooks`). Backward: a pre-hook on the node
that made a module's output, which costs nothing measurable, where a full
backward hook makes a launch-bound step 1.5 times slower.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch._C import _current_graph_task_id
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..categories import Category
from ..events import Phase
from ..module_names import LOGITS, LOSS
from .module_hooks import module_hooks


class Tagger(Protocol):
    """The listener that the hooks talk to."""

    tagging: bool
    """True if tags are wanted now; hooks return at once when not."""

    last_node: int
    """The node of the graph that was tagged last, by its sequence number."""

    last_plain: tuple[Callable[[], torch.Tensor | None], int]
    """The last output that required no gradient, not held, and the module that it is of."""

    def name(self, name: str) -> int:
        """The index of a name, made if new."""
        ...

    def name_of(self, index: int) -> str:
        """The inverse of `name`."""
        ...

    def tag(self, phase: Phase, module: int) -> None:
        """Tag what this thread allocates from now on with `module`."""
        ...

    def leaf(self, name: str, tensor: torch.Tensor) -> None:
        """A leaf of the graph that is no parameter: its `.grad` will be filled."""
        ...

    def step_in_backward(self, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
        """An optimizer steps as a part of backward; returns what ends that."""
        ...

    def own(self, category: Category, name: str, tensor: torch.Tensor) -> None:
        """The tensor belongs to somebody."""
        ...


Guard = Callable[[Callable[..., Any]], Callable[..., Any]]
"""Stands around every hook; in a loop that is not ours it keeps our failures out of it."""


def unguarded(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook itself."""
    return hook


@contextmanager
def tag_modules(model: torch.nn.Module, tagger: Tagger, guard: Guard = unguarded) -> Iterator[None]:
    """Tag whatever the model's modules allocate, until the context is left.

    Each hook's removal is pushed right after it is added, so a failure half-way
    leaves nothing behind.
    """
    head = output_embedding(model)
    with ExitStack() as undo:
        for name, module in model.named_modules():
            index = tagger.name(name)
            if hands_on(module):
                continue
            parent = tagger.name(LOSS if module is head else name.rpartition(".")[0])
            before_backward = guard(partial(_before_backward, tagger, index))
            enter = guard(partial(_enter, tagger, index))
            leave = guard(partial(_leave, tagger, index, parent, module is head, before_backward))
            undo.callback(module_hooks.add(module, enter, leave))
        yield


@contextmanager
def tag_steps_in_backward(tagger: Tagger, guard: Guard = unguarded) -> Iterator[None]:
    """Tag what optimizers do that step as soon as a gradient is there, until the context is left."""
    ends: list[Callable[[], None]] = []

    def begins(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if tagger.tagging and _current_graph_task_id() != -1:
            ends.append(tagger.step_in_backward(optimizer))

    def ended(*_: Any) -> None:
        if ends:
            ends.pop()()

    with ExitStack() as undo:
        undo.callback(register_optimizer_step_pre_hook(guard(begins)).remove)
        undo.callback(register_optimizer_step_post_hook(guard(ended)).remove)
        yield


def hands_on(module: torch.nn.Module) -> bool:
    """True if a module returns what it is given, as a dropout of 0 does: it allocates nothing."""
    return isinstance(module, torch.nn.Identity) or (type(module) is torch.nn.Dropout and module.p == 0)


WRAPPERS = ("DistributedDataParallel", "FullyShardedDataParallel", "DeepSpeedEngine")
"""Classes whose objects stand around a model and are called in its place."""


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model itself, whatever stands around it to train it on several GPUs."""
    while type(model).__name__ in WRAPPERS and isinstance(inner := model.module, torch.nn.Module):
        model = inner
    return model


def output_embedding(model: torch.nn.Module) -> torch.nn.Module | None:
    """The module that makes the logits, where the model can say."""
    get: Callable[[], torch.nn.Module | None] | None = getattr(unwrapped(model), "get_output_embeddings", None)
    try:
        return get() if get else None
    except NotImplementedError:
        return None


def _enter(tagger: Tagger, index: int, _module: Any, _args: Any) -> None:
    if not tagger.tagging:
        return
    recomputing = _current_graph_task_id() != -1
    before, maker = tagger.last_plain
    made = before()
    # A hook of the module that made it, such as `enable_input_require_grads` sets, ran after ours.
    if made is not None and made.requires_grad and made.grad_fn is None and not recomputing:
        tagger.last_plain = _nothing, 0
        tagger.leaf(f"{tagger.name_of(maker)}.output", made)
    tagger.tag(Phase.RECOMPUTE if recomputing else Phase.FORWARD, index)


def _nothing() -> None:
    """No tensor."""


def _leave(
    tagger: Tagger,
    index: int,
    parent: int,
    is_head: bool,
    before_backward: Callable[..., Any],
    _module: Any,
    args: Any,
    output: Any,
) -> None:
    if not tagger.tagging:
        return
    recomputing = _current_graph_task_id() != -1
    made = _tensor_in(output)
    if made is not None:
        if is_head and not recomputing:
            tagger.own(Category.LOGITS_LOSS, LOGITS, made)
        node = made.grad_fn
        if node is None:
            if not made.requires_grad:
                tagger.last_plain = weakref.ref(made), index
            # One that is handed on as it came, by a dropout of 0, is known already.
            elif not recomputing and not any(made is given for given in args):
                tagger.leaf(f"{tagger.name_of(index)}.output", made)
        # The model itself ends in the loss, which the loop has tagged already; a
        # container that ends in one of its modules leaves the node to that one.
        elif index and node._sequence_nr() != tagger.last_node:
            tagger.last_node = node._sequence_nr()
            node.register_prehook(before_backward)
    tagger.tag(Phase.RECOMPUTE if recomputing else Phase.FORWARD, parent)


def _before_backward(tagger: Tagger, index: int, _gradients: Any) -> None:
    # Runs on the thread that executes the node: on CUDA, autograd's own.
    if tagger.tagging:
        tagger.tag(Phase.BACKWARD, index)


def _tensor_in(output: Any) -> torch.Tensor | None:
    """The tensor whose node ends the module's part of the graph."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, dict):
        loss = output.get("loss")
        return loss if isinstance(loss, torch.Tensor) else None
    if isinstance(output, tuple | list) and output and isinstance(output[0], torch.Tensor):
        return output[0]
    return None
