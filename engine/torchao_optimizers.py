"""torchao's optimizers, stepped so that what they do can be seen.

Their step is compiled, and PyTorch compiles nothing while a dispatch mode watches: on a GPU
the watch is set aside for the step, whose kernel is one and needs no watching; on a CPU,
where the watch is all there is, it runs uncompiled.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

CLASSES = {"ao-adamw-8bit": "AdamW8bit", "ao-adamw-4bit": "AdamW4bit", "ao-adamw-fp8": "AdamWFp8"}
"""By the optimizer's name as a setting."""


def low_bit_adamw(kind: str, parameters: list[torch.nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """One of `CLASSES`."""
    made: type[Any] = getattr(import_module("torchao.optim"), CLASSES[kind])

    class Stepped(made):  # type: ignore[misc]
        def step(self, closure: Any = None) -> None:
            with _compiled_if_it_can_be(parameters[0].device):
                super().step(closure)

    Stepped.__name__ = made.__name__
    optimizer: torch.optim.Optimizer = Stepped(parameters, lr=lr)
    return optimizer


@contextmanager
def _compiled_if_it_can_be(device: torch.device) -> Iterator[None]:
    from torch.utils._python_dispatch import _disable_current_modes

    with _disable_current_modes() if device.type == "cuda" else torch.compiler.set_stance("force_eager"):
        yield


def offloaded_adamw(parameters: list[torch.nn.Parameter], lr: float) -> Any:
    """AdamW on the host; the device has the weights, their gradients, and what is too small to be moved."""
    made: type[Any] = import_module("torchao.optim").CPUOffloadOptimizer

    class Offloaded(made):  # type: ignore[misc]
        """An offloaded optimizer with the attributes of PyTorch's own: torchao's does not initialize them."""

        @property
        def state(self) -> dict[Any, Any]:
            """The state of each parameter, wherever it is."""
            on_device = dict(self.d_opt.state) if self.d_opt is not None else {}
            return on_device | {p: {"host": [*optimizer.state.values()]} for p, optimizer in self.optim_dict.items()}

    Offloaded.__name__ = made.__name__
    return Offloaded(parameters, lr=lr)
