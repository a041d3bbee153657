"""The order in which changes and combinations of them are predicted, each decided by what is known of others.

The search never waits for all that it has asked: a combination is chosen while the last answer before is still
missing, so that every core has something to do. Answers count in the order of the questions, and which is
missing when the next question is chosen does not depend on how long any of them takes: the search asks the same
on every machine.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product

from .. import techniques
from ..config import RunConfig, UserError
from ..technique import Effect
from .outcome import Prediction
from .outlook import Change, Combination, Outlook

LARGEST_COMBINATION = 4
MOST_COMBINATIONS = 8
"""For each effect."""

AHEAD = 2
"""Questions that wait for an answer at once, of those that are chosen by others' answers."""

LEAST_GAIN = 0.01
"""Share of the peak that a combination has to promise beyond the best known, to be predicted."""

MOST_PESSIMISM = 0.1
"""Share of the peak: a combination expected to be worse than the best by more is not predicted."""


class CombinationSearch:
    """One search, from the changes alone to their combinations.

    Args:
        config: The run as it is.
        now: Its prediction.
        effects: The changes that may help and their effect, those first that take longest to predict.

    Attributes:
        outlook: What is known.
    """

    def __init__(self, config: RunConfig, now: Prediction, effects: Mapping[Change, Effect]) -> None:
        self._config, self._effects = config, effects
        self.outlook = Outlook(now)
        self._asked: set[Combination] = {Combination()}
        self._awaited: deque[Combination] = deque()
        self._of_effect = dict.fromkeys(sorted({*effects.values()}), 0)
        self._pairs_asked = False

    @property
    def alone_is_known(self) -> bool:
        """True if every change that can be made alone has been answered."""
        return self._pairs_asked and not any(len(one) == 1 for one in self._awaited)

    def alone(self) -> list[RunConfig]:
        """Each change by itself, where it can be."""
        return self._ask([Combination((change,)) for change in self._effects if self._is_allowed([change])])

    def learn(self, answer: Prediction | UserError) -> list[RunConfig]:
        """Take in the next answer, in the order of the questions, and choose what else to ask."""
        one = self._awaited.popleft()
        if isinstance(answer, Prediction):
            self.outlook.learn(one, answer)
        if len(self._awaited) >= AHEAD:
            return []
        asked = [] if self._pairs_asked else self._ask(self._beside_others())
        self._pairs_asked = True
        while len(self._awaited) < AHEAD and (more := self._next()) is not None:
            asked += self._ask([more])
        return asked

    def counts(self, one: Combination, least_bytes: int) -> bool:
        """True if it saves so much, and so much more than any part of it that is known."""
        known = self.outlook.known
        parts = (known[part].peak_bytes for part in one.parts() if part in known)
        return min(parts) - known[one].peak_bytes >= least_bytes

    def _ask(self, wanted: Sequence[Combination]) -> list[RunConfig]:
        new = [one for one in dict.fromkeys(wanted) if one not in self._asked]
        self._asked.update(new)
        self._awaited += new
        return [self._config.with_(one.settings) for one in new]

    def _is_allowed(self, changes: Sequence[Change]) -> bool:
        try:
            techniques.check(self._config.with_(Combination(changes).settings))
        except UserError:
            return False
        return True

    def _beside_others(self) -> list[Combination]:
        """Pairs of a change that cannot be by itself and that one, of those it can be beside, that leaves the least."""
        known = self.outlook.known
        partners = sorted(self.outlook.changes, key=lambda change: known[Combination((change,))].peak_bytes)
        pairs = []
        for change in self._effects:
            if not self._is_allowed([change]):
                others = (other for other in partners if other.technique != change.technique)
                partner = next((other for other in others if self._is_allowed([change, other])), None)
                pairs += [Combination((change, partner))] if partner is not None else []
        return pairs

    def _next(self) -> Combination | None:
        """The combination that promises most of the effect that has had the fewest; None: none promises enough."""
        promised = {one: self.outlook.expected_peak_bytes(one) for one in self._combinations()}
        for effect in sorted(self._of_effect, key=lambda effect: (self._of_effect[effect], effect)):
            if self._of_effect[effect] < MOST_COMBINATIONS:
                one = self._most_promising(promised, effect)
                if one is not None:
                    self._of_effect[effect] += 1
                    return one
        return None

    def _combinations(self) -> Iterator[Combination]:
        """Combinations not asked for yet, of changes of different techniques that lower something."""
        by_technique: dict[str, list[Change]] = {}
        for change in self.outlook.useful(self._effects):
            by_technique.setdefault(change.technique, []).append(change)
        for size in range(2, LARGEST_COMBINATION + 1):
            for some in combinations(by_technique.values(), size):
                yield from (one for one in map(Combination, product(*some)) if one not in self._asked)

    def _most_promising(self, promised: Mapping[Combination, int], effect: Effect) -> Combination | None:
        """The combination most worth predicting among those with no more effect than this.

        Those expected to be better than the best known come first. When none is left, those follow that have one
        change more than the best and are not expected to be much worse: a change may turn out well where another
        has taken away what it is bad for. Of combinations that promise as much, the smallest is taken.
        """
        known = self.outlook.known
        best = min((one for one in known if self._effect(one) <= effect), key=lambda one: known[one].peak_bytes)
        peak = known[best].peak_bytes
        step = max(1, int(peak * LEAST_GAIN))
        allowed = {one: size for one, size in promised.items() if self._effect(one) <= effect}
        worth_it = [one for one, size in allowed.items() if size < peak - step]
        worth_it = worth_it or [
            one for one, size in allowed.items() if one > best and step < size - peak < peak * MOST_PESSIMISM
        ]
        foreseen = [one for one in self._awaited if all(self.outlook.knows(change) for change in one)]
        awaited = {one: self.outlook.expected_peak_bytes(one) for one in foreseen}
        for one in sorted(worth_it, key=lambda one: (promised[one] // step, len(one))):
            more = any(part < one and size - promised[one] < step for part, size in awaited.items())
            if not more and self._is_allowed([*one]):
                return one
        return None

    def _effect(self, one: Combination) -> Effect:
        return max((self._effects[change] for change in one), default=Effect.NONE)
