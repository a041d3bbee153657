"""What was measured, as JSON: one document of a model, or a line for each tensor as it is measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .measure import Fidelity, TensorReport
from .scheme import Scheme
from .totals import propose, total

SCHEMA = "gpumem-weights/1"


def tensor_entry(report: TensorReport) -> dict[str, Any]:
    """A tensor's figures."""
    weights = report.distribution
    return {
        "name": report.name,
        "shape": list(report.shape),
        "dtype": report.dtype,
        "parameters": report.parameters,
        "mean": weights.mean,
        "std": weights.std,
        "kurtosis": weights.kurtosis,
        "largest_sigma": weights.largest_sigma,
        "min": weights.low,
        "max": weights.high,
        "schemes": {key: _fidelity(found) for key, found in report.fidelity.items()},
        **({"unsuited": dict(report.unsuited)} if report.unsuited else {}),
    }


def _fidelity(found: Fidelity) -> dict[str, Any]:
    entry = {
        "bits_per_parameter": found.bits_per_parameter,
        "bytes": found.storage_bytes,
        "sqnr_db": found.sqnr_db,
        "rmse": found.rmse,
        "relative_rmse": found.relative_rmse,
        "largest_error": found.largest_error,
        "levels_used": found.levels_used,
        "levels": found.levels,
        "entropy_bits": found.entropy_bits,
        "wasted_bits": found.wasted_bits,
    }
    return entry if found.scales_sqnr_db is None else entry | {"scales_sqnr_db": found.scales_sqnr_db}


def picture_entry(report: TensorReport) -> dict[str, Any]:
    """What its pictures are drawn from: its density, and by scheme the share and the value of every level."""
    return {
        "density": _short(report.distribution.density),
        "levels": {
            key: {"shares": _short(found.shares), "values": _short(found.level_values)}
            for key, found in report.fidelity.items()
        },
    }


def _short(values: NDArray[np.float64]) -> list[float | None]:
    """To four digits; None: not a number."""
    return [None if math.isnan(value) else float(f"{value:.4g}") for value in values.tolist()]


def total_entry(reports: Sequence[TensorReport], schemes: Iterable[Scheme]) -> dict[str, Any]:
    """The tensors that are quantized, together, and under the schemes a run can have what to keep in 16 bit."""
    schemes = list(schemes)
    added = ((scheme.key, total(reports, scheme)) for scheme in schemes)
    totals = {key: found.as_entry() for key, found in added if found is not None}
    keep = {
        scheme.key: found.as_entry() for scheme in schemes if scheme.setting and (found := propose(reports, scheme))
    }
    return {
        "tensors": len(reports),
        "parameters": sum(report.parameters for report in reports),
        "schemes": totals,
        "keep": keep,
    }
