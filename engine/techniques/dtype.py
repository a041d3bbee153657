"""Data type of the weights, and of the arithmetic."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..categories import Category
from ..config import DTYPES, Option, RunConfig, Value
from ..technique import Group, Mathematics, Technique

if TYPE_CHECKING:
    from ..recipe import Recipe


AUTOCAST = {"mixed": "bfloat16", "mixed-float16": "float16"}
"""The dtype of the arithmetic where weights are float32."""

UNSCALED = "float16 without loss scaling; bfloat16 and mixed need none, float16 trains with loss_scaling=on"

_BFLOAT16 = "slower on GPUs below compute capability 8.0, which have no bfloat16 tensor cores"

_FLOAT16 = "what exceeds 65,504 overflows"


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Set the dtype the weights are loaded in, and autocast for `mixed`."""
    import torch

    value = config.text("dtype")
    if value in AUTOCAST:
        recipe.dtype, recipe.autocast = torch.float32, getattr(torch, AUTOCAST[value])
    elif value != "profile":
        recipe.dtype = getattr(torch, value)


def _dtype(config: RunConfig) -> str:
    """The value as it is set, or what the profile says; `profile` where nobody knows that before it is loaded."""
    value = config.text("dtype")
    return config.architecture.dtype if value == "profile" and config.architecture is not None else value


def mathematics(config: RunConfig) -> Mathematics:
    """The range of float16 is too small for gradients: they vanish, and sums overflow to inf and nan."""
    value = _dtype(config)
    unscaled = AUTOCAST.get(value, value) == "float16" and not config.flag("loss_scaling")
    return Mathematics(numerics=value, unsound=UNSCALED if unscaled else "")


def saves(config: RunConfig) -> tuple[Value, ...]:
    """Arithmetic in float16 holds what it does in bfloat16: it is for float32 on GPUs that compute in no bfloat16."""
    if config.text("dtype") in AUTOCAST:
        return ("bfloat16",)
    return ("bfloat16", "mixed", "mixed-float16") if _dtype(config) in ("float32", "profile") else ("bfloat16", "mixed")


def recognise(model: Any, _optimizer: Any) -> Mapping[str, Value]:
    """The floating-point type of most of the weights, and the autocast that the forward is under."""
    sizes: Counter[str] = Counter()
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    if not sizes:
        return {}
    weights = sizes.most_common(1)[0][0]
    arithmetic = _autocast(model)
    mixed = [value for value, dtype in AUTOCAST.items() if weights == "float32" and dtype == arithmetic]
    return {"dtype": mixed[0] if mixed else weights}


def _autocast(model: Any) -> str | None:
    """The script's own autocast around the model, or accelerate's inside the forward that it has wrapped."""
    import torch

    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        return str(torch.get_autocast_dtype(device)).removeprefix("torch.")
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    if state is None or not hasattr(model, "_original_forward"):
        return None
    return {"bf16": "bfloat16", "fp16": "float16"}.get(str(state._shared_state.get("_mixed_precision")))


TECHNIQUE = Technique(
    name="dtype",
    title="data type",
    group=Group.NUMBERS,
    summary="bytes per number: weights, gradients, optimizer state and activations all follow it",
    formula="float32 4 B, float16 and bfloat16 2 B; mixed: float32 weights, 16-bit arithmetic under autocast",
    source="https://arxiv.org/abs/1710.03740",
    cost={
        "profile": "",
        "float32": "slower: tensor cores multiply 16-bit numbers several times as fast",
        "float16": _FLOAT16,
        "bfloat16": _BFLOAT16,
        "mixed": f"{_BFLOAT16}; weights are converted in every pass",
        "mixed-float16": f"{_FLOAT16}; weights are converted in every pass",
    },
    order=10,
    options=(
        Option(
            "dtype",
            "profile",
            "dtype of the weights; profile: as published; mixed: float32 under autocast, to bfloat16 or float16",
            ("profile", "float32", "float16", "bfloat16", "mixed", "mixed-float16"),
        ),
    ),
    in_script={
        "profile": "from_pretrained(..., dtype='auto')",
        **{value: f"from_pretrained(..., dtype=torch.{value})" for value in DTYPES},
        **{value: f"weights in float32, torch.autocast(device, torch.{AUTOCAST[value]})" for value in AUTOCAST},
    },
    in_plain_script={
        "profile": "the dtype in which the model is made",
        **{value: f"model.to(torch.{value}), and its inputs" for value in DTYPES},
        **{value: f"weights in float32, torch.autocast(device, torch.{AUTOCAST[value]})" for value in AUTOCAST},
    },
    acts_on=(
        Category.PARAMETERS,
        Category.GRADIENTS,
        Category.OPTIMIZER_STATE,
        Category.ACTIVATIONS,
        Category.KV_CACHE,
        Category.LOGITS_LOSS,
    ),
    variants=({"dtype": "float16"}, {"dtype": "bfloat16"}, {"dtype": "mixed"}, {"dtype": "mixed-float16"}),
    key="d",
    apply=apply,
    saves=saves,
    mathematics=mathematics,
    recognise=recognise,
)
