"""The optimizer, and where and in how many bits it keeps its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..config import Option, RunConfig, Value
from ..events import Category, Environment
from ..technique import Group, Mathematics, Technique

if TYPE_CHECKING:
    from ..workload import Recipe

PAGED = ("paged-adamw", "paged-adamw-8bit")
ADAMW = ("adamw", "adamw-fused", "adamw-single")
BITSANDBYTES = ("adamw-8bit", *PAGED)
CLASSES = {
    "AdamW": "adamw",
    "SGD": "sgd",
    "AdamW8bit": "adamw-8bit",
    "PagedAdamW": "paged-adamw",
    "PagedAdamW32bit": "paged-adamw",
    "PagedAdamW8bit": "paged-adamw-8bit",
    "Adafactor": "adafactor",
}
"""The option's value, by the name of an optimizer's class."""


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Choose how the optimizer is made."""
    import torch

    kind = config.text("optimizer")
    size = recipe.dtype.itemsize
    recipe.state_bytes = {"adamw-8bit": 2, "sgd-momentum": size}.get(kind, 2 * size if kind in ADAMW else 0)
    if kind in BITSANDBYTES:
        import bitsandbytes.optim as bnb

        recipe.libraries.add("bitsandbytes")
        recipe.make_optimizer = {
            "adamw-8bit": bnb.AdamW8bit,
            "paged-adamw": bnb.PagedAdamW32bit,
            "paged-adamw-8bit": bnb.PagedAdamW8bit,
        }[kind]
        return

    def make(parameters: list[Any], lr: float) -> Any:
        if kind == "adafactor":
            return torch.optim.Adafactor(parameters, lr=lr)
        if kind.startswith("sgd"):
            return torch.optim.SGD(parameters, lr=lr, momentum=0.9 if kind == "sgd-momentum" else 0.0)
        # foreach is CUDA's default; asked for by name so that a CPU run shows the same.
        if kind == "adamw-fused":
            return torch.optim.AdamW(parameters, lr=lr, fused=True)
        return torch.optim.AdamW(parameters, lr=lr, foreach=kind == "adamw")

    recipe.make_optimizer = make


def unavailable(value: Value, environment: Environment) -> str | None:
    """bitsandbytes' optimizers need it; paging needs a GPU to page from."""
    if value in BITSANDBYTES and "bitsandbytes" not in environment.packages:
        return "the package bitsandbytes is not installed"
    if value in PAGED and not environment.on_gpu:
        return "paging moves state between a GPU and the host, and there is no GPU"
    return None


def mathematics(config: RunConfig) -> Mathematics:
    """All of AdamW are one rule; in 8 bit it reads its states rounded."""
    kind = config.text("optimizer")
    rule = "AdamW" if kind in ADAMW or kind in BITSANDBYTES else kind
    return Mathematics(rule, "8-bit states" if kind.endswith("8bit") else "")


def recognise(_model: Any, optimizer: Any) -> Mapping[str, Value]:
    """Its class, and how torch's own loops over parameters."""
    optimizer = next(iter(getattr(optimizer, "optimizers", {}).values()), optimizer)  # stepped in backward
    kind = CLASSES.get(type(optimizer).__name__)
    if kind is None:
        return {}
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
    formula="a parameter: AdamW 2 numbers, 8-bit 2 bytes and scales, Adafactor a row and a column, SGD none",
    source="https://arxiv.org/abs/2110.02861",
    cost={
        "adamw": "nothing measurable",
        "adamw-fused": "none: it is the fastest, one kernel for many parameters",
        "adamw-single": "a slower step: several small kernels for every parameter",
        "adamw-8bit": "its states are converted in every step",
        "paged-adamw": "none while memory lasts, then its states travel over PCIe",
        "paged-adamw-8bit": "its states are converted in every step, and travel over PCIe when memory runs out",
        "adafactor": "a slower step, and another optimizer: losses will differ",
        "sgd": "none, but it is another optimizer: losses will differ",
        "sgd-momentum": "none, but it is another optimizer: losses will differ",
    },
    order=70,
    options=(
        Option(
            "optimizer",
            "adamw",
            "adamw is foreach, CUDA's default; paged keeps state in CUDA managed memory",
            (
                "adamw",
                "adamw-fused",
                "adamw-single",
                "adamw-8bit",
                "paged-adamw",
                "paged-adamw-8bit",
                "adafactor",
                "sgd",
                "sgd-momentum",
            ),
        ),
    ),
    in_script="another optimizer's class",
    acts_on=(Category.OPTIMIZER_STATE,),
    variants=tuple({"optimizer": kind} for kind in (*ADAMW[1:], *BITSANDBYTES, "adafactor", "sgd", "sgd-momentum")),
    packages=("bitsandbytes",),
    key="o",
    apply=apply,
    saves=("adamw-fused", "adamw-8bit", "paged-adamw-8bit", "sgd"),
    mathematics=mathematics,
    recognise=recognise,
    unavailable=unavailable,
)
