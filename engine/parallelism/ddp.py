"""`DistributedDataParallel`: a replica a rank, gradients all-reduced in buckets while backward goes on."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import Parallelism, Wrapped

if TYPE_CHECKING:
    import torch

    from ..recipe import Model


class DDP(Parallelism):
    """Replicas of the model, whose gradients are averaged bucket by bucket.

    Args:
        bucket_view: Gradients are views of the reducer's buckets, instead of being copied into them.
    """

    def __init__(self, bucket_view: bool) -> None:
        self._bucket_view = bucket_view

    def wrap(self, model: Model, device: torch.device, make: Callable[[], torch.optim.Optimizer]) -> Wrapped:
        """The constructor broadcasts rank 0's weights."""
        from torch.nn.parallel import DistributedDataParallel

        ids = [device] if device.type == "cuda" else None
        call = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=self._bucket_view)
        return Wrapped(call, make())

    def begin(self, call: Any, last: bool) -> None:
        """Set what `no_sync` sets, which as a context would have to be around forward and backward."""
        call.require_backward_grad_sync = last
