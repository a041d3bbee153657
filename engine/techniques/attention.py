"""The attention implementation that the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..categories import Category
from ..config import Option, RunConfig, Value
from ..events import Environment
from ..missing_package import not_installed
from ..technique import Group, Technique

if TYPE_CHECKING:
    from ..recipe import Recipe


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Pass the choice to transformers."""
    if config["attention"] != "auto":
        recipe.load_arguments["attn_implementation"] = config.text("attention")
    if config["attention"] == "flash_attention_2":
        recipe.libraries.add("flash-attn")


def unavailable(value: Value, environment: Environment) -> str | None:
    """flash_attention_2 needs its package and a GPU."""
    if value != "flash_attention_2":
        return None
    if not environment.on_gpu:
        return "it needs a CUDA GPU"
    return None if "flash-attn" in environment.packages else not_installed("flash-attn")


def conflict(config: RunConfig) -> str | None:
    """Flash attention computes in 16 bit only."""
    if config["attention"] == "flash_attention_2" and config["dtype"] == "float32":
        return "attention=flash_attention_2 needs 16-bit arithmetic: set dtype to float16, bfloat16 or mixed"
    return None


def saves(config: RunConfig) -> tuple[Value, ...]:
    """auto is sdpa already for every model that has it."""
    return ("sdpa", "flash_attention_2") if config["attention"] == "eager" else ("flash_attention_2",)


def recognise(model: Any, _optimizer: Any) -> Mapping[str, Value]:
    """The implementation that transformers has chosen for the model."""
    chosen = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return {"attention": chosen} if chosen else {}


TECHNIQUE = Technique(
    name="attention",
    title="attention",
    group=Group.MODEL,
    summary="eager keeps the whole seq x seq score matrix of every head; sdpa and flash never build it",
    formula="eager keeps about 5·heads·batch·seq² bytes a layer at 16 bit; sdpa and flash 4·heads·batch·seq",
    source="https://arxiv.org/abs/2205.14135",
    cost="eager runs several kernels where sdpa runs one",
    order=20,
    options=(
        Option(
            "attention",
            "auto",
            "auto: what transformers chooses for the model, sdpa where it can",
            ("auto", "sdpa", "eager", "flash_attention_2"),
        ),
    ),
    in_script={
        value: f"from_pretrained(..., attn_implementation={value!r})"
        for value in ("sdpa", "eager", "flash_attention_2")
    },
    in_plain_script=None,
    acts_on=(Category.ACTIVATIONS,),
    variants=({"attention": "eager"}, {"attention": "sdpa"}, {"attention": "flash_attention_2", "dtype": "bfloat16"}),
    packages=("flash-attn",),
    key="t",
    apply=apply,
    saves=saves,
    recognise=recognise,
    conflict=conflict,
    unavailable=unavailable,
)
