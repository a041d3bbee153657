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


LARGEST = 1e8
"""Magnitude beyond which a number is no weight; a fourth power of it is a float32 still."""


class Format(NamedTuple):
    """A floating-point format.

    Attributes:
        unsigned: The integer as wide as it.
        signed: The same, with a sign.
        largest: Bits of the largest number that may be a weight; the infinities and NaN are above it.
        mantissa_bits: Of the fraction.
    """

    unsigned: np.dtype[Any]
    signed: np.dtype[Any]
    largest: int
    mantissa_bits: int

    @property
    def sign(self) -> int:
        """The bit of the sign."""
        return 1 << (8 * self.unsigned.itemsize - 1)


FORMATS = {
    "BF16": Format(np.dtype("<u2"), np.dtype("<i2"), 0x4CBE, 7),
    "F16": Format(np.dtype("<u2"), np.dtype("<i2"), 0x7BFF, 10),
    "F32": Format(np.dtype("<u4"), np.dtype("<i4"), 0x4CBEBC20, 23),
}
"""By safetensors' names; other formats are read as F32."""


def as_float32(bits: Bits, name: str) -> NDArray[np.float32]:
    """The numbers that the bits stand for."""
    if name == "BF16":
        wide = bits.astype("<u4")
        wide <<= 16
        return wide.view("<f4")
    return bits.view("<f2").astype("<f4") if name == "F16" else bits.view("<f4")


def magnitudes(bits: Bits, form: Format) -> Bits:
    """The bits of the numbers' magnitudes."""
    mask: Bits = bits & form.unsigned.type(form.sign - 1)
    return mask


def range_of(bits: Bits, form: Format) -> tuple[int, int]:
    """The bits of the largest number, and of the magnitude of the most negative one; both at least those of 0."""
    # As signed integers every negative number is below 0; as unsigned ones every one is above the sign's bit.
    return max(int(bits.view(form.signed).max()), 0), max(int(bits.max()) - form.sign, 0)


def run_maxima(found: Bits) -> Bits:
    """The largest of every RUN magnitudes of a flat array; the last ones may be fewer."""
    return np.maximum.reduceat(found, np.arange(0, len(found), RUN))


def row_maxima(found: Bits, columns: int, start: int) -> tuple[slice, Bits]:
    """The largest magnitudes of the rows of `columns` numbers that a part of a matrix touches.

    Args:
        found: The part's magnitudes, flat.
        columns: Of the matrix.
        start: Where in the matrix the part begins.

    Returns:
        Which rows, and the largest of each within this part.
    """
    first, last = start // columns, (start + len(found) - 1) // columns
    edges = np.maximum(np.arange(first, last + 1) * columns - start, 0)
    return slice(first, last + 1), np.maximum.reduceat(found, edges)
