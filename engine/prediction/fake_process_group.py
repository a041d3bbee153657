"""One rank of a job whose others are not there: collectives return at once and fill nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ..config import UserError
from ..parallelism import group


@contextmanager
def fake_process_group(ranks: int, rank: int) -> Iterator[None]:
    """Be a rank of a job.

    Args:
        ranks: Processes of the job.
        rank: Which of them this is.

    Raises:
        UserError: This process is a rank of a real job.
    """
    if dist.is_initialized():
        raise UserError("a job of several ranks cannot be predicted in a process that is a rank of one")
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        group.leave()
