"""The recipe of a run: the decisions of the techniques."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from .allocator_settings import AllocatorSettings
from .parallelism import Parallelism

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
