"""A rank of a job on the modelled device: torch's own code where it is Python, by rule where it is not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from ..parallelism import Parallelism
from ..parallelism.zero import ZeRO
from ..recipe import Recipe
from . import fake_zero3_hooks
from .cuda_patches import replace
from .fake_cuda import DEVICE, FakeCuda
from .fake_ddp import FakeDDP, Note, Repeated
from .fake_fsdp import fsdp_paths
from .fake_process_group import fake_process_group
from .fake_zero import FakeZeRO


@contextmanager
def fake_rank(parallelism: Parallelism, ranks: int, rank: int) -> Iterator[None]:
    """Be one rank of a job; enter it outside of fake mode, as groups and meshes keep tables of ranks that are read.

    Args:
        parallelism: Of the run.
        ranks: Processes of the job; 1: there is no job.
        rank: Which of them this is.
    """
    with fake_process_group(ranks, rank):
        parallelism.prepare(DEVICE)
        yield


@contextmanager
def rank_paths(recipe: Recipe, tracker: FakeCuda, repeated: Repeated, note: Note) -> Iterator[None]:
    """Have what trains on several GPUs do on the modelled device what it does on a GPU.

    Args:
        recipe: Of the run.
        tracker: The recorder.
        repeated: See `Repeated`.
        note: Told of buffers whose owner is known.
    """

    def ddp(module: Any, *_: Any, gradient_as_bucket_view: bool = False, **__: Any) -> FakeDDP:
        return FakeDDP(module, repeated, note, gradient_as_bucket_view, tracker.may_keep)

    with ExitStack() as undo:
        undo.enter_context(fsdp_paths(tracker))
        replace(undo, torch.nn.parallel, "DistributedDataParallel", ddp)
        if isinstance(recipe.parallelism, ZeRO):
            undo.callback(setattr, recipe, "parallelism", recipe.parallelism)
            recipe.parallelism = FakeZeRO(recipe.parallelism.settings, note)
            if recipe.parallelism.stage == 3:
                replace(undo, torch.nn.functional, "linear", fake_zero3_hooks.linear)
        yield
