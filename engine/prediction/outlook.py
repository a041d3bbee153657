"""Expected peaks of combinations of changes, told from some that are known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from ..categories import Category
from ..config import Value
from ..events import Phase
from ..technique import Effect
from .outcome import Prediction

Moments = npt.NDArray[np.float64]
"""Bytes at the highest moment of each phase, shape [phases, categories]."""

BACKWARD, RECOMPUTE = (phase.name.lower() for phase in (Phase.BACKWARD, Phase.RECOMPUTE))

FLOOR_BYTES = float(1 << 20)
"""Added to each figure, so that what comes up from nothing has a share as well."""

LEAST_EFFECT = 0.005
"""Share of the peak: a change that lowers no phase by so much is of no use."""


@dataclass(frozen=True, slots=True)
class Change:
    """Settings that are changed together: a switch, and what has to go with it.

    Attributes:
        settings: The technique's switch first.
    """

    settings: tuple[tuple[str, Value], ...]

    @property
    def technique(self) -> str:
        """The name of the technique whose switch it is."""
        return self.settings[0][0]


class Combination(frozenset[Change]):
    """Changes of different techniques."""

    @property
    def ordered(self) -> list[Change]:
        """The changes by technique: a set's own order is another in every process, and advice would be with it."""
        return sorted(self, key=lambda change: change.technique)

    @property
    def settings(self) -> dict[str, Value]:
        """All settings of the changes, by name."""
        return {name: value for change in self.ordered for name, value in change.settings}

    def parts(self) -> Iterator[Combination]:
        """The combinations of some of its changes, largest first; the last is of none."""
        ordered, sizes = self.ordered, range(len(self) - 1, -1, -1)
        return map(Combination, chain.from_iterable(combinations(ordered, size) for size in sizes))


class Outlook:
    """Tells the peak of a combination from those that are known.

    A change makes of a category at the highest moment of a phase a certain share, alone about the same as
    beside others: shares below one are multiplied. Those above one are not, the largest counts: what makes
    activations float32 does so once. The more of a combination is known, the less is left to be told.

    Args:
        now: The run without a change.

    Attributes:
        known: What has been predicted.
    """

    def __init__(self, now: Prediction) -> None:
        self.known: dict[Combination, Prediction] = {Combination(): now}
        recomputes = any(now.by_phase.get(RECOMPUTE, {}).values())
        self._phases = [phase.name.lower() for phase in Phase if recomputes or phase is not Phase.RECOMPUTE]
        self._moments: dict[Combination, Moments] = {Combination(): self._moments_of(now)}
        self._shares: dict[Change, Moments] = {}
        self._expected: dict[Combination, int] = {}

    def learn(self, combination: Combination, prediction: Prediction) -> None:
        """Take in a combination's prediction; of a pair one of which is new, also that change's share."""
        self.known[combination] = prediction
        self._moments[combination] = self._moments_of(prediction)
        self._expected = {one: size for one, size in self._expected.items() if not combination < one}
        new = [change for change in combination.ordered if change not in self._shares]
        rest = Combination(combination - {*new})
        if len(new) == 1 and rest in self._moments:
            self._shares[new[0]] = self._moments[combination] / self._moments[rest]

    def knows(self, change: Change) -> bool:
        """True if it is known what a change does."""
        return change in self._shares

    @property
    def changes(self) -> list[Change]:
        """The changes whose own effect is known."""
        return [next(iter(one)) for one in self.known if len(one) == 1]

    def useful(self, effects: Mapping[Change, Effect]) -> list[Change]:
        """The changes that lower something, without those that one of the same technique and no more harm betters."""
        now, peak = self._moments[Combination()], self.known[Combination()].peak_bytes
        lowering = [
            change
            for change, shares in self._shares.items()
            if (now * (1 - np.minimum(shares, 1))).sum(axis=1).max() >= LEAST_EFFECT * peak
        ]
        useful: list[Change] = []
        for change in sorted(lowering, key=lambda change: effects[change]):
            rivals = [one for one in useful if one.technique == change.technique]
            if not any((self._shares[one] <= self._shares[change] * (1 + LEAST_EFFECT)).all() for one in rivals):
                useful.append(change)
        return useful

    def expected_peak_bytes(self, combination: Combination) -> int:
        """The peak expected of a combination whose changes are all known.

        Of its largest known parts that counts which promises most: what is not tried for a bad promise
        stays unknown, and what is tried for a good one does not.
        """
        found = self._expected.get(combination)
        if found is None:
            known = [part for part in combination.parts() if part in self._moments]
            found = min(self._expected_from(part, combination) for part in known if len(part) == len(known[0]))
            self._expected[combination] = found
        return found

    def _expected_from(self, part: Combination, combination: Combination) -> int:
        """The peak expected of a combination beside a part of it that is known."""
        shares = np.stack([self._shares[change] for change in combination.ordered if change not in part])
        together = np.minimum(shares, 1).prod(axis=0) * np.maximum(shares, 1).max(axis=0)
        return int((self._moments[part] * together).sum(axis=1).max())

    def _moments_of(self, prediction: Prediction) -> Moments:
        """The highest moments of a prediction; what is recomputed counts as the activations that it is.

        Where the run as it is recomputes nothing, the moment of doing so is a part of backward. Where it does, it
        has a row of its own, also if it is backward's highest.
        """
        found = prediction.by_phase
        if RECOMPUTE in self._phases:
            backward, recompute = found.get(BACKWARD, {}), found.get(RECOMPUTE, {})
            if backward.get(Category.RECOMPUTED.key) or not any(recompute.values()):
                recompute = max(backward, recompute, key=lambda row: sum(row.values()))
                backward = backward | {Category.RECOMPUTED.key: 0}
            found = found | {BACKWARD: backward, RECOMPUTE: recompute}
        rows: list[Any] = [found.get(phase, {}) for phase in self._phases]
        moments = np.array([[row.get(category.key, 0) for category in Category] for row in rows], np.float64)
        moments[:, Category.ACTIVATIONS] += moments[:, Category.RECOMPUTED]
        moments[:, Category.RECOMPUTED] = 0
        return moments + FLOOR_BYTES
