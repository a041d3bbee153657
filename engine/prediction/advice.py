"""The changes of a configuration that help most: each predicted alone, then the most promising combinations.

Some changes help only together: with 4-bit weights alone a model may need more than without, since its
activations become float32, and with each layer checkpointed as well it needs least. All combinations are too
many to predict, so that what is known of some has to tell which others are worth it (`Outlook`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product

from .. import techniques
from ..config import RunConfig, UserError, Value, show
from ..technique import Effect, Technique
from .outcome import Prediction
from .outlook import LEAST_EFFECT, Change, Combination, Outlook

Answer = Prediction | UserError
PredictAll = Callable[[Sequence[RunConfig]], Sequence[Answer]]

LARGEST_COMBINATION = 4
MOST_ROUNDS, EACH_ROUND = 4, 2
"""In each, what promises most is predicted, and what comes of it is learnt from."""

LEAST_GAIN = 0.01
"""Share of the peak that a combination has to promise beyond the best known, to be predicted."""

MOST_PESSIMISM = 0.1
"""Share of the peak: a combination expected to be worse than the best by more is not predicted."""

LEAST_SAVING_BYTES = 1 << 20
"""A saving of less is none."""


@dataclass(frozen=True, slots=True)
class Advice:
    """A change of the configuration and what it would do.

    Attributes:
        changes: Settings by name.
        prediction: Of the changed run.
        saved_bytes: At the peak, against the run as it is.
        effect: On what is computed.
        costs: In time, traffic and the host's memory, in words.
    """

    changes: dict[str, Value]
    prediction: Prediction
    saved_bytes: int
    effect: Effect
    costs: str

    @property
    def text(self) -> str:
        """The settings as `--set` takes them."""
        return " ".join(f"{name}={show(value)}" for name, value in self.changes.items())


@dataclass(frozen=True, slots=True)
class Advised:
    """The changes found so far.

    Attributes:
        now: The run as it is.
        alone: Single changes that save something: what keeps the mathematics first, and of that the most.
        combined: Combinations in which every change counts, in the same order.
    """

    now: Prediction
    alone: list[Advice]
    combined: list[Advice]


def advise(config: RunConfig, predict_all: PredictAll) -> Advised:
    """Find the changes that save most at the predicted peak; see `stages`."""
    *_, found = stages(config, predict_all)
    return found


def stages(config: RunConfig, predict_all: PredictAll) -> Iterator[Advised]:
    """Find the changes that save most at the predicted peak, and tell of them as they become known.

    Args:
        config: The run as it is.
        predict_all: Predicts several configurations; an error for one that cannot run.

    Yields:
        The run as it is; with all single changes; with their combinations.

    Raises:
        UserError: The run as it is cannot be predicted.
    """
    search = _Search(config, predict_all)
    yield search.result()
    search.alone()
    yield search.result()
    search.beside_others()
    search.together()
    yield search.result()


def single_changes(config: RunConfig) -> Iterator[dict[str, Value]]:
    """Every value that can lower memory of every switch, possible or not, but for what may not train at all.

    Accumulation is at the same effective batch.
    """
    for technique in techniques.registry().values():
        overruled = technique.overruled(config)
        same = (config[technique.name], overruled[0] if overruled else None)
        for value in technique.savers:
            changes = {technique.name: value}
            if technique.name == "accumulation":
                parts, rest = divmod(int(value), config.integer("accumulation"))
                if rest or parts < 1 or config.batch_size % parts:
                    continue
                changes["batch_size"] = config.batch_size // parts
            if value not in same and (sound := _made_sound(config, changes)) is not None:
                yield sound


def could_help(now: Prediction, technique: Technique) -> bool:
    """True if what a technique acts on is a part of any phase's highest moment to speak of."""
    return acts_on_bytes(now, technique) >= LEAST_EFFECT * now.peak_bytes


def acts_on_bytes(now: Prediction, technique: Technique) -> int:
    """The most that the categories a technique acts on hold together, at the highest moment of any phase."""
    acts_on = [category.key for category in technique.acts_on]
    return max((sum(moment.get(key, 0) for key in acts_on) for moment in now.by_phase.values()), default=0)


def most_promising_first(now: Prediction, changes: Sequence[dict[str, Value]]) -> list[int]:
    """The order in which changes are worth being predicted: a value of each technique before another of any.

    Args:
        now: The run as it is; techniques that act on more of it come before others.
        changes: As `single_changes` gives them, a technique's switch first.

    Returns:
        Indices of all of them.
    """
    switches = [next(iter(change)) for change in changes]
    turn = [switches[:i].count(switch) for i, switch in enumerate(switches)]
    held = {switch: acts_on_bytes(now, techniques.registry()[switch]) for switch in set(switches)}
    return sorted(range(len(changes)), key=lambda i: (turn[i], -held[switches[i]]))


def _made_sound(config: RunConfig, changes: dict[str, Value]) -> dict[str, Value] | None:
    """A change with what it takes for it to train, which is loss scaling for float16; None: nothing would help."""
    for settings in (changes, {**changes, "loss_scaling": True}):
        if techniques.effect(config, config.with_(settings)) is not Effect.UNSOUND:
            return settings
    return None


