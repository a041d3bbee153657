"""A tensor under every scheme: how far off its weights come back, and how its codes are used."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from .bits import RUN
from .scheme import Piece, Scheme, piece_of
from .survey import Part, Survey

DENSITY_BINS = 256


@dataclass(frozen=True, slots=True)
class Fidelity:
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
        level_values: The mean weight that each level is restored to [levels]; NaN: not used.
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
    scales_sqnr_db: float | None
    shares: NDArray[np.float64]
    level_values: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Distribution:
    """A tensor's weights as they are.

    Attributes:
        mean: Of the weights.
        std: Their standard deviation.
        kurtosis: Fourth moment over the square of the second: 3 where they are normal.
        largest_sigma: The largest distance from the mean, in standard deviations.
        low: The smallest weight, at most 0.
        high: The largest, at least 0.
        density: Share of the weights in each of DENSITY_BINS equal bins from low to high.
    """

    mean: float
    std: float
    kurtosis: float
    largest_sigma: float
    low: float
    high: float
    density: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class TensorReport:
    """All that is known of one tensor.

    Attributes:
        name: Of its parameter.
        shape: Its own.
        dtype: How it is stored, by safetensors' name.
        distribution: Its weights.
        fidelity: By scheme's key.
        unsuited: Why it cannot be stored so, by scheme's key.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    distribution: Distribution
    fidelity: Mapping[str, Fidelity]
    unsuited: Mapping[str, str]

    @property
    def parameters(self) -> int:
        """Weights in it."""
        return math.prod(self.shape)


@dataclass
class _Sums:
    """Of one scheme, over the parts of a tensor."""

    noise: float = 0.0
    largest: float = 0.0
    scale_signal: float = 0.0
    scale_noise: float = 0.0
    counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros(256))
    restored: NDArray[np.float64] = field(default_factory=lambda: np.zeros(256))

    def add(self, piece: Piece, scheme: Scheme, weight: float) -> None:
        """Quantize a piece that stands for `weight` times as many."""
        found = scheme.quantize(piece)
        error = (piece.values - found.restored).reshape(-1)
        self.noise += weight * _squares(error)
        self.largest = max(self.largest, float(error.abs().amax()))
        codes = found.codes.reshape(-1)
        self.counts += weight * torch.bincount(codes, minlength=256).numpy()
        self.restored += weight * torch.bincount(codes, found.restored.reshape(-1), minlength=256).numpy()
        if found.scales is not None:
            ideal, stored = found.scales
            self.scale_signal += weight * _squares(ideal)
            self.scale_noise += weight * _squares(ideal - stored)


def _squares(values: torch.Tensor) -> float:
    """Their sum; in float32 over a run, in float64 over runs."""
    flat = values.reshape(-1)
    whole = len(flat) // RUN * RUN
    rows = flat[:whole].reshape(-1, RUN)
    return float((rows * rows).sum(1).sum(dtype=torch.float64) + flat[whole:].double().square().sum())


def measure(survey: Survey, schemes: Sequence[Scheme]) -> TensorReport:
    """Measure a tensor that has been surveyed."""
    rows, columns = survey.geometry.rows, survey.geometry.columns
    unsuited = {scheme.key: reason for scheme in schemes if (reason := scheme.unsuited(rows, columns))}
    sums = {scheme: _Sums() for scheme in schemes if scheme.key not in unsuited}
    whole = _Whole(survey)
    ordered = torch.from_numpy(_ordered(survey))
    for part in survey.parts():
        piece = piece_of(survey, part, ordered)
        whole.add(part, piece)
        for scheme, its in sums.items():
            its.add(piece, scheme, part.weight)
    found = {scheme.key: _fidelity(scheme, rows, columns, sums[scheme], whole) for scheme in sums}
    tensor = survey.tensor
    return TensorReport(tensor.name, tensor.shape, tensor.dtype, whole.distribution(), found, unsuited)


