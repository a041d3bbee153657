"""The modules that transformers has bitsandbytes quantize, and how one is kept from it."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def left_as_they_are(model: Any) -> list[str]:
    """Paths that transformers leaves out where nobody says what to leave out: the output layer, what is tied to it."""
    from transformers.quantizers.base import get_keys_to_not_convert

    return [*get_keys_to_not_convert(model)]


def convertible_modules(model: Any) -> frozenset[str]:
    """Paths of the linear layers that are quantized where nobody says what to leave out."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    kept = [*left_as_they_are(model), *(model._keep_in_fp32_modules or ())]
    return frozenset(
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, kept)
    )


def keep_in(module: Any, dtype: torch.dtype) -> None:
    """Hold a linear layer in a dtype and have it compute in that, whatever comes in: as bitsandbytes' layers do.

    PEFT's preparation makes float32 of all that is not quantized.
    """
    module.to(dtype)
    kind: Any = type(module)
    module.__class__ = _in_its_own_dtype(kind)


@cache
def _in_its_own_dtype(kind: Any) -> Any:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = kind.forward(self, x.to(self.weight.dtype))
        return out.to(x.dtype)

    return type(kind.__name__, (kind,), {"forward": forward})
