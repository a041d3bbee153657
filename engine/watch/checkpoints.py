"""Checkpoints of somebody else's model, seen when they are computed again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from .. import recompute

ATTRIBUTE = "_gradient_checkpointing_func"
"""The attribute that holds the function by which transformers checkpoints a layer."""


@contextmanager
def observed_checkpoints(model: torch.nn.Module) -> Iterator[None]:
    """Have transformers' layers that checkpoint themselves say when they are computed again."""
    with ExitStack() as undo:
        for name, layer in model.named_modules():
            checkpoint = vars(layer).get(ATTRIBUTE)
            if checkpoint is not None and getattr(layer, "gradient_checkpointing", False):
                observed = ObservedCheckpoint(checkpoint, name)
                setattr(layer, ATTRIBUTE, observed)
                undo.callback(_restore, layer, observed)
        yield


def _restore(layer: torch.nn.Module, observed: ObservedCheckpoint) -> None:
    """Take it away, and with it those beneath it whose time is over; whoever ends last ends all."""
    observed.over = True
    function = vars(layer).get(ATTRIBUTE)
    while isinstance(function, ObservedCheckpoint) and function.over:
        function = function.checkpoint
        setattr(layer, ATTRIBUTE, function)


class ObservedCheckpoint:
    """A checkpoint function that names the layer it computes; pickled and copied as that function alone."""

    def __init__(self, checkpoint: Callable[..., Any], layer: str) -> None:
        self.checkpoint, self.over = checkpoint, False
        self._layer = layer

    def __call__(self, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoint `run`."""
        return self.checkpoint(run if self.over else recompute.observed(run, (self._layer,)), *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        copied: Callable[..., Any] = copy.deepcopy(self.checkpoint, memo)
        return copied

    def __reduce__(self) -> tuple[Any, ...]:
        return partial, (self.checkpoint,)
