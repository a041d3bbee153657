"""Compiling: the model's layers become kernels of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..categories import Category
from ..config import Option, RunConfig, Value
from ..events import Environment
from ..technique import Group, Mathematics, Technique

if TYPE_CHECKING:
    from ..recipe import Recipe

NOT_PREDICTED = "compile=on is not predicted: what a compiler fuses and keeps is known once it has compiled"


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Compile every layer in place: all that are alike are compiled once, and each keeps its name."""
    if config.flag("compile"):
        recipe.compiles = True
        recipe.transforms.append(_compile_layers)


def _compile_layers(model: Any) -> Any:
    from transformers.modeling_layers import GradientCheckpointingLayer

    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile()
    return model


def conflict(config: RunConfig) -> str | None:
    """Settings under which layers cannot be compiled, or not once for all."""
    if not config.flag("compile"):
        return None
    if config.flag("kv_cache"):
        return "compile=on would compile each layer by itself for its part of the KV cache: set kv_cache=off"
    reasons = {
        "checkpointing": ("off", "what is kept and what computed again is the compiler's to choose"),
        "quantization": ("none", "bitsandbytes' layers are not compiled"),
        "offload": ("off", "what compiled layers save is theirs"),
        "parallel": ("none", "it is for one GPU here"),
    }
    for name, (plain, why) in reasons.items():
        if config.text(name) != plain:
            return f"compile=on cannot be had with {name}={config[name]}, {why}: set {name}={plain}"
    return None


def unavailable(value: Value, environment: Environment) -> str | None:
    """PyTorch compiles nothing that is watched operator by operator."""
    if not value or environment.on_gpu:
        return None
    return "on a CPU every operator is watched, which compiled ones are not: it needs a GPU"


def mathematics(config: RunConfig) -> Mathematics:
    """Fused operators round less often."""
    return Mathematics(numerics="compiled" if config.flag("compile") else "")


def recognise(model: Any, _optimizer: Any) -> Mapping[str, Value]:
    """Modules compiled in place."""
    return {"compile": any(vars(module).get("_compiled_call_impl") is not None for module in model.modules())}


TECHNIQUE = Technique(
    name="compile",
    title="compile",
    group=Group.MEMORY_FOR_TIME,
    summary="layers as fused kernels: what lies between fused operators is never made, and less is kept for backward",
    formula="depends on what the compiler fuses; measured, and not predicted",
    source="https://docs.pytorch.org/docs/stable/generated/torch.compile.html",
    cost="the first steps compile, for seconds to a minute; after that it is faster",
    order=95,
    options=(Option("compile", False, "torch.compile for every layer", (False, True)),),
    in_script={True: "model.compile(), or layer.compile() for each; TrainingArguments(torch_compile=True)"},
    in_plain_script={True: "model.compile(), or layer.compile() for each"},
    acts_on=(Category.ACTIVATIONS, Category.TEMPORARIES),
    variants=({"compile": True, "kv_cache": False},),
    apply=apply,
    saves=(),
    conflict=conflict,
    unavailable=unavailable,
    mathematics=mathematics,
    recognise=recognise,
)
