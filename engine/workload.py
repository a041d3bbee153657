"""The workload of a RunConfig: a model, an optimizer and batches that can be trained."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from logging import ERROR, getLogger
from typing import Any

import torch

from .allocator_settings import AllocatorSettings
from .batches import Batches, bytes_of, file_rows, random_rows, shapes_of
from .config import RunConfig, UserError, excerpt, kind_and_line, one_line
from .missing_package import install
from .parallelism import Parallelism
from .tasks import AUTO, TASKS, Rows, Task, task_of
from .techniques import registry

MOST_MODULES = 10_000
"""Layers or experts of a model: each is a module, made before anything else could be refused."""

MOST_PARAMETERS = 10**14
"""Parameters of a model, a hundred times the largest: bytes of more would not fit the columns of a trace."""

Model = Any
"""A transformers model, possibly wrapped by PEFT; neither ships types."""


@dataclass
class Recipe:
    """The decisions of the techniques, filled in before anything is loaded.

    Attributes:
        shell: The model on the meta device, to be read only.
        dtype: Of the weights.
        lora_targets: The architecture's default; empty: PEFT's own.
        adapters: PEFT's task type; "": none.
        load_arguments: Passed to `from_pretrained`.
        transforms: Applied to the loaded model, in order.
        make_optimizer: From trainable parameters and learning rate.
        loss_scaling: Whether the loop scales the loss.
        autocast: Arithmetic dtype of the forward pass, if not the weights'.
        accumulation: Micro-batches per optimizer step.
        keep_outputs: Whether the loop's outputs live until the next forward returns.
        trains_all: Whether every weight is trained, and not adapters beside them.
        keeps_gradients: Whether all gradients are there at once.
        state_bytes: Of optimizer state per trained parameter, at the least.
        weight_bits: Of a stored weight, at the least; 0: as many as the dtype has.
        makes_logits: Whether the logits of a whole batch are there at once.
        libraries: Packages whose own kernels run beside PyTorch's.
        last_layers: So many of the model's last layers are treated otherwise.
        layer_period: After how many layers what is done to them repeats.
        compiles: Whether PyTorch's compiler is used.
        packing: How texts of several lengths are put into rows.
        one_row: Whether all rows of a batch become one.
        allocator: Settings of the CUDA caching allocator.
        checkpoint_context: Made of the model, and entered around each segment that is checkpointed.
        parallelism: How a rank trains beside others.
    """

    shell: Model
    dtype: torch.dtype
    lora_targets: tuple[str, ...] = ()
    adapters: str = "CAUSAL_LM"
    load_arguments: dict[str, Any] = field(default_factory=dict)
    transforms: list[Callable[[Model], Model]] = field(default_factory=list)
    make_optimizer: Callable[[list[torch.nn.Parameter], float], torch.optim.Optimizer] = torch.optim.AdamW
    autocast: torch.dtype | None = None
    loss_scaling: bool = False
    accumulation: int = 1
    keep_outputs: bool = True
    trains_all: bool = True
    keeps_gradients: bool = True
    state_bytes: int = 0
    weight_bits: int = 0
    makes_logits: bool = True
    libraries: set[str] = field(default_factory=set)
    last_layers: int = 0
    layer_period: int = 1
    compiles: bool = False
    packing: str = "off"
    one_row: bool = False
    allocator: AllocatorSettings = field(default_factory=AllocatorSettings)
    checkpoint_context: Callable[[Model], AbstractContextManager[None]] = lambda _: nullcontext()
    parallelism: Parallelism = field(default_factory=Parallelism)


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
    given, (architecture, task) = config.architecture, _architecture(config)
    with _of_the_model(config):
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
    with _of_the_model(config):
        wanted = task.rows(config, architecture)
    _refuse_too_long(config, shell, architecture, wanted)
    if shapes_only:
        rows, lengths = shapes_of(config, wanted, recipe)
    else:
        if missing := [name for name in task.packages if importlib.util.find_spec(name) is None]:
            hint = install(f"gpumem-tui[{task.extra}]")
            raise UserError(f"{task.name} needs what is not installed, {' and '.join(missing)}: {hint}")
        _refuse_too_large(config, shell, recipe, device, task, wanted)
        rows, lengths = file_rows(config, task) if config.data else random_rows(config, wanted, recipe)
    tokens = wanted[task.tokens].elements if task.tokens else None
    batches = Batches(rows, tokens, config.batch_size, device, lengths, recipe.one_row)
    return Plan(config, task, architecture, shell, recipe, batches, device, shapes_only)


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
    model = _load(plan, reading)
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


def quiet_loggers() -> None:
    """Keep to themselves what libraries log; takes effect if it comes before they are imported."""
    # bitsandbytes warns at every call of an int8 layer; torchao, which transformers imports
    # where it is installed, of kernels it could not load.
    for name in ("bitsandbytes", "torchao", "torch.utils._pytree"):
        getLogger(name).setLevel(ERROR)


def quiet_libraries() -> None:
    """Keep progress bars and advice off the terminal."""
    quiet_loggers()
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # PEFT still uses names that newer transformers call deprecated: nothing a user can act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft)\.")


def _architecture(config: RunConfig) -> tuple[Any, Task]:
    import transformers
    from transformers import AutoConfig, PreTrainedConfig

    if config.unknown_architecture:
        raise UserError(config.unknown_architecture)
    with _of_the_model(config):
        if config.architecture is not None:
            fields = config.architecture.fields()
            _refuse_too_many_modules(fields)
            architecture = AutoConfig.for_model(**fields)
        else:
            _refuse_too_many_modules(PreTrainedConfig.get_config_dict(config.model)[0])
            architecture = AutoConfig.from_pretrained(config.model)

    def has_model(task: Task) -> bool:
        return type(architecture) in getattr(transformers, task.auto_class)._model_mapping

    task = task_of(config.task, architecture.architectures or (), has_model)
    if task is None:
        kinds = [name for name, known in TASKS.items() if has_model(known)]
        what = f"{architecture.model_type} has no model for task={config.task}" if config.task != AUTO else (
            f"{architecture.model_type} is of no task that is known here"
        )  # fmt: skip
        raise UserError(f"{config.model}: {what}" + f"; it has for: {', '.join(kinds)}" * bool(kinds))
    _adapt(config, architecture, task)
    return architecture, task


def _refuse_too_many_modules(fields: Mapping[str, Any]) -> None:
    for name, value in fields.items():
        if isinstance(value, dict):  # of a part of the model: text, vision
            _refuse_too_many_modules(value)
        elif ("layer" in name or "expert" in name) and isinstance(value, int) and value > MOST_MODULES:
            raise UserError(f"{name}={excerpt(value)}; there may be {MOST_MODULES}")


def _adapt(config: RunConfig, architecture: Any, task: Task) -> None:
    """Make a model's configuration that of what is set."""
    made_for = getattr(architecture, "image_size", None)
    wanted = [config.image_size] * 2 if isinstance(made_for, list | tuple) else config.image_size
    if config.image_size and made_for is not None and made_for != wanted:
        if config.pretrained:
            raise UserError(f"{config.model} was made for images of {made_for}: leave image_size out")
        architecture.image_size = wanted
    if task.adapters == "SEQ_CLS" and architecture.pad_token_id is None:
        architecture.pad_token_id = 0  # by which a decoder finds the last token of a row


