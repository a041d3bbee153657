"""The ranks of a job that is predicted: which hold the same, and what each comes to. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from ..config import RunConfig
from ..report import RankFigures, of_job
from ..run import Run
from ..techniques.parallel import shard_ranks
from .outcome import Prediction


def alike(config: RunConfig, ranks: int, rows: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    """Ranks in groups that hold the same, rank 0's first.

    Shards are of whole rows: of 10 rows four ranks have 3, 3, 3 and 1. The shard
    itself and its gradient are padded; optimizer state is not.

    Args:
        config: The run.
        ranks: Processes of the job.
        rows: First dimensions of the trained parameters.
    """
    if config.text("parallel") != "fsdp2":
        return (tuple(range(ranks)),)
    sharing, distinct = shard_ranks(config, ranks), sorted(set(rows))
    groups: dict[tuple[int, ...], list[int]] = {}
    for rank in range(ranks):
        key = tuple(_rows_of(count, sharing, rank % sharing) for count in distinct)
        groups.setdefault(key, []).append(rank)
    return tuple(map(tuple, groups.values()))


def _rows_of(count: int, sharing: int, place: int) -> int:
    each = -(-count // sharing)
    return min(max(count - each * place, 0), each)


def each_kind(prediction: Prediction, predict: Callable[[int], Prediction]) -> list[Prediction]:
    """One prediction for each group of ranks that hold the same.

    Args:
        prediction: Of rank 0.
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
