"""The place where what is saved for backward waits: the device, or the host's memory."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from ..categories import Category
from ..config import Option, RunConfig, Value
from ..events import Environment
from ..recompute import checkpoint_function
from ..technique import Group, Technique

if TYPE_CHECKING:
    from ..recipe import Recipe

LIBRARIES = ("OffloadActivations.", "save_on_cpu.")
"""Classes whose hooks move to the host what autograd saves: TRL's and PyTorch's."""


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Enter the hooks around the model without its head, or around each checkpointed segment."""
    if (where := config.text("offload")) == "off":
        return
    from ..activation_offload import ActivationsOnHost

    hooks_of = partial(ActivationsOnHost, second_stream=config.flag("offload.stream"))
    if where == "checkpoints":
        recipe.checkpoint_context = hooks_of
    else:
        recipe.transforms.append(partial(_around_body, hooks_of))


def _around_body(hooks_of: Any, model: Any) -> Any:
    """Logits and loss stay, as with TRL: backward wants them at once."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    hooks = hooks_of(whole)
    body = whole.base_model
    body.register_forward_pre_hook(partial(_enter, hooks))
    body.register_forward_hook(partial(_leave, hooks), always_call=True)
    return model


def _enter(hooks: Any, *_: Any) -> None:
    hooks.__enter__()


def _leave(hooks: Any, *_: Any) -> None:
    hooks.__exit__()


def conflict(config: RunConfig) -> str | None:
    """Without checkpoints there are none to move."""
    if config.text("offload") == "checkpoints" and config.text("checkpointing") == "off":
        return "offload=checkpoints needs checkpointing: set checkpointing=layers, or offload=activations"
    return None


def unavailable(value: Value, environment: Environment) -> str | None:
    """There has to be a device that is not the host."""
    return "there is no GPU to move them from" if value != "off" and not environment.on_gpu else None


def recognise(model: Any, _optimizer: Any) -> Mapping[str, Value]:
    """PyTorch's or TRL's hooks around the forward, or transformers' around its checkpoints."""
    import torch

    for module in model.modules():
        function = checkpoint_function(module)
        if "checkpoint_func" in str(getattr(getattr(function, "func", function), "__qualname__", "")):
            return {"offload": "checkpoints", "offload.stream": False}
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    pack: Any = hooks[0] if hooks else None
    if not str(getattr(pack, "__qualname__", "")).startswith(LIBRARIES):
        return {"offload": "off"}
    its = inspect.getclosurevars(pack).nonlocals.get("self")
    return {"offload": "activations", "offload.stream": bool(getattr(its, "use_streams", False))}


TECHNIQUE = Technique(
    name="offload",
    title="offload",
    group=Group.MEMORY_FOR_TIME,
    summary="what backward needs waits in pinned host memory: all that is saved, or the inputs of checkpoints alone",
    formula="activations, or 2·seq·batch·hidden bytes a checkpointed layer; a layer's come back while it runs",
    source="https://docs.pytorch.org/docs/stable/generated/torch.autograd.graph.save_on_cpu.html",
    slowdown=0.5,
    cost={
        "off": "",
        "activations": "every activation over PCIe and back: several times slower than checkpointing",
        "checkpoints": "a layer's input over PCIe and back, little beside computing the layer again",
    },
    order=55,
    options=(
        Option(
            "offload",
            "off",
            "activations: all that the layers save; checkpoints: the inputs of checkpointed segments",
            ("off", "activations", "checkpoints"),
        ),
        Option(
            "offload.stream",
            False,
            "copy on a second stream beside computing, as TRL does; up to five tensors wait for it on the GPU",
            (False, True),
        ),
    ),
    in_script={
        "activations": "SFTConfig(activation_offloading=True)",
        "checkpoints": "activation_checkpointing_kwargs={'offload': True}",
    },
    in_plain_script={
        "activations": "torch.autograd.graph.save_on_cpu(pin_memory=True) around the forward",
        "checkpoints": "torch.autograd.graph.save_on_cpu(pin_memory=True) around the checkpoints",
    },
    acts_on=(Category.ACTIVATIONS,),
    variants=(
        {"offload": "activations"},
        {"offload": "activations", "offload.stream": True},
        {"offload": "checkpoints", "checkpointing": "layers"},
        {"offload": "checkpoints", "checkpointing": "layers", "offload.stream": True},
    ),
    apply=apply,
    conflict=conflict,
    unavailable=unavailable,
    recognise=recognise,
)
