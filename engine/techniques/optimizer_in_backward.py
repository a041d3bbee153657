"""Stepping each parameter in backward, so that gradients never exist all at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..categories import Category
from ..config import Option, RunConfig, Value
from ..technique import Group, Technique

if TYPE_CHECKING:
    from ..recipe import Recipe


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Have the optimizer made once for each parameter."""
    if not config.flag("optimizer_in_backward"):
        return
    from ..optimizer_in_backward import OptimizerInBackward

    make = recipe.make_optimizer
    recipe.make_optimizer = lambda parameters, lr: OptimizerInBackward(parameters, lambda one: make(one, lr))
    recipe.keeps_gradients = False


def conflict(config: RunConfig) -> str | None:
    """A parameter that has been stepped cannot wait for more gradients, nor for what the scaler finds in others."""
    if not config.flag("optimizer_in_backward"):
        return None
    if config.integer("accumulation") > 1:
        return "optimizer_in_backward=on steps after every micro-batch: set accumulation=1"
    if config.flag("loss_scaling"):
        return "optimizer_in_backward=on steps before all gradients are unscaled: set loss_scaling=off"
    return None


def recognise(model: Any, _optimizer: Any) -> Mapping[str, Value]:
    """Hooks that run once a gradient is there."""
    return {"optimizer_in_backward": any(getattr(p, "_post_accumulate_grad_hooks", None) for p in model.parameters())}


TECHNIQUE = Technique(
    name="optimizer_in_backward",
    title="step in backward",
    group=Group.OPTIMIZER,
    summary="steps each parameter as soon as its gradient is there and frees it: gradients never exist all at once",
    formula="gradients: the largest parameter's instead of all; no gain where logits or activations are the peak",
    source="https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html",
    cost="a call of the optimizer for every parameter; no clipping by the norm of all gradients, no accumulation",
    slowdown=0.1,
    order=78,
    options=(Option("optimizer_in_backward", False, "step inside the backward pass", (False, True)),),
    in_script={True: "parameter.register_post_accumulate_grad_hook(...) with an optimizer for each parameter"},
    acts_on=(Category.GRADIENTS, Category.TEMPORARIES),
    variants=({"optimizer_in_backward": True},),
    apply=apply,
    conflict=conflict,
    recognise=recognise,
)
