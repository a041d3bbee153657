"""Frozen weights in 4 or 8 bit, quantized by bitsandbytes (QLoRA, LLM.int8)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..categories import Category
from ..config import Option, RunConfig, Value
from ..events import Environment
from ..missing_package import not_installed
from ..quantized_modules import convertible_modules, keep_in, left_as_they_are
from ..technique import Group, Mathematics, Technique

if TYPE_CHECKING:
    from ..recipe import Model, Recipe

FLOAT32_BYTES = 4

NOTHING = "none"
"""That no module is kept in 16 bit."""


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
    kept = kept_modules(config, recipe.shell)
    skipped: Any = None  # the library's own choice: the output layer
    if kept:
        skipped = [*left_as_they_are(recipe.shell), *kept]
        if not _alike_in_every_layer(kept, convertible_modules(recipe.shell)):
            recipe.layer_period = int(recipe.shell.config.num_hidden_layers)
    recipe.load_arguments["quantization_config"] = (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
        if kind == "int8"
        else BitsAndBytesConfig(
            load_in_4bit=True,
            llm_int8_skip_modules=skipped,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=config.flag("quantization.double"),
            bnb_4bit_compute_dtype=arithmetic if compute == "dtype" else getattr(torch, compute),
        )
    )

    if not config.flag("quantization.prepared"):
        return

    def prepare(model: Any) -> Any:
        # Checkpointing is a technique of its own; here only what quantization needs.
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        for name, module in [*model.named_modules()]:  # a prediction's model may have fewer layers
            if name in kept:
                keep_in(module, recipe.dtype)
        return model

    recipe.transforms.append(prepare)


def kept_modules(config: RunConfig, model: Model) -> list[str]:
    """Paths of the modules that would be quantized if `quantization.skip` did not name them."""
    wanted = _named(config)
    return [
        name for name in sorted(convertible_modules(model)) if any(f".{name}".endswith(f".{end}") for end in wanted)
    ]


def _named(config: RunConfig) -> list[str]:
    text = config.text("quantization.skip")
    return [] if text == NOTHING else [name.strip() for name in text.split(",") if name.strip()]


def _alike_in_every_layer(kept: list[str], convertible: frozenset[str]) -> bool:
    """True if every module is kept whose path differs from a kept one's in the layer's number only."""
    without_number = {re.sub(r"\.\d+\.", ".", name, count=1) for name in kept}
    return all(name in kept for name in convertible if re.sub(r"\.\d+\.", ".", name, count=1) in without_number)


def unsuitable(config: RunConfig, model: Model) -> str | None:
    """Module names that are typed have to name a quantized module; also while nothing is, so that it can be set on."""
    names = convertible_modules(model) if _named(config) else ()
    for wanted in _named(config):
        if not any(f".{name}".endswith(f".{wanted}") for name in names):
            ends = sorted({name.rsplit(".", 1)[-1] for name in names})
            return f"quantization.skip: no quantized module is called {wanted!r}; there are {', '.join(ends)}"
    return None


def unavailable(value: Value, environment: Environment) -> str | None:
    """It needs bitsandbytes; its 4-bit and 8-bit paths run on a CPU too."""
    if value == "none" or "bitsandbytes" in environment.packages:
        return None
    return not_installed("bitsandbytes")


def conflict(config: RunConfig) -> str | None:
    """Quantized weights cannot be trained; PEFT's IA3 of bitsandbytes' layers does not convert back."""
    if config["quantization"] != "none" and not config["lora"]:
        return f"quantization={config['quantization']} freezes the weights: set lora=on to train adapters beside them"
    if config["quantization"] != "none" and not config["quantization.prepared"] and config["lora.kind"] == "ia3":
        return "lora.kind=ia3 returns float32, which norms in 16 bit do not take: set quantization.prepared=on"
    return None


def caution(config: RunConfig) -> str | None:
    """PEFT's k-bit preparation converts what is not quantized to float32 (bitsandbytes #1569)."""
    if config["quantization"] == "none" or not config.flag("quantization.prepared"):
        return None
    if config.text("dtype").startswith("mixed"):
        if config.generates or config.text("checkpointing") != "off":
            return None  # what passes from layer to layer is little beside what the layers keep
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
            return {"quantization": "int8", "quantization.prepared": _is_prepared(model)}
        if kind == "Linear4bit" and not hasattr(module, "base_layer"):  # PEFT's wrapper has the same name
            state = getattr(module.weight, "quant_state", None)
            return {
                "quantization": str(getattr(module.weight, "quant_type", "nf4")),
                "quantization.double": bool(getattr(state, "nested", True)),
                "quantization.compute": str(getattr(module, "compute_dtype", "")).removeprefix("torch.") or "dtype",
                "quantization.prepared": _is_prepared(model),
            }
    return {"quantization": "none"}


def _is_prepared(model: Any) -> bool:
    """True if embeddings are float32; what else is not quantized, bitsandbytes may have converted since."""
    from torch.nn import Embedding

    return all(m.weight.itemsize == FLOAT32_BYTES for m in model.modules() if isinstance(m, Embedding))


TECHNIQUE = Technique(
    name="quantization",
    title="quantization",
    group=Group.NUMBERS,
    summary="stores the frozen weights of linear layers in 4 or 8 bit and dequantizes them where they are used",
    formula="nf4, fp4: 4.5 bit a weight, 4.127 with double quantization; int8: 8 bit and a scale per row",
    source="https://arxiv.org/abs/2305.14314",
    cost="weights are dequantized where they are used, in forward and in backward",
    slowdown=0.2,
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
        Option(
            "quantization.skip",
            NOTHING,
            "modules kept in the run's dtype: their names, or the ends of them, separated by commas",
            (NOTHING,),
            True,
        ),
        Option(
            "quantization.prepared",
            True,
            "PEFT's k-bit preparation: embeddings, head and norms in float32; off: as loaded, as TRL leaves them",
            (True, False),
        ),
    ),
    in_script=dict.fromkeys(
        ("nf4", "fp4", "int8"), "from_pretrained(..., quantization_config=BitsAndBytesConfig(...))"
    ),
    in_plain_script={
        "nf4": "bitsandbytes.nn.LinearNF4 for its linear layers, and adapters beside them",
        "fp4": "bitsandbytes.nn.LinearFP4 for its linear layers, and adapters beside them",
        "int8": "bitsandbytes.nn.Linear8bitLt for its linear layers, and adapters beside them",
    },
    acts_on=(Category.PARAMETERS,),
    variants=(  # what is quantized is frozen: something beside it has to be trained
        {"lora": True, "quantization": "nf4"},
        {
            "lora": True,
            "quantization": "fp4",
            "quantization.double": False,
            "quantization.compute": "bfloat16",
            "quantization.skip": "dense_4h_to_h",
        },
        {"lora": True, "quantization": "int8"},
        {
            "lora": True,
            "quantization": "nf4",
            "quantization.compute": "bfloat16",
            "quantization.prepared": False,
            "dtype": "bfloat16",
        },
    ),
    packages=("bitsandbytes",),
    key="u",
    apply=apply,
    saves=("nf4",),
    caution=caution,
    mathematics=mathematics,
    recognise=recognise,
    conflict=conflict,
    unsuitable=unsuitable,
    unavailable=unavailable,
)
