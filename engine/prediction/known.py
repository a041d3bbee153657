"""Predictions, and what is searched for among them, from wherever they are had soonest. Torch is for new ones."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache

from ..config import RunConfig, UserError
from .capacity import largest_that_fit
from .gpus import Gpu
from .libraries_loading import libraries_loading
from .outcome import Prediction
from .prediction_store import PredictionStore
from .predictor import Answer, PredictingProcess
from .several import several
from .warm_server import warm_process


def predicted(config: RunConfig, gpu: Gpu, rank: int | None = None) -> Prediction:
    """The prediction of `predict`: read if any process of this user has made it before, made and kept if not.

    Raises:
        UserError: As `predict`.
    """
    store = PredictionStore(gpu)
    found: Answer | None = store.get(config, rank)
    if found is None and (process := _warm()) is not None:
        found = process.predict(config, gpu, rank)
    if found is None:
        with libraries_loading():
            from .predict import predict

        found = predict(config, gpu, rank=rank)
        store.put(config, found.packed(), rank)
    if isinstance(found, UserError):
        raise found
    return found


@cache
def _warm() -> PredictingProcess | None:
    """A copy of the server that `gpumem-tui warm` has left, for this process's questions; None: there is none.

    A process that has torch needs none.
    """
    there = warm_process() if "torch" not in sys.modules else None
    return PredictingProcess(there=there) if there is not None else None


def largest_known(prediction: Prediction, predict: Callable[[RunConfig], Prediction], gpu: Gpu) -> dict[str, int]:
    """The result of `capacity.largest_that_fit`: read if any process of this user has searched before, kept if not."""
    store = PredictionStore(gpu)
    found = store.get_largest(prediction.config)
    if found is None:
        with several(gpu, predict) as processes:
            found = largest_that_fit(prediction, predict, gpu, processes.another())
        store.put_largest(prediction.config, found)
    return found
