"""What can be told of somebody else's loop by looking at its model and optimizer."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

from .. import techniques
from ..config import RunConfig

OPTIMIZERS = {"AdamW": "adamw", "SGD": "sgd", "AdamW8bit": "adamw-8bit", "PagedAdamW": "paged-adamw",
              "PagedAdamW8bit": "paged-adamw-8bit", "Adafactor": "adafactor"}  # fmt: skip
DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def script_name() -> str:
    """What to call this process: the script's name, with its rank if it has several."""
    script = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path("python")
    name = script.parent.name if script.stem == "__main__" else script.stem
    rank = os.environ.get("RANK")
    return f"{name}-rank{rank}" if rank and os.environ.get("WORLD_SIZE", "1") != "1" else name


def config_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: list[torch.Tensor]) -> RunConfig:
    """The run in our own words, as far as it can be told; what cannot stays as by default."""
    shape = tuple(batch[0].shape) if batch else ()
    found = _found(model, optimizer) | {
        "batch_size": int(shape[0]) if shape else 1,
        "seq_len": int(shape[1]) if len(shape) > 1 else 1,
        "rows": 1,
        "learning_rate": float(optimizer.param_groups[0].get("lr", 0.0)),
    }
    config = RunConfig(model=_model_name(model), device=str(device_of(model)), options=techniques.defaults())
    return config.with_({name: value for name, value in found.items() if _is_ours(name, value)})


def _is_ours(name: str, value: Any) -> bool:
    """Whether a setting of ours can have the value: a script may do what we do not."""
    option = techniques.all_options().get(name)
    return option is not None and option.admits(value)


def device_of(model: torch.nn.Module) -> torch.device:
    """Where it is watched: the GPU of its first parameter that is on one, or the CPU."""
    devices = [p.device for p in model.parameters()]
    return next((d for d in devices if d.type == "cuda"), torch.device("cpu"))


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer whose `step` does the work, whatever accelerate puts around it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"watch(model, optimizer): {type(optimizer).__name__} is no torch.optim.Optimizer")
    return optimizer


def _model_name(model: torch.nn.Module) -> str:
    config = getattr(model, "config", None)
    return str(getattr(config, "_name_or_path", "") or type(model).__name__)


def _found(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    kinds = {type(module).__name__ for module in model.modules()}
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    config = getattr(model, "config", None)
    found: dict[str, Any] = {
        "lora": bool(getattr(model, "peft_config", None)),
        "quantization": "nf4" if "Linear4bit" in kinds else "int8" if "Linear8bitLt" in kinds else "none",
        "dtype": DTYPES.get(max(sizes, key=lambda dtype: sizes[dtype])) if sizes else None,
        "optimizer": OPTIMIZERS.get(type(optimizer).__name__),
        "checkpointing": "layers"
        if any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
        else "off",
        "kv_cache": bool(getattr(config, "use_cache", False)),
        "attention": getattr(config, "_attn_implementation", None),
    }
    if found["optimizer"] == "adamw" and optimizer.param_groups[0].get("fused"):
        found["optimizer"] = "adamw-fused"
    return {name: value for name, value in found.items() if value is not None}
