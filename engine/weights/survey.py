"""One pass over a tensor: its extremes, whether all of it is finite, and which runs of it are measured.

A scale that covers a tensor or a row depends on its largest weight, which no
sample finds; so every weight is looked at once, as bits. Errors are averages,
for which a sample is enough if it holds the runs with the largest weights, of
which a few can make most of the error, and the rest in proportion.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..config import UserError
from .bits import RUN, Bits, as_float32, no_extremes, row_extremes, run_extremes
from .tensors import CHUNK, Geometry, WeightTensor, format_of, geometry

Floats = NDArray[np.float32]

SAMPLED_RUNS = 1024
"""Runs of 256 weights sampled in each tensor."""
ALWAYS = 4
"""One in so many of them are those with the largest weights."""
BLOCK = 64
"""Weights to one scale of NF4 and FP4."""
SQUARED_RUNS = 8192
"""At least so many of a tensor's runs, if it has them, tell the mean square of its weights."""
ALIKE_BITS = 3
"""Runs are alike whose largest weights agree to so many bits of the mantissa."""


@dataclass(frozen=True, slots=True)
class Part:
    """Runs of neighbouring weights that stand for `weight` times as many.

    Attributes:
        values: [n, RUN], or one row that is shorter.
        starts: Place of each run's first weight in the flat tensor.
        weight: Runs of the tensor to each of these.
    """

    values: Floats
    starts: NDArray[np.int64]
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Survey:
    """Figures of the whole tensor that every scheme needs.

    Attributes:
        tensor: Which.
        geometry: Its rows and columns.
        low: Of all weights, at most 0.
        high: Of all weights, at least 0.
        row_low: The same of each row [rows].
        row_high: The same of each row [rows].
        mean_square: Of its weights.
        typical: Median of its runs' largest magnitudes.
        absmax_mean: Mean over blocks of 64 weights of their largest magnitude.
        sample: Some runs that stand for all.
        exact: Whether all of the tensor is to be measured, and not the sample.
    """

    tensor: WeightTensor
    geometry: Geometry
    low: float
    high: float
    row_low: Floats
    row_high: Floats
    mean_square: float
    typical: float
    absmax_mean: float
    sample: tuple[Part, ...]
    exact: bool

    def parts(self) -> Iterator[Part]:
        """The parts to measure."""
        yield from _all_parts(self.tensor) if self.exact else self.sample


