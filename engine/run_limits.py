"""Runs that are refused before anything is loaded: too many modules, too long rows, too much for the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .batches import bytes_of
from .config import RunConfig, UserError, excerpt
from .model_shell import positions
from .recipe import Model, Recipe
from .tasks import Rows, Task

MOST_MODULES = 10_000
"""Layers or experts of a model: each is a module, made before anything else could be refused."""

MOST_PARAMETERS = 10**14
"""Parameters of a model, a hundred times the largest: bytes of more would not fit the columns of a trace."""


def refuse_too_many_modules(fields: Mapping[str, Any]) -> None:
    """Refuse more layers or experts than `MOST_MODULES`, in any part of a model.

    Raises:
        UserError: There are more.
    """
    for name, value in fields.items():
        if isinstance(value, dict):  # of a part of the model: text, vision
            refuse_too_many_modules(value)
        elif ("layer" in name or "expert" in name) and isinstance(value, int) and value > MOST_MODULES:
            raise UserError(f"{name}={excerpt(value)}; there may be {MOST_MODULES}")


def refuse_too_long(config: RunConfig, shell: Model, architecture: Any, wanted: Rows) -> None:
    """Refuse rows, with what is generated, longer than a table of learned positions.

    On a GPU, looking there ends CUDA for the process.

    Rotary positions can be computed for any length.
    """
    most = positions(architecture)
    length = max((row.shape[0] for row in wanted.values() if row.high and len(row.shape) == 1), default=0)
    if config.generates:
        length = config.row_tokens
    if not 0 < most < length:
        return
    tables = [module for module in shell.modules() if isinstance(module, torch.nn.Embedding)]
    # Some models keep a few positions for padding.
    learned = [t for t in tables if t is not shell.get_input_embeddings() and most <= t.num_embeddings < most + 8]
    if learned:
        said = f"{'target_len' if length == config.target_len else 'seq_len'}={length} is"
        if config.generates:
            said = f"seq_len={config.seq_len} and new_tokens={config.new_tokens} are together"
        raise UserError(f"{config.model} has learned positions for {most} tokens in a row: {said} too long")


def refuse_too_large(
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
