"""Descriptions of somebody else's loop, read off its model and optimizer."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import tasks, techniques
from ..config import DTYPES, Architecture, RunConfig, UserError, Value, excerpt
from ..tracing import zero
from ..tracing.hooks import unwrapped
from .batch import Batch

NO_ARCHITECTURE = ("auto_map", "attn_implementation", "quantization_config")
"""Fields of a transformers configuration that say how a model is run."""


def script_name() -> str:
    """The script's name: the engine's, or its job's."""
    script = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path("python")
    return script.parent.name if script.stem == "__main__" else script.stem


def config_of(
    model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], batch: Batch, accumulation: int | None
) -> RunConfig:
    """The run in our own words, as far as it can be told; what cannot stays as by default."""
    optimizer = optimizers[0] if optimizers else None
    inner = unwrapped(model)
    found = (
        # Of what stands around the two; read off themselves it is truer, where both say something.
        techniques.recognise(model, zero.around(optimizer) or optimizer)
        | techniques.recognise(inner, optimizer)
        | {
            "batch_size": batch.rows or 1,
            "seq_len": batch.seq_len or 1,
            "rows": 1,
            "accumulation": accumulation or 1,
            "learning_rate": float(optimizer.param_groups[0].get("lr", 0.0)) if optimizer is not None else 0.0,
        }
    )
    config = RunConfig(
        model=_model_name(inner),
        device=str(device_of(model)),
        architecture=architecture_of(inner),
        options=techniques.defaults(),
    )
    known = dict(admitted(found))
    foreign = {name: excerpt(value) for name, value in found.items() if name not in known and str(value)}
    return dataclasses.replace(config.with_(known), foreign=foreign)


def architecture_of(model: torch.nn.Module) -> Architecture | None:
    """The architecture of a transformers model for a task, which is in memory; None of any other."""
    adapted = getattr(model, "get_base_model", None)  # PEFT's
    task_class = _task_class(adapted() if callable(adapted) else model)
    config: Any = getattr(model, "config", None)
    if not callable(getattr(config, "to_dict", None)) or not isinstance(getattr(config, "model_type", None), str):
        return None
    if not task_class:
        return None
    plain = json.loads(json.dumps(config.to_dict(), default=str))
    fields = {name: value for name, value in plain.items() if not name.startswith("_") and name not in NO_ARCHITECTURE}
    fields["architectures"] = [task_class]  # a model made in the script has not written it down
    adapters = [*getattr(model, "peft_config", {}).values()]
    targets = getattr(adapters[0], "target_modules", None) if adapters else None
    dtype = next((name for name in DTYPES if getattr(torch, name) is getattr(config, "dtype", None)), DTYPES[0])
    try:
        return Architecture(fields, dtype, tuple(sorted(targets)) if isinstance(targets, set | list) else ())
    except UserError:
        return None


def _task_class(model: Any) -> str:
    """The class of transformers' own that a model is, or was made of, and that says its task; "": none."""
    own = (each for each in type(model).__mro__ if each.__module__.startswith("transformers.models."))
    return next((each.__name__ for each in own if tasks.named(each.__name__)), "")


def admitted(found: Mapping[str, Value]) -> Iterator[tuple[str, Value]]:
    """The values that a setting of ours can have: a script may do what we do not."""
    known = techniques.all_options()
    for name, value in found.items():
        with contextlib.suppress(UserError):
            yield name, known[name].parse(value, "watched")


def device_of(model: torch.nn.Module) -> torch.device:
    """The device to watch: the GPU of the model's first parameter that is on one, or the CPU."""
    devices = [p.device for p in model.parameters()]
    return next((d for d in devices if d.type == "cuda"), torch.device("cpu"))


def optimizers_in(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The optimizers whose `step` does the work, whatever accelerate or DeepSpeed puts around them.

    Args:
        optimizer: One, or several in a list, a tuple or the values of a dictionary; DeepSpeed's engine; None:
            there is none.

    Raises:
        TypeError: One is not torch's.
    """
    if optimizer is None:
        return []
    several = list(optimizer.values()) if isinstance(optimizer, dict) else optimizer
    return [_unwrapped(each) for each in (several if isinstance(several, list | tuple) else [several])]


def accumulation_of(optimizer: Any) -> int | None:
    """Micro-batches a step, where accelerate has been told; None: it is not known."""
    steps = getattr(getattr(optimizer, "gradient_state", None), "num_steps", None)
    return steps if isinstance(steps, int) and steps > 1 else None


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    around = zero.optimizer_in(optimizer)
    optimizer = optimizer if around is None else around.optimizer
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"watch(model, optimizer): {type(optimizer).__name__} is no torch.optim.Optimizer")
    return optimizer


def _model_name(model: torch.nn.Module) -> str:
    config = getattr(model, "config", None)
    name = type(model).__name__
    if hasattr(model, "set_requires_gradient_sync"):  # fully_shard makes a class of its own
        name = name.removeprefix("FSDP")
    return str(getattr(config, "_name_or_path", "") or name)
