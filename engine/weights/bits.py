"""Floats as the integers of their bits.

IEEE numbers of one sign are ordered as their bits are. So the largest and the
smallest of millions of 16-bit floats are found by comparing integers, at the
speed of memory and without converting anything; NaN and the infinities come
out as the largest of all.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bits = NDArray[Any]
"""Unsigned integers: the bits of floats in one of FORMATS."""

RUN = 256
"""Weights that are looked at together: neighbours, of whole blocks of every scheme."""


class Format(NamedTuple):
    """A floating-point format.

    Attributes:
        unsigned: The integer as wide as it.
        signed: The same, with a sign.
        infinity: Bits of the positive infinity; NaN is above it.
        mantissa_bits: Of the fraction.
    """

    unsigned: np.dtype[Any]
    signed: np.dtype[Any]
    infinity: int
    mantissa_bits: int

    @property
    def sign(self) -> int:
        """The bit of the sign."""
        return 1 << (8 * self.unsigned.itemsize - 1)


FORMATS = {
    "BF16": Format(np.dtype("<u2"), np.dtype("<i2"), 0x7F80, 7),
    "F16": Format(np.dtype("<u2"), np.dtype("<i2"), 0x7C00, 10),
    "F32": Format(np.dtype("<u4"), np.dtype("<i4"), 0x7F800000, 23),
}
"""By safetensors' names; other formats are read as F32."""


def as_float32(bits: Bits, name: str) -> NDArray[np.float32]:
    """The numbers that the bits stand for."""
    if name == "BF16":
        return (bits.astype("<u4") << 16).view("<f4")
    return bits.view("<f2").astype("<f4") if name == "F16" else bits.view("<f4")


class Extremes(NamedTuple):
    """The bits of the largest number, and of the magnitude of the most negative, from 0: one of each a group."""

    high: Bits
    low: Bits

    def merge(self, at: slice, other: Extremes) -> None:
        """Widen some of these groups by what else was found of them."""
        np.maximum(self.high[at], other.high, out=self.high[at])
        np.maximum(self.low[at], other.low, out=self.low[at])

    def over(self, groups: int) -> Extremes:
        """Extremes of `groups` larger groups, each of as many neighbouring ones."""
        return Extremes(self.high.reshape(groups, -1).max(1), self.low.reshape(groups, -1).max(1))


def no_extremes(groups: int, form: Format) -> Extremes:
    """Extremes of groups of which nothing has been seen."""
    return Extremes(np.zeros(groups, form.unsigned), np.zeros(groups, form.unsigned))


def _from_maxima(positive: Bits, negative: Bits, form: Format) -> Extremes:
    # As signed integers every negative number is below 0; as unsigned ones every one is above the sign's bit.
    sign = form.unsigned.type(form.sign)
    high = np.maximum(positive, 0).view(form.unsigned)
    return Extremes(high, np.where(negative >= sign, negative & ~sign, 0).astype(form.unsigned))


def run_extremes(bits: Bits, form: Format) -> Extremes:
    """Extremes of every RUN numbers of a flat array; the last ones may be fewer."""
    if len(bits) % RUN:
        bits = np.concatenate([bits, np.zeros(-len(bits) % RUN, bits.dtype)])
    runs = bits.reshape(-1, RUN)
    return _from_maxima(runs.view(form.signed).max(1), runs.max(1), form)


def row_extremes(bits: Bits, columns: int, start: int, form: Format) -> tuple[slice, Extremes]:
    """Extremes of the rows of `columns` numbers that a part of a matrix touches.

    Args:
        bits: The part, flat.
        columns: Of the matrix.
        start: Where in the matrix the part begins.
        form: Its format.

    Returns:
        Which rows, and what this part says of each.
    """
    first, last = start // columns, (start + len(bits) - 1) // columns
    edges = np.maximum(np.arange(first, last + 1) * columns - start, 0)
    positive = np.maximum.reduceat(bits.view(form.signed), edges)
    return slice(first, last + 1), _from_maxima(positive, np.maximum.reduceat(bits, edges), form)
