"""The choice of parameters that are trained; the others have neither gradients nor optimizer state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..categories import Category
from ..config import Option, RunConfig, Value
from ..model_layers import decoder_layers
from ..technique import Group, Mathematics, Technique

if TYPE_CHECKING:
    from ..recipe import Recipe


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Freeze the rest once the model is loaded."""
    kind, embeddings = config.text("trainable"), config.text("trainable.embeddings")
    if kind == "all" and embeddings != "off":
        return
    recipe.trains_all = False
    count = config.integer("trainable.layers")
    if kind == "last-layers":
        recipe.last_layers = count

    def freeze(model: Any) -> Any:
        last = {id(p) for layer in decoder_layers(model)[-count:] for p in layer.parameters()}
        earlier = {id(p) for layer in decoder_layers(model)[:-count] for p in layer.parameters()}
        of_embeddings = set(map(id, _embeddings(model)))
        for parameter in model.parameters():
            wanted = {
                "all": True,
                "last-layers": id(parameter) in last or id(parameter) not in earlier,
                "norms-biases": parameter.dim() < 2,
            }[kind]
            if id(parameter) in of_embeddings:
                wanted = embeddings == "on"
            parameter.requires_grad_(wanted)
        return model

    recipe.transforms.append(freeze)


def _embeddings(model: Any) -> Iterator[Any]:
    """Parameters of the embeddings of tokens and positions, and of the head."""
    from torch.nn import Embedding

    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for module in model.modules():
        if module is head or isinstance(module, Embedding):
            yield from module.parameters(recurse=False)


def conflict(config: RunConfig) -> str | None:
    """Adapters train beside a model that is frozen altogether."""
    if not config.flag("lora") or (config.text("trainable") == "all" and config.text("trainable.embeddings") != "off"):
        return None
    return "lora=on trains adapters and nothing else: set trainable=all and trainable.embeddings=auto, or lora=off"


def mathematics(config: RunConfig) -> Mathematics:
    """Other parameters are trained."""
    if config.text("trainable") == "all" and config.text("trainable.embeddings") != "off":
        return Mathematics()
    return Mathematics(" ".join(str(config[option.name]) for option in TECHNIQUE.options))


def recognise(model: Any, _optimizer: Any) -> Mapping[str, Value]:
    """The choice that `requires_grad` shows, if it is one of these; adapters are LoRA's."""
    if getattr(model, "peft_config", None):
        return {}
    of_embeddings = {id(p): p.requires_grad for p in _embeddings(model)}
    trained = any(of_embeddings.values())
    others = {id(p): p for p in model.parameters() if id(p) not in of_embeddings}
    if all(p.requires_grad for p in others.values()):
        return {"trainable": "all", "trainable.embeddings": "auto" if trained or not of_embeddings else "off"}
    found: dict[str, Value] = {"trainable.embeddings": "on" if trained else "auto"}
    if all(p.requires_grad == (p.dim() < 2) for p in others.values()):
        return found | {"trainable": "norms-biases"}
    layers = [all(p.requires_grad for p in layer.parameters()) for layer in decoder_layers(model)]
    count = sum(layers)
    if 0 < count < len(layers) and all(layers[-count:]):
        return found | {"trainable": "last-layers", "trainable.layers": count}
    return {}


TECHNIQUE = Technique(
    name="trainable",
    title="trained part",
    group=Group.MODEL,
    summary="frozen parameters have no gradient and no optimizer state; layers below the first trained keep nothing",
    formula="gradients, state and activations from the first trained layer on; with checkpointing all are passed",
    source="https://arxiv.org/abs/2106.10199",
    cost={
        "all": "",
        "last-layers": "it learns less; backward, which ends at the first trained layer, is faster",
        "norms-biases": "it learns less; backward, in which no weight has a gradient, is faster",
    },
    order=35,
    options=(
        Option(
            "trainable",
            "all",
            "last-layers: the last few and the final norm; norms-biases: whatever is no matrix",
            ("all", "last-layers", "norms-biases"),
        ),
        Option("trainable.layers", 2, "how many last layers", (1, 2, 4, 8, 16), True, 1, 10_000),
        Option(
            "trainable.embeddings",
            "auto",
            "embeddings and head too; auto: only where all is",
            ("auto", "on", "off"),
        ),
    ),
    in_script=dict.fromkeys(("last-layers", "norms-biases"), "parameter.requires_grad_(False) for the others"),
    acts_on=(Category.GRADIENTS, Category.OPTIMIZER_STATE, Category.ACTIVATIONS),
    variants=(
        {"trainable": "last-layers", "trainable.layers": 2},
        {"trainable": "norms-biases"},
        {"trainable": "norms-biases", "trainable.embeddings": "on"},
        {"trainable": "all", "trainable.embeddings": "off"},
    ),
    apply=apply,
    conflict=conflict,
    mathematics=mathematics,
    recognise=recognise,
)