@contextmanager
def _of_the_model(config: RunConfig) -> Iterator[None]:
    """A model that is not there, or whose configuration makes no sense, is the user's to put right."""
    try:
        yield
    except (OSError, ValueError, UserError) as error:  # meant to be read
        raise UserError(f"{config.model}: {one_line(error)}") from None
    except Exception as error:  # whatever breaks on what makes no sense
        raise UserError(f"{config.model}: its configuration makes no model: {kind_and_line(error)}") from None


def shell_of(hf_config: Any, task: Task = TASKS["causal-lm"]) -> Model:
    """The model on the meta device: every shape, no storage. To be read only: whoever asks again gets the same."""
    return _shell(_Described(hf_config), task)


class _Described:
    """A configuration that equals every other of the same content."""

    def __init__(self, hf_config: Any) -> None:
        self.hf_config, self.content = hf_config, (type(hf_config), hf_config.to_json_string(use_diff=False))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Described) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.content)


@functools.lru_cache(maxsize=4)  # a restart and a prediction of another technique have the same model
def _shell(described: _Described, task: Task) -> Model:
    import transformers

    with torch.device("meta"):
        return getattr(transformers, task.auto_class).from_config(described.hf_config)


def positions(architecture: Any) -> int:
    """Tokens in a row that a model was made for; 0: not said."""
    text = architecture.get_text_config()
    names = ("max_position_embeddings", "max_target_positions")
    return int(next((size for name in names if (size := getattr(text, name, None))), 0))


def _refuse_too_long(config: RunConfig, shell: Model, architecture: Any, wanted: Rows) -> None:
    """Refuse rows longer than a table of learned positions: on a GPU, looking there ends CUDA for the process.

    Rotary positions can be computed for any length.
    """
    most = positions(architecture)
    length = max((row.shape[0] for row in wanted.values() if row.high and len(row.shape) == 1), default=0)
    if not 0 < most < length:
        return
    tables = [module for module in shell.modules() if isinstance(module, torch.nn.Embedding)]
    # Some models keep a few positions for padding.
    learned = [t for t in tables if t is not shell.get_input_embeddings() and most <= t.num_embeddings < most + 8]
    if learned:
        name = "target_len" if length == config.target_len else "seq_len"
        raise UserError(f"{config.model} has learned positions for {most} tokens in a row: {name}={length} is too long")


