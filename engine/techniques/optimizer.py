"""The optimizer, and where and in how many bits it keeps its state."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ..categories import Category
from ..config import Option, RunConfig, Value
from ..events import Environment
from ..missing_package import not_installed
from ..technique import Group, Mathematics, Technique

if TYPE_CHECKING:
    from ..recipe import Recipe

PAGED = ("paged-adamw", "paged-adamw-8bit")
ADAMW = ("adamw", "adamw-fused", "adamw-single")
BITSANDBYTES = ("adamw-8bit", *PAGED)
LOW_BIT = ("ao-adamw-8bit", "ao-adamw-4bit", "ao-adamw-fp8")
TORCHAO = (*LOW_BIT, "cpu-offload")
SGD = ("sgd", "sgd-momentum")
CLASSES = {
    "AdamW": "adamw",
    "SGD": "sgd",
    "Muon": "muon",
    "MuonWithAdamW": "muon",
    "AdamW8bit": "adamw-8bit",
    "AdamW4bit": "ao-adamw-4bit",
    "AdamWFp8": "ao-adamw-fp8",
    "CPUOffloadOptimizer": "cpu-offload",
    "PagedAdamW": "paged-adamw",
    "PagedAdamW32bit": "paged-adamw",
    "PagedAdamW8bit": "paged-adamw-8bit",
    "Adafactor": "adafactor",
}
"""The option's value, by the name of an optimizer's class."""


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Choose how the optimizer is made."""
    kind = config.text("optimizer")
    size = recipe.dtype.itemsize
    sizes = {"adamw-8bit": 2, "ao-adamw-8bit": 2, "ao-adamw-fp8": 2, "ao-adamw-4bit": 1, "muon": size}
    recipe.state_bytes = sizes.get(kind, {"sgd-momentum": size}.get(kind, 2 * size if kind in ADAMW else 0))
    if kind in BITSANDBYTES:
        recipe.libraries.add("bitsandbytes")
        recipe.make_optimizer = _of_bitsandbytes(kind)
    elif kind in TORCHAO:
        from .. import torchao_optimizers as ao

        recipe.compiles = kind in LOW_BIT
        recipe.make_optimizer = ao.offloaded_adamw if kind == "cpu-offload" else partial(ao.low_bit_adamw, kind)
    elif kind == "muon":
        recipe.make_optimizer = _muon(recipe)
    else:
        recipe.make_optimizer = partial(_of_torch, kind)


def _of_bitsandbytes(kind: str) -> Any:
    import bitsandbytes.optim as bnb

    return {
        "adamw-8bit": bnb.AdamW8bit,
        "paged-adamw": bnb.PagedAdamW32bit,
        "paged-adamw-8bit": bnb.PagedAdamW8bit,
    }[kind]


def _muon(recipe: Recipe) -> Any:
    """Embeddings and head are known once the model is there."""
    from ..muon import MuonWithAdamW

    apart: set[int] = set()

    def look(model: Any) -> Any:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        apart.update(id(p) for end in ends if end is not None for p in end.parameters())
        return model

    recipe.transforms.append(look)
    return lambda parameters, lr: MuonWithAdamW(parameters, lr, apart)


def _of_torch(kind: str, parameters: list[Any], lr: float) -> Any:
    import torch

    if kind == "adafactor":
        return torch.optim.Adafactor(parameters, lr=lr)
    if kind in SGD:
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9 if kind == "sgd-momentum" else 0.0)
    # foreach is CUDA's default; asked for by name so that a CPU run shows the same.
    if kind == "adamw-fused":
        return torch.optim.AdamW(parameters, lr=lr, fused=True)
    return torch.optim.AdamW(parameters, lr=lr, foreach=kind == "adamw")


def conflict(config: RunConfig) -> str | None:
    """Gradients that leave for the host as soon as they are there."""
    if config.text("optimizer") != "cpu-offload":
        return None
    if config.flag("loss_scaling"):
        return "optimizer=cpu-offload copies gradients before they are unscaled: set loss_scaling=off"
    if config.text("parallel") != "none":
        return "optimizer=cpu-offload copies gradients before ranks have reduced them: set parallel=none"
    if config.flag("optimizer_in_backward"):
        return "optimizer=cpu-offload steps on the host after backward: set optimizer_in_backward=off"
    return None


def unavailable(value: Value, environment: Environment) -> str | None:
    """Libraries' optimizers need them; paging and offloading need a GPU to move from."""
    if value in TORCHAO and "torchao" not in environment.packages:
        return not_installed("torchao", "torchao")
    if value in BITSANDBYTES and "bitsandbytes" not in environment.packages:
        return not_installed("bitsandbytes")
    if value in (*PAGED, "cpu-offload") and not environment.on_gpu:
        return "it moves state between a GPU and the host, and there is no GPU"
    return None


def mathematics(config: RunConfig) -> Mathematics:
    """AdamW's variants are one rule; in few bits it reads its states rounded."""
    kind = config.text("optimizer")
    rule = "AdamW" if kind in ADAMW or kind in BITSANDBYTES or kind in TORCHAO else kind
    rounded = {"ao-adamw-4bit": "4-bit states", "ao-adamw-fp8": "8-bit float states"}
    return Mathematics(rule, rounded.get(kind, "8-bit states" if kind.endswith("8bit") else ""))


