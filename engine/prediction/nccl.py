"""NCCL's memory on a GPU: outside of every statistic of torch's, and so an estimate. Loads no torch."""

from __future__ import annotations

from ..config import RunConfig

BEGUN_BYTES, COMMUNICATOR_BYTES = 364 << 20, 486 << 20
"""Held once NCCL has begun, and by each communicator from its first collective on, on 2 and 4 H100s with NVLink."""


def communicators(config: RunConfig, ranks: int) -> int:
    """Groups of ranks that send to one another: hybrid sharding has one for shards and one for replicas.

    Args:
        config: The run.
        ranks: Processes of the job.
    """
    kind = config.text("parallel")
    if ranks == 1 or kind == "none":
        return 0
    in_groups = kind == "fsdp2" and config.text("parallel.shard") == "hybrid"
    return 2 if in_groups or kind.startswith("zero") else 1  # DeepSpeed makes one of its own


def nccl_bytes(config: RunConfig, ranks: int) -> int:
    """Bytes of a run's communicators on each GPU."""
    count = communicators(config, ranks)
    return BEGUN_BYTES * bool(count) + COMMUNICATOR_BYTES * count
