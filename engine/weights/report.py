"""Reports of tensors: figures only, as they go from the process that measures to the one that shows them."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

PICTURES = ("density", "shares", "level_values")
"""Fields that are there to be drawn; documents do without."""


class Fidelity(msgspec.Struct, frozen=True, kw_only=True, rename={"storage_bytes": "bytes"}):
    """A tensor under one scheme.

    Attributes:
        storage_bytes: What it takes, with every constant.
        bits_per_parameter: The same, a weight.
        sqnr_db: Signal to quantization noise, 10 log10(sum w² / sum (w - w')²); None: there is no noise.
        rmse: Root of the mean squared error, in the weights' own unit.
        relative_rmse: The same over the root of the weights' mean square.
        largest_error: Of all weights measured.
        levels_used: Levels that any weight measured is stored as.
        levels: That there are.
        entropy_bits: Of the codes: what the weights would take at least, stored as these codes.
        wasted_bits: Of a code, beyond that.
        scales_sqnr_db: Double quantization's own: of the scales themselves; None elsewhere.
        shares: Of the weights at each level, from the lowest [levels].
        level_values: The mean weight that each level is restored to, where weights are about as large as most are
            [levels]; None: none of these is.
    """

    storage_bytes: int
    bits_per_parameter: float
    sqnr_db: float | None
    rmse: float
    relative_rmse: float
    largest_error: float
    levels_used: int
    levels: int
    entropy_bits: float
    wasted_bits: float
    scales_sqnr_db: float | None = None
    shares: tuple[float, ...] = ()
    level_values: tuple[float | None, ...] = ()


class TensorReport(msgspec.Struct, frozen=True, kw_only=True, rename={"low": "min", "high": "max"}):
    """A tensor: its weights as they are, and under every scheme.

    Attributes:
        name: Of its parameter.
        shape: Its own.
        dtype: How it is stored, by safetensors' name.
        parameters: Weights in it.
        transposed: Whether it is stored as inputs by outputs (Conv1D): schemes get its transpose.
        mean: Of the weights.
        std: Their standard deviation.
        kurtosis: Fourth moment over the square of the second: 3 where they are normal.
        largest_sigma: The largest distance from the mean, in standard deviations.
        low: The smallest weight, at most 0.
        high: The largest, at least 0.
        schemes: By scheme's key.
        unsuited: Why it cannot be stored so, by scheme's key.
        density: Share of the weights in each of equal bins from low to high.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    transposed: bool
    mean: float
    std: float
    kurtosis: float
    largest_sigma: float
    low: float
    high: float
    schemes: dict[str, Fidelity]
    unsuited: dict[str, str] = {}
    density: tuple[float, ...] = ()

    @property
    def mean_square(self) -> float:
        """Mean square of the weights."""
        return self.mean**2 + self.std**2


class ModelHead(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="model"):
    """A model before its tensors are measured.

    Attributes:
        model: What it is called.
        random: Whether its weights are drawn.
        exact: Whether every weight is measured, and not a sample.
        tensors: How many matrices it has.
        parameters: Weights in them.
        vectors: How many vectors there are besides: biases and norms, which nobody quantizes.
        left_out: Why others are not measured, by name.
        unavailable: Why schemes are not, by key.
    """

    model: str
    random: bool
    exact: bool
    tensors: int
    parameters: int
    vectors: int
    left_out: dict[str, str]
    unavailable: dict[str, str]


class Measured(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="tensor"):
    """One tensor has been measured."""

    report: TensorReport


class ModelEnd(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="end"):
    """The end of a model: all tensors have been measured.

    Attributes:
        architecture_known: Whether it could be told which of them a run would quantize.
        kept: Those that it would not.
    """

    architecture_known: bool
    kept: tuple[str, ...]


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="failed"):
    """It could not be done, in one line."""

    text: str


Entry = ModelHead | Measured | ModelEnd | Failed


def figures(report: TensorReport) -> dict[str, Any]:
    """A tensor as documents have it: without what its pictures are drawn from."""
    entry: dict[str, Any] = msgspec.to_builtins(report)
    for holder in (entry, *entry["schemes"].values()):
        for name in PICTURES:
            holder.pop(name, None)
    for fidelity in entry["schemes"].values():
        if fidelity["scales_sqnr_db"] is None:
            del fidelity["scales_sqnr_db"]
    return entry


def short(values: NDArray[np.float64]) -> tuple[float, ...]:
    """Numbers to four digits, which is what a picture needs."""
    return tuple(_rounded(values).tolist())


def known(values: NDArray[np.float64]) -> tuple[float | None, ...]:
    """The same of numbers some of which may be NaN: None."""
    return tuple(None if math.isnan(value) else value for value in _rounded(values).tolist())


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):  # log of 0
        unit = 10.0 ** np.clip(3 - np.floor(np.log10(np.abs(values))), -300, 300)
    rounded: NDArray[np.float64] = np.round(values * unit) / unit
    return rounded
