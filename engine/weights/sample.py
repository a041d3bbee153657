"""Runs of a tensor that stand for all of it, and its values without their places.

Errors are averages, for which a sample is enough if runs with large weights, of
which a few can make most of the error, are in it more often, and count the less
for it. A scheme whose levels are the whole tensor's needs no places; what its
outermost levels lose is the error of few weights, so all of those are counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .bits import RUN, Bits, as_float32, magnitudes
from .tensors import CHUNK, WeightTensor, format_of, geometry

Floats = NDArray[np.float32]

SAMPLED_RUNS = 640
"""Runs of 256 weights sampled in each tensor."""
ALWAYS = 32
"""So many of them are those with the largest weights."""
EVEN_OUT = 4
"""Rounds in which the part of a sample that a few runs cannot fill is given to the others."""
TAIL = 1 / 256
"""Share of the weights that are counted one by one, of the lowest and the highest: what outermost quantiles leave."""


@dataclass(frozen=True, slots=True)
class Part:
    """Runs of neighbouring weights, each of which stands for some of the tensor's.

    Attributes:
        bits: As they are read: [n, RUN], or one row that is shorter.
        read_as: Their format.
        starts: Place of each run's first weight in the flat tensor [n].
        stands_for: Runs of the tensor that each of these stands for [n].
    """

    bits: Bits
    read_as: str
    starts: NDArray[np.int64]
    stands_for: NDArray[np.float64]

    @property
    def values(self) -> Floats:
        """The weights, converted anew: samples that wait do so in half the memory."""
        return as_float32(self.bits, self.read_as)


@dataclass(frozen=True, slots=True)
class Values:
    """Values of a tensor's weights, wherever they are.

    Attributes:
        values: Ascending [k].
        counts: Weights that have each, or are stood for by it [k].
    """

    values: Floats
    counts: NDArray[np.float64]

    def quantiles(self, shares: NDArray[np.float64]) -> Floats:
        """The values that such shares of the weights are below."""
        reached = np.cumsum(self.counts)
        places = np.searchsorted(reached, shares * reached[-1], side="right")
        found: Floats = self.values[np.minimum(places, len(self.values) - 1)]
        return found


class Tail:
    """The lowest and the highest weights of a tensor, gathered in a pass over it.

    Attributes:
        low: Bits of a magnitude: those more negative are gathered.
        high: The same of positive ones.
    """

    def __init__(self, tensor: WeightTensor) -> None:
        self.tensor, self.form = tensor, format_of(tensor)
        bits = tensor.glimpse().reshape(-1)
        ordered = bits[np.argsort(as_float32(bits, tensor.read_as))]
        outermost = int(TAIL / 2 * len(ordered))
        self.low, self.high = (
            int(end) & (self.form.sign - 1) if int(end) & self.form.sign == sign else 0
            for end, sign in ((ordered[outermost], self.form.sign), (ordered[-1 - outermost], 0))
        )
        self.parts: list[Bits] = []
        self.count, self.most = 0, max(int(4 * TAIL * geometry(tensor).numel), CHUNK)

    def add(self, bits: Bits) -> None:
        """Some of its weights."""
        self.parts.append(_few(bits, self._beyond(bits)))
        self.count += len(self.parts[-1])
        if self.count > self.most:
            self._shorten()

    def _beyond(self, bits: Bits) -> NDArray[np.bool_]:
        # As signed integers negative numbers are below all others; as unsigned ones above, the larger the further.
        found: NDArray[np.bool_] = bits.view(self.form.signed) > self.high
        found |= bits > self.form.sign + self.low
        return found

    def _shorten(self) -> None:
        """Leave out the smaller half: what was glimpsed is not what the tensor is like."""
        bits = np.concatenate(self.parts)
        middle = int(np.partition(magnitudes(bits, self.form), len(bits) // 2)[len(bits) // 2])
        self.low, self.high = max(self.low, middle), max(self.high, middle)
        self.parts = [bits[self._beyond(bits)]]
        self.count = len(self.parts[0])

    def values(self, sample: tuple[Part, ...]) -> Values:
        """All values: of the tail every one, of the others those sampled."""
        tail = np.concatenate(self.parts)
        bits = np.concatenate([part.bits.reshape(-1) for part in sample])
        each = np.concatenate([np.repeat(part.stands_for, part.bits.shape[1]) for part in sample])
        inner = np.flatnonzero(~self._beyond(bits))
        counts = each[inner] * ((geometry(self.tensor).numel - len(tail)) / each[inner].sum())
        return by_value(np.concatenate([bits[inner], tail]), np.concatenate([counts, np.ones(len(tail))]), self.tensor)


def _few(bits: Bits, chosen: NDArray[np.bool_]) -> Bits:
    """Those chosen, of which there are few: looked for among eights of which any is, in half the time."""
    whole = len(bits) // 8 * 8
    eights = np.flatnonzero(chosen[:whole].view(np.uint64) != 0)
    bits_of, chosen_of = (flat[:whole].reshape(-1, 8).take(eights, axis=0).reshape(-1) for flat in (bits, chosen))
    found = bits_of.take(np.flatnonzero(chosen_of))
    return np.concatenate([found, bits[whole:][chosen[whole:]]]) if whole < len(bits) else found


def by_value(bits: Bits, counts: NDArray[np.float64], tensor: WeightTensor) -> Values:
    """Weights in the order of their values, those of 16 bit that are equal together.

    Args:
        bits: Of the weights [k].
        counts: Weights that each stands for [k].
        tensor: Which they are of.
    """
    if bits.itemsize == 2:
        counted = np.bincount(bits, counts)
        bits = np.flatnonzero(counted).astype(bits.dtype)
        counts = counted[bits]
    values = as_float32(bits, tensor.read_as)
    order = np.argsort(values)
    return Values(values[order], counts[order])


def sampled(tensor: WeightTensor, largest: Bits, row_absmax: Floats, rest: Bits) -> tuple[Part, ...]:
    """Some runs, spread evenly over all of them in the order of their largest weights.

    Args:
        tensor: Which.
        largest: Bits of the magnitude of each whole run's largest weight.
        row_absmax: Of its rows.
        rest: What it ends with that is too short to be a run.
    """
    if len(largest) <= SAMPLED_RUNS:
        return tuple(all_parts(tensor))
    order = np.argsort(largest, kind="stable")
    rows = row_absmax[order * RUN // geometry(tensor).columns]
    chance = _chances(as_float32(largest[order], tensor.read_as), rows)
    reached = np.cumsum(chance, dtype=np.float64)
    picked = np.searchsorted(reached, np.arange(0.5, reached[-1]))
    by_place = picked[np.argsort(order[picked])]
    runs = order[by_place]
    parts = [Part(tensor.runs(runs), tensor.read_as, runs * RUN, 1 / chance[by_place].astype(np.float64))]
    if len(rest):
        parts.append(Part(rest[None], tensor.read_as, np.array([len(largest) * RUN]), np.ones(1)))
    return tuple(parts)


def _chances(largest: Floats, rows: Floats) -> Floats:
    """The probability of each run to be in the sample.

    In equal shares: alike for all, as errors are where one step is the whole
    tensor's; in proportion to the square of its largest weight, as where scales
    are blocks'; of its row's, as where they are rows'.

    Args:
        largest: Magnitude of each run's largest weight, ascending.
        rows: That of its row's.
    """
    scale = largest[-1] or 1.0  # the square of a float32 may be none
    errors: list[Floats] = [np.square(sizes / scale) for sizes in (largest, rows)]
    share = SAMPLED_RUNS / (len(errors) + 1)
    chance = np.full_like(largest, share / len(largest))
    for error in errors:
        chance += _in_proportion(error, share)
    chance[-ALWAYS:] = 1
    found: Floats = np.minimum(chance, 1)
    return found


def _in_proportion(error: Floats, count: float) -> Floats:
    """Chances in proportion to an error, that come to a count; what would be above 1 is given to the others."""
    most = np.float32(error.max())
    for _ in range(EVEN_OUT):
        most = np.float32(np.minimum(error, most).sum(dtype=np.float64) / count)
    return (np.minimum(error, most) / (most or 1)).astype(np.float32, copy=False)


def all_parts(tensor: WeightTensor) -> Iterator[Part]:
    """All of a tensor; each part is valid until the next is asked for."""
    for number, bits in enumerate(tensor.chunks()):
        start, whole = number * CHUNK, len(bits) // RUN * RUN
        if whole:
            starts = start + np.arange(0, whole, RUN)
            yield Part(bits[:whole].reshape(-1, RUN), tensor.read_as, starts, np.ones(len(starts)))
        if len(bits) > whole:
            yield Part(bits[None, whole:], tensor.read_as, np.array([start + whole]), np.ones(1))
