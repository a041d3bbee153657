"""The largest value that fits, in as few predictions as it takes."""

from __future__ import annotations

import math
from collections.abc import Callable

RESOLUTION_BITS = 6
"""Numbers are told apart to one part in 64."""


def largest(bound_at: Callable[[int], int], start: int, available: int, most: int) -> int:
    """The largest n from 1 to `most` whose bound is within what is available.

    The bound grows with n, mostly along a straight line or a parabola, so the
    next n to try lies where the last two say that the limit is.

    Args:
        bound_at: Bytes needed at n; asked once for each n.
        start: First n to ask for.
        available: Bytes there are.
        most: Where to stop.

    Returns:
        A number that fits, and up to 64 the largest; beyond, up to 1.6 % more
        would. 0 if not even 1 fits.
    """
    known: dict[int, int] = {}
    low, high = 0, most + 1  # low fits, high does not, as far as is known
    n = min(max(1, start), most)
    narrow = False  # the limit was guessed last time; if that has not halved the range, halve it
    while high - low > max(1, low >> RESOLUTION_BITS):
        width = high - low
        known[n] = bound_at(n)
        low, high = (n, high) if known[n] <= available else (low, n)
        guess = (low + high) // 2 if narrow and 2 * (high - low) > width else _guess(known, low, high, available)
        narrow = len(known) > 2
        n = min(max(guess, low + 1), high - 1)
    return low


def _guess(known: dict[int, int], low: int, high: int, available: int) -> int:
    """Where a parabola through the three points nearest to the limit meets it; through two, a line."""
    near = sorted(known, key=lambda n: abs(known[n] - available))[:3]
    if len(near) == 1:
        return near[0] * 2 if known[near[0]] <= available else near[0] // 2
    n0, n1 = near[:2]
    slope = (known[n1] - known[n0]) / (n1 - n0)
    bend = 0.0
    if len(near) == 3:
        bend = ((known[near[2]] - known[n1]) / (near[2] - n1) - slope) / (near[2] - n0)
    # known[n0] + slope·(n - n0) + bend·(n - n0)·(n - n1) = available
    a, b, c = bend, slope - bend * (n0 + n1), known[n0] - available - slope * n0 + bend * n0 * n1
    root = b * b - 4 * a * c
    if b + math.sqrt(max(root, 0.0)) <= 0 or root < 0:
        return high - 1
    guess = int(-2 * c / (b + math.sqrt(root)))
    # That it is the largest is only known when one a little larger does not fit.
    step = max(1, low >> RESOLUTION_BITS)
    return guess + step if low <= guess < low + step else guess
