"""What would fit, searched by rules of the test: which change comes first, and that it is the least."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from gpumem_tui.engine import techniques
from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import RunConfig, UserError
from gpumem_tui.engine.events import Environment
from gpumem_tui.engine.out_of_memory.fixes import EXPANDABLE, FixSearch, beyond_prediction
from gpumem_tui.engine.out_of_memory.report import Fix, OutOfMemoryReport, Verdict
from gpumem_tui.engine.prediction.gpus import Gpu, gpu
from gpumem_tui.engine.prediction.outcome import Prediction
from gpumem_tui.engine.prediction.outcome import Verdict as Outcome
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.run import Run, RunId, RunKind
from gpumem_tui.profiles import run_fields

from .app_driver import foretold
from .fake_source import CPU, GPU, MIB

A, P = Category.ACTIVATIONS.key, Category.PARAMETERS.key

ARCHITECTURE = {"architecture": run_fields("tiny")["architecture"]}
ACTIVATIONS_OF_A_ROW = 10 * MIB
PARAMETERS = 100 * MIB
KEPT = {"off": 1.0, "selective": 0.6, "layers": 0.4, "segments": 0.35, "input": 0.9}


def held(config: RunConfig) -> dict[str, int]:
    """A model whose activations grow with rows and tokens, and are dropped by checkpointing."""
    rows = config.batch_size * config.seq_len / 256 * KEPT[config.text("checkpointing")]
    return {P: PARAMETERS, A: int(rows * ACTIVATIONS_OF_A_ROW)}


def prediction_of(config: RunConfig, room: int, sizes: dict[str, int], outcome: Outcome | None = None) -> Prediction:
    peak = sum(sizes.values())
    run = Run(RunId("predicted", 1), config, GPU, RunKind.PREDICTED)
    verdict = outcome or (Outcome.FITS if peak <= room else Outcome.TOO_LARGE)
    return dataclasses.replace(foretold(config, peak, run), by_phase={"backward": sizes}, verdict=verdict)


def report_of(room: int, verdict: Verdict = Verdict.FULL, **more: object) -> OutOfMemoryReport:
    """A run that had so much in torch, and asked for more."""
    fields = {"asked_bytes": MIB, "reason": "", "phase": "backward", "step": 2, "by_category": {}}
    return OutOfMemoryReport(
        **fields | {"verdict": verdict, "allocated_bytes": room, "total_bytes": 80 << 30} | more  # type: ignore[arg-type]
    )


class Searched:
    """All that a search finds, and what it asked for on the way."""

    def __init__(
        self,
        room: int,
        rule: Callable[[RunConfig], dict[str, int]] = held,
        report: OutOfMemoryReport | None = None,
        environment: Environment = GPU,
        kind: RunKind = RunKind.TRAINED,
        **settings: object,
    ) -> None:
        config = techniques.configure({"model": "m", **ARCHITECTURE}, {"batch_size": 32, **settings})  # type: ignore[dict-item]
        self.asked: list[RunConfig] = []

        def predicted(config: RunConfig, card: Gpu) -> Prediction:
            self.asked.append(config)
            return prediction_of(config, card.available_bytes, rule(config))

        run = Run(RunId("e", 1), config, environment, kind)
        search = FixSearch(run, report or report_of(room), predicted)
        self.fixes = list(search)
        self.unfit_by_bytes = search.unfit_by_bytes

    def fix_of(self, *names: str) -> Fix:
        return next(fix for fix in self.fixes if {*fix.set} == {*names})


def test_what_keeps_the_mathematics_comes_first_and_of_that_the_quickest() -> None:
    found = Searched(room=300 * MIB)
    assert [set(fix.set) for fix in found.fixes[:2]] == [{"accumulation", "batch_size"}, {"checkpointing"}]
    keeps = [fix.keeps_mathematics for fix in found.fixes]
    assert keeps == sorted(keeps, reverse=True) and not all(keeps)


def test_each_is_the_least_step_of_its_ladder_that_fits() -> None:
    found = Searched(room=300 * MIB)  # 100 of parameters, 10 a row
    assert found.fix_of("accumulation", "batch_size").set == {"accumulation": 2, "batch_size": 16}
    assert found.fix_of("checkpointing").set == {"checkpointing": "selective"}
    assert found.fix_of("batch_size").set == {"batch_size": 20}
    assert found.fix_of("seq_len").set == {"seq_len": 160}
    assert all(fix.fits and fix.peak_bytes <= 300 * MIB for fix in found.fixes)


def test_the_largest_of_many_is_found_in_a_few_predictions() -> None:
    found = Searched(room=1000 * MIB, batch_size=127)
    assert found.fix_of("batch_size").set == {"batch_size": 90}
    assert sum(config.batch_size not in (1, 127) and config["accumulation"] == 1 for config in found.asked) < 12


def test_where_one_change_does_not_suffice_several_do_and_each_as_little_as_it_can() -> None:
    found = Searched(room=115 * MIB)
    first = found.fixes[0]
    assert first.keeps_mathematics and first.set.keys() == {"accumulation", "batch_size"}
    tight = Searched(room=107 * MIB, rule=held)
    assert tight.fixes[0].set == {"accumulation": 32, "batch_size": 1, "checkpointing": "selective"}


def test_where_nothing_fits_it_is_said_by_how_much() -> None:
    found = Searched(room=90 * MIB, rule=lambda config: held(config) | {P: PARAMETERS})
    least = min(sum(held(config).values()) for config in found.asked)
    (nearest,) = found.fixes
    assert not nearest.fits and nearest.peak_bytes == least and found.unfit_by_bytes == least - 90 * MIB


def test_that_the_run_does_not_fit_is_known_whatever_is_predicted() -> None:
    # Predicted 420 MiB where there are 500: what nobody knows of took 80 and more, and will again.
    found = Searched(room=500 * MIB)
    assert found.fix_of("batch_size").set == {"batch_size": 31}
    assert found.fix_of("batch_size").peak_bytes == 490 * MIB + 1


def test_a_leak_is_not_mended_by_settings() -> None:
    found = Searched(room=300 * MIB, report=report_of(300 * MIB, Verdict.GROWN))
    assert not found.fixes and not found.asked and found.unfit_by_bytes is None


def test_expandable_segments_only_where_gaps_are_the_reason() -> None:
    fragmented = Searched(room=430 * MIB, report=report_of(430 * MIB, Verdict.FRAGMENTED))
    assert fragmented.fixes[0].set == dict(EXPANDABLE) and fragmented.fixes[0].keeps_mathematics
    on_already = Searched(room=430 * MIB, report=report_of(430 * MIB, Verdict.FRAGMENTED, expandable_segments=True))
    full = Searched(room=430 * MIB)
    assert not any(fix.set == dict(EXPANDABLE) for fix in (*on_already.fixes, *full.fixes))


def test_a_change_that_this_machine_cannot_make_is_none() -> None:
    without = dataclasses.replace(GPU, packages={})
    state = {Category.OPTIMIZER_STATE.key: 300 * MIB}

    def rule(config: RunConfig) -> dict[str, int]:
        return held(config) | ({} if config.text("optimizer").endswith("8bit") else state)

    assert any(fix.set.get("optimizer") == "adamw-8bit" for fix in Searched(room=500 * MIB, rule=rule).fixes)
    assert not any("optimizer" in fix.set for fix in Searched(room=500 * MIB, rule=rule, environment=without).fixes)


def test_what_cannot_be_predicted_is_said() -> None:
    def refuse(config: RunConfig, card: Gpu) -> Prediction:
        raise UserError("too odd")

    for base, reason in (({"model": "m", **ARCHITECTURE}, "too odd"), ({"model": "m"}, "none of transformers'")):
        run = Run(RunId("e", 1), techniques.configure(base, {}), GPU)
        with pytest.raises(UserError, match=reason):
            list(FixSearch(run, report_of(300 * MIB), refuse))


def test_a_script_is_told_the_line_to_write() -> None:
    found = Searched(room=300 * MIB, kind=RunKind.WATCHED)
    assert found.fix_of("checkpointing").text.startswith(
        "checkpointing=selective (model.gradient_checkpointing_enable({"
    )
    assert found.fix_of("batch_size").text == "batch_size=20 (the loader's batch size)"


def test_on_a_cpu_what_a_gpu_s_libraries_take_is_not_asked_for() -> None:
    """The real predictor and a run that held 66 MiB of workspaces less than a GPU would."""
    config = techniques.configure(
        {"model": "tiny", **run_fields("tiny")}, {"batch_size": 2, "seq_len": 64, "checkpointing": "layers"}
    )
    predicted = predict(config, gpu("H100 80GB"))
    load = predicted.run.traces()[0]
    lighter = Run(RunId("e", 1), config, CPU)
    lighter.keep([dataclasses.replace(load, begin=load.begin[:0])])
    workspace = predicted.by_category[Category.WORKSPACE.key]
    assert beyond_prediction(predicted.run, report_of(MIB), predicted) == 0
    assert beyond_prediction(lighter, report_of(MIB), predicted) == -workspace
    # It died in a phase that is predicted to go through with less than it had and asked for.
    backward = sum(predicted.by_phase["backward"].values())
    assert beyond_prediction(lighter, report_of(backward), predicted) == MIB


def test_of_a_sharded_job_more_shards_are_a_way_out_and_the_last() -> None:
    def rule(config: RunConfig) -> dict[str, int]:
        return {P: 800 * MIB // config.integer("parallel.ranks")}

    sharded = Searched(room=210 * MIB, rule=rule, **{"parallel": "fsdp2", "parallel.ranks": 2})
    assert [fix.set for fix in sharded.fixes] == [{"parallel.ranks": 4}]
    assert not sharded.fixes[0].keeps_mathematics
