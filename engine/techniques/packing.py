"""Packing: texts of several lengths in rows of one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..categories import Category
from ..config import Option, RunConfig
from ..technique import Group, Mathematics, Technique

if TYPE_CHECKING:
    from ..recipe import Model, Recipe


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Tell who makes the rows; a variable-length kernel wants all of a batch in one."""
    recipe.packing = config.text("packing")
    recipe.one_row = recipe.packing == "packed" and config.text("attention") == "flash_attention_2"


def conflict(config: RunConfig) -> str | None:
    """A cache's positions, and a prompt's, are counted from the row's begin."""
    if config.text("packing") != "packed":
        return None
    if config.flag("kv_cache") and config.text("checkpointing") == "off":
        return "packing=packed starts positions again within a row, a KV cache does not: set kv_cache=off"
    if config.flag("lora") and config.text("lora.kind") == "prompt":
        return "packing=packed would have a prompt before the first text of a row only: set another lora.kind"
    return None


def unsuitable(config: RunConfig, model: Model) -> str | None:
    """The model has to be told of padding, or of positions."""
    import inspect

    wanted = {"padded": "attention_mask", "packed": "position_ids"}.get(config.text("packing"), "")
    takes = inspect.signature(model.forward).parameters
    if not wanted or (wanted in takes and "input_ids" in takes and "labels" in takes):
        return None
    return f"packing={config['packing']}: {type(model).__name__} takes no {wanted} beside tokens and labels"


def mathematics(config: RunConfig) -> Mathematics:
    """Other tokens are trained on in a step."""
    kind = config.text("packing")
    return Mathematics("" if kind == "off" else f"{kind} rows")


TECHNIQUE = Technique(
    name="packing",
    title="packing",
    group=Group.MODEL,
    summary="texts of several lengths: padded to the longest, or packed one behind the other with own positions",
    formula="padded: a mask, and tokens for nothing; packed: no padding, and a mask of seq² bytes a row without flash",
    source="https://huggingface.co/docs/trl/reducing_memory_usage#packing",
    cost={
        "off": "",
        "padded": "padding is computed as well, and attention with a mask is slower",
        "packed": "without flash attention the mask makes attention slower",
    },
    order=22,
    options=(
        Option(
            "packing",
            "off",
            "off: full rows; padded, packed: texts of random lengths, with --data of its own",
            ("off", "padded", "packed"),
        ),
    ),
    in_script={"padded": "rows of several lengths and their attention_mask", "packed": "SFTConfig(packing=True)"},
    in_plain_script=None,
    acts_on=(Category.ACTIVATIONS, Category.INPUTS),
    variants=({"packing": "padded"}, {"packing": "packed", "kv_cache": False}),
    apply=apply,
    saves=(),
    conflict=conflict,
    unsuitable=unsuitable,
    mathematics=mathematics,
)
