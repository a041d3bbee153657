"""A tensor under every scheme: how far off its weights come back, and how its codes are used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from .bits import RUN
from .piece import Piece, piece_of
from .report import Fidelity, TensorReport, known, short
from .scheme import Scheme
from .survey import Part, Survey
from .totals import decibels

DENSITY_BINS = 1024


@dataclass
class _Sums:
    """Sums of one scheme, over the parts of a tensor."""

    noise: float = 0.0
    largest: float = 0.0
    scale_signal: float = 0.0
    scale_noise: float = 0.0
    counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros(256))
    typical_counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros(256))
    typical_restored: NDArray[np.float64] = field(default_factory=lambda: np.zeros(256))

    def add(self, piece: Piece, scheme: Scheme, weight: float) -> None:
        """Quantize a piece that stands for `weight` times as many."""
        found = scheme.quantize(piece)
        error = (piece.values - found.restored).reshape(-1)
        self.noise += weight * _squares(error)
        self.largest = max(self.largest, float(error.abs().amax()))
        codes = found.codes.reshape(-1)
        self.counts += weight * torch.bincount(codes, minlength=256).numpy()
        typical = slice(None) if scheme.error_follows == "nothing" else piece.typical
        codes = codes.reshape(found.restored.shape)[typical].reshape(-1)
        restored = found.restored[typical].reshape(-1)
        self.typical_counts += torch.bincount(codes, minlength=256).numpy()
        self.typical_restored += torch.bincount(codes, restored, minlength=256).numpy()
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
    return whole.report(
        {scheme.key: _fidelity(scheme, rows, columns, sums[scheme], whole) for scheme in sums}, unsuited
    )


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
        """The ratio of all weights' error to that of those measured.

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

    def report(self, schemes: dict[str, Fidelity], unsuited: dict[str, str]) -> TensorReport:
        """The report of everything added."""
        first, second, third, fourth = (self.sums[1:] / self.seen).tolist()
        variance = max(second - first**2, 0.0)
        std = math.sqrt(variance)
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        survey, tensor = self.survey, self.survey.tensor
        return TensorReport(
            name=tensor.name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            parameters=survey.geometry.numel,
            mean=first,
            std=std,
            kurtosis=central / variance**2 if variance else 0.0,
            largest_sigma=max(survey.high - first, first - survey.low) / std if std else 0.0,
            low=survey.low,
            high=survey.high,
            schemes=schemes,
            unsuited=unsuited,
            density=short(self.density / self.seen),
        )


def _fidelity(scheme: Scheme, rows: int, columns: int, sums: _Sums, whole: _Whole) -> Fidelity:
    signal = whole.survey.mean_square
    noise = sums.noise / whole.seen * whole.share(scheme)
    codes = list(scheme.codes)
    shares = sums.counts[codes] / whole.seen
    used = shares[shares > 0]
    entropy = abs(float((used * np.log2(used)).sum()))
    with np.errstate(invalid="ignore", divide="ignore"):
        values = sums.typical_restored[codes] / sums.typical_counts[codes]
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
        shares=short(shares),
        level_values=known(values),
    )
