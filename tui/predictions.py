"""What the screens ask of whoever can tell a peak before a run."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple, Protocol

from ..engine.config import RunConfig, UserError
from ..engine.events import Environment
from ..engine.prediction.gpus import Gpu, gpu
from ..engine.predictor import Predictor

WITHOUT_A_GPU = "H100 80GB"
"""Which GPU is asked about where there is none, if nobody says."""

REMEMBERED = 24
"""Wishes that are not answered yet; older ones are those of a screen long left."""


class Prediction(NamedTuple):
    """Of one configuration.

    Attributes:
        peak_bytes: Highest allocated during a step.
        fits: Whether the device holds it; None: not known.
    """

    peak_bytes: int
    fits: bool | None


class Predictions(Protocol):
    """Somebody who predicts.

    Attributes:
        gpu_name: For which GPU; empty: not known yet.
    """

    gpu_name: str

    def of(self, config: RunConfig) -> Prediction | None:
        """What is known of a configuration; returns at once, None while it is being worked out."""
        ...


class Background:
    """Predicts in a process of its own, what was asked for last first.

    Args:
        wanted: Name of the GPU to predict for; empty: the one of the engine,
            or `WITHOUT_A_GPU`.

    Raises:
        UserError: No such GPU.
    """

    def __init__(self, wanted: str = "") -> None:
        self._gpu = gpu(wanted) if wanted else None
        self._predictor: Predictor | None = None
        self._asked: dict[str, RunConfig] = {}
        self.gpu_name = ""

    def see(self, environment: Environment | None) -> None:
        """Know the engine's device."""
        if environment is None or self._predictor is not None:
            return
        target = self._gpu or gpu_of(environment)
        self.gpu_name, self._predictor = target.name, Predictor(target)

    def of(self, config: RunConfig) -> Prediction | None:
        """What is known; a wish if nothing is."""
        if self._predictor is None:
            return None
        answer = self._predictor.get(config)
        key = repr(config)
        if answer is not None:
            self._asked.pop(key, None)
            return None if isinstance(answer, UserError) else Prediction(answer.peak_bytes, answer.fits)
        if key not in self._asked:
            self._asked[key] = config
            for old in list(self._asked)[:-REMEMBERED]:
                del self._asked[old]
            self._predictor.want(list(self._asked.values()))
        return None

    def close(self) -> None:
        """End the process."""
        if self._predictor is not None:
            self._predictor.close()


def gpu_of(environment: Environment) -> Gpu:
    """The engine's GPU with the memory it really has; without one, `WITHOUT_A_GPU`."""
    if not environment.on_gpu:
        return gpu(WITHOUT_A_GPU)
    memory = environment.device_total_bytes
    try:
        return replace(gpu(environment.device_name.removeprefix("NVIDIA ")), memory_bytes=memory)
    except UserError:
        major, _, minor = (environment.capability or "8.0").partition(".")
        alike = gpu("A100 80GB" if major == "8" else WITHOUT_A_GPU)
        return replace(
            alike, name=environment.device_name, memory_bytes=memory, capability=(int(major), int(minor or 0))
        )  # fmt: skip
