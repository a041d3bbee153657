"""Predictions, and what is searched for among them, from wherever they are had soonest. Torch is for new ones."""

from __future__ import annotations

from collections.abc import Callable

from ..config import RunConfig
from .capacity import largest_that_fit
from .gpus import Gpu
from .libraries_loading import libraries_loading
from .outcome import Prediction
from .prediction_store import PredictionStore
from .several import several


def predicted(config: RunConfig, gpu: Gpu, rank: int | None = None) -> Prediction:
    """The prediction of `predict`: read if any process of this user has made it before, made and kept if not.

    Raises:
        UserError: As `predict`.
    """
    store = PredictionStore(gpu)
    found = store.get(config, rank)
    if found is None:
        with libraries_loading():
            from .predict import predict

        found = predict(config, gpu, rank=rank)
        store.put(config, found.packed(), rank)
    return found


def largest_known(prediction: Prediction, predict: Callable[[RunConfig], Prediction], gpu: Gpu) -> dict[str, int]:
    """The result of `capacity.largest_that_fit`: read if any process of this user has searched before, kept if not."""
    store = PredictionStore(gpu)
    found = store.get_largest(prediction.config)
    if found is None:
        with several(gpu, predict) as processes:
            found = largest_that_fit(prediction, predict, gpu, processes.another())
        store.put_largest(prediction.config, found)
    return found
