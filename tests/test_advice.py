"""Which changes save most: the search for combinations against all of them, and what is said of each."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pytest

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import RunConfig, UserError, Value
from gpumem_tui.engine.prediction import advice
from gpumem_tui.engine.prediction.advice import Advised, advise
from gpumem_tui.engine.prediction.combination_search import MOST_COMBINATIONS
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.outcome import Prediction
from gpumem_tui.engine.prediction.outlook import Change, Combination, Outlook
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.prediction.questions_in_order import Answer, Learn, QuestionsInOrder, Work
from gpumem_tui.engine.run import Run, RunId, RunKind
from gpumem_tui.engine.technique import Effect
from gpumem_tui.profiles import preset, run_fields
from gpumem_tui.tui.commands.advise import _table

from .app_driver import foretold
from .benchmarks.combinations import CASES, DATA, Case
from .conftest import small_run
from .fake_source import GPU

GIB = 2**30


class Recorded:
    """Predictions made beforehand: of every single change, pair and triple of a run."""

    def __init__(self, name: str) -> None:
        self.case: Case = CASES[name]
        self.config, self.asked = self.case.config, 0
        with np.load(DATA / f"combinations-{name}.npz", allow_pickle=False) as data:
            self.phases, self.categories = data["phases"].tolist(), data["categories"].tolist()
            settings = [json.loads(text) for text in data["settings"].tolist()]
            self.bytes = {frozenset(some.items()): table for some, table in zip(settings, data["bytes"], strict=True)}

    def peak_bytes(self, changes: Mapping[str, Value]) -> int:
        return int(self.bytes[frozenset(changes.items())].sum(axis=1).max())

    def effect(self, changes: Mapping[str, Value]) -> Effect:
        return techniques.effect(self.config, self.config.with_(changes))

    def predict(self, config: RunConfig) -> Answer:
        changes = {name: config[name] for name in techniques.all_options() if config[name] != self.config[name]}
        table = self.bytes.get(frozenset(changes.items()))
        if table is None:  # a combination of more than three
            return UserError("not recorded")
        self.asked += 1
        rows = [dict(zip(self.categories, row, strict=True)) for row in table.tolist()]
        by_phase = dict(zip(self.phases, rows, strict=True))
        return outcome(config, by_phase, gpu(self.case.gpu).memory_bytes)


def outcome(config: RunConfig, by_phase: dict[str, dict[str, int]], memory_bytes: int) -> Prediction:
    """A prediction that says what a search reads."""
    highest = max(by_phase.values(), key=lambda sizes: sum(sizes.values()))
    peak = sum(highest.values())
    run = Run(RunId("H100 80GB", 1), config, GPU, RunKind.PREDICTED)
    return dataclasses.replace(
        foretold(config, peak, run, peak <= memory_bytes), by_category=highest, by_phase=by_phase
    )


def in_turn(answer: Callable[[RunConfig], Answer]) -> Work:
    """One configuration after the other."""

    def work(first: Sequence[RunConfig], learn: Learn) -> Iterator[None]:
        questions = QuestionsInOrder(first, learn)
        while (question := questions.take()) is not None:
            questions.answer(question[0], answer(question[1]))
            yield

    return work


def searched(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Recorded, Advised]:
    recorded = Recorded(name)
    monkeypatch.setattr(advice, "single_changes", lambda _: map(dict, recorded.case.changes))
    return recorded, advise(recorded.config, in_turn(recorded.predict))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("most", [Effect.NONE, Effect.NUMERICS, Effect.TRAINING], ids=lambda effect: effect.title)
def test_nothing_that_saves_more_is_missed_among_all_pairs_and_triples(
    name: str, most: Effect, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 1 %, of what keeps the mathematics, of what only rounds otherwise, and of all."""
    recorded, advised = searched(name, monkeypatch)
    best = min(map(recorded.peak_bytes, (c for c in map(dict, recorded.bytes) if recorded.effect(c) <= most)))
    found = [a.prediction.peak_bytes for a in (*advised.alone, *advised.combined) if a.effect <= most]
    assert min([advised.now.peak_bytes, *found]) <= best * 1.01
    assert recorded.asked <= 1 + len(recorded.case.changes) + MOST_COMBINATIONS * len(Effect)
    assert recorded.asked < len(recorded.bytes) / 3


