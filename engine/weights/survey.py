"""One pass over a tensor: its extremes, whether all of it is finite, and what of it is measured.

A scale that covers a tensor or a row depends on its largest weight, which no
sample finds; so every weight is looked at once, as bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
from numpy.typing import NDArray

from ..config import UserError
from .bits import LARGEST, RUN, Bits, as_float32, magnitudes, range_of, row_maxima, run_maxima
from .sample import SAMPLED_RUNS, Floats, Part, Tail, Values, all_parts, by_value, sampled
from .tensors import CHUNK, Geometry, WeightTensor, format_of, geometry

BLOCK = 64
"""Weights to one scale of NF4 and FP4."""
SQUARED_RUNS = 16384
"""At least so many of a tensor's runs, if it has them, tell the mean square of its weights."""
ALIKE_BITS = 3
"""Runs are alike whose largest weights agree to so many bits of the mantissa."""


@dataclass(frozen=True, slots=True)
class Survey:
    """Figures of the whole tensor that every scheme needs.

    Attributes:
        tensor: Which.
        geometry: Its rows and columns.
        low: Of all weights, at most 0.
        high: Of all weights, at least 0.
        row_absmax: Largest magnitude of each row [rows].
        mean_square: Of its weights.
        typical: Median of its runs' largest magnitudes.
        absmax_mean: Mean over blocks of 64 weights of their largest magnitude.
        sample: Some runs that stand for all.
        values: What stands for all of them where places do not matter.
        exact: Whether all of the tensor is to be measured, and not the sample.
    """

    tensor: WeightTensor
    geometry: Geometry
    low: float
    high: float
    row_absmax: Floats
    mean_square: float
    typical: float
    absmax_mean: float
    sample: tuple[Part, ...]
    values: Values
    exact: bool

    def parts(self) -> Iterator[Part]:
        """The parts to measure."""
        yield from all_parts(self.tensor) if self.exact else self.sample


