"""The fewest GPUs on which a run fits, and the way to use them that costs the least time. Loads no torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .. import techniques
from ..config import RunConfig, UserError, Value, show
from .outcome import Prediction

COUNTS = (1, 2, 4, 8, 16, 32, 64)

ALONE: tuple[dict[str, Value], ...] = ({"parallel": "none"}, {"parallel": "none", "checkpointing": "layers"})
TOGETHER: tuple[dict[str, Value], ...] = (
    {"parallel": "fsdp2"},
    {"parallel": "fsdp2", "checkpointing": "layers"},
    {"parallel": "fsdp2", "checkpointing": "layers", "parallel.offload": True},
)
"""Ways to train, the one that takes the least time first, and the least memory last.

A replica a GPU (DDP) is none: it takes more than one GPU alone, which is tried first.
"""


class Fewest(NamedTuple):
    """A number of GPUs, and how to train on them.

    Attributes:
        gpus: Number of them.
        changes: Settings by name, beside the number of ranks.
        prediction: Of the rank that holds most.
    """

    gpus: int
    changes: dict[str, Value]
    prediction: Prediction

    @property
    def words(self) -> str:
        """For people: `2 x RTX 4090: fsdp2 with checkpointing`."""
        parallel = show(self.changes["parallel"])
        details = sorted(name.removeprefix("parallel.") for name in self.changes if name != "parallel")
        words = [parallel] * (parallel != "none") + ["with " + " and ".join(details)] * bool(details)
        return f"{self.gpus} x {self.prediction.gpu}: {' '.join(words) or 'as it is'}"


def fewest_gpus(config: RunConfig, predict: Callable[[RunConfig], Prediction]) -> Fewest | None:
    """The fewest GPUs with which a run fits; None: it does not with the most that are tried.

    The batch is that of each rank.

    Args:
        config: The run.
        predict: Predicts one on the GPUs that are asked about.
    """

    def predicted(count: int, changes: dict[str, Value]) -> Fewest | None:
        """None: it cannot be run so."""
        wanted = config.with_(changes | {"parallel.ranks": count if count > 1 else 0})
        changed = {name: value for name, value in changes.items() if name == "parallel" or config[name] != value}
        try:
            techniques.check(wanted)
            return Fewest(count, changed, predict(wanted))
        except UserError:
            return None

    for count in COUNTS:
        ways = TOGETHER if count > 1 else ALONE
        thriftiest = next((found for way in reversed(ways) if (found := predicted(count, way))), None)
        if thriftiest is not None and thriftiest.prediction.fits:
            others = (predicted(count, way) for way in ways)
            return next((one for one in others if one and one.prediction.fits), thriftiest)
    return None
