"""The changes of a configuration that help most: each predicted alone, then the most promising combinations.

Some changes help only together: with 4-bit weights alone a model may need more than without, since its
activations become float32, and with each layer checkpointed as well it needs least. All combinations are too
many to predict, so that what is known of some has to tell which others are worth it (`Outlook`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .. import techniques
from ..config import RunConfig, UserError, Value, show
from ..technique import Effect, Technique
from .combination_search import CombinationSearch
from .outcome import Prediction
from .outlook import LEAST_EFFECT, Change, Combination
from .questions_in_order import Answer, Work

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


def advise(config: RunConfig, work: Work) -> Advised:
    """Find the changes that save most at the predicted peak; see `stages`."""
    *_, found = stages(config, work)
    return found


def stages(config: RunConfig, work: Work) -> Iterator[Advised]:
    """Find the changes that save most at the predicted peak, and tell of them as they become known.

    Args:
        config: The run as it is.
        work: Has configurations predicted, as `several.Several.work` does.

    Yields:
        The run as it is; with all single changes; with their combinations.

    Raises:
        UserError: The run as it is cannot be predicted.
    """
    search = _Advising(config)
    told = 0
    for _ in work([config], search.learn):
        while told < search.stage:
            told += 1
            yield search.result()
    while told < _STAGES:
        told += 1
        yield search.result()


def single_changes(config: RunConfig) -> Iterator[dict[str, Value]]:
    """Every value that can lower memory of every switch, possible or not, but for what may not train at all.

    Accumulation is at the same effective batch.
    """
    for technique in techniques.registry().values():
        for value in technique.savers(config):
            changes = {technique.name: value}
            if technique.name == "accumulation":
                parts, rest = divmod(int(value), config.integer("accumulation"))
                if rest or parts < 1 or config.batch_size % parts:
                    continue
                changes["batch_size"] = config.batch_size // parts
            if (sound := _made_sound(config, changes)) is not None:
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


_STAGES = 3


class _Advising:
    """A search from its first question to its advice.

    Args:
        config: The run as it is.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._search: CombinationSearch | None = None

    @property
    def stage(self) -> int:
        """Stages that have been reached, but for the last one, which ends it."""
        return 0 if self._search is None else 1 + self._search.alone_is_known

    def learn(self, answer: Answer) -> Sequence[RunConfig]:
        """Take in an answer, of the run as it is first of all."""
        if self._search is not None:
            return self._search.learn(answer)
        if isinstance(answer, UserError):
            raise answer
        effects: dict[Change, Effect] = {}
        for settings in sorted(single_changes(self._config), key=lambda one: -_micro_batches(self._config, one)):
            change = Change(tuple(settings.items()))
            if could_help(answer, techniques.registry()[change.technique]):
                effects[change] = techniques.effect(self._config, self._config.with_(settings))
        self._search = CombinationSearch(self._config, answer, effects)
        return self._search.alone()

    def result(self) -> Advised:
        """The changes found so far."""
        assert self._search is not None
        known, now = self._search.outlook.known, self._search.outlook.known[Combination()]
        found = [self._advice(one, now) for one in known if one and self._search.counts(one, LEAST_SAVING_BYTES)]
        found.sort(key=lambda advice: (advice.effect, -advice.saved_bytes))
        single = {id(advice) for advice in found if sum(name in techniques.registry() for name in advice.changes) == 1}
        return Advised(
            now,
            [advice for advice in found if id(advice) in single],
            [advice for advice in found if id(advice) not in single],
        )

    def _advice(self, one: Combination, now: Prediction) -> Advice:
        assert self._search is not None
        predicted = self._search.outlook.known[one]
        order = list(techniques.registry())
        ordered = sorted(one, key=lambda change: order.index(change.technique))
        settings = {name: value for change in ordered for name, value in change.settings}
        saved = now.peak_bytes - predicted.peak_bytes
        effect = techniques.effect(self._config, predicted.config)
        return Advice(settings, predicted, saved, effect, _costs(settings, predicted))


def _micro_batches(config: RunConfig, changes: Mapping[str, Value]) -> int:
    """Micro-batches of a step with a change: predicting it takes as much longer."""
    return config.with_(changes).integer("accumulation")


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
