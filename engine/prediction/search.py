"""The largest value that fits, in as few predictions as it takes."""

from __future__ import annotations

from collections.abc import Callable


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
        0 if not even 1 fits.
    """
    known: dict[int, int] = {}

    def fits(n: int) -> bool:
        known[n] = bound_at(n)
        return known[n] <= available

    low, high = 0, most + 1  # low fits, high does not, as far as is known
    n = min(max(1, start), most)
    while high - low > 1:
        if fits(n):
            low = n
        else:
            high = n
        n = _next(known, low, high, available)
    return low


def _next(known: dict[int, int], low: int, high: int, available: int) -> int:
    """Where the line through the two points nearest to the limit meets it."""
    points = sorted(known.items(), key=lambda point: abs(point[1] - available))[:2]
    if len(points) == 2:
        (n0, b0), (n1, b1) = points
        if b0 != b1:
            guess = n0 + int((available - b0) * (n1 - n0) / (b1 - b0))
            # At the guess the answer is not yet proven: the next one up has to fail.
            guess = guess + 1 if guess == low else guess
            return min(max(guess, low + 1), high - 1)
    ((n0, b0),) = points[:1]
    grown = n0 * 2 if b0 <= available else n0 // 2
    return min(max(grown, low + 1), high - 1)
