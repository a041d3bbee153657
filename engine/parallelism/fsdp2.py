"""FSDP2: torch's `fully_shard`, a group of parameters for each decoder layer and one for the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..model_layers import decoder_layers
from . import Parallelism, Wrapped

if TYPE_CHECKING:
    import torch

    from ..recipe import Model


@dataclass(frozen=True)
class FSDP2(Parallelism):
    """Shards of the model, gathered layer by layer.

    Attributes:
        shard_ranks: From the ranks of the job, how many hold one copy of the model between them.
        reshard: Whether a layer's gathered weights are freed between forward and backward.
        param_dtype: The dtype in which weights are gathered and used; None: their own.
        reduce_dtype: The dtype in which gradients are reduced; None: their own.
        offload: Whether shards, gradients and optimizer state are on the host.
    """

    shard_ranks: Callable[[int], int]
    reshard: bool
    param_dtype: torch.dtype | None
    reduce_dtype: torch.dtype | None
    offload: bool

    def least_bytes(self, whole: int) -> int:
        """A shard's, which may be on the host."""
        from .group import world_size

        return 0 if self.offload else whole // self.shard_ranks(world_size())

    def load_device(self, device: torch.device) -> torch.device:
        """The host: a layer goes to the GPU when it is sharded, so that no GPU ever holds the whole model."""
        import torch

        return torch.device("cpu")

    def prepare(self, device: torch.device) -> None:
        """The mesh of the ranks."""
        from .group import mesh

        mesh(device.type, self.shard_ranks)

    def wrap(self, model: Model, device: torch.device, make: Callable[[], torch.optim.Optimizer]) -> Wrapped:
        """Shard the layers, then what is left; the optimizer gets shards."""
        from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

        from .group import mesh

        settings: dict[str, Any] = {
            "mesh": mesh(device.type, self.shard_ranks),
            "mp_policy": MixedPrecisionPolicy(param_dtype=self.param_dtype, reduce_dtype=self.reduce_dtype),
        }
        if self.offload:
            settings["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        for layer in decoder_layers(model):
            fully_shard(layer, reshard_after_forward=self.reshard, **settings)
        fully_shard(model, **settings)
        return Wrapped(model, make())

    def begin(self, call: Any, last: bool) -> None:
        """Until the last, gradients add up unsharded."""
        call.set_requires_gradient_sync(last)
