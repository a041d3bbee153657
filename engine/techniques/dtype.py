"""Data type of the weights, and of the arithmetic."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import Option, RunConfig
from ..technique import Technique

if TYPE_CHECKING:
    from ..workload import Recipe


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Set the dtype the weights are loaded in, and autocast for `mixed`."""
    import torch

    value = config.text("dtype")
    if value == "mixed":
        recipe.dtype, recipe.autocast = torch.float32, torch.bfloat16
    elif value != "profile":
        recipe.dtype = getattr(torch, value)


TECHNIQUE = Technique(
    name="dtype",
    title="data type",
    key="d",
    summary="bytes per number: weights, gradients, optimizer state and activations all follow it",
    formula="float32 4 B, float16 and bfloat16 2 B; mixed: float32 weights, bfloat16 arithmetic under autocast",
    source="https://arxiv.org/abs/1710.03740",
    cost="none: 16-bit arithmetic is faster on every GPU with tensor cores",
    order=10,
    options=(
        Option(
            "dtype",
            "profile",
            "dtype of the weights; profile: as published; mixed: float32 under bfloat16 autocast",
            ("profile", "float32", "float16", "bfloat16", "mixed"),
        ),
    ),
    apply=apply,
)
