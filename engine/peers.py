"""The other ranks of a job: rank 0 says what all of them do next.

Two collectives that wait for one another must be entered by all ranks, so a run
is left by all at the same micro-batch. Whoever commands speaks to rank 0; between
two micro-batches it tells the others whether the run goes on, and between two runs
what comes next, over a gloo group beside the one that trains. A rank that dies
breaks that group, and every wait in it ends with an error.
"""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .feed import Start
from .launch import ORDER
from .techniques import parse_config

if TYPE_CHECKING:
    import torch

WATCHDOG_LOOKS_S = 0.25
"""NCCL's watchdog looks ten times a second."""


@dataclass
class Peers:
    """One rank's end.

    Attributes:
        rank: Of this process, from 0.
        size: Ranks of the job.
        local_rank: Among those on this machine: its GPU.
    """

    rank: int
    size: int
    local_rank: int
    _group: Any = field(default=None, init=False)
    _word: Any = field(default=None, init=False)

    @property
    def leads(self) -> bool:
        """True for the rank that is commanded."""
        return self.rank == 0

    def join(self, device: torch.device) -> None:
        """Meet the others; on the thread that will train.

        Args:
            device: Of this rank.
        """
        import torch

        from . import nccl
        from .parallelism.group import host_group, join

        cores = len(os.sched_getaffinity(0))
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", self.size))))
        if device.type == "cuda":
            torch.cuda.set_device(device)
            nccl.observe()
        join(device)
        self._group = host_group()
        self._word = torch.zeros((), dtype=torch.int64)

    def all_leave(self, asked: bool) -> bool:
        """Decide whether the run is left here; called by all ranks alike.

        Args:
            asked: Whether this rank has been asked to; only rank 0 is.
        """
        return bool(self._told(int(asked)))

    def tell(self, command: Start | None) -> None:
        """Have the others do what rank 0 does next.

        Args:
            command: None: the job is over.
        """
        import torch
        import torch.distributed as dist

        text = json.dumps(command.config.as_dict() if command is not None else None).encode()
        self._told(len(text))
        dist.broadcast(torch.frombuffer(bytearray(text), dtype=torch.uint8), 0, self._group)

    def hear(self) -> Start | None:
        """Wait for what comes next; None: the job is over."""
        import torch
        import torch.distributed as dist

        text = torch.empty(self._told(0), dtype=torch.uint8)
        dist.broadcast(text, 0, self._group)
        config = json.loads(bytes(text.tolist()))
        return None if config is None else Start(parse_config(config, "rank 0"))

    def let_go(self, device: torch.device) -> None:
        """Have NCCL let go of what its last collectives were given; called by all ranks alike, after a run.

        It keeps the tensors of a collective that nobody has waited for by name, as DDP's
        are, until the next one after its watchdog has seen the end of it.

        Args:
            device: Of this rank.
        """
        import torch
        import torch.distributed as dist

        if device.type != "cuda":
            return
        for _ in range(2):
            torch.cuda.synchronize(device)
            threading.Event().wait(WATCHDOG_LOOKS_S)
            dist.all_reduce(torch.zeros((), device=device))

    def _told(self, word: int) -> int:
        """Rank 0's number, on every rank."""
        import torch.distributed as dist
        from torch.utils._python_dispatch import _disable_current_modes

        with _disable_current_modes():  # the op tracker would take this for the run's
            self._word.fill_(word)
            dist.broadcast(self._word, 0, self._group)
            return int(self._word.item())


def peers_here() -> Peers | None:
    """The peers that the launcher's environment names; None: this process is no rank that `engine.job` has started."""
    if ORDER not in os.environ:
        return None
    rank, size, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return Peers(rank, size, local)
