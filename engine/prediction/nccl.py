"""NCCL's memory on a GPU: outside of every statistic of torch's, and so an estimate. Loads no torch."""

from __future__ import annotations

from ..config import RunConfig
from ..techniques.parallel import shard_ranks

KERNELS_BYTES, COMMUNICATOR_BYTES = 280 << 20, 486 << 20
"""Its kernels, beyond a context without them, and each communicator's buffers, on 2 and 4 H100s with NVLink."""


def communicators(config: RunConfig, ranks: int) -> int:
    """Groups of ranks that send to one another: the job's own, and for hybrid sharding one of shards, one of replicas.

    Args:
        config: The run.
        ranks: Processes of the job.
    """
    kind = config.text("parallel")
    if ranks == 1 or kind == "none":
        return 0
    if kind.startswith("zero"):
        return 2  # DeepSpeed makes one of its own
    shard = shard_ranks(config, ranks) if kind == "fsdp2" else ranks
    return 1 if shard == ranks else 1 + (shard > 1) + (ranks // shard > 1)


def nccl_bytes(config: RunConfig, ranks: int) -> int:
    """Bytes of a run's communicators on each GPU, and of the kernels they run."""
    count = communicators(config, ranks)
    return KERNELS_BYTES * bool(count) + COMMUNICATOR_BYTES * count