def _ordered(survey: Survey) -> NDArray[np.float32]:
    """Sampled weights in ascending order; of the runs with the largest weights only as many as is their share."""
    rarest = max(part.weight for part in survey.sample)
    chosen = [part.values[:: max(1, round(rarest / part.weight))].reshape(-1) for part in survey.sample]
    return np.sort(np.concatenate(chosen))


class _Whole:
    """Moments and density of a tensor, over its parts."""

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        self.sums = np.zeros(5)
        self.density = np.zeros(DENSITY_BINS)
        self.row_squares = 0.0

    def add(self, part: Part, piece: Piece) -> None:
        """One more part, which stands for `part.weight` times as many weights."""
        values = part.values
        square = values * values
        powers = (np.ones((1, 1)) * values.size, values, square, square * values, square * square)
        self.sums += [part.weight * power.sum(1).sum(dtype=np.float64) for power in powers]
        low, high = self.survey.low, self.survey.high
        found = torch.histc(piece.values, DENSITY_BINS, low, high if high > low else low + 1)
        self.density += part.weight * found.numpy()
        cut, bounds = piece.by_row()
        self.row_squares += part.weight * cut.shape[1] * _squares(bounds.abs().amax(1))

    @property
    def seen(self) -> float:
        """Weights that have been added, or are stood for."""
        return float(self.sums[0])

    def share(self, scheme: Scheme) -> float:
        """By how much more all weights err than those measured.

        All rows' largest weights and the mean square of all weights are known.
        What is measured of some is told of all in proportion, since a few rows
        or runs can have most of the error.
        """
        if scheme.error_follows == "row" and self.row_squares:
            rows = np.maximum(-self.survey.row_low, self.survey.row_high).astype(np.float64)
            return float((rows**2).mean() * self.seen / self.row_squares)
        if scheme.error_follows == "weights" and self.sums[2]:
            return self.survey.mean_square * self.seen / float(self.sums[2])
        return 1.0

    def distribution(self) -> Distribution:
        """Of everything added."""
        first, second, third, fourth = (self.sums[1:] / self.seen).tolist()
        variance = max(second - first**2, 0.0)
        std = math.sqrt(variance)
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        low, high = self.survey.low, self.survey.high
        return Distribution(
            mean=first,
            std=std,
            kurtosis=central / variance**2 if variance else 0.0,
            largest_sigma=max(high - first, first - low) / std if std else 0.0,
            low=low,
            high=high,
            density=self.density / self.seen,
        )


def _fidelity(scheme: Scheme, rows: int, columns: int, sums: _Sums, whole: _Whole) -> Fidelity:
    signal = whole.survey.mean_square
    noise = sums.noise / whole.seen * whole.share(scheme)
    codes = list(scheme.codes)
    shares = sums.counts[codes] / whole.seen
    used = shares[shares > 0]
    entropy = abs(float((used * np.log2(used)).sum()))
    with np.errstate(invalid="ignore", divide="ignore"):
        values = sums.restored[codes] / sums.counts[codes]
    size = scheme.storage_bytes(rows, columns)
    return Fidelity(
        storage_bytes=size,
        bits_per_parameter=8 * size / (rows * columns),
        sqnr_db=decibels(signal, noise),
        rmse=math.sqrt(noise),
        relative_rmse=math.sqrt(noise / signal) if signal else 0.0,
        largest_error=sums.largest,
        levels_used=len(used),
        levels=len(codes),
        entropy_bits=entropy,
        wasted_bits=scheme.code_bits - entropy,
        scales_sqnr_db=decibels(sums.scale_signal, sums.scale_noise) if sums.scale_signal else None,
        shares=shares,
        level_values=values,
    )


def decibels(signal: float, noise: float) -> float | None:
    """Their ratio; None: one of them is nothing."""
    return 10 * math.log10(signal / noise) if signal and noise else None
