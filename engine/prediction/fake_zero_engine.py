"""The engine of DeepSpeed's ZeRO on the modelled device, and the optimizer around one, as all stages have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


class FakeZeroOptimizer:
    """An optimizer of torch's inside one that partitions: attributes have DeepSpeed's names, by which owners are found.

    Attributes:
        optimizer: The one inside.
        is_last: True in the last micro-batch of a step.
    """

    optimizer: torch.optim.Optimizer
    is_last: bool
    _hooks: list[Any]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer inside, which steps the master weights."""
        return self.optimizer.param_groups

    @property
    def state(self) -> Any:
        """State of the optimizer inside."""
        return self.optimizer.state

    def remove_hooks(self) -> None:
        """Undo what was hooked."""
        for hook in self._hooks:
            hook.remove()

    def reduce_rest(self) -> None:
        """Reduce what backward has left."""
        raise NotImplementedError

    def step(self) -> None:
        """Step what is of this rank."""
        raise NotImplementedError


class FakeZeroEngine:
    """Stands in for the engine that `deepspeed.initialize` returns.

    Args:
        model: That is trained.
        optimizer: Around its optimizer.
        settings: DeepSpeed's configuration.
    """

    def __init__(self, model: torch.nn.Module, optimizer: FakeZeroOptimizer, settings: Mapping[str, Any]) -> None:
        self.module, self.optimizer = model, optimizer
        self._accumulation, self._micro = int(settings["gradient_accumulation_steps"]), 0

    def __call__(self, **batch: Any) -> Any:
        """Run the model."""
        return self.module(**batch)

    def backward(self, loss: torch.Tensor, scale_wrt_gas: bool = True) -> None:
        """Run the backward pass, and reduce what is to be reduced."""
        self._micro += 1
        self.optimizer.is_last = self._micro == self._accumulation
        loss.backward()
        self.optimizer.reduce_rest()

    def step(self) -> None:
        """Step after the last micro-batch; before that nothing is done."""
        if self._micro == self._accumulation:
            self._micro = 0
            self.optimizer.step()

    def destroy(self) -> None:
        """Take the hooks off the parameters."""
        self.optimizer.remove_hooks()
