"""The workload of a RunConfig: a model, an optimizer and batches that can be trained."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .architecture import architecture_of, blamed_on_the_model
from .batches import Batches, file_rows, random_rows, shapes_of
from .config import RunConfig, UserError
from .library_logs import quiet_libraries
from .missing_package import install
from .model_shell import numel, positions, shell_of
from .recipe import Model, Recipe
from .run_limits import MOST_PARAMETERS, refuse_too_large, refuse_too_long
from .tasks import Task
from .techniques import registry
from .weight_loading import load


@dataclass
class Workload:
    """A model ready to train.

    Attributes:
        model: Its modules by the names that they have on one GPU.
        call: What the loop calls: the model, or an engine's wrapper around it.
        scaler: Passes everything through unless the recipe scales the loss.
    """

    model: Model
    call: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    batches: Batches
    recipe: Recipe
    device: torch.device
    scaler: torch.amp.GradScaler

    def release(self) -> None:
        """Take hooks off the parameters: they hold torchao's optimizer, engines of ranks. Forget what is compiled."""
        self.recipe.parallelism.close(self.call)
        for parameter in self.model.parameters():
            hooks = getattr(parameter, "_post_accumulate_grad_hooks", None)
            if hooks:
                hooks.clear()
        if self.recipe.compiles:
            torch._dynamo.reset()  # only so many versions of a function are kept

    @property
    def parameters(self) -> int:
        """Parameters, a tied one counted once, quantized ones at their true number."""
        return sum(numel(p) for p in self.model.parameters())

    @property
    def trainable_parameters(self) -> int:
        """Number of parameters with gradients."""
        return sum(numel(p) for p in self.model.parameters() if p.requires_grad)


@dataclass
class Plan:
    """A run with everything decided and nothing loaded."""

    config: RunConfig
    task: Task
    architecture: Any
    shell: Model  # on the meta device: shapes without storage
    recipe: Recipe
    batches: Batches
    device: torch.device
    shapes_only: bool = False

    @property
    def positions(self) -> int:
        """Tokens in a row that the model was made for; 0: not said."""
        return positions(self.architecture)


def prepare(config: RunConfig, device: torch.device, shapes_only: bool = False) -> Plan:
    """Decide everything about a run; imports the libraries it needs.

    Args:
        config: The run.
        device: Where it happens.
        shapes_only: For a prediction: no weights, no data and no capacity of
            this machine matter, only shapes.

    Raises:
        UserError: No such model or data, or it cannot fit.
    """
    quiet_libraries()
    given, (architecture, task) = config.architecture, architecture_of(config)
    with blamed_on_the_model(config):
        shell = shell_of(architecture, task)
        if (parameters := sum(p.numel() for p in shell.parameters())) > MOST_PARAMETERS:
            raise UserError(f"{parameters:.1e} parameters; there may be {MOST_PARAMETERS:.0e}")
    recipe = Recipe(
        shell=shell,
        dtype=getattr(torch, given.dtype) if given else (getattr(architecture, "dtype", None) or torch.float32),
        lora_targets=given.lora_targets if given else (),
        adapters=task.adapters,
    )
    for technique in registry().values():
        technique.apply(config, recipe)
    for technique in registry().values():
        if problem := technique.unsuitable(config, shell):
            raise UserError(problem)
    if config.generates:
        _only_use(config, task, recipe)
    with blamed_on_the_model(config):
        wanted = task.rows(config, architecture)
    refuse_too_long(config, shell, architecture, wanted)
    if shapes_only:
        rows, lengths = shapes_of(config, wanted, recipe)
    else:
        _refuse_missing(task)
        refuse_too_large(config, shell, recipe, device, task, wanted)
        rows, lengths = file_rows(config, task) if config.data else random_rows(config, wanted, recipe)
    tokens = wanted[task.tokens].elements if task.tokens else None
    batches = Batches(rows, tokens, config.batch_size, device, lengths, recipe.one_row)
    return Plan(config, task, architecture, shell, recipe, batches, device, shapes_only)


def _refuse_missing(task: Task) -> None:
    """Refuse a task whose packages are not installed.

    Raises:
        UserError: One is not.
    """
    if missing := [name for name in task.packages if importlib.util.find_spec(name) is None]:
        hint = install(f"gpumem-tui[{task.extra}]")
        raise UserError(f"{task.name} needs what is not installed, {' and '.join(missing)}: {hint}")


def _only_use(config: RunConfig, task: Task, recipe: Recipe) -> None:
    """Have a recipe for training leave out what only training needs.

    Raises:
        UserError: This model, or what is set, does not generate.
    """
    if task.name != "causal-lm":
        raise UserError(f"{config.model}: workload=generate is for causal language models, and this is of {task.name}")
    for name, plain in (("loss", "full"), ("parallel", "none")):
        if config[name] != plain:
            raise UserError(f"workload=generate is without {name}={config[name]}: set {name}={plain}")
    recipe.trains_all = recipe.loss_scaling = False


def build(plan: Plan, reading: Callable[[str], None] = lambda _: None) -> Workload:
    """Load the model on the device with every technique applied.

    Args:
        plan: The run.
        reading: Told which module's weight is read next; "": all have been. What
            it raises ends the loading.

    Raises:
        UserError: The model cannot be had, or a technique does not suit it.
    """
    torch.manual_seed(plan.config.seed)
    model = load(plan, reading)
    reading("")
    for transform in plan.recipe.transforms:
        model = transform(model)
    model.train(not plan.config.generates)
    if plan.config.generates:
        model.requires_grad_(False)

    def make() -> torch.optim.Optimizer:
        trainable = [p for p in model.parameters() if p.requires_grad]
        if plan.config.generates:
            return torch.optim.SGD([torch.nn.Parameter(torch.empty(0))])
        return plan.recipe.make_optimizer(trainable, plan.config.learning_rate)

    call, optimizer = plan.recipe.parallelism.wrap(model, plan.device, make)
    scaler = torch.amp.GradScaler(plan.device.type, enabled=plan.recipe.loss_scaling)
    return Workload(model, call, optimizer, plan.batches, plan.recipe, plan.device, scaler)
