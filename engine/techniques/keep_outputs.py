"""Lifetime of the loop's variable `outputs`: to the end of its step, or until the next step replaces it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..categories import Category
from ..config import Option, RunConfig
from ..technique import Group, Technique

if TYPE_CHECKING:
    from ..recipe import Recipe


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Tell the loop."""
    recipe.keep_outputs = config.flag("keep_outputs")


TECHNIQUE = Technique(
    name="keep_outputs",
    title="keep outputs",
    group=Group.MEMORY_FOR_TIME,
    summary="a loop that does not delete its outputs holds logits and KV cache while the next forward runs",
    formula="batch·seq·vocab·bytes of logits and the KV cache, a second time, from the second step on",
    source="https://docs.pytorch.org/docs/stable/notes/faq.html#my-model-reports-cuda-runtime-error-2-out-of-memory",
    order=90,
    options=(Option("keep_outputs", True, "keep the outputs until the next forward has returned", (True, False)),),
    in_script={
        True: "no del: the outputs live until the next forward has returned",
        False: "del outputs after backward",
    },
    acts_on=(Category.LOGITS_LOSS, Category.KV_CACHE),
    variants=({"keep_outputs": False},),
    key="e",
    apply=apply,
)