def survey(tensor: WeightTensor, exact: bool = False) -> Survey:
    """Pass over a tensor.

    Args:
        tensor: Which.
        exact: Whether all of it is to be measured.

    Raises:
        UserError: It cannot be read, or holds NaN or an infinity.
    """
    shape, form = geometry(tensor), format_of(tensor)
    by_run = no_extremes(-(-shape.numel // RUN), form)
    rows_are_runs = shape.columns % RUN == 0
    by_row = no_extremes(0 if rows_are_runs else shape.rows, form)
    squares = _Squares(tensor, 1 if exact else max(1, shape.whole_runs // SQUARED_RUNS))
    block_sum = 0.0
    for number, bits in enumerate(tensor.chunks()):
        start = number * CHUNK
        found = run_extremes(bits, form)
        if max(found.high.max(), found.low.max()) >= form.infinity:
            raise _not_finite(tensor, bits, start)
        by_run.merge(slice(start // RUN, start // RUN + len(found.high)), found)
        if not rows_are_runs:
            by_row.merge(*row_extremes(bits, shape.columns, start, form))
        squares.add(bits, start // RUN)
        if exact:
            block_sum += _block_absmax(as_float32(bits, tensor.read_as)).sum(dtype=np.float64)
    if rows_are_runs:
        by_row = by_run.over(shape.rows)
    largest = np.maximum(by_run.high, by_run.low)[: shape.whole_runs]
    sample = _sample(tensor, largest, bits)
    blocks = -(-shape.numel // BLOCK)
    row_low, row_high = -as_float32(by_row.low, tensor.read_as), as_float32(by_row.high, tensor.read_as)
    return Survey(
        tensor,
        shape,
        low=float(row_low.min()),
        high=float(row_high.max()),
        row_low=row_low,
        row_high=row_high,
        mean_square=squares.total(largest) / shape.numel,
        typical=float(np.median(as_float32(largest, tensor.read_as))) if len(largest) else np.inf,
        absmax_mean=block_sum / blocks if exact else _mean_absmax(sample),
        sample=sample,
        exact=exact,
    )


class _Squares:
    """The sum of a tensor's squares, from every so many-th of its runs."""

    def __init__(self, tensor: WeightTensor, stride: int) -> None:
        self.read_as, self.form = tensor.read_as, format_of(tensor)
        self.stride = stride | 1  # odd: never always the same columns
        self.of_runs: list[NDArray[np.float32]] = []
        self.rest = 0.0

    def add(self, bits: Bits, first_run: int) -> None:
        """A chunk that begins with that run."""
        whole = len(bits) // RUN
        runs = bits[: whole * RUN].reshape(whole, RUN)[-first_run % self.stride :: self.stride]
        values = as_float32(runs, self.read_as)
        self.of_runs.append((values * values).sum(1))
        self.rest += float(np.square(as_float32(bits[whole * RUN :], self.read_as), dtype=np.float64).sum())

    def total(self, largest: Bits) -> float:
        """Sum of squares of all runs, told by their largest weights from the runs added that are alike."""
        if not len(largest):
            return self.rest
        classes = (largest >> (self.form.mantissa_bits - ALIKE_BITS)).astype(np.int64)
        classes -= classes.min()
        bound = np.square(as_float32(largest, self.read_as), dtype=np.float64)
        seen = np.arange(0, len(largest), self.stride)
        squares = np.bincount(classes[seen], np.concatenate(self.of_runs), classes.max() + 1)
        bounds = np.bincount(classes[seen], bound[seen], classes.max() + 1)
        known = np.flatnonzero(bounds)
        if not len(known):
            return self.rest
        ratio = np.interp(np.arange(len(bounds)), known, squares[known] / bounds[known])
        return float((ratio * np.bincount(classes, bound, len(bounds))).sum()) + self.rest


def _block_absmax(values: Floats) -> Floats:
    flat = np.abs(values).reshape(-1)
    return np.maximum.reduceat(flat, np.arange(0, flat.size, BLOCK))


def _mean_absmax(sample: tuple[Part, ...]) -> float:
    blocks = [(part.weight, _block_absmax(part.values)) for part in sample]
    total = sum(weight * found.sum(dtype=np.float64) for weight, found in blocks)
    return float(total / sum(weight * len(found) for weight, found in blocks))


def _sample(tensor: WeightTensor, largest: Bits, last: Bits) -> tuple[Part, ...]:
    """The runs with the largest weights, and of all others, in the order of theirs, every so many-th.

    Args:
        tensor: Which.
        largest: Of each of its whole runs.
        last: Its last chunk, which ends with what is too short to be a run.
    """
    whole = len(largest)
    if whole <= SAMPLED_RUNS:
        return tuple(_all_parts(tensor))
    order = np.argsort(largest, kind="stable")
    always = SAMPLED_RUNS // ALWAYS
    others, some = whole - always, SAMPLED_RUNS - always
    picked = order[((np.arange(some) + 0.5) * (others / some)).astype(np.int64)]
    parts = [_part(tensor, picked, others / some), _part(tensor, order[others:], 1.0)]
    if short := len(last) % RUN:
        rest = as_float32(last[-short:].copy(), tensor.read_as)
        parts.append(Part(rest[None], np.array([whole * RUN])))
    return tuple(parts)


def _part(tensor: WeightTensor, runs: NDArray[np.int64], weight: float) -> Part:
    runs = np.sort(runs)
    return Part(as_float32(tensor.runs(runs), tensor.read_as), runs * RUN, weight)


def _all_parts(tensor: WeightTensor) -> Iterator[Part]:
    for number, bits in enumerate(tensor.chunks()):
        values, start = as_float32(bits, tensor.read_as), number * CHUNK
        whole = len(values) // RUN * RUN
        if whole:
            yield Part(values[:whole].reshape(-1, RUN), start + np.arange(0, whole, RUN))
        if len(values) > whole:
            yield Part(values[None, whole:], np.array([start + whole]))


def _not_finite(tensor: WeightTensor, bits: Bits, start: int) -> UserError:
    values = as_float32(bits, tensor.read_as)
    first = int(np.flatnonzero(~np.isfinite(values))[0])
    place = [int(i) for i in np.unravel_index(start + first, tensor.shape)]
    what = "NaN" if np.isnan(values[first]) else "an infinity"
    return UserError(f"{tensor.name} holds {what} at {place}: its weights cannot be quantized")
