"""Several GPUs: replicas of the model (DDP), or shards of it (FSDP2, DeepSpeed ZeRO)."""

from __future__ import annotations

import sys
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

ZERO = ("zero1", "zero2", "zero3")
ON_A_CPU = 2
"""Ranks where there is no GPU to count and none are asked for."""
ELEMENTWISE = ("adamw", "adamw-fused", "adamw-single", "sgd", "sgd-momentum")
"""Optimizers that can step a shard: what they do to a number depends on no other number."""


def ranks(config: RunConfig, gpus: int) -> int:
    """Processes of a run, one a GPU.

    Args:
        config: The run.
        gpus: Visible here, or in the machine that is predicted for; 0: it is a CPU.
    """
    if config.text("parallel") == "none":
        return 1
    return config.integer("parallel.ranks") or gpus or ON_A_CPU


def shard_ranks(config: RunConfig, world: int) -> int:
    """Ranks that hold one copy of the model between them; under `hybrid` half of all unless it is said.

    Args:
        config: The run.
        world: Ranks of the job.
    """
    if config.text("parallel.shard") == "full":
        return world
    return config.integer("parallel.shard_ranks") or max(1, world // 2)


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Choose the engine; what the other techniques have decided of dtypes is known by now."""
    kind, offload = config.text("parallel"), config.flag("parallel.offload")
    if kind == "ddp":
        from ..parallelism.ddp import DDP

        recipe.parallelism = DDP(config.flag("parallel.bucket_view"))
    elif kind == "fsdp2":
        _shard(config, recipe)
    elif kind in ZERO:
        from ..parallelism.zero import ZeRO, deepspeed_settings

        # Its engine converts the model: 16-bit weights, and their float32 master copies in the optimizer.
        dtype, recipe.autocast = str(recipe.autocast or recipe.dtype).removeprefix("torch."), None
        hidden = int(recipe.shell.config.get_text_config().hidden_size)
        settings = deepspeed_settings(
            int(kind[-1]),
            hidden,
            config.batch_size,
            recipe.accumulation,
            dtype,
            config.text("parallel.bucket"),
            offload,
        )
        recipe.parallelism = ZeRO(settings)


def _shard(config: RunConfig, recipe: Recipe) -> None:
    """FSDP2 has a mixed precision of its own: weights are gathered in 16 bit, and gradients summed in 32."""
    import torch

    from ..parallelism.fsdp2 import FSDP2

    param_dtype, recipe.autocast = recipe.autocast, None
    reduce = config.text("parallel.reduce")
    if reduce == "auto":
        reduce = "" if param_dtype is None else "float32"
    recipe.parallelism = FSDP2(
        partial(shard_ranks, config),
        config.flag("parallel.reshard"),
        param_dtype,
        getattr(torch, reduce) if reduce else None,
        config.flag("parallel.offload"),
    )


def conflict(config: RunConfig) -> str | None:
    """Settings that the engines cannot have together."""
    kind = config.text("parallel")
    if kind == "none":
        return None
    if config.flag("optimizer_in_backward"):
        return f"parallel={kind} reduces gradients before a step: set optimizer_in_backward=off"
    if kind == "ddp":
        return None
    optimizer = config.text("optimizer")
    if optimizer not in ELEMENTWISE:
        return f"parallel={kind} steps shards, which optimizer={optimizer} cannot: one of {', '.join(ELEMENTWISE)}"
    if config.flag("loss_scaling"):
        return f"parallel={kind}: GradScaler looks for overflows in one rank's shards only: set loss_scaling=off"
    if config.text("quantization") != "none":
        elsewhere = ""
        if kind == "fsdp2" and config.text("quantization") in ("nf4", "fp4"):
            elsewhere = " (elsewhere FSDP shards 4-bit weights whose bnb_4bit_quant_storage is a float dtype)"
        remedy = "set parallel=ddp, or quantization=none"
        return f"parallel={kind} is not supported here with quantization{elsewhere}: {remedy}"
    if kind == "fsdp2" and config.text("checkpointing") in ("segments", "input"):
        return "parallel=fsdp2 gathers the weights of one layer at a time, not of a segment: set checkpointing=layers"
    return _mesh_problem(config) if kind == "fsdp2" else None


def _mesh_problem(config: RunConfig) -> str | None:
    """Groups of equal size."""
    world, shard = config.integer("parallel.ranks"), config.integer("parallel.shard_ranks")
    if config.text("parallel.shard") != "hybrid" or not world:
        return None
    if world % (shard or 2):
        return f"parallel.ranks={world} makes no groups of equal size for parallel.shard_ranks={shard or world // 2}"
    return None


def unavailable(value: Value, environment: Environment) -> str | None:
    """ZeRO is DeepSpeed's."""
    if value in ZERO and "deepspeed" not in environment.packages:
        return not_installed("deepspeed", "deepspeed")
    return None


def mathematics(config: RunConfig) -> Mathematics:
    """Every rank trains on rows of its own, so a step is of all ranks' rows; sums may be taken in another dtype."""
    kind = config.text("parallel")
    if kind == "none":
        return Mathematics()
    reduce = config.text("parallel.reduce")
    return Mathematics(f"{config['parallel.ranks'] or 'all'} ranks", "" if reduce == "auto" else f"reduced in {reduce}")


def recognise(model: Any, optimizer: Any) -> Mapping[str, Value]:
    """The engine by its classes, and the process group's size; a replica inside of its wrapper shows neither."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return {"parallel": "none"}
    found: dict[str, Value] = {}
    classes = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    if (stage := _stage(optimizer) or _stage(getattr(optimizer, "optimizer", None))) is not None:
        found["parallel"] = f"zero{stage}"
    elif "FSDPModule" in classes:
        found["parallel"] = "fsdp2"
    elif type(model).__name__ == "DistributedDataParallel":
        found |= {"parallel": "ddp", "parallel.bucket_view": bool(model.gradient_as_bucket_view)}
    return found | {"parallel.ranks": distributed.get_world_size()} if found else {}


def _stage(optimizer: Any) -> int | None:
    """The stage of one of DeepSpeed's optimizers."""
    name = type(optimizer).__name__
    if name == "DeepSpeedZeroOptimizer":
        return 2 if optimizer.partition_gradients else 1
    return 3 if name == "DeepSpeedZeroOptimizer_Stage3" else None


TECHNIQUE = Technique(
    name="parallel",
    title="several GPUs",
    group=Group.SEVERAL_GPUS,
    summary="a replica on each GPU (ddp), or of weights, gradients and optimizer state a shard (fsdp2, zero)",
    formula="zero1: optimizer state / ranks; zero2: gradients too; fsdp2, zero3: weights too; ddp: gradients twice",
    source="https://arxiv.org/abs/1910.02054",
    cost={
        "none": "",
        "ddp": "one all-reduce of all gradients a step, while backward goes on",
        "fsdp2": "weights travel twice a micro-batch and gradients once, layer by layer",
        "zero1": "gradients are reduced and updated weights gathered once a step",
        "zero2": "gradients are reduced in every micro-batch, weights gathered once a step",
        "zero3": "weights travel twice a micro-batch and gradients once, module by module",
    },
    order=90,
    options=(
        Option(
            "parallel",
            "none",
            "ddp: a replica a GPU; fsdp2: torch's fully_shard; zero1 to zero3: DeepSpeed's stages",
            ("none", "ddp", "fsdp2", *ZERO),
        ),
        Option(
            "parallel.ranks",
            0,
            "processes, one a GPU; 0: all visible GPUs, two on a CPU",
            (0, 2, 4, 8, 16, 32, 64),
            True,
            0,
            65536,
        ),
        Option("parallel.shard", "full", "fsdp2: full over all ranks; hybrid: over groups of them", ("full", "hybrid")),
        Option("parallel.shard_ranks", 0, "hybrid: ranks in a group; 0: half of all", (0, 2, 4, 8), True, 0, 65536),
        Option("parallel.reshard", True, "fsdp2: free gathered weights between forward and backward", (True, False)),
        Option(
            "parallel.reduce",
            "auto",
            "fsdp2: dtype gradients are summed in; auto: the gradients', under dtype=mixed float32",
            ("auto", "float32", "bfloat16", "float16"),
        ),
        Option("parallel.offload", False, "fsdp2, zero: shards and optimizer state on the host", (False, True)),
        Option("parallel.bucket_view", False, "ddp: gradients are views of the reducer's buckets", (False, True)),
        Option(
            "parallel.bucket",
            "auto",
            "zero: bucket sizes; auto: as Hugging Face sets them, from hidden size; default: DeepSpeed's",
            ("auto", "default"),
        ),
    ),
    in_script={
        "ddp": "torchrun, and DistributedDataParallel(model)",
        "fsdp2": "torchrun, and fully_shard(layer) for each, fully_shard(model)",
        **dict.fromkeys(ZERO, "torchrun, and deepspeed.initialize(...)"),
    },
    acts_on=(Category.PARAMETERS, Category.GRADIENTS, Category.OPTIMIZER_STATE),
    variants=(
        {"parallel": "ddp", "parallel.ranks": 1},
        {"parallel": "ddp", "parallel.ranks": 1, "parallel.bucket_view": True},
        {"parallel": "fsdp2", "parallel.ranks": 1},
        {"parallel": "fsdp2", "parallel.ranks": 1, "parallel.reshard": False},
        {"parallel": "zero1", "parallel.ranks": 1},
        {"parallel": "zero2", "parallel.ranks": 1},
        {"parallel": "zero3", "parallel.ranks": 1},
    ),
    packages=("deepspeed",),
    key="f",
    apply=apply,
    saves=("fsdp2",),
    conflict=conflict,
    mathematics=mathematics,
    recognise=recognise,
    unavailable=unavailable,
)
