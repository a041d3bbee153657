"""DeepSpeed ZeRO: its engine around the model, the optimizer over flat partitions."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from . import Parallelism, Wrapped

if TYPE_CHECKING:
    import torch

    from ..recipe import Model

NEVER = 1 << 30


class ZeRO(Parallelism):
    """A stage of ZeRO.

    Args:
        settings: DeepSpeed's configuration, see `deepspeed_settings`.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)
        self._last = True
        self._undo = ExitStack()

    def least_bytes(self, whole: int) -> int:
        """A partition's: of stage 3 of everything, and no stage holds less."""
        from .group import world_size

        return 0 if "offload_optimizer" in self.settings["zero_optimization"] else whole // world_size()

    def wrap(self, model: Model, device: torch.device, make: Callable[[], torch.optim.Optimizer]) -> Wrapped:
        """Stage 3 partitions the model that is there; a loaded one is whole on every GPU until then."""
        import deepspeed
        from torch.nn import functional

        from .group import let_go_of_barrier

        os.environ.setdefault("LOCAL_RANK", "0")  # it asks for it also where it is not used
        if device.type == "cpu":
            # It would compile collectives over shared memory, for minutes and with a compiler; gloo has them.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        with ExitStack() as undo:
            # Stage 3 has one of its own put in its place, which keeps more for backward, and leaves it there.
            undo.callback(setattr, functional, "linear", functional.linear)
            engine, optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=make(), config=self.settings, dist_init_required=False
            )
            let_go_of_barrier(device)
            self._undo = undo.pop_all()
        return Wrapped(engine, optimizer)

    def begin(self, call: Any, last: bool) -> None:
        """DeepSpeed counts micro-batches by itself."""
        self._last = last

    def backward(self, call: Any, loss: torch.Tensor) -> None:
        """The loss is a micro-batch's share already."""
        call.backward(loss, scale_wrt_gas=False)
        if not self._last:
            call.step()

    def step(self, call: Any, scaler: torch.amp.GradScaler, optimizer: Any) -> None:
        """The optimizer's step, the gathering of what it has updated, and the end of the gradients."""
        call.step()

    def zero_grad(self, optimizer: Any) -> None:
        """The engine's step has done so."""

    def close(self, call: Any) -> None:
        """Take its hooks off the model, and the model out of where stage 3 leaves it: a stack and a cache."""
        from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

        self._undo.close()
        call.destroy()
        FWD_MODULE_STACK.clear()
        for function in vars(PartitionedParameterCoordinator).values():
            for cell in getattr(function, "__closure__", None) or ():  # the cache is behind a decorator of its own
                if hasattr(cell.cell_contents, "cache_clear"):
                    cell.cell_contents.cache_clear()


def deepspeed_settings(
    stage: int, hidden: int, batch_size: int, accumulation: int, dtype: str, buckets: str, offload: bool
) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        stage: 1, 2 or 3.
        hidden: Of the model.
        batch_size: Rows of a micro-batch of one rank.
        accumulation: Micro-batches to a step.
        dtype: Of the weights: float32, or 16 bit beside a float32 master copy.
        buckets: `auto` as Hugging Face sets them, `default` as DeepSpeed does.
        offload: Optimizer state, and in stage 3 the partitions, on the host.
    """
    zero: dict[str, Any] = {"stage": stage}
    if buckets == "auto":
        zero["reduce_bucket_size"] = hidden * hidden
        if stage == 3:
            zero["stage3_prefetch_bucket_size"] = int(0.9 * hidden * hidden)
            zero["stage3_param_persistence_threshold"] = 10 * hidden
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    return {
        "train_micro_batch_size_per_gpu": batch_size,
        "gradient_accumulation_steps": accumulation,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
        # A fixed scale: without loss scaling, as it is on one GPU.
        "fp16": {"enabled": dtype == "float16", "loss_scale": 1.0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # that one would have to be compiled
        "steps_per_print": NEVER,
    }
