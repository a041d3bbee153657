"""Data type of the weights, and of the arithmetic."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..config import Option, RunConfig, Value
from ..events import Category
from ..technique import Mathematics, Technique

if TYPE_CHECKING:
    from ..workload import Recipe


_BFLOAT16 = "none, and faster, from compute capability 8.0 on; older GPUs have no bfloat16 tensor cores"


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Set the dtype the weights are loaded in, and autocast for `mixed`."""
    import torch

    value = config.text("dtype")
    if value == "mixed":
        recipe.dtype, recipe.autocast = torch.float32, torch.bfloat16
    elif value != "profile":
        recipe.dtype = getattr(torch, value)


def mathematics(config: RunConfig) -> Mathematics:
    """The range of float16 is too small for gradients: they vanish, and sums overflow to inf and nan."""
    value = config.text("dtype")
    return Mathematics("gradients in float16 without loss scaling" if value == "float16" else "", value)


def recognise(model: Any, _optimizer: Any) -> Mapping[str, Value]:
    """The floating-point type of most of the weights."""
    sizes: Counter[str] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    return {"dtype": sizes.most_common(1)[0][0]} if sizes else {}


TECHNIQUE = Technique(
    name="dtype",
    title="data type",
    summary="bytes per number: weights, gradients, optimizer state and activations all follow it",
    formula="float32 4 B, float16 and bfloat16 2 B; mixed: float32 weights, bfloat16 arithmetic under autocast",
    source="https://arxiv.org/abs/1710.03740",
    cost={
        "profile": "none",
        "float32": "slower: tensor cores multiply 16-bit numbers several times as fast",
        "float16": "none in time, but without loss scaling gradients vanish and the loss can become nan",
        "bfloat16": _BFLOAT16,
        "mixed": f"{_BFLOAT16}; weights are converted in every pass",
    },
    order=10,
    options=(
        Option(
            "dtype",
            "profile",
            "dtype of the weights; profile: as published; mixed: float32 under bfloat16 autocast",
            ("profile", "float32", "float16", "bfloat16", "mixed"),
        ),
    ),
    in_script="from_pretrained(..., dtype=...)",
    acts_on=(Category.PARAMETERS, Category.GRADIENTS, Category.ACTIVATIONS),
    variants=({"dtype": "float16"}, {"dtype": "bfloat16"}, {"dtype": "mixed"}),
    key="d",
    apply=apply,
    mathematics=mathematics,
    recognise=recognise,
)