def recognise(_model: Any, optimizer: Any) -> Mapping[str, Value]:
    """Its class, by its own name where no value is that; and how torch's own loops over parameters."""
    optimizer = next(iter(getattr(optimizer, "optimizers", {}).values()), optimizer)  # stepped in backward
    kind = CLASSES.get(type(optimizer).__name__)
    if kind is None:
        return {"optimizer": type(optimizer).__name__} if optimizer is not None else {}
    if type(optimizer).__name__ == "AdamW" and type(optimizer).__module__.startswith("bitsandbytes."):
        # transformers' `adamw_bnb_8bit` and `paged_adamw_8bit` are this one, with arguments.
        bits = getattr(optimizer.args, "optim_bits", 32)
        kind = "paged-" * bool(getattr(optimizer, "is_paged", False)) + ("adamw-8bit" if bits == 8 else "adamw")
        return {"optimizer": "adamw-single" if kind == "adamw" else kind}
    if kind == "adamw-8bit" and any(base.__module__.startswith("torchao.") for base in type(optimizer).__mro__):
        kind = "ao-adamw-8bit"
    group = optimizer.param_groups[0]
    if kind == "adamw":
        kind += "-fused" if group.get("fused") else "-single" if group.get("foreach") is False else ""
    if kind == "sgd" and group.get("momentum"):
        kind += "-momentum"
    return {"optimizer": kind}


TECHNIQUE = Technique(
    name="optimizer",
    title="optimizer",
    group=Group.OPTIMIZER,
    summary="AdamW keeps two moments per trainable parameter; foreach AdamW makes one more copy while it steps",
    formula="a parameter: AdamW 2 numbers, 8-bit 2 bytes, 4-bit 1, Muon 1 number, Adafactor a row and a column",
    source="https://arxiv.org/abs/2110.02861",
    cost={
        "adamw": "",
        "adamw-fused": "",
        "adamw-single": "a slower step: several small kernels for every parameter",
        "adamw-8bit": "its states are converted in every step",
        "paged-adamw": "its states travel over PCIe when memory runs out",
        "paged-adamw-8bit": "its states are converted in every step, and travel over PCIe when memory runs out",
        "ao-adamw-8bit": "its states are converted in every step; the first step compiles that",
        "ao-adamw-4bit": "its states are converted in every step; the first step compiles that",
        "ao-adamw-fp8": "its states are converted in every step; the first step compiles that",
        "cpu-offload": "gradients and weights over PCIe, and the host's processor steps: seconds for a large model",
        "muon": "ten products a matrix in every step, and it is another optimizer: losses will differ",
        "adafactor": "a slower step, and another optimizer: losses will differ",
        "sgd": "it is another optimizer: losses will differ",
        "sgd-momentum": "it is another optimizer: losses will differ",
    },
    order=70,
    options=(
        Option(
            "optimizer",
            "adamw",
            "adamw is foreach, CUDA's default; paged: state in managed memory; ao and cpu-offload: torchao's",
            (
                "adamw",
                "adamw-fused",
                "adamw-single",
                "adamw-8bit",
                "paged-adamw",
                "paged-adamw-8bit",
                *TORCHAO,
                "muon",
                "adafactor",
                *SGD,
            ),
        ),
    ),
    in_script={
        "adamw": "torch.optim.AdamW(...)",
        "adamw-fused": "torch.optim.AdamW(..., fused=True)",
        "adamw-single": "torch.optim.AdamW(..., foreach=False)",
        "adamw-8bit": "bitsandbytes.optim.AdamW8bit(...)",
        "paged-adamw": "bitsandbytes.optim.PagedAdamW32bit(...)",
        "paged-adamw-8bit": "bitsandbytes.optim.PagedAdamW8bit(...)",
        "ao-adamw-8bit": "torchao.optim.AdamW8bit(...)",
        "ao-adamw-4bit": "torchao.optim.AdamW4bit(...)",
        "ao-adamw-fp8": "torchao.optim.AdamWFp8(...)",
        "cpu-offload": "torchao.optim.CPUOffloadOptimizer(..., torch.optim.AdamW)",
        "muon": "torch.optim.Muon(...) of the matrices, AdamW of the rest",
        "adafactor": "torch.optim.Adafactor(...)",
        "sgd": "torch.optim.SGD(...)",
        "sgd-momentum": "torch.optim.SGD(..., momentum=0.9)",
    },
    acts_on=(Category.OPTIMIZER_STATE,),
    variants=tuple({"optimizer": k} for k in (*ADAMW[1:], *BITSANDBYTES, *TORCHAO, "muon", "adafactor", *SGD)),
    packages=("bitsandbytes", "torchao"),
    key="o",
    apply=apply,
    saves=("adamw-fused", "adamw-8bit", "ao-adamw-4bit", "cpu-offload", "sgd"),
    conflict=conflict,
    mathematics=mathematics,
    recognise=recognise,
    unavailable=unavailable,
)
