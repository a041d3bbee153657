"""What can be told of somebody else's loop by looking at its model and optimizer."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import techniques
from ..config import RunConfig, UserError, Value


def script_name() -> str:
    """What to call this process: the script's name, with its rank if it has several."""
    script = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path("python")
    name = script.parent.name if script.stem == "__main__" else script.stem
    rank = os.environ.get("RANK")
    return f"{name}-rank{rank}" if rank and os.environ.get("WORLD_SIZE", "1") != "1" else name


def config_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: list[torch.Tensor]) -> RunConfig:
    """The run in our own words, as far as it can be told; what cannot stays as by default."""
    shape = tuple(batch[0].shape) if batch else ()
    found = techniques.recognise(model, optimizer) | {
        "batch_size": int(shape[0]) if shape else 1,
        "seq_len": int(shape[1]) if len(shape) > 1 else 1,
        "rows": 1,
        "learning_rate": float(optimizer.param_groups[0].get("lr", 0.0)),
    }
    config = RunConfig(model=_model_name(model), device=str(device_of(model)), options=techniques.defaults())
    return config.with_(dict(_admitted(found)))


def _admitted(found: Mapping[str, Value]) -> Iterator[tuple[str, Value]]:
    """Those that a setting of ours can have: a script may do what we do not."""
    known = techniques.all_options()
    for name, value in found.items():
        with contextlib.suppress(UserError):
            yield name, known[name].parse(value, "watched")


def device_of(model: torch.nn.Module) -> torch.device:
    """Where it is watched: the GPU of its first parameter that is on one, or the CPU."""
    devices = [p.device for p in model.parameters()]
    return next((d for d in devices if d.type == "cuda"), torch.device("cpu"))


def optimizers_in(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The optimizers whose `step` does the work, whatever accelerate puts around them.

    Args:
        optimizer: One, or several in a list, a tuple or the values of a dictionary.

    Raises:
        TypeError: There is none, or one that is not torch's.
    """
    several = list(optimizer.values()) if isinstance(optimizer, dict) else optimizer
    found = [_unwrapped(each) for each in (several if isinstance(several, list | tuple) else [several])]
    if not found:
        raise TypeError("watch(model, optimizer): no optimizer in an empty list")
    return found


def _unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"watch(model, optimizer): {type(optimizer).__name__} is no torch.optim.Optimizer")
    return optimizer


def _model_name(model: torch.nn.Module) -> str:
    config = getattr(model, "config", None)
    return str(getattr(config, "_name_or_path", "") or type(model).__name__)