def _refuse_too_large(
    config: RunConfig, shell: Model, recipe: Recipe, device: torch.device, task: Task, wanted: Rows
) -> None:
    """Refuse a run before loading anything, if what it needs at the least is too much.

    On a GPU the allocator would say so later, and of a batch it should; on a CPU
    the kernel would end the process, and the app with it.
    """
    from .device import memory_for_a_run_bytes

    count = sum(p.numel() for p in shell.parameters())
    bits = recipe.weight_bits or recipe.dtype.itemsize * 8
    needed, what = count * bits // 8, "its weights alone take"
    if recipe.trains_all:
        needed += count * (recipe.dtype.itemsize * recipe.keeps_gradients + recipe.state_bytes)
        what = f"weights{', gradients' * recipe.keeps_gradients} and optimizer state alone take"
    needed, there = recipe.parallelism.least_bytes(needed), memory_for_a_run_bytes(device)
    if needed > there:
        raise UserError(
            f"{config.model} does not fit: {what} {needed / 2**30:.1f} GiB, {device} has {there / 2**30:.1f} GiB"
        )
    batch = _least_of_a_batch(config, shell, recipe, task, wanted)
    if device.type == "cpu" and needed + batch > there:
        raise UserError(
            f"batch_size={config.batch_size} seq_len={config.seq_len} does not fit: {config.rows} rows and one batch "
            f"of them take at least {batch / 2**30:.1f} GiB beside the model, {device} has {there / 2**30:.1f} GiB"
        )


def _least_of_a_batch(config: RunConfig, shell: Model, recipe: Recipe, task: Task, wanted: Rows) -> int:
    """Bytes of all rows, and of one batch's logits and their float32 copy for the loss."""
    vocabulary = int(getattr(shell.config.get_text_config(), "vocab_size", 0) or 0) if recipe.makes_logits else 0
    scored = config.batch_size * (wanted[task.scored].elements if task.scored else 0) * vocabulary
    return bytes_of(config, wanted, recipe.dtype) + scored * (recipe.dtype.itemsize + torch.float32.itemsize)


def _load(plan: Plan, reading: Callable[[str], None]) -> Model:
    """Load through `from_pretrained`, real weights or random ones alike."""
    import transformers

    config, dtype = plan.config, plan.recipe.dtype
    device = plan.recipe.parallelism.load_device(plan.device)
    arguments = {
        "config": plan.architecture,
        "dtype": dtype,
        "device_map": {"": str(device)},
        **plan.recipe.load_arguments,
    }
    with _loading_on_this_thread():
        if config.pretrained and not plan.shapes_only:
            try:
                with _told_of_weights(reading):
                    return getattr(transformers, plan.task.auto_class).from_pretrained(config.model, **arguments)
            except OSError as error:
                raise UserError(f"{config.model}: {one_line(error)}") from None
        shell, persistent = plan.shell, plan.shell.state_dict()
        generator = torch.Generator(device).manual_seed(config.seed)
        weights = {
            name: _RandomWeight(
                name, tuple(tensor.shape), dtype if tensor.is_floating_point() else tensor.dtype, generator, reading
            )
            for name, tensor in [*shell.named_parameters(), *shell.named_buffers()]
            if name in persistent
        }
        return type(shell).from_pretrained(None, state_dict=weights, **arguments)


@contextmanager
def _loading_on_this_thread() -> Iterator[None]:
    """Have transformers load in the calling thread, where tags and trackers see it."""
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before


@contextmanager
def _told_of_weights(reading: Callable[[str], None]) -> Iterator[None]:
    """Hear from transformers which module's weight is read next; before 5.5 it does not tell."""
    from transformers.utils import logging

    def told(bar: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        weights = bar(*args, **kwargs)
        return _reading_each(weights, reading) if kwargs.get("desc") == "Loading weights" else weights

    if not hasattr(logging, "set_tqdm_hook"):
        yield
        return
    before = logging.set_tqdm_hook(told)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _reading_each(weights: Iterable[tuple[str, Any]], reading: Callable[[str], None]) -> Iterator[tuple[str, Any]]:
    for weight in weights:
        reading(weight[0].rpartition(".")[0])
        yield weight


RANDOM_STD = 0.02
"""Standard deviation of a profile's random matrices."""


class _RandomWeight:
    """Stands in for a safetensors slice: the tensor is made when it is read.

    So a profile's random weights take the very path of real ones, quantization
    included, one tensor at a time and directly on the device.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        generator: torch.Generator,
        reading: Callable[[str], None],
    ) -> None:
        self.name, self.shape, self.dtype, self.generator, self.reading = name, shape, dtype, generator, reading

    def __getitem__(self, _index: Any) -> torch.Tensor:
        self.reading(self.name.rpartition(".")[0])
        tensor = torch.empty(self.shape, dtype=self.dtype, device=self.generator.device)
        if len(self.shape) < 2 or not self.dtype.is_floating_point:  # norms and biases; counters
            return tensor.fill_(1.0 if self.name.endswith("weight") else 0.0)
        return tensor.normal_(0.0, RANDOM_STD, generator=self.generator)

    def get_dtype(self) -> str:
        return _SAFETENSORS[self.dtype]


_SAFETENSORS = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.bool: "BOOL",
}  # fmt: skip
"""Safetensors' names of the dtypes of parameters and buffers."""


def numel(parameter: torch.nn.Parameter) -> int:
    """Weights in a parameter, of all ranks; 4-bit storage packs two into one element."""
    if (partitioned := getattr(parameter, "ds_numel", None)) is not None:  # DeepSpeed's, of stage 3
        return int(partitioned)
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
