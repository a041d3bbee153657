"""Frozen weights in 4 or 8 bit, quantized by bitsandbytes (QLoRA, LLM.int8)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..config import Option, RunConfig, Value
from ..events import Category, Environment
from ..technique import Mathematics, Technique

if TYPE_CHECKING:
    from ..workload import Recipe


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Have transformers quantize while it loads, then prepare for training."""
    kind = config.text("quantization")
    if kind == "none":
        return
    import torch
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    recipe.libraries.add("bitsandbytes")
    recipe.weight_bits = 8 if kind == "int8" else 4
    compute, arithmetic = config.text("quantization.compute"), recipe.autocast or recipe.dtype
    recipe.load_arguments["quantization_config"] = (
        BitsAndBytesConfig(load_in_8bit=True)
        if kind == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=config.flag("quantization.double"),
            bnb_4bit_compute_dtype=arithmetic if compute == "dtype" else getattr(torch, compute),
        )
    )

    def prepare(model: Any) -> Any:
        # Checkpointing is a technique of its own; here only what quantization needs.
        return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)

    recipe.transforms.append(prepare)


def unavailable(value: Value, environment: Environment) -> str | None:
    """It needs bitsandbytes; its 4-bit and 8-bit paths run on a CPU too."""
    if value == "none" or "bitsandbytes" in environment.packages:
        return None
    return "the package bitsandbytes is not installed"


def conflict(config: RunConfig) -> str | None:
    """Quantized weights cannot be trained."""
    if config["quantization"] != "none" and not config["lora"]:
        return f"quantization={config['quantization']} freezes the weights: set lora=on to train adapters beside them"
    return None


def caution(config: RunConfig) -> str | None:
    """PEFT's k-bit preparation converts what is not quantized to float32 (bitsandbytes #1569)."""
    if config["quantization"] == "none":
        return None
    if config.text("dtype").startswith("mixed"):
        return (
            "k-bit preparation makes embeddings, head and norms float32, and so what passes from layer to layer: "
            "with no layer checkpointed this can need more than LoRA on 16-bit weights"
        )
    return (
        "k-bit preparation makes embeddings, head and norms float32, and without autocast all activations; "
        "float32 attention with grouped queries keeps every score as well: this can need more than LoRA on 16-bit "
        "weights; under dtype=mixed (bfloat16 autocast, as trainers run it) attention stays in 16 bit"
    )


def mathematics(config: RunConfig) -> Mathematics:
    """Frozen weights are rounded when they are stored."""
    if config.text("quantization") == "none":
        return Mathematics()
    return Mathematics(numerics=" ".join(f"{o.name}={config[o.name]}" for o in TECHNIQUE.options))


def recognise(model: Any, _optimizer: Any) -> Mapping[str, Value]:
    """bitsandbytes' linear layers, and how their weights are packed."""
    for module in model.modules():
        kind = type(module).__name__
        if kind == "Linear8bitLt":
            return {"quantization": "int8"}
        if kind == "Linear4bit" and not hasattr(module, "base_layer"):  # PEFT's wrapper has the same name
            state = getattr(module.weight, "quant_state", None)
            return {
                "quantization": str(getattr(module.weight, "quant_type", "nf4")),
                "quantization.double": bool(getattr(state, "nested", True)),
                "quantization.compute": str(getattr(module, "compute_dtype", "")).removeprefix("torch.") or "dtype",
            }
    return {"quantization": "none"}


TECHNIQUE = Technique(
    name="quantization",
    title="quantization",
    summary="stores the frozen weights of linear layers in 4 or 8 bit and dequantizes them where they are used",
    formula="nf4, fp4: 4.5 bit a weight, 4.127 with double quantization; int8: 8 bit and a scale per row",
    source="https://arxiv.org/abs/2305.14314",
    cost="weights are dequantized where they are used, in forward and in backward",
    order=40,
    options=(
        Option("quantization", "none", "how frozen weights are stored", ("none", "nf4", "fp4", "int8")),
        Option("quantization.double", True, "quantize the 4-bit scales as well", (True, False)),
        Option(
            "quantization.compute",
            "dtype",
            "dtype of the arithmetic; dtype: the run's, under autocast that of autocast",
            ("dtype", "float16", "bfloat16", "float32"),
        ),
    ),
    in_script="from_pretrained(..., quantization_config=BitsAndBytesConfig(...))",
    acts_on=(Category.PARAMETERS,),
    variants=(  # what is quantized is frozen: something beside it has to be trained
        {"lora": True, "quantization": "nf4"},
        {"lora": True, "quantization": "fp4", "quantization.double": False, "quantization.compute": "bfloat16"},
        {"lora": True, "quantization": "int8"},
    ),
    packages=("bitsandbytes",),
    key="u",
    apply=apply,
    saves=("nf4",),
    caution=caution,
    mathematics=mathematics,
    recognise=recognise,
    conflict=conflict,
    unavailable=unavailable,
)
