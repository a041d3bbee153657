"""An optimizer that steps a parameter as soon as its gradient is there."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch


class OptimizerInBackward(torch.optim.Optimizer):
    """One optimizer for each parameter, stepped by the hook after its gradient has been accumulated.

    As in PyTorch's tutorial. A gradient lives until the next one is made; `step` and
    `zero_grad` have nothing left to do.

    Args:
        parameters: To be trained.
        make: Makes the optimizer of one.
    """

    def __init__(
        self, parameters: list[torch.nn.Parameter], make: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]
    ) -> None:
        self.optimizers = {parameter: make([parameter]) for parameter in parameters}
        super().__init__(parameters, dict(next(iter(self.optimizers.values())).defaults))
        for optimizer in self.optimizers.values():
            optimizer.state = self.state
        # A parameter holds its hook where the garbage collector does not look: it must not hold the optimizer too.
        step_one = weakref.WeakMethod(self._step_one)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(lambda ready: one(ready) if (one := step_one()) else None)

    @property
    def name2qmap(self) -> dict[str, torch.Tensor]:
        """Each 8-bit optimizer's own code tables (bitsandbytes)."""
        tables = (getattr(optimizer, "name2qmap", {}) for optimizer in self.optimizers.values())
        return {f"{i}.{name}": table for i, found in enumerate(tables) for name, table in found.items()}

    def _step_one(self, parameter: torch.Tensor) -> None:
        optimizer = self.optimizers[parameter]  # type: ignore[index]
        optimizer.step()
        optimizer.zero_grad()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Nothing: every parameter has been stepped in backward."""

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: no gradient is left."""
