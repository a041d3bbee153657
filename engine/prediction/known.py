"""A prediction, from wherever it is had soonest. Loads no torch for one that is known."""

from __future__ import annotations

from ..config import RunConfig
from .gpus import Gpu
from .libraries_loading import libraries_loading
from .outcome import Prediction
from .prediction_store import PredictionStore


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