def survey(tensor: WeightTensor, exact: bool = False) -> Survey:
    """Pass over a tensor.

    Args:
        tensor: Which.
        exact: Whether all of it is to be measured.

    Raises:
        UserError: It cannot be read, or holds NaN or an infinity.
    """
    shape = geometry(tensor)
    extremes = _Extremes(tensor, shape)
    squares = _Squares(tensor, 1 if exact else max(1, shape.whole_runs // SQUARED_RUNS))
    tail = Tail(tensor) if shape.whole_runs > SAMPLED_RUNS else None
    block_sum = 0.0
    for number, bits in enumerate(tensor.chunks()):
        extremes.add(bits, number * CHUNK)
        squares.add(bits, number * CHUNK // RUN)
        if tail is not None:
            tail.add(bits)
        if exact:
            block_sum += _block_absmax(as_float32(bits, tensor.read_as)[None]).sum(dtype=np.float64)
    largest = extremes.of_runs[: shape.whole_runs]
    row_absmax = as_float32(extremes.of_rows(), tensor.read_as)
    sample = sampled(tensor, largest, row_absmax, bits[len(bits) // RUN * RUN :].copy())
    low, high = extremes.bounds()
    return Survey(
        tensor,
        shape,
        low=low,
        high=high,
        row_absmax=row_absmax,
        mean_square=squares.total(largest, sample) / shape.numel,
        typical=_median(largest, tensor.read_as),
        absmax_mean=block_sum / -(-shape.numel // BLOCK) if exact else _mean_absmax(sample),
        sample=sample,
        values=_all_values(sample, tensor) if tail is None else tail.values(sample),
        exact=exact,
    )


class _Extremes:
    """The lowest and the highest weight, and the largest magnitude of each run and row, as bits.

    Attributes:
        of_runs: The last one may be shorter than a run [ceil(numel / RUN)].
    """

    def __init__(self, tensor: WeightTensor, shape: Geometry) -> None:
        self.tensor, self.shape, self.form = tensor, shape, format_of(tensor)
        self.of_runs = np.zeros(-(-shape.numel // RUN), self.form.unsigned)
        self._rows_are_runs = shape.columns % RUN == 0
        self._by_row = np.zeros(0 if self._rows_are_runs else shape.rows, self.form.unsigned)
        self._low = self._high = 0

    def add(self, bits: Bits, start: int) -> None:
        """A chunk that begins with that weight.

        Raises:
            UserError: It holds NaN or an infinity.
        """
        high, low = range_of(bits, self.form)
        if max(high, low) > self.form.largest:
            raise _no_weight(self.tensor, bits, start)
        self._high, self._low = max(self._high, high), max(self._low, low)
        found = magnitudes(bits, self.form)
        runs = run_maxima(found)
        self.of_runs[start // RUN : start // RUN + len(runs)] = runs
        if not self._rows_are_runs:
            rows, maxima = row_maxima(found, self.shape.columns, start)
            np.maximum(self._by_row[rows], maxima, out=self._by_row[rows])

    def of_rows(self) -> Bits:
        """Largest magnitude of each row [rows]."""
        return self.of_runs.reshape(self.shape.rows, -1).max(1) if self._rows_are_runs else self._by_row

    def bounds(self) -> tuple[float, float]:
        """The lowest weight, at most 0, and the highest, at least 0."""
        low, high = as_float32(np.array([self._low, self._high], self.form.unsigned), self.tensor.read_as)
        return 0.0 - float(low), float(high)  # not -0.0


class _Squares:
    """The sum of a tensor's squares, from every so many-th of its runs."""

    def __init__(self, tensor: WeightTensor, stride: int) -> None:
        self.read_as, self.form = tensor.read_as, format_of(tensor)
        # Runs begin at the same columns again after so many; never always at the same ones.
        recurring = (shape := geometry(tensor)).columns // math.gcd(shape.columns, RUN)
        self.stride = next(s for s in count(stride) if math.gcd(s, recurring) == 1)
        self.of_runs: list[NDArray[np.float32]] = []
        self.rest = 0.0

    def add(self, bits: Bits, first_run: int) -> None:
        """A chunk that begins with that run."""
        whole = len(bits) // RUN
        runs = bits[: whole * RUN].reshape(whole, RUN)[-first_run % self.stride :: self.stride]
        values = as_float32(runs, self.read_as)
        self.of_runs.append(np.einsum("rw,rw->r", values, values))
        self.rest += float(np.square(as_float32(bits[whole * RUN :], self.read_as), dtype=np.float64).sum())

    def total(self, largest: Bits, sample: tuple[Part, ...]) -> float:
        """Sum of squares of all runs, told by their largest weights from the runs added or sampled that are alike."""
        if not len(largest):
            return self.rest
        classes = (largest >> (self.form.mantissa_bits - ALIKE_BITS)).astype(np.int64)
        classes -= classes.min()
        bound = np.square(as_float32(largest, self.read_as), dtype=np.float64)
        sampled = [part for part in sample if part.bits.shape[1] == RUN and self.stride > 1]  # or all are known
        seen = np.concatenate([np.arange(0, len(largest), self.stride), *(part.starts // RUN for part in sampled)])
        of_seen = np.concatenate([*self.of_runs, *(np.square(part.values).sum(1) for part in sampled)])
        squares = np.bincount(classes[seen], of_seen, classes.max() + 1)
        bounds = np.bincount(classes[seen], bound[seen], classes.max() + 1)
        known = np.flatnonzero(bounds)
        if not len(known):
            return self.rest
        ratio = np.interp(np.arange(len(bounds)), known, squares[known] / bounds[known])
        return float((ratio * np.bincount(classes, bound, len(bounds))).sum()) + self.rest


def _block_absmax(runs: Floats) -> Floats:
    """The largest magnitude of each BLOCK weights of runs [n, w]: [n, ceil(w / BLOCK)]."""
    return np.maximum.reduceat(np.abs(runs), np.arange(0, runs.shape[1], BLOCK), axis=1)


def _mean_absmax(sample: tuple[Part, ...]) -> float:
    blocks = [(part.stands_for, _block_absmax(part.values)) for part in sample]
    total = sum(float(stands_for @ found.sum(1, dtype=np.float64)) for stands_for, found in blocks)
    return total / sum(float(stands_for.sum()) * int(found.shape[1]) for stands_for, found in blocks)


def _median(largest: Bits, read_as: str) -> float:
    if not len(largest):
        return np.inf
    middle = len(largest) // 2
    return float(as_float32(np.partition(largest, middle)[middle, None], read_as)[0])


def _all_values(parts: tuple[Part, ...], tensor: WeightTensor) -> Values:
    """The values of a tensor whose parts have all been taken."""
    bits = np.concatenate([part.bits.reshape(-1) for part in parts])
    return by_value(bits, np.ones(len(bits)), tensor)


def _no_weight(tensor: WeightTensor, bits: Bits, start: int) -> UserError:
    values = as_float32(bits, tensor.read_as)
    first = int(np.flatnonzero(~(np.abs(values) <= LARGEST))[0])
    shape = tensor.shape[::-1] if tensor.transposed else tensor.shape
    place = [int(i) for i in np.unravel_index(start + first, shape)]
    if tensor.transposed:
        place.reverse()
    what = "NaN" if np.isnan(values[first]) else "an infinity" if np.isinf(values[first]) else f"{values[first]:.3g}"
    return UserError(f"{tensor.name} holds {what} at {place}: its weights cannot be quantized")
