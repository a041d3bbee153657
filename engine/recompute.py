"""Seeing a checkpointed segment being computed again.

Whoever checkpoints wraps the function it checkpoints with `observed`; whoever
wants to know sets an observer. Works for both implementations of
`torch.utils.checkpoint`, since both call that function again during backward.
Loads no torch until something is observed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

Observer = Callable[[tuple[str, ...]], AbstractContextManager[None]]

# A plain global: CUDA's backward runs on a thread of autograd's own, where a
# context variable of the engine's thread would not be seen.
_observers: tuple[Observer, ...] = ()


@contextmanager
def observer(callback: Observer) -> Iterator[None]:
    """Have `callback(layers)` entered and left around every recompute, whoever else observes them."""
    global _observers  # noqa: PLW0603
    _observers = (*_observers, callback)
    try:
        yield
    finally:
        _observers = tuple(other for other in _observers if other is not callback)


def observed(run: Callable[..., Any], layers: tuple[str, ...]) -> Callable[..., Any]:
    """Wrap a function about to be checkpointed, naming the layers it computes."""

    def call(*args: Any) -> Any:
        if not _observers or not in_backward():
            return run(*args)
        with ExitStack() as stack:
            for each in _observers:
                stack.enter_context(each(layers))
            return run(*args)

    return call


def checkpoint_function(layer: Any) -> Any:
    """The function by which a transformers layer checkpoints itself, whoever observes it; None: it does not."""
    function = getattr(layer, "_gradient_checkpointing_func", None)
    while (inner := getattr(function, "checkpoint", None)) is not None:  # `watch.checkpoints.ObservedCheckpoint`
        function = inner
    return function if getattr(layer, "gradient_checkpointing", False) else None


def in_backward() -> bool:
    """True if this thread is executing a backward pass."""
    import torch

    return bool(torch._C._current_graph_task_id() != -1)
