"""Gradient accumulation: several micro-batches to one optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..categories import Category
from ..config import Option, RunConfig
from ..technique import Group, Mathematics, Technique

if TYPE_CHECKING:
    from ..recipe import Recipe


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Set how many micro-batches the loop runs before it steps."""
    recipe.accumulation = config.integer("accumulation")


def mathematics(config: RunConfig) -> Mathematics:
    """A step is of so many rows, however many at a time."""
    return Mathematics(f"{config.batch_size * config.integer('accumulation')} rows a step")


TECHNIQUE = Technique(
    name="accumulation",
    title="accumulation",
    group=Group.MEMORY_FOR_TIME,
    summary="adds up the gradients of several micro-batches before a step: a larger batch for the memory of one",
    formula="effective batch = batch_size · accumulation; activations and logits of one micro-batch at a time",
    source="https://arxiv.org/abs/1806.00187",
    cost="as many passes as micro-batches, each less well filled",
    slowdown=0.05,
    order=80,
    options=(Option("accumulation", 1, "micro-batches per optimizer step", (1, 2, 4, 8, 16), True, 1, 65536),),
    in_script="so many micro-batches to a step, each so much smaller for the same batch",
    acts_on=(Category.ACTIVATIONS, Category.KV_CACHE, Category.LOGITS_LOSS, Category.INPUTS),
    variants=({"accumulation": 3},),
    key="a",
    apply=apply,
    saves=(16, 8, 4, 2),
    mathematics=mathematics,
)
