"""Seeing a checkpointed segment being computed again.

Whoever checkpoints wraps the function it checkpoints with `observed`; whoever
wants to know sets an observer. Works for both implementations of
`torch.utils.checkpoint`, since both call that function again during backward.
Loads no torch until something is observed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

Observer = Callable[[tuple[str, ...]], AbstractContextManager[None]]

# A plain global: CUDA's backward runs on a thread of autograd's own, where a
# context variable of the engine's thread would not be seen.
_observer: Observer | None = None


@contextmanager
def observer(callback: Observer) -> Iterator[None]:
    """Have `callback(layers)` entered and left around every recompute."""
    global _observer  # noqa: PLW0603
    before, _observer = _observer, callback
    try:
        yield
    finally:
        _observer = before


def observed(run: Callable[..., Any], layers: tuple[str, ...]) -> Callable[..., Any]:
    """Wrap a function about to be checkpointed, naming the layers it computes."""

    def call(*args: Any) -> Any:
        if _observer is None or not in_backward():
            return run(*args)
        with _observer(layers):
            return run(*args)

    return call


def in_backward() -> bool:
    """True if this thread is executing a backward pass."""
    import torch

    return bool(torch._C._current_graph_task_id() != -1)
