"""A model under a scheme: what its tensors come to together, and which few of them should stay in 16 bit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .report import TensorReport
from .scheme import Scheme

STANDS_OUT_DB = 0.5
MOST_KEPT = 8
BYTES_IN_16_BIT = 2


def decibels(signal: float, noise: float) -> float | None:
    """Their ratio; None: one of them is nothing."""
    return 10 * math.log10(signal / noise) if signal and noise else None


@dataclass(frozen=True, slots=True)
class Total:
    """Totals over all tensors that are stored quantized.

    Attributes:
        parameters: Weights in them.
        storage_bytes: What they take.
        sqnr_db: Of all their weights together; None: there is no error.
        rmse: Of all their weights together.
        largest_error: Of any weight.
        levels_used: A mean over the weights.
        levels: That there are.
        entropy_bits: A mean over the weights.
        wasted_bits: A mean over the weights.
        worst: The tensor with the lowest SQNR; empty: none has any.
        worst_sqnr_db: Its SQNR.
        unsuited: How many tensors cannot be stored so, and are not in these figures.
    """

    parameters: int
    storage_bytes: int
    sqnr_db: float | None
    rmse: float
    largest_error: float
    levels_used: float
    levels: int
    entropy_bits: float
    wasted_bits: float
    worst: str
    worst_sqnr_db: float | None
    unsuited: int

    @property
    def bits_per_parameter(self) -> float:
        """Bits a parameter, every constant included."""
        return 8 * self.storage_bytes / self.parameters

    def as_entry(self) -> dict[str, Any]:
        """The totals as a document holds them."""
        return {
            "parameters": self.parameters,
            "bits_per_parameter": self.bits_per_parameter,
            "bytes": self.storage_bytes,
            "sqnr_db": self.sqnr_db,
            "rmse": self.rmse,
            "largest_error": self.largest_error,
            "levels_used": self.levels_used,
            "levels": self.levels,
            "entropy_bits": self.entropy_bits,
            "wasted_bits": self.wasted_bits,
            "worst": {"name": self.worst, "sqnr_db": self.worst_sqnr_db},
            "unsuited": self.unsuited,
        }


def total(reports: Sequence[TensorReport], scheme: Scheme) -> Total | None:
    """Add up; None if no tensor can be stored so."""
    suited = [(report, report.schemes[scheme.key]) for report in reports if scheme.key in report.schemes]
    if not suited:
        return None
    parameters = sum(report.parameters for report, _ in suited)

    def mean(values: Iterable[float]) -> float:
        return sum(report.parameters * value for (report, _), value in zip(suited, values, strict=True)) / parameters

    noise = mean(found.rmse**2 for _, found in suited)
    signal = mean(report.mean_square for report, _ in suited)
    rated = [(found.sqnr_db, report.name) for report, found in suited if found.sqnr_db is not None]
    worst_sqnr_db, worst = min(rated, default=(None, ""))
    return Total(
        parameters=parameters,
        storage_bytes=sum(found.storage_bytes for _, found in suited),
        sqnr_db=decibels(signal, noise),
        rmse=math.sqrt(noise),
        largest_error=max(found.largest_error for _, found in suited),
        levels_used=mean(found.levels_used for _, found in suited),
        levels=len(scheme.codes),
        entropy_bits=mean(found.entropy_bits for _, found in suited),
        wasted_bits=mean(found.wasted_bits for _, found in suited),
        worst=worst,
        worst_sqnr_db=worst_sqnr_db,
        unsuited=len(reports) - len(suited),
    )


@dataclass(frozen=True, slots=True)
class Proposal:
    """The tensors to keep in 16 bit under a scheme.

    Attributes:
        scheme: Its key.
        tensors: Names of their parameters, the worst first.
        added_bytes: What keeping them costs.
        worst_before_db: The lowest SQNR of any tensor without it.
        worst_after_db: The lowest of those still quantized.
    """

    scheme: str
    tensors: tuple[str, ...]
    added_bytes: int
    worst_before_db: float
    worst_after_db: float

    @property
    def skip(self) -> str:
        """The value of `quantization.skip` that keeps them."""
        return ",".join(name.removesuffix(".weight") for name in self.tensors)

    def as_entry(self) -> dict[str, Any]:
        """The proposal as a document holds it."""
        return {
            "tensors": list(self.tensors),
            "skip": self.skip,
            "added_bytes": self.added_bytes,
            "worst_before_db": self.worst_before_db,
            "worst_after_db": self.worst_after_db,
        }


def propose(reports: Sequence[TensorReport], scheme: Scheme) -> Proposal | None:
    """The worst tensors, down to the last that is set apart from the next by STANDS_OUT_DB; None if none is."""
    rated = sorted(
        (
            (found.sqnr_db, report)
            for report in reports
            if (found := report.schemes.get(scheme.key)) is not None and found.sqnr_db is not None
        ),
        key=lambda pair: pair[0],
    )
    apart = [i for i in range(1, min(MOST_KEPT + 1, len(rated))) if rated[i][0] - rated[i - 1][0] >= STANDS_OUT_DB]
    if not apart:
        return None
    kept = [report for _, report in rated[: apart[-1]]]
    added = sum(BYTES_IN_16_BIT * r.parameters - r.schemes[scheme.key].storage_bytes for r in kept)
    return Proposal(scheme.key, tuple(r.name for r in kept), added, rated[0][0], rated[len(kept)][0])
