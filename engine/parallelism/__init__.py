"""The way one rank of a job trains: alone, as a replica (DDP), or with a shard of the model (FSDP2, DeepSpeed ZeRO).

A `Parallelism` stands in the recipe of a run. What is made and stepped through it is
the engines' own; here is only how they are called. Loads no torch until it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

    from ..recipe import Model


class Wrapped(NamedTuple):
    """A model and an optimizer as an engine has them.

    Attributes:
        call: What the loop calls: the model itself, or what the engine wraps around it.
        optimizer: What the loop steps.
    """

    call: Callable[..., Any]
    optimizer: Any


class Parallelism:
    """A rank alone; the base of all others."""

    def load_device(self, device: torch.device) -> torch.device:
        """The device that weights are read to, before the model is wrapped."""
        return device

    def least_bytes(self, whole: int) -> int:
        """Bytes that a rank holds at the least of weights, gradients and optimizer state.

        Args:
            whole: Of the whole model.
        """
        return whole

    def prepare(self, device: torch.device) -> None:
        """Make what stays from run to run, and is not a run's memory: groups of ranks."""

    def wrap(self, model: Model, device: torch.device, make: Callable[[], torch.optim.Optimizer]) -> Wrapped:
        """Have the engine take over a model that is loaded.

        Args:
            model: Its parameters may be replaced in place.
            device: Of this rank.
            make: Makes the optimizer of the model's trainable parameters, as they are when it is called.
        """
        return Wrapped(model, make())

    def begin(self, call: Any, last: bool) -> None:
        """A micro-batch begins; after the last of a step gradients are reduced over the ranks."""

    def backward(self, call: Any, loss: torch.Tensor) -> None:
        """Run the backward pass."""
        loss.backward()

    def step(self, call: Any, scaler: torch.amp.GradScaler, optimizer: Any) -> None:
        """Run the optimizer."""
        scaler.step(optimizer)
        scaler.update()

    def zero_grad(self, optimizer: Any) -> None:
        """Let go of the gradients."""
        optimizer.zero_grad()

    def close(self, call: Any) -> None:
        """Undo what would keep the model's memory alive after a run."""
