"""Low-rank adapters beside frozen weights (PEFT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..categories import Category
from ..config import Option, RunConfig, UserError, Value, one_line
from ..events import Environment
from ..missing_package import not_installed
from ..technique import Group, Mathematics, Technique

if TYPE_CHECKING:
    from ..recipe import Model, Recipe


KINDS = ("lora", "rslora", "dora", "pissa", "vera", "ia3", "prompt")
PISSA = "pissa_niter_16"
"""The initial values from a few rounds of a randomized SVD instead of a whole one, as PEFT advises."""


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Freeze the model and wrap its target modules."""
    if not config.flag("lora"):
        return
    import peft

    recipe.trains_all = False
    wanted = config.text("lora.targets")
    targets: str | list[str] | None = wanted if wanted == "all-linear" else _named(wanted)
    if wanted == "profile":
        # None: PEFT's own table by architecture, which for IA3 has other modules than any profile.
        targets = (list(recipe.lora_targets) or None) if config["lora.kind"] != "ia3" else None
    recipe.transforms.append(lambda model: _wrapped(peft, model, config, targets, recipe.adapters or None))


def _wrapped(peft: Any, model: Model, config: RunConfig, targets: str | list[str] | None, task: str | None) -> Model:
    if isinstance(targets, list):
        parameters = [name for name in targets if name.rsplit(".", 1)[-1] in _expert_parameters(model)]
        targets = [name for name in targets if name not in parameters]
    else:
        parameters = []
    settings = _settings(peft, config, targets, parameters, task)
    if hasattr(settings, "fan_in_fan_out"):
        # GPT-2's projections are Conv1D, stored transposed; PEFT wants to be told.
        settings.fan_in_fan_out = any(type(m).__name__ == "Conv1D" for m in model.modules())
    try:
        return peft.get_peft_model(model, settings)
    except (ValueError, AttributeError) as error:
        # Of some architectures all-linear means the experts' parameters too: PEFT alone knows of which.
        for name in sorted(_expert_parameters(model)) if targets == "all-linear" else ():
            if problem := _of_experts(config, name):
                raise UserError(problem) from error
        if isinstance(error, AttributeError):
            raise
        raise UserError(f"lora.kind={config['lora.kind']}: {one_line(error)}") from error


def _settings(
    peft: Any, config: RunConfig, targets: str | list[str] | None, parameters: list[str], task: str | None
) -> Any:
    """PEFT's, of the kind that is wanted."""
    kind, dropout = config.text("lora.kind"), config.number("lora.dropout")
    common: dict[str, Any] = {"task_type": task}
    if kind == "prompt":
        return peft.PromptTuningConfig(num_virtual_tokens=config.integer("lora.tokens"), **common)
    common["target_modules"] = targets
    if kind == "ia3":
        return peft.IA3Config(feedforward_modules=None if targets is None else [], **common)
    if kind == "vera":
        return peft.VeraConfig(r=config.integer("lora.r"), vera_dropout=dropout, **common)
    return peft.LoraConfig(
        r=config.integer("lora.r"),
        lora_alpha=config.integer("lora.alpha"),
        lora_dropout=dropout,
        use_rslora=kind == "rslora",
        use_dora=kind == "dora",
        init_lora_weights=PISSA if kind == "pissa" else True,
        target_parameters=parameters or None,
        bias="none",
        **common,
    )


def _expert_parameters(model: Model) -> set[str]:
    """Parameters that hold all experts of a mixture in one: no modules, so they are adapted as parameters."""
    paths = (name.rpartition(".") for name, parameter in model.named_parameters() if parameter.dim() == 3)
    return {leaf for module, _, leaf in paths if module.rpartition(".")[2] == "experts"}


def _named(wanted: str) -> list[str]:
    return [name.strip() for name in wanted.split(",") if name.strip()]


def unsuitable(config: RunConfig, model: Model) -> str | None:
    """Names that are typed have to be the model's, also while LoRA is off; experts' parameters take LoRA alone."""
    wanted = config.text("lora.targets")
    if wanted in ("profile", "all-linear"):
        return None
    experts = _expert_parameters(model)
    leaves = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules() if name} | experts
    named = [(name, name.rsplit(".", 1)[-1]) for name in _named(wanted)]
    missing = [name for name, leaf in named if leaf not in leaves]
    if missing or not named:
        return f"lora.targets: no module is called {(missing or [wanted])[0]!r}; there are {', '.join(sorted(leaves))}"
    whole = [name for name, leaf in named if leaf in experts]
    return _of_experts(config, whole[0]) if whole else None


