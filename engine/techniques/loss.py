"""The loss: computed from all logits at once, or without ever having them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ..categories import Category
from ..config import Option, RunConfig, Value
from ..events import Environment
from ..missing_package import not_installed
from ..technique import Group, Mathematics, Technique

if TYPE_CHECKING:
    from ..recipe import Model, Recipe

SINCE = (2, 13)
"""PyTorch's version that has `linear_cross_entropy`."""


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Give the model another forward, one that ends in the loss."""
    kind = config.text("loss")
    if kind == "full":
        return
    from .. import fused_loss

    recipe.makes_logits = False
    recipe.transforms.append(partial(fused_loss.fuse, compute=getattr(fused_loss, kind.replace("-", "_"))))


def unsuitable(config: RunConfig, model: Model) -> str | None:
    """PyTorch's function knows neither a scale nor a cap of the logits, Liger's no scale."""
    from ..fused_loss import Scaling, scaling_of

    if config.text("loss") == "full":
        return None
    if not _is_causal(model):
        return (
            f"loss={config['loss']} is for causal language models, which {type(model).__name__} is not: set loss=full"
        )
    kind, scaling = config.text("loss"), scaling_of(model.config)
    done = {"linear-cross-entropy": Scaling(), "liger": Scaling(softcap=scaling.softcap)}.get(kind, scaling)
    return (
        f"loss={kind} cannot scale or cap the logits as this model does; set loss=chunked" if done != scaling else None
    )


def _is_causal(model: Model) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = type(model.config)
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING and type(model) is MODEL_FOR_CAUSAL_LM_MAPPING[kind]


def unavailable(value: Value, environment: Environment) -> str | None:
    """Liger's kernels are Triton's."""
    if value == "linear-cross-entropy":
        version = tuple(map(int, re.findall(r"\d+", environment.packages.get("torch", "0.0"))[:2]))
        return None if version >= SINCE else "PyTorch has it from 2.13 on"
    if value == "liger":
        if not environment.on_gpu:
            return "its kernels need a GPU"
        return None if "liger-kernel" in environment.packages else not_installed("liger-kernel", "liger")
    return None


def mathematics(config: RunConfig) -> Mathematics:
    """The chunked loss adds up in float32; the other two add up the head's gradient in the weights' dtype."""
    kind = config.text("loss")
    return Mathematics(numerics="" if kind in ("full", "chunked") else kind)


def recognise(model: Any, _optimizer: Any) -> Mapping[str, Value]:
    """TRL and Liger give a model another forward, and so do we."""
    for module in model.modules():
        if getattr(module, "get_output_embeddings", None) is None:
            continue
        ours: Any = getattr(module, "loss", None)
        if type(ours).__name__ == "FusedLoss":
            return {"loss": ours.compute.__name__.replace("_", "-")}
        for function in _forwards(module):
            if getattr(getattr(function, "__code__", None), "co_name", "") == "_fused_forward":  # TRL's
                return {"loss": "chunked"}
            if str(getattr(function, "__module__", "")).startswith("liger_kernel."):
                return {"loss": "liger"}
    return {"loss": "full"}


def _forwards(module: Any) -> Iterator[Any]:
    """A module's forward, and what accelerate's autocast has wrapped."""
    function = module.forward
    while function is not None:
        function = getattr(function, "__func__", function)
        yield function
        function = getattr(function, "__wrapped__", None)
    if (original := getattr(module, "_original_forward", None)) is not None:
        yield getattr(original, "__func__", original)


TECHNIQUE = Technique(
    name="loss",
    title="loss",
    group=Group.MODEL,
    summary="a large vocabulary's logits, in float32 and with their gradient, are often the peak; chunks avoid them",
    formula="full: about 12·batch·seq·vocab bytes; chunked: 4096·32768 numbers; float32 gradients of head and hidden",
    source="https://huggingface.co/docs/trl/sft_trainer",
    cost={
        "full": "",
        "chunked": "the head is multiplied twice: a few per cent where the model is large",
        "linear-cross-entropy": "",
        "liger": "",
    },
    slowdown=0.03,
    order=45,
    options=(
        Option(
            "loss",
            "full",
            "chunked: as TRL computes it; linear-cross-entropy: PyTorch's; liger: Liger's",
            ("full", "chunked", "linear-cross-entropy", "liger"),
        ),
    ),
    in_script={
        "chunked": "trl.SFTTrainer does it",
        "linear-cross-entropy": "torch.nn.functional.linear_cross_entropy(hidden, head.weight, labels)",
        "liger": "TrainingArguments(use_liger_kernel=True)",
    },
    in_plain_script={
        "chunked": "torch.utils.checkpoint.checkpoint(...) around head and loss, a chunk of rows at a time",
        "linear-cross-entropy": "torch.nn.functional.linear_cross_entropy(hidden, head.weight, labels)",
        "liger": "liger_kernel.transformers.LigerFusedLinearCrossEntropyLoss()(head.weight, hidden, labels)",
    },
    acts_on=(Category.LOGITS_LOSS,),
    variants=({"loss": "chunked"}, {"loss": "linear-cross-entropy"}, {"loss": "liger"}),
    packages=("liger-kernel", "trl"),
    apply=apply,
    saves=("chunked",),
    unsuitable=unsuitable,
    unavailable=unavailable,
    mathematics=mathematics,
    recognise=recognise,
)
