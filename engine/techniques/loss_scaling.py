"""Scaling the loss so that float16 gradients neither vanish nor overflow."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..categories import Category
from ..config import Option, RunConfig, UserError
from ..technique import Group, Technique

if TYPE_CHECKING:
    from ..recipe import Recipe

FLOAT16 = {"float16": True, "mixed-float16": True, "float32": False, "bfloat16": False, "mixed": False}
"""The dtypes that are known: True if they compute in float16. A profile's shows when it is loaded."""


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Have the loop scale through a `GradScaler`."""
    if not config.flag("loss_scaling"):
        return
    import torch

    computes = (recipe.autocast or recipe.dtype) is torch.float16
    if problem := _problem(config, computes, recipe.dtype is torch.float16):
        raise UserError(problem)
    recipe.loss_scaling = True


def scales(config: RunConfig) -> bool:
    """True if there may be something to scale: the arithmetic is in float16, or not known yet."""
    return FLOAT16.get(config.text("dtype"), True)


def conflict(config: RunConfig) -> str | None:
    """A dtype that `GradScaler` cannot scale, as far as the dtype is set."""
    dtype = config.text("dtype")
    if not config.flag("loss_scaling") or dtype not in FLOAT16:
        return None
    return _problem(config, FLOAT16[dtype], dtype == "float16")


def _problem(config: RunConfig, computes_float16: bool, holds_float16: bool) -> str | None:
    """Adapters are trained in float32 beside float16 weights; the fused AdamW unscales float16 gradients itself."""
    if not computes_float16:
        return "loss_scaling=on is for float16: set dtype to mixed-float16, or switch it off"
    if holds_float16 and not config.flag("lora") and config.text("optimizer") != "adamw-fused":
        return "GradScaler unscales no float16 gradients: set dtype=mixed-float16, optimizer=adamw-fused or lora=on"
    return None


TECHNIQUE = Technique(
    name="loss_scaling",
    title="loss scaling",
    group=Group.NUMBERS,
    summary="multiplies the loss before backward and divides the gradients before the step; bad steps are skipped",
    formula="two numbers, and one more per step: gradients are unscaled in place",
    source="https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling",
    cost="one pass over the gradients; the first steps may be skipped until the scale fits",
    order=15,
    options=(Option("loss_scaling", False, "train through torch.amp.GradScaler", (False, True)),),
    in_script={True: "scaler.scale(loss).backward(); scaler.step(optimizer); scaler.update()"},
    acts_on=(Category.GRADIENTS,),
    variants=(
        {"loss_scaling": True, "dtype": "mixed-float16"},
        {"loss_scaling": True, "dtype": "float16", "optimizer": "adamw-fused"},
        {"loss_scaling": True, "dtype": "float16", "lora": True},
    ),
    apply=apply,
    saves=(),
    conflict=conflict,
)