def _of_experts(config: RunConfig, name: str) -> str | None:
    """PEFT's `ParamWrapper` adapts a parameter by a product that is added to it whole."""
    fits = not config["lora.dropout"] and config["lora.kind"] in ("lora", "rslora")
    if not config.flag("lora") or config["lora.kind"] == "prompt" or fits:  # a prompt has no targets
        return None
    return f"lora.targets: {name} is all experts in one parameter: set lora.dropout=0 and lora.kind=lora"


def conflict(config: RunConfig) -> str | None:
    """Two kinds read the weights before they are used, in which quantized ones do not take part."""
    kind, quantization = config.text("lora.kind"), config.text("quantization")
    if not config.flag("lora"):
        return None
    if kind == "pissa" and quantization != "none":
        return "lora.kind=pissa starts from the weights' largest parts, which quantized weights do not show"
    if kind == "dora" and quantization == "int8":
        return "lora.kind=dora reads int8 weights before bitsandbytes has their scales: set quantization=nf4"
    return None


def unavailable(value: Value, environment: Environment) -> str | None:
    """It needs PEFT."""
    return None if not value or "peft" in environment.packages else not_installed("peft")


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
    found: dict[str, Value] = {"lora": True, "lora.kind": _kind(active)}
    for option, fields in _FIELDS.items():
        values = [value for name in fields if isinstance(value := getattr(active, name, None), int | float)]
        if values:
            found[option] = values[0]
    targets = [getattr(active, name, None) for name in ("target_modules", "target_parameters")]
    if isinstance(targets[0], str):
        return found | {"lora.targets": targets[0]}
    if names := sorted(name for some in targets for name in some or ()):
        found["lora.targets"] = ",".join(names)
    return found


_FIELDS = {
    "lora.r": ("r",),
    "lora.alpha": ("lora_alpha",),
    "lora.dropout": ("lora_dropout", "vera_dropout"),
    "lora.tokens": ("num_virtual_tokens",),
}
"""The fields of PEFT's settings, by the option they are."""


def _kind(settings: Any) -> str:
    """The kind of adapter that PEFT's settings describe; empty: none of ours."""
    if getattr(settings, "use_dora", False):
        return "dora"
    if str(getattr(settings, "init_lora_weights", "")).startswith("pissa"):
        return "pissa"
    if getattr(settings, "use_rslora", False):
        return "rslora"
    return {"IA3": "ia3", "VERA": "vera", "PROMPT_TUNING": "prompt", "LORA": "lora"}.get(settings.peft_type, "")


TECHNIQUE = Technique(
    name="lora",
    title="LoRA",
    group=Group.MODEL,
    summary="trains two small matrices beside each chosen weight: gradients and optimizer state all but vanish",
    formula="r·(d_in + d_out) trainable parameters a target; dora: and a copy of each weight while it is used",
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
        Option(
            "lora.kind",
            "lora",
            "rslora scales by sqrt(r), dora has magnitudes, pissa starts from the weights, vera and ia3 are vectors",
            KINDS,
        ),
        Option("lora.tokens", 20, "virtual tokens before each row, for lora.kind=prompt", (8, 20, 64), True, 1, 65536),
    ),
    in_script={True: "peft.get_peft_model(model, LoraConfig(...))"},
    in_plain_script={True: "peft.get_peft_model(model, LoraConfig(target_modules=[...])), of linear layers above all"},
    acts_on=(Category.GRADIENTS, Category.OPTIMIZER_STATE),
    variants=(
        {"lora": True, "lora.r": 4, "lora.targets": "all-linear"},
        {"lora": True, "lora.kind": "rslora"},
        {"lora": True, "lora.kind": "dora"},
        {"lora": True, "lora.kind": "pissa"},
        {"lora": True, "lora.kind": "vera"},
        {"lora": True, "lora.kind": "ia3"},
        {"lora": True, "lora.kind": "prompt"},
    ),
    packages=("peft",),
    key="l",
    apply=apply,
    mathematics=mathematics,
    recognise=recognise,
    conflict=conflict,
    unsuitable=unsuitable,
    unavailable=unavailable,
)