class _Search:
    """One search, from the changes alone to their combinations.

    Args:
        config: The run as it is.
        predict_all: Predicts several configurations.
    """

    def __init__(self, config: RunConfig, predict_all: PredictAll) -> None:
        self._config, self._predict_all = config, predict_all
        answer = predict_all([config])[0]
        if isinstance(answer, UserError):
            raise answer
        self.now = answer
        self._outlook = Outlook(answer)
        self._asked: set[Combination] = {Combination()}
        self._effects: dict[Change, Effect] = {}
        for settings in single_changes(config):
            change = Change(tuple(settings.items()))
            if could_help(answer, techniques.registry()[change.technique]):
                self._effects[change] = techniques.effect(config, config.with_(settings))

    def alone(self) -> None:
        """Predict each change by itself, where it can be."""
        self._ask([Combination((change,)) for change in self._effects if self._is_allowed([change])])

    def beside_others(self) -> None:
        """Predict what cannot be by itself beside the change that leaves the least of those that it can be beside."""
        known = self._outlook.known
        partners = sorted(self._outlook.changes, key=lambda change: known[Combination((change,))].peak_bytes)
        pairs = []
        for change in self._effects:
            if not self._is_allowed([change]):
                others = (other for other in partners if other.technique != change.technique)
                partner = next((other for other in others if self._is_allowed([change, other])), None)
                pairs += [Combination((change, partner))] if partner is not None else []
        self._ask(pairs)

    def together(self) -> None:
        """Predict the combinations that promise most, again and again, until none promises more than what is known."""
        for _ in range(MOST_ROUNDS):
            promised = {one: self._outlook.expected_peak_bytes(one) for one in self._combinations()}
            wanted = [one for effect in Effect for one in self._most_promising(promised, effect)]
            if not wanted:
                return
            self._ask(wanted)

    def result(self) -> Advised:
        """The changes found so far."""
        found = [self._advice(one) for one in self._outlook.known if one and self._counts(one)]
        found.sort(key=lambda advice: (advice.effect, -advice.saved_bytes))
        single = {id(advice) for advice in found if sum(name in techniques.registry() for name in advice.changes) == 1}
        return Advised(
            self.now,
            [advice for advice in found if id(advice) in single],
            [advice for advice in found if id(advice) not in single],
        )

    def _is_allowed(self, changes: Sequence[Change]) -> bool:
        try:
            techniques.check(self._config.with_(Combination(changes).settings))
        except UserError:
            return False
        return True

    def _ask(self, wanted: Sequence[Combination]) -> None:
        new = [one for one in dict.fromkeys(wanted) if one not in self._asked]
        self._asked.update(new)
        answers = self._predict_all([self._config.with_(one.settings) for one in new])
        for one, answer in zip(new, answers, strict=True):
            if isinstance(answer, Prediction):
                self._outlook.learn(one, answer)

    def _combinations(self) -> Iterator[Combination]:
        """Combinations not asked for yet, of changes of different techniques that lower something."""
        by_technique: dict[str, list[Change]] = {}
        for change in self._outlook.useful(self._effects):
            by_technique.setdefault(change.technique, []).append(change)
        for size in range(2, LARGEST_COMBINATION + 1):
            for some in combinations(by_technique.values(), size):
                yield from (one for one in map(Combination, product(*some)) if one not in self._asked)

    def _most_promising(self, promised: Mapping[Combination, int], effect: Effect) -> list[Combination]:
        """The combinations most worth predicting among those with no more effect than this.

        Those expected to be better than the best known come first. When none is left, those follow that have one
        change more than the best and are not expected to be much worse: a change may turn out well where another
        has taken away what it is bad for. Of combinations that promise as much, the smallest is taken.
        """
        known = self._outlook.known
        best = min((one for one in known if self._effect(one) <= effect), key=lambda one: known[one].peak_bytes)
        peak = known[best].peak_bytes
        step = max(1, int(peak * LEAST_GAIN))
        allowed = {one: size for one, size in promised.items() if self._effect(one) <= effect}
        worth_it = [one for one, size in allowed.items() if size < peak - step]
        worth_it = worth_it or [
            one for one, size in allowed.items() if one > best and step < size - peak < peak * MOST_PESSIMISM
        ]
        chosen: list[Combination] = []
        for one in sorted(worth_it, key=lambda one: (promised[one] // step, len(one))):
            if len(chosen) == EACH_ROUND:
                break
            more = any(part < one and promised[part] - promised[one] < step for part in chosen)
            if not more and self._is_allowed([*one]):
                chosen.append(one)
        return chosen

    def _effect(self, one: Combination) -> Effect:
        return max((self._effects[change] for change in one), default=Effect.NONE)

    def _counts(self, one: Combination) -> bool:
        """True if it saves something, and more than any part of it that is known."""
        known = self._outlook.known
        parts = (known[part].peak_bytes for part in one.parts() if part in known)
        return min(parts) - known[one].peak_bytes >= LEAST_SAVING_BYTES

    def _advice(self, one: Combination) -> Advice:
        predicted = self._outlook.known[one]
        order = list(techniques.registry())
        ordered = sorted(one, key=lambda change: order.index(change.technique))
        settings = {name: value for change in ordered for name, value in change.settings}
        saved = self.now.peak_bytes - predicted.peak_bytes
        effect = techniques.effect(self._config, predicted.config)
        return Advice(settings, predicted, saved, effect, _costs(settings, predicted))


def _costs(changes: Mapping[str, Value], predicted: Prediction) -> str:
    words = techniques.costs(changes)
    if any(name.startswith("checkpointing") for name in changes):
        document = predicted.document
        layers = {layer for recompute in document.recomputes for layer in recompute.layers}
        tokens = predicted.config.batch_size * predicted.config.seq_len * predicted.config.integer("accumulation")
        flops = 2 * (document.parameters or 0) * tokens
        if layers:
            words.append(f"{len(layers)} layers are computed twice, up to {flops / 1e12:.3g} TFLOP more a step")
    if predicted.pinned_bytes:
        words.append(f"{predicted.pinned_bytes / 2**30:.2f} GiB of pinned host memory")
    if predicted.managed_bytes:
        words.append(f"up to {2 * predicted.managed_bytes / 2**30:.2f} GiB over PCIe a step, there and back")
    return "; ".join(words) or "nothing to speak of"
