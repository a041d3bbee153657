"""Seeing a checkpointed segment being computed again.

Whoever checkpoints wraps the function it checkpoints with `observed`; whoever
wants to know is one of the `observers`. Works for both implementations of
`torch.utils.checkpoint`, since both call that function again during backward.
Loads no torch until something is observed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from .listeners import Listeners

Observer = Callable[[tuple[str, ...]], AbstractContextManager[None]]

observers: Listeners[Observer] = Listeners()
"""Each has `callback(layers)` entered and left around every recompute."""


def observed(run: Callable[..., Any], layers: tuple[str, ...]) -> Callable[..., Any]:
    """Wrap a function about to be checkpointed, naming the layers it computes."""

    def call(*args: Any) -> Any:
        if not observers.listeners or not in_backward():
            return run(*args)
        with ExitStack() as stack:
            for each in observers.listeners:
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