def test_changes_that_help_only_together_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit weights alone need more than 16-bit ones, since activations become float32; checkpointed as well, least."""
    recorded, advised = searched("lora", monkeypatch)
    assert recorded.peak_bytes({"quantization": "nf4"}) > advised.now.peak_bytes
    by_text = {one.text: one for one in advised.combined}
    both = by_text["quantization=nf4 checkpointing=layers"]
    assert both.prediction.peak_bytes / GIB == pytest.approx(12.69, abs=0.01)
    assert both.effect is Effect.NUMERICS


def test_what_is_recorded_is_what_is_predicted() -> None:
    recorded = Recorded("lora")
    changes = {"quantization": "nf4", "checkpointing": "layers"}
    now = predict(recorded.config.with_(changes), gpu(recorded.case.gpu))
    assert now.peak_bytes == recorded.peak_bytes(changes)


def test_what_cannot_help_is_not_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters have next to no optimizer state: no optimizer is tried."""
    recorded, advised = searched("lora", monkeypatch)
    tried = {name for one in (*advised.alone, *advised.combined) for name in one.changes}
    assert "optimizer" not in tried
    assert recorded.asked <= 17


@pytest.mark.parametrize("name", CASES)
def test_how_long_each_answer_takes_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process that answers at once asks what several do whose answers come in any order."""
    recorded = Recorded(name)
    monkeypatch.setattr(advice, "single_changes", lambda _: map(dict, recorded.case.changes))

    def several(processes: int, chance: random.Random) -> tuple[list[RunConfig], list[str]]:
        asked: list[RunConfig] = []

        def work(first: Sequence[RunConfig], learn: Learn) -> Iterator[None]:
            questions, taken = QuestionsInOrder(first, learn), list[tuple[int, RunConfig]]()
            while questions.waiting or taken:
                while questions.waiting and len(taken) < processes:
                    taken += [some] if (some := questions.take()) is not None else []
                number, config = taken.pop(chance.randrange(len(taken)))
                asked.append(config)
                questions.answer(number, recorded.predict(config))
                yield

        advised = advise(recorded.config, work)
        asked.sort(key=repr)
        return asked, [one.text for one in (*advised.alone, *advised.combined)]

    chance = random.Random(name)
    alone = several(1, chance)
    assert all(several(processes, chance) == alone for processes in (2, 2, 3, 4, 16))


# --- by hand ------------------------------------------------------------------------


def pretended(config: RunConfig) -> Answer:
    """100 GiB, and what each technique takes away; 4-bit weights only with adapters."""
    if config["quantization"] != "none" and not config["lora"]:
        return UserError("needs lora")
    sizes = {
        "parameters": 30 if config["quantization"] == "none" else 8,
        "optimizer_state": {"adamw": 40, "sgd": 0, "adamw-8bit": 10}.get(config.text("optimizer"), 40),
        "gradients": 10,
        "activations": 20 if config["checkpointing"] == "off" else 2,
    }
    if config["lora"]:
        sizes |= {"gradients": 0, "optimizer_state": 0}
    by_phase = {"optimizer": {name: size * GIB for name, size in sizes.items()}}
    return outcome(config, by_phase, 60 * GIB)


def test_what_keeps_the_mathematics_comes_first_and_another_optimizer_last() -> None:
    advised = advise(small_run(), in_turn(pretended))
    assert advised.now.peak_bytes == 100 * GIB
    alone = [(one.text, one.effect, one.saved_bytes // GIB) for one in advised.alone]
    values = [value for value in techniques.registry()["checkpointing"].switch.choices if value != "off"]
    assert alone[: len(values)] == [(f"checkpointing={value}", Effect.NONE, 18) for value in values]
    alone = alone[len(values) :]
    assert alone[0] == ("optimizer=adamw-8bit", Effect.NUMERICS, 30)
    assert ("optimizer=sgd", Effect.TRAINING, 40) in alone
    assert all(one.costs for one in advised.alone)
    assert [one.effect for one in advised.combined] == sorted(one.effect for one in advised.combined)


def test_costs_that_are_nothing_are_not_among_others() -> None:
    free, dear = {"kv_cache": False, "optimizer": "adamw-fused"}, {"loss": "chunked"}
    now = advise(small_run(), in_turn(pretended)).now
    assert advice._costs(free, now) == "nothing to speak of"
    assert advice._costs(free | dear, now) == techniques.registry()["loss"].cost_of("chunked")


@pytest.mark.parametrize("columns", [30, 40, 60, 80])
def test_a_setting_is_never_broken_between_lines(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    now = advise(small_run(), in_turn(pretended)).now
    changes: dict[str, Value] = {"optimizer": "cpu-offload", "loss": "linear-cross-entropy", "trainable": "last-layers"}
    one = advice.Advice(changes, now, 1 << 30, Effect.NONE, advice._costs(changes, now))
    words = " ".join(_table("together", [one])).split()
    assert {"optimizer=cpu-offload", "loss=linear-cross-entropy", "trainable=last-layers"} <= {*words}


def test_what_needs_another_change_to_be_possible_is_tried_beside_it() -> None:
    advised = advise(small_run(), in_turn(pretended))
    best = min(advised.combined, key=lambda one: one.prediction.peak_bytes)
    assert set(best.changes) == {"lora", "checkpointing", "quantization"}
    assert best.prediction.peak_bytes == 10 * GIB


def test_the_moment_of_recomputing_is_one_that_a_combination_may_not_get_below() -> None:
    """Logits decide, then what is recomputed: a change that takes away the one leaves the other."""
    config = small_run(checkpointing="layers")

    def held(logits: int, recomputed: int, state: int) -> Prediction:
        sizes = {"backward": {"logits_loss": logits}, "recompute": {"recomputed": recomputed}}
        by_phase = {phase: {"optimizer_state": state * GIB} | {c: n * GIB for c, n in some.items()}
                    for phase, some in sizes.items()}  # fmt: skip
        return outcome(config, by_phase, 60 * GIB)

    outlook = Outlook(held(10, 8, 4))
    chunked, stateless = Change((("loss", "chunked"),)), Change((("optimizer", "sgd"),))
    outlook.learn(Combination((chunked,)), held(1, 8, 4))
    outlook.learn(Combination((stateless,)), held(10, 8, 0))
    assert outlook.expected_peak_bytes(Combination((chunked, stateless))) / GIB == pytest.approx(8, abs=0.1)


def test_every_change_of_a_combination_counts() -> None:
    """Adapters leave no optimizer state: another optimizer beside them is no advice."""
    assert not any(
        {"lora", "optimizer"} <= set(one.changes) for one in advise(small_run(), in_turn(pretended)).combined
    )


def test_of_values_that_hold_the_same_one_is_tried() -> None:
    changes = [*advice.single_changes(small_run())]
    assert [some["quantization"] for some in changes if "quantization" in some] == ["nf4"]
    assert not any(some.get("dtype") == "float32" or [*some] == ["loss_scaling"] for some in changes)


@pytest.mark.parametrize(
    ("now", "other"),
    [
        ({"attention": "auto"}, {"attention": "sdpa"}),
        ({"dtype": "mixed"}, {"dtype": "mixed-float16", "loss_scaling": True}),
        ({"dtype": "mixed-float16", "loss_scaling": True}, {"dtype": "mixed", "loss_scaling": False}),
        ({"checkpointing": "layers"}, {"checkpointing": "selective"}),
    ],
)
def test_values_that_save_nothing_beside_the_one_there_is_are_not_tried(
    now: dict[str, Value], other: dict[str, Value]
) -> None:
    config = small_run(**now)
    switch, value = next(iter(other.items()))
    assert not any(some.get(switch) == value for some in advice.single_changes(config))
    before, after = predict(config, gpu("H100 80GB")), predict(config.with_(other), gpu("H100 80GB"))
    assert before.peak_bytes - after.peak_bytes < advice.LEAST_SAVING_BYTES


def test_float16_without_loss_scaling_is_no_advice() -> None:
    """Its gradients vanish, and the loss becomes nan."""
    changes = [dict(some) for some in advice.single_changes(small_run())]
    assert {"dtype": "bfloat16"} in changes
    scaled = {"dtype": "mixed-float16", "loss_scaling": True}
    assert scaled in changes, "with it, it does train"
    assert not any("without loss scaling" in cost for cost in techniques.costs(scaled))
    assert not any("float16" in str(some.get("dtype")).split("-") and len(some) == 1 for some in changes)


def test_what_another_setting_decides_is_no_advice() -> None:
    """Checkpointed layers take no KV cache, whatever it is set to."""
    assert {"kv_cache": False} in [*advice.single_changes(small_run())]
    assert not any("kv_cache" in some for some in advice.single_changes(small_run(checkpointing="layers")))


def test_a_saving_under_a_mebibyte_is_none() -> None:
    def nearly_the_same(config: RunConfig) -> Answer:
        found = pretended(config)
        if isinstance(found, Prediction) and config["attention"] != "eager":
            found = dataclasses.replace(found, peak_bytes=found.peak_bytes - 1000)
        return found

    eager = small_run(attention="eager")
    assert {"attention": "sdpa"} in [*advice.single_changes(eager)]
    assert not any("attention" in one.changes for one in advise(eager, in_turn(nearly_the_same)).alone)


def test_a_run_that_cannot_be_predicted_gets_no_advice() -> None:
    with pytest.raises(UserError, match="this cannot be predicted"):
        advise(small_run(), in_turn(lambda _: UserError("this cannot be predicted")))


def test_qlora_of_8b_comes_to_fit_a_24_gib_card_with_the_same_batch_sequence_and_mathematics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The logits of 8192 tokens over 128,256 words are what is too much."""
    settings = techniques.parse(preset("qlora").settings | {"batch_size": 2, "seq_len": 4096}, "test")
    config, card = techniques.configure(run_fields("llama-3.1-8b"), settings), gpu("RTX 4090")
    harmless = [c for c in advice.single_changes(config) if _keeps_everything(config, c)]
    few: list[Mapping[str, Value]] = [{"loss": "chunked"}, {"offload": "checkpoints"}]  # a second each
    assert all(changes in harmless for changes in few)
    monkeypatch.setattr(advice, "single_changes", lambda _: few)
    found = advise(config, in_turn(lambda one: predict(one, card)))
    assert not found.now.fits
    fitting = [one for one in (*found.alone, *found.combined) if one.prediction.fits]
    assert fitting and all(one.effect is Effect.NONE for one in fitting)
    best = min(fitting, key=lambda one: one.prediction.peak_bytes)
    assert best.prediction.safe_bound_bytes < card.available_bytes - GIB


def _keeps_everything(config: RunConfig, changes: Mapping[str, Value]) -> bool:
    other = config.with_(changes)
    same = (config.batch_size, config.seq_len) == (other.batch_size, other.seq_len)
    return same and techniques.effect(config, other) is Effect.NONE


def test_a_value_of_each_technique_is_predicted_before_another_of_any_what_acts_on_most_first() -> None:
    config = techniques.configure(run_fields("tiny"), {})
    now, changes = predict(config, gpu("H100 80GB")), list(advice.single_changes(config))
    order = advice.most_promising_first(now, changes)
    assert sorted(order) == list(range(len(changes)))
    switches = [next(iter(changes[i])) for i in order]
    first = switches[: len(set(switches))]
    assert set(first) == set(switches)
    held = [advice.acts_on_bytes(now, techniques.registry()[switch]) for switch in first]
    assert held == sorted(held, reverse=True)
