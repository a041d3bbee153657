"""torchao's optimizers as on a GPU, where their step is one compiled kernel a parameter.

No code of torchao's is run: a compiled step cannot be, and nobody needs the package for a
prediction. What it allocates (torchao 0.18) is written down here.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .fake_cuda import FakeCuda

LEAST_NUMBERS = 4096
"""Parameters of fewer have their state in their own dtype, and stay on the device."""


def module(tracker: FakeCuda) -> ModuleType:
    """A stand-in for `torchao.optim`.

    Args:
        tracker: Counts what a kernel takes for itself.
    """
    made = ModuleType("torchao.optim")
    kinds = {"AdamW8bit": (8, 256, 256), "AdamW4bit": (4, 128, 16), "AdamWFp8": (8, 256, 0)}
    for name, (bits, block, levels) in kinds.items():
        members = {"bits": bits, "block": block, "levels": levels, "tracker": tracker}
        setattr(made, name, type(name, (_LowBitAdamW,), members))
    made.CPUOffloadOptimizer = _OffloadedAdamW  # type: ignore[attr-defined]
    return made


class _LowBitAdamW(torch.optim.Optimizer):
    """Codes, a scale a block and a table of levels for each of the two moments."""

    bits: int
    block: int
    levels: int
    tracker: FakeCuda

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = self._moment(parameter), self._moment(parameter)
                if isinstance(state["exp_avg"], dict):
                    self._compiled_step(parameter)

    def _compiled_step(self, parameter: Tensor) -> None:
        """The compiler's buffers.

        4-bit codes are packed by twos, so that the whole codes, 8 bytes each, and what they
        are made of are there at once: measured on an H100 at 24 bytes a number. In 8 bit
        it keeps all of that in registers, as far as has been seen.
        """
        count, block = parameter.numel(), self.tracker.address(parameter)
        if self.bits == 4:
            self.tracker.scratch(4 * count, 4 * count, 8 * count, 8 * count, source=block)
            self.tracker.may_take(28 * count, block)
        else:
            self.tracker.may_take(8 * count, block)

    def _moment(self, parameter: Tensor) -> Tensor | dict[str, Tensor]:
        count, device = parameter.numel(), parameter.device
        if count < LEAST_NUMBERS or count % self.block:
            return torch.zeros_like(parameter)
        made = {
            "codes": torch.zeros(count * self.bits // 8, dtype=torch.uint8, device=device),
            "scale": torch.zeros(count // self.block, device=device),
        }
        return made | ({"qmap": torch.zeros(self.levels, device=device)} if self.levels else {})


class _OffloadedAdamW(torch.optim.Optimizer):
    """A pinned copy of each weight and of its gradient on the host; what is small is stepped on the device.

    Attributes:
        pinned_copies: By weight.
    """

    def __init__(self, parameters: list[Tensor], lr: float) -> None:
        trained = [p for p in parameters if p.requires_grad]
        small = [p for p in trained if p.numel() < LEAST_NUMBERS]
        self.d_opt = torch.optim.AdamW(small, lr=lr, fused=True) if small else None
        host = {"device": "cpu", "pin_memory": True}
        self.pinned_copies = {
            p: [torch.empty(p.shape, dtype=p.dtype, **host) for _ in range(2)]  # type: ignore[call-overload]
            for p in trained
            if p.numel() >= LEAST_NUMBERS
        }
        self.optim_dict: dict[Tensor, Any] = {}
        self._parameters = trained

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.d_opt is not None:
            self.d_opt.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    @property
    def param_groups(self) -> list[Any]:  # type: ignore[override]
        return [{"params": self._parameters}]
