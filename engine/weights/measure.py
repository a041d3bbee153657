"""A tensor under every scheme: how far off its weights come back, and how its codes are used."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from .piece import Piece, Pieces
from .report import Fidelity, TensorReport, known, short
from .scheme import Scheme
from .survey import Survey
from .totals import decibels

DENSITY_BINS = 1024


@dataclass
class _Sums:
    """Sums of one scheme, over the parts of a tensor."""

    seen: float = 0.0
    squares: float = 0.0
    row_squares: float = 0.0
    noise: float = 0.0
    largest: float = 0.0
    scale_signal: float = 0.0
    scale_noise: float = 0.0
    counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros(256))
    typical_counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros(256))
    typical_restored: NDArray[np.float64] = field(default_factory=lambda: np.zeros(256))

    def add(self, piece: Piece, scheme: Scheme) -> None:
        """Quantize a piece."""
        found = scheme.quantize(piece)
        error = piece.values - found.restored
        self.seen += piece.count
        self.squares += piece.squares
        if scheme.error_follows == "row":
            self.row_squares += piece.row_squares
        self.noise += piece.sum_of_squares(error)
        self.largest = max(self.largest, float(error.abs_().amax()))
        self.counts += piece.histogram(found.codes, 256)
        typical = slice(None) if scheme.elementwise else piece.typical
        codes = found.codes.reshape(found.restored.shape)[typical].reshape(-1)
        ascending = found.restored if found.ascending is None else found.ascending
        restored = ascending[typical].reshape(-1)
        self.typical_counts += torch.bincount(codes, minlength=256).numpy()
        self.typical_restored += torch.bincount(codes, restored, minlength=256).numpy()
        if found.scales is not None:
            ideal, stored = found.scales
            self.scale_signal += piece.sum_of_squares(ideal)
            self.scale_noise += piece.sum_of_squares(ideal - stored)

    def share(self, scheme: Scheme, survey: Survey) -> float:
        """The ratio of all weights' error to that of those measured.

        All rows' largest weights and the mean square of all weights are known.
        What is measured of some is told of all in proportion, since a few rows
        or runs can have most of the error.
        """
        if scheme.error_follows == "row" and self.row_squares:
            squares = survey.row_absmax.astype(np.float64) ** 2
            return float(squares.mean() * self.seen / self.row_squares)
        if scheme.error_follows == "weights" and self.squares:
            return survey.mean_square * self.seen / self.squares
        return 1.0


def measure(survey: Survey, schemes: Sequence[Scheme]) -> TensorReport:
    """Measure a tensor that has been surveyed."""
    rows, columns = survey.geometry.rows, survey.geometry.columns
    unsuited = {scheme.key: reason for scheme in schemes if (reason := scheme.unsuited(rows, columns))}
    sums = {scheme: _Sums() for scheme in schemes if scheme.key not in unsuited}
    whole = _Whole(survey)
    for piece, its_schemes, is_whole in _pieces(survey, list(sums)):
        if is_whole:
            whole.add(piece)
        for scheme in its_schemes:
            sums[scheme].add(piece, scheme)
    return whole.report({scheme.key: _fidelity(scheme, survey, its) for scheme, its in sums.items()}, unsuited)


def _pieces(survey: Survey, schemes: Sequence[Scheme]) -> Iterator[tuple[Piece, Sequence[Scheme], bool]]:
    """Pieces to measure, each with its schemes and whether moments are taken of it."""
    pieces = Pieces(survey)
    if survey.exact:
        yield from ((pieces.of(part), schemes, True) for part in survey.parts())
        return
    yield pieces.of_values(), [scheme for scheme in schemes if scheme.elementwise], True
    placed = [scheme for scheme in schemes if not scheme.elementwise]
    yield from ((pieces.of(part), placed, False) for part in survey.parts())


class _Whole:
    """Moments and density of a tensor, over its parts."""

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        self.sums = np.zeros(4)
        self.density = np.zeros(DENSITY_BINS)

    def add(self, piece: Piece) -> None:
        """One more piece, and what it stands for."""
        values, stands_for = piece.values.numpy(), piece.stands_for.numpy()
        square = values * values
        powers = (np.ones_like(values), values, square * values, square * square)
        self.sums += [stands_for @ power.sum(1, dtype=np.float64) for power in powers]
        low, high = self.survey.low, self.survey.high
        bins = ((piece.values - low) * (DENSITY_BINS / ((high - low) or 1.0))).to(torch.int16)
        self.density += piece.histogram(bins.clamp_(max=DENSITY_BINS - 1), DENSITY_BINS)

    @property
    def seen(self) -> float:
        """Weights that have been added, or are stood for."""
        return float(self.sums[0])

    def report(self, schemes: dict[str, Fidelity], unsuited: dict[str, str]) -> TensorReport:
        """The report of everything added."""
        first, third, fourth = (self.sums[1:] / self.seen).tolist()
        second = self.survey.mean_square
        variance = max(second - first**2, 0.0)
        std = math.sqrt(variance)
        central = fourth - 4 * first * third + 6 * first**2 * second - 3 * first**4
        survey, tensor = self.survey, self.survey.tensor
        return TensorReport(
            name=tensor.name,
            shape=tensor.shape,
            dtype=tensor.dtype,
            parameters=survey.geometry.numel,
            transposed=tensor.transposed,
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


def _fidelity(scheme: Scheme, survey: Survey, sums: _Sums) -> Fidelity:
    rows, columns = survey.geometry.rows, survey.geometry.columns
    signal = survey.mean_square
    noise = sums.noise / sums.seen * sums.share(scheme, survey)
    codes = list(scheme.codes)
    shares = sums.counts[codes] / sums.seen
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
