"""The largest value that fits, in as few predictions as it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

RESOLUTION_BITS = 6
"""Numbers are told apart to one part in 64."""

MOST_EXPECTED = 4
"""Times that what is expected is believed."""


class Expectation(Protocol):
    """Expectations of numbers not asked for, from those that were."""

    def largest_between(self, low: int, high: int) -> int | None:
        """The largest number expected to fit, from one that fits on and below one that does not; None: no idea."""
        ...

    def is_confirmed(self, n: int) -> bool:
        """True if n came out as expected in everything, so that what is said of larger ones is as sure."""
        ...


class _NoExpectation:
    def largest_between(self, low: int, high: int) -> int | None:
        return None

    def is_confirmed(self, n: int) -> bool:
        return False


def largest(
    bound_at: Callable[[int], int],
    start: int,
    available: int,
    most: int,
    expectation: Expectation | None = None,
) -> int:
    """The largest n from 1 to `most` whose bound is within what is available.

    The bound grows with n, mostly along a straight line or a parabola, so the
    next n to try lies where the last two say that the limit is.

    Args:
        bound_at: Bytes needed at n; asked once for each n.
        start: First n to ask for.
        available: Bytes there are.
        most: Where to stop.
        expectation: Of numbers not asked for; None: nothing is expected.

    Returns:
        A number that fits, and up to 64 the largest; beyond, up to 1.6 % more
        would. 0 if not even 1 fits.
    """
    expected = expectation or _NoExpectation()
    known: dict[int, int] = {}
    low, high = 0, most + 1  # low fits, high does not, as far as is known
    n, tries = min(max(1, start), most), 0
    while high - low > max(1, low >> RESOLUTION_BITS):
        known[n] = bound_at(n)
        low, high = (n, high) if known[n] <= available else (low, n)
        told = expected.largest_between(low, high) if tries < MOST_EXPECTED else None
        if told == low == n and expected.is_confirmed(n):
            return n
        bracketed = low in known and high in known
        if told is not None:
            guess = told
        elif bracketed:
            # A line; if not, then a parabola; halving ends what neither describes.
            guess = (_on_line, _on_parabola, _halfway)[tries % 3](known, low, high, available)
        else:
            guess = _outwards(known, available)
        tries += told is not None or bracketed
        # That it is the largest is only known when one a little larger does not fit, or one expected to be it came so.
        step = max(1, low >> RESOLUTION_BITS)
        near_low = guess == low if told is not None else low <= guess < low + step
        guess = guess + step if near_low else guess
        n = min(max(guess, low + 1), most) if high > most else guess if low < guess < high else (low + high) // 2
    return low


def _outwards(known: dict[int, int], available: int) -> int:
    near = sorted(known, key=lambda n: abs(known[n] - available))[:2]
    if len(near) == 1:
        return near[0] * 2 if known[near[0]] <= available else near[0] // 2
    (n0, b0), (n1, b1) = ((n, known[n]) for n in near)
    return n0 + int((available - b0) * (n1 - n0) / (b1 - b0)) if b0 != b1 else 1 << 40


def _on_line(known: dict[int, int], low: int, high: int, available: int) -> int:
    return low + int((available - known[low]) * (high - low) / max(1, known[high] - known[low]))


def _on_parabola(known: dict[int, int], low: int, high: int, available: int) -> int:
    """Through the three points nearest to the limit."""
    n0, n1, n2 = sorted(known, key=lambda n: abs(known[n] - available))[:3]
    slope = (known[n1] - known[n0]) / (n1 - n0)
    bend = ((known[n2] - known[n1]) / (n2 - n1) - slope) / (n2 - n0)
    # known[n0] + slope·(n - n0) + bend·(n - n0)·(n - n1) = available
    b, c = slope - bend * (n0 + n1), known[n0] - available - slope * n0 + bend * n0 * n1
    root = b * b - 4 * bend * c
    if root < 0 or b + math.sqrt(root) <= 0:
        return (low + high) // 2
    return int(-2 * c / (b + math.sqrt(root)))


def _halfway(_known: dict[int, int], low: int, high: int, _available: int) -> int:
    return (low + high) // 2
