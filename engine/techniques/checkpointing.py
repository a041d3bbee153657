"""Gradient checkpointing: drop activations in forward, compute them again in backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import recompute
from ..categories import Category
from ..config import Option, RunConfig, UserError, Value
from ..module_names import layer_of
from ..technique import Group, Technique

if TYPE_CHECKING:
    from ..recipe import Recipe


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Replace the function through which the model's layers checkpoint themselves."""
    mode = config.text("checkpointing")
    if mode == "off":
        return
    every = {"layers": 1, "selective": 1, "segments": config.integer("checkpointing.every")}.get(mode)
    recipe.layer_period = every or 1
    arguments: dict[str, Any] = {"use_reentrant": config.flag("checkpointing.reentrant")}
    if mode == "selective":
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        arguments["context_fn"] = partial(create_selective_checkpoint_contexts, _attention_operators())
    recipe.transforms.append(lambda model: _enable(model, every, arguments, recipe.checkpoint_context(model)))


def _attention_operators() -> list[Any]:
    """The operators whose results are kept: with long rows, attention is the dearest part to compute again."""
    from torch import ops

    names = (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_flash_attention_forward",
    )
    return [getattr(ops.aten, name).default for name in names if hasattr(ops.aten, name)]


def conflict(config: RunConfig) -> str | None:
    """The reentrant implementation knows nothing of single operators."""
    if config.text("checkpointing") == "selective" and config.flag("checkpointing.reentrant"):
        return "checkpointing=selective needs checkpointing.reentrant=off"
    return None


def _enable(model: Any, every: int | None, arguments: dict[str, Any], around: AbstractContextManager[None]) -> Any:
    """Turn checkpointing on as transformers does, in segments of `every` layers.

    transformers sends each layer's forward through a function of the layer's.
    Ours lets the first layers of a segment pass their input on unchanged and
    runs them all, as one checkpoint, when the segment's last layer is called.

    Args:
        model: A transformers model, wrapped by PEFT or not.
        every: Layers a segment; None: all of them, so only the input is kept.
        arguments: Of `torch.utils.checkpoint.checkpoint`.
        around: Entered around each call of that.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise UserError(f"checkpointing: {type(model).__name__} does not support gradient checkpointing")
    # The new name came in with transformers 5.18; the old one warns from then on.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=arguments)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    named = [(name, module) for name, module in model.named_modules() if _checkpoints_itself(module)]
    stacks = {name.rpartition(".")[0] for name, _ in named}
    if every != 1 and len(stacks) > 1:
        raise UserError(f"checkpointing: {type(model).__name__} has {len(stacks)} stacks of layers: set layers")
    size = every or len(named)
    for start in range(0, len(named), size):
        names, layers = zip(*named[start : start + size], strict=True)
        segment = _Segment(names, layers, layers[0]._gradient_checkpointing_func, around)
        for layer in layers:
            layer._gradient_checkpointing_func = partial(segment.call, layer)
    return model


def _checkpoints_itself(module: Any) -> bool:
    from transformers.modeling_layers import GradientCheckpointingLayer

    return isinstance(module, GradientCheckpointingLayer)


class _Segment:
    """Consecutive layers that are dropped and computed again together.

    Args:
        names: The layers' names in the model, first to last.
        layers: The layers.
        checkpoint: `torch.utils.checkpoint.checkpoint` as transformers set it up.
        around: Entered around each call of that.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        layers: tuple[Any, ...],
        checkpoint: Callable[..., Any],
        around: AbstractContextManager[None],
    ) -> None:
        self.names = tuple(map(layer_of, names))
        self.first, self.last = layers[0], layers[-1]
        self.checkpoint, self.around = checkpoint, around
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def call(self, layer: Any, forward: Callable[..., Any], hidden_states: Any, *rest: Any) -> Any:
        """Stand in for `layer._gradient_checkpointing_func(forward, hidden_states, ...)`."""
        if layer is self.first:
            self.calls = []  # an interrupted forward may have left some
        self.calls.append((forward, rest))
        if layer is not self.last:
            return hidden_states
        calls, self.calls = self.calls, []

        def run(hidden: Any) -> Any:
            for position, (layer_forward, others) in enumerate(calls, 1):
                output = layer_forward(hidden, *others)
                # Some layers return a tuple, of which the next one wants the first.
                hidden = output[0] if isinstance(output, tuple) and position < len(calls) else output
            return hidden

        with self.around:
            return self.checkpoint(recompute.observed(run, self.names), hidden_states)


def saves(config: RunConfig) -> tuple[Value, ...]:
    """selective keeps what layers does, and attention's outputs too."""
    if config["checkpointing"] == "layers":
        return ("segments", "input")
    return ("layers", "selective", "segments", "input")


def recognise(model: Any, _optimizer: Any) -> Mapping[str, Value]:
    """Layers that checkpoint themselves through transformers' function, and which implementation that calls."""
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    if not layers:
        return {"checkpointing": "off"}
    kinds = {type(layer) for layer in layers}
    if any(type(module) in kinds and not module.gradient_checkpointing for module in model.modules()):
        return {}  # every other layer, say: no option is that, and none at all is the safer guess
    functions = map(recompute.checkpoint_function, layers)
    keywords = next((f.keywords for f in functions if isinstance(f, partial)), {})
    mode = "selective" if "context_fn" in keywords else "layers"
    return {"checkpointing": mode, "checkpointing.reentrant": bool(keywords.get("use_reentrant", False))}


TECHNIQUE = Technique(
    name="checkpointing",
    title="checkpointing",
    group=Group.MEMORY_FOR_TIME,
    summary="keeps only the input of a segment of layers and computes the rest again in backward",
    formula="2·seq·batch·hidden bytes a segment instead of about 34 a layer; selective: as much again for attention",
    source="https://arxiv.org/abs/1604.06174",
    cost="what is dropped is computed twice: at most one more forward pass, about a third more computation",
    slowdown=0.33,
    order=60,
    options=(
        Option(
            "checkpointing",
            "off",
            "layers: each; selective: but for attention; segments: every so many; input: all but the first input",
            ("off", "layers", "selective", "segments", "input"),
        ),
        Option("checkpointing.every", 2, "layers in a segment", (2, 3, 4, 6, 8), True, 1, 10_000),
        Option("checkpointing.reentrant", False, "the older implementation of torch.utils.checkpoint", (False, True)),
    ),
    in_script={
        "layers": "model.gradient_checkpointing_enable()",
        "selective": "model.gradient_checkpointing_enable({'use_reentrant': False, 'context_fn': ...})",
        "segments": "torch.utils.checkpoint.checkpoint(...) around so many layers, in a forward of your own",
        "input": "torch.utils.checkpoint.checkpoint(...) around all layers, in a forward of your own",
    },
    in_plain_script={
        "layers": "torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False) for each layer",
        "selective": "torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False, context_fn=...)",
        "segments": "torch.utils.checkpoint.checkpoint_sequential(layers, segments, x, use_reentrant=False)",
        "input": "torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)",
    },
    acts_on=(Category.ACTIVATIONS,),
    variants=(
        {"checkpointing": "selective"},
        {"checkpointing": "layers"},
        {"checkpointing": "segments", "checkpointing.every": 3},
        {"checkpointing": "input"},
        {"checkpointing": "layers", "checkpointing.reentrant": True},
    ),
    key="k",
    apply=apply,
    saves=saves,
    conflict=conflict,
    recognise=recognise,
)
