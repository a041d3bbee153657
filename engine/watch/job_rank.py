"""The rank that a watched script is, of which job: told by the environment that launchers set.

torchrun, `accelerate launch`, `deepspeed` and most others name the rank, the number
of ranks, and a place where the ranks meet, which is the same for all of a job.
"""

from __future__ import annotations

import os
import re
import sys
from typing import NamedTuple

from ..engine_registry import LONGEST_NAME

UNIQUE = re.compile(r"[0-9a-f]{8}-?[0-9a-f-]{20,}")
"""A run id that nobody chose, of which the beginning is enough."""

NO_ID = ("", "none")
LONGEST_KEY = 16


class JobRank(NamedTuple):
    """One rank of a job.

    Attributes:
        job: Its name, which all of its ranks arrive at; empty: there is no job.
        rank: From 0.
        ranks: Of the job.
        is_first_here: No other of its ranks on this machine comes before it.
    """

    job: str = ""
    rank: int = 0
    ranks: int = 1
    is_first_here: bool = True


def job_rank(script: str) -> JobRank:
    """The rank that this process is.

    Args:
        script: What the job is called, beside what tells it from others of that name.
    """
    rank, ranks = _from_group() or _from_environment()
    if ranks <= 1:
        return JobRank()
    local = os.environ.get("LOCAL_RANK", "")
    first = int(local) == 0 if local.isdigit() else rank == 0
    key = _key()
    return JobRank(f"{script[: LONGEST_NAME - len(key) - len('-.99999')]}-{key}", rank, ranks, first)


def _from_group() -> tuple[int, int] | None:
    """The process group's own word, where there is one: a script may start its ranks by itself."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed.get_rank(), distributed.get_world_size()


def _from_environment() -> tuple[int, int]:
    rank, ranks = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    return (int(rank), int(ranks)) if rank.isdigit() and ranks.isdigit() else (0, 1)


def _key() -> str:
    """A key that the ranks of a job have in common, and no other job on this machine at the time has."""
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if run_id in NO_ID:
        return os.environ.get("MASTER_PORT") or str(os.getppid())
    return run_id[:8] if UNIQUE.fullmatch(run_id) else run_id[:LONGEST_KEY]
