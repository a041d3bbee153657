"""The KV cache that a model builds while it trains, unless it is told not to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..categories import Category
from ..config import Option, RunConfig, Value
from ..technique import Group, Technique

if TYPE_CHECKING:
    from ..recipe import Recipe


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Set `use_cache` on the model's configuration."""
    value = config.flag("kv_cache")

    def set_use_cache(model: object) -> object:
        model.config.use_cache = value  # type: ignore[attr-defined]
        return model

    recipe.transforms.append(set_use_cache)


def overruled(config: RunConfig) -> tuple[Value, str] | None:
    """transformers' checkpointed layers take no cache: computed again, they would fill it twice."""
    return (False, "checkpointing") if config.flag("kv_cache") and config.text("checkpointing") != "off" else None


def recognise(model: Any, _optimizer: Any) -> Mapping[str, Value]:
    """`use_cache` of transformers' configuration of the model; with one that has no such field it builds none."""
    config = getattr(model, "config", None)
    known = isinstance(getattr(config, "model_type", None), str)
    return {"kv_cache": bool(getattr(config, "use_cache", False))} if known else {}


TECHNIQUE = Technique(
    name="kv_cache",
    title="KV cache",
    group=Group.MODEL,
    summary="transformers keeps keys and values for generation by default, also in training, where nobody reads them",
    formula="2·layers·batch·seq·kv_heads·head_dim·bytes, alive as long as the outputs are",
    source="https://huggingface.co/docs/transformers/kv_cache",
    order=30,
    options=(
        Option("kv_cache", True, "use_cache of the model's configuration", (True, False)),
        Option(
            "kv_cache.kind",
            "dynamic",
            "while text is generated; static: as long as it will be; quantized: in 4 bit, the last 128 tokens not",
            ("dynamic", "static", "quantized"),
        ),
    ),
    in_script={value: f"model.config.use_cache = {value}" for value in (True, False)},
    in_plain_script=None,
    acts_on=(Category.KV_CACHE,),
    variants=({"kv_cache": False},),
    key="c",
    apply=apply,
    recognise=recognise,
    overruled=overruled,
)
