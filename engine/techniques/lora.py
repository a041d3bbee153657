"""Low-rank adapters beside frozen weights (PEFT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..config import Option, RunConfig, Value
from ..events import Category, Environment
from ..technique import Mathematics, Technique

if TYPE_CHECKING:
    from ..workload import Model, Recipe


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Freeze the model and wrap its target modules."""
    if not config.flag("lora"):
        return
    from peft import LoraConfig, get_peft_model

    recipe.trains_all = False
    wanted = config.text("lora.targets")
    targets: str | list[str] | None = wanted if wanted == "all-linear" else _named(wanted)
    if wanted == "profile":
        targets = list(recipe.lora_targets) or None  # None: PEFT's own table by architecture
    settings = LoraConfig(
        r=config.integer("lora.r"),
        lora_alpha=config.integer("lora.alpha"),
        lora_dropout=config.number("lora.dropout"),
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )

    def wrap(model: Any) -> Any:
        # GPT-2's projections are Conv1D, stored transposed; PEFT wants to be told.
        settings.fan_in_fan_out = any(type(m).__name__ == "Conv1D" for m in model.modules())
        return get_peft_model(model, settings)

    recipe.transforms.append(wrap)


def _named(wanted: str) -> list[str]:
    return [name.strip() for name in wanted.split(",") if name.strip()]


def unsuitable(config: RunConfig, model: Model) -> str | None:
    """Module names that are typed have to be names of the model's; also while LoRA is off, so that it can be set on."""
    wanted = config.text("lora.targets")
    if wanted in ("profile", "all-linear"):
        return None
    leaves = sorted({name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name})
    missing = [name for name in _named(wanted) if name.rsplit(".", 1)[-1] not in leaves]
    if missing or not _named(wanted):
        return f"lora.targets: no module is called {(missing or [wanted])[0]!r}; there are {', '.join(leaves)}"
    return None


def unavailable(value: Value, environment: Environment) -> str | None:
    """It needs PEFT."""
    return None if not value or "peft" in environment.packages else "the package peft is not installed"


def mathematics(config: RunConfig) -> Mathematics:
    """Other parameters are trained, as its details say."""
    if not config.flag("lora"):
        return Mathematics()
    return Mathematics(" ".join(f"{o.name}={config[o.name]}" for o in TECHNIQUE.options))


def recognise(model: Any, _optimizer: Any) -> Mapping[str, Value]:
    """The settings of PEFT's active adapter, if it is one of LoRA's."""
    adapters = getattr(model, "peft_config", None)
    if not isinstance(adapters, Mapping) or not adapters:
        return {"lora": False}
    active = next(iter(adapters.values()))
    found: dict[str, Value] = {"lora": True}
    for option, name in (("lora.r", "r"), ("lora.alpha", "lora_alpha"), ("lora.dropout", "lora_dropout")):
        if isinstance(value := getattr(active, name, None), int | float):
            found[option] = value
    targets = getattr(active, "target_modules", None)
    if targets:
        found["lora.targets"] = targets if isinstance(targets, str) else ",".join(sorted(targets))
    return found


TECHNIQUE = Technique(
    name="lora",
    title="LoRA",
    summary="trains two small matrices beside each chosen weight: gradients and optimizer state all but vanish",
    formula="r·(d_in + d_out) trainable parameters a target; activations stay, and so do the frozen weights",
    source="https://arxiv.org/abs/2106.09685",
    cost="a little: two small products more per adapted module, and a far shorter optimizer step",
    order=50,
    options=(
        Option("lora", False, "train adapters, freeze the rest", (False, True)),
        Option("lora.r", 8, "rank", (4, 8, 16, 32, 64, 128), True, 1, 65536),
        Option("lora.alpha", 32, "scale: alpha / r", (8, 16, 32, 64), True, 1, 1 << 20, affects_memory=False),
        Option("lora.dropout", 0.05, "dropout before the adapter", (0.0, 0.05, 0.1), True, 0.0, 0.99),
        Option(
            "lora.targets",
            "profile",
            "profile's default, all-linear, or module names separated by commas",
            ("profile", "all-linear"),
            True,
        ),
    ),
    in_script="peft.get_peft_model(model, LoraConfig(...))",
    acts_on=(Category.GRADIENTS, Category.OPTIMIZER_STATE),
    variants=({"lora": True, "lora.r": 4, "lora.targets": "all-linear"},),
    packages=("peft",),
    key="l",
    apply=apply,
    mathematics=mathematics,
    recognise=recognise,
    unsuitable=unsuitable,
    unavailable=unavailable,
)
