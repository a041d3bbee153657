"""The ranks of a job that is predicted: which hold the same, and what each comes to. Loads no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ..config import RunConfig
from ..report import RankFigures, of_job
from ..run import Run
from ..techniques.parallel import shard_ranks
from .outcome import Prediction

KINDS = 4
"""Groups of ranks that are told apart, at the most: beyond, a rank is counted to one that holds a little more."""

Shapes = Sequence[tuple[int, ...]]
"""Shapes of the trained parameters, in order."""


def alike(config: RunConfig, ranks: int, shapes: Shapes) -> tuple[tuple[int, ...], ...]:
    """Ranks in groups that hold the same, the fullest first.

    FSDP2's shards are of whole rows: of 10 rows four ranks have 3, 3, 3 and 1. The
    shard itself and its gradient are padded; optimizer state is not. ZeRO-1's
    and ZeRO-2's ranks keep the gradients of all parameters that lie in their partition, also of those
    that begin or end in another's; of stage 3 every parameter is padded to equal parts.

    Args:
        config: The run.
        ranks: Processes of the job.
        shapes: Of the trained parameters.
    """
    kind = config.text("parallel")
    if kind == "fsdp2":
        sharing, rows = shard_ranks(config, ranks), sorted({shape[0] for shape in shapes if shape})
        keys = [tuple(_rows_of(count, sharing, rank % sharing) for count in rows) for rank in range(ranks)]
    elif kind in ("zero1", "zero2"):
        keys = [(size,) for size in _in_partitions([math.prod(shape) for shape in shapes], ranks)]
    else:
        keys = [()] * ranks
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in sorted(range(ranks), key=lambda rank: keys[rank], reverse=True):
        groups.setdefault(keys[rank], []).append(rank)
    found = list(groups.values())
    told_apart = sorted({n * (len(found) - 1) // max(KINDS - 1, 1) for n in range(KINDS)})
    ends = [*told_apart[1:], len(found)]
    merged = (found[begin:end] for begin, end in zip(told_apart, ends, strict=True))
    return tuple(tuple(rank for group in some for rank in group) for some in merged)


def _rows_of(count: int, sharing: int, place: int) -> int:
    each = -(-count // sharing)
    return min(max(count - each * place, 0), each)


def _in_partitions(sizes: Sequence[int], ranks: int) -> list[int]:
    """By rank, the elements of all parameters that lie in its partition, or partly."""
    partition, found, at = max(1, -(-sum(sizes) // ranks)), [0] * ranks, 0
    for size in sizes:
        for rank in range(at // partition, min(ranks, (at + size - 1) // partition + 1)):
            found[rank] += size
        at += size
    return found


def each_kind(prediction: Prediction, predict: Callable[[int], Prediction]) -> list[Prediction]:
    """One prediction for each group of ranks that hold the same.

    Args:
        prediction: Of a rank of the first group.
        predict: Predicts another rank of the job.
    """
    return [prediction, *(predict(group[0]) for group in prediction.alike[1:])]


def figures(predictions: Sequence[Prediction]) -> list[RankFigures]:
    """A line for each rank of the job.

    Args:
        predictions: As `each_kind` returns them.
    """
    of_rank = _by_rank(predictions)
    documents = {rank: one.document for rank, one in of_rank.items()}
    return of_job(documents, {rank: one.outside_torch_bytes for rank, one in of_rank.items()}).ranks


def runs(predictions: Sequence[Prediction]) -> list[Run]:
    """The run of each rank of the job, rank 0's last; those that hold the same share their traces.

    Args:
        predictions: As `each_kind` returns them.
    """
    by_rank = _by_rank(predictions)
    return [_as_rank(by_rank[rank].run, rank) for rank in sorted(by_rank, reverse=True)]


def _by_rank(predictions: Sequence[Prediction]) -> dict[int, Prediction]:
    groups = predictions[0].alike
    return {rank: one for one, group in zip(predictions, groups, strict=True) for rank in group}


def _as_rank(run: Run, rank: int) -> Run:
    if rank == run.id.rank:
        return run
    other = Run(run.id._replace(rank=rank, device=f"cuda:{rank}"), run.config, run.environment, run.kind)
    for event in run.events():
        other.tell(event)
    other.keep(run.traces())
    return other
