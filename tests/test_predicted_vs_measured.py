"""Predicted beside measured: on the live screen, on the compare screen, and from the command line."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import Architecture, RunConfig
from gpumem_tui.engine.events import Environment
from gpumem_tui.engine.feed import ViewerRole
from gpumem_tui.engine.prediction.outcome import Prediction
from gpumem_tui.engine.recording import Recording
from gpumem_tui.engine.report import report
from gpumem_tui.engine.run import Run, RunId, RunKind
from gpumem_tui.tui.cli import main
from gpumem_tui.tui.commands.common import opened
from gpumem_tui.tui.prediction_client import WORKING, Background
from gpumem_tui.tui.screens.compare import CATEGORIES, HIGHEST, LAYERS, MODES, OWNERS, REFERENCE, SAVED
from gpumem_tui.tui.state import ViewState
from gpumem_tui.watch import watch

from .app_driver import GPU_UNIT, RECORDINGS, SIZES, Driver, Oracle, shown
from .conftest import Engine, small_run
from .fake_source import CPU, GPU, FakeSource
from .watching import Seen, small_model

GIB = 1 << 30
QUICK = ["run", "--device", "cpu", "--batch-size", "2", "--seq-len", "16"]


def gpu_run(steps: int, **settings: Any) -> FakeSource:
    source = FakeSource(GPU, unit=GPU_UNIT)
    source.start(**settings)
    for _ in range(steps):
        source.finish_step()
    return source


class Beside(Oracle):
    """Predicts a batch of one row less than what will be run: wrong by the logits of a row."""

    def __init__(self, ready: bool = True) -> None:
        super().__init__(lambda config: self.document(config)["peak"]["allocated_bytes"], ready)
        self._runs: dict[str, Run] = {}

    def document(self, config: RunConfig) -> dict[str, Any]:
        return report(self.predicted(config)).as_dict()

    def predicted(self, config: RunConfig) -> Run:
        if repr(config) not in self._runs:
            self._runs[repr(config)] = self._worked_out(config)
        return self._runs[repr(config)]

    def _worked_out(self, config: RunConfig) -> Run:
        source = gpu_run(2)
        source.start(config.with_({"batch_size": config.batch_size - 1}))
        for _ in range(2):
            source.finish_step()
        run = Run(RunId(self.gpu_name, 1), config, GPU, RunKind.PREDICTED)
        run.keep([*source.run.traces()])
        for event in source.run.events():
            run.tell(event)
        return run

    def of_run(self, run: Run) -> Prediction | str:
        found = self.of(run.config)
        return dataclasses.replace(found, whole_run=self.predicted(run.config)) if found is not None else WORKING


LOGITS_OF_A_ROW = 5 * GPU_UNIT // 8


# --- the live screen --------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
async def test_the_predicted_peak_stands_beside_the_measured_one(size: tuple[int, int]) -> None:
    source = gpu_run(1)
    async with shown(source, size, predictions=Beside()) as driver:
        peak = driver.app.state.peak.peak.bytes
        predicted = f"~{(peak - LOGITS_OF_A_ROW) / GIB:.2f}"
        words = f"{predicted} predicted" if size[0] >= 100 else predicted
        measured = f"{peak / GIB:.2f} GiB"
        assert total(driver).endswith(f"{measured}, {words}"), "what the first step holds is not yet all"
        source.finish_step()
        await driver.tick()
        comma = "," * (size[0] >= 100)
        assert total(driver).endswith(f"{measured}, {words}{comma} +{LOGITS_OF_A_ROW / GIB:.3f}")


def total(driver: Driver) -> str:
    """The row below the categories."""
    return next(line for line in driver.lines if line.startswith("   allocated")).rstrip()


@pytest.mark.parametrize("width", [60, 72, 80, 100, 140])
async def test_the_prediction_never_pushes_a_measured_figure_out(width: int) -> None:
    """With and without it every row says the same, but for what is marked with ~; the oldest that happened may go."""
    async with shown(gpu_run(3), (width, 24)) as driver:
        without = driver.lines
    async with shown(gpu_run(3), (width, 24), predictions=Beside()) as driver:
        happened = re.compile(r" +\d+:\d\d ")
        for before in (line.rstrip() for line in without if not happened.match(line) and "no recompute" not in line):
            assert any(after.startswith(before) for after in driver.lines), before
        assert " ~" in total(driver)


async def test_nothing_is_set_beside_a_run_on_a_cpu_and_one_line_says_why() -> None:
    source = FakeSource(CPU)
    source.start()
    for _ in range(2):
        source.finish_step()
    with closing(Background(source, "RTX 4090")) as predictions:
        async with shown(source, predictions=predictions) as driver:
            assert "~" not in total(driver)
            await driver.press("5")
            assert len(driver.app.page.runs()) == 1
            for view in MODES:
                assert view in driver.text
                said = "it is on a CPU, predictions are of GPUs" in driver.text
                assert said == ("A difference takes two runs." in driver.text) == (view is MODES[OWNERS])
                assert "~" not in driver.text
                await driver.press("tab")


# --- the compare screen -----------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
async def test_the_prediction_is_one_more_run(size: tuple[int, int]) -> None:
    async with shown(gpu_run(2), size, predictions=Beside()) as driver:
        await driver.press("5")
        measured, predicted = driver.app.page.runs()
        assert "run 1, predicted" in driver.text
        rows = {c: driver.line(f"{c.info.letter} {c.info.title}") for c in Category if measured.peak[c]}
        assert len(rows) > 4
        for category, row in rows.items():
            a, b = predicted.peak[category] / GIB, measured.peak[category] / GIB
            change = f"{a - b:+.2f}" if f"{b - a:.2f}" != "0.00" else "0.00"
            assert row.split()[-3:] == [f"{b:.2f}", f"~{a:.2f}", change]
        await driver.compare_by(HIGHEST)
        a, b = (run.by_phase[phase] / GIB for run in (predicted, measured) for phase in run.by_phase
                if phase.title == "backward")  # fmt: skip
        assert driver.line("backward").split()[1:] == [f"{b:.2f}", f"~{a:.2f}", f"{a - b:+.2f}"]
        await driver.compare_by(LAYERS)
        assert "layers.3" in driver.text and "logits" in driver.text
        await driver.compare_by(SAVED)
        a, b = (sum(run.saved_by_layer.values()) / GIB for run in (predicted, measured))
        driver.app.page.move(99)
        await driver.tick()
        assert driver.line("all").split()[1:] == [f"{b:.2f}", f"~{a:.2f}", f"{a - b:+.2f}"]
        await driver.compare_by(REFERENCE)
        assert f"~{sum(predicted.peak.values()) / GIB:.2f}" in driver.line("run 1, predicted")


@pytest.mark.parametrize("size", SIZES)
async def test_the_difference_in_named_terms_adds_up_on_the_screen(size: tuple[int, int]) -> None:
    async with shown(gpu_run(2), size, predictions=Beside()) as driver:
        await driver.compare_by(OWNERS)
        places = [line for line in driver.lines if "peak in" in line]
        assert [re.sub(r"\s+", " ", line).strip() for line in places] == [
            "A peak in step 2, optimizer step of AdamW", "B peak in step 2, optimizer step of AdamW",
        ]  # fmt: skip
        figures = [re.sub(r"\s{2,}| (?=~)", "|", line.strip()).split("|") for line in driver.lines[driver.lines.index(
            next(line for line in driver.lines if line.strip().startswith("P "))):]]  # fmt: skip
        shown_rows = [row for row in figures if len(row) == 4 and not row[0].startswith(("1 live", "←"))]
        categories = [row for row in shown_rows if row[0][1:2] == " "]
        whole = {row[0]: [int(cell.lstrip("~").replace(",", "")) for cell in row[1:]] for row in shown_rows}
        for before, after, change in whole.values():
            assert after - before == change
        total = whole["all"]
        assert [sum(whole[row[0]][i] for row in categories) for i in range(3)] == total
        assert total[2] == -LOGITS_OF_A_ROW == whole["logits"][2]
        assert all(row[2].startswith("~") for row in shown_rows)
        table = driver.app.page.table()
        assert [len(row) for row in table] == [5] * len(table)


async def test_what_was_chosen_stays_chosen_when_a_prediction_comes_and_goes() -> None:
    source, oracle = gpu_run(2), Beside(ready=False)
    async with shown(source, predictions=oracle) as driver:
        await driver.press("5")
        for step in range(2):
            await driver.press("1", "b", "5")
            source.obey()
            for _ in range(step + 1):
                source.finish_step()
                await driver.tick()
        source.finish_step()
        await driver.press("right", "right", "enter")
        assert chosen(driver) == ("run 3", "run 3")
        oracle.ready = True
        await driver.tick()
        assert [run.origin for run in driver.app.page.runs()] == ["run 1", "run 2", "run 3", "run 3, predicted"]
        assert chosen(driver) == ("run 3", "run 3")
        await driver.press("right", "-")
        assert "the prediction goes when its run does" in driver.text
        await driver.press("left", "left", "left", "-", "right")
        assert chosen(driver) == ("run 3", "run 3")
        await driver.press("1", "b", "5")
        source.obey()
        await driver.tick()
        assert [run.origin for run in driver.app.page.runs()] == ["run 2", "run 3"]
        assert chosen(driver) == ("run 3", "run 3")


def chosen(driver: Driver) -> tuple[str, str]:
    page = driver.app.page
    runs = page.runs()
    return runs[page.selected].origin, runs[page.base].origin


@pytest.mark.parametrize("size", [(60, 20), *SIZES])
async def test_a_watched_script_is_predicted_and_what_that_lacks_is_said(size: tuple[int, int]) -> None:
    source = watched_run(2)
    async with shown(source, size, predictions=Beside()) as driver:
        assert "~" in total(driver)
        assert any(words in driver.text for words in ("saves most", "try first", "no single change"))
        assert "a letter says where your script sets it" in driver.lines[-2]
        await driver.compare_by(CATEGORIES)
        assert "run 1, predicted" in driver.text
        assert "~ is gpumem-tui's own loop with the script's settings" in " ".join(driver.text.split())


@pytest.mark.usefixtures("runtime_folder", "frozen_heap")
async def test_a_script_that_only_uses_its_model_is_not_predicted(seen: Seen) -> None:
    model = small_model()[0]
    with watch(model), torch.no_grad():
        for _ in range(2):
            model(input_ids=torch.ones(1, 4, dtype=torch.int64))
    async with shown(seen.sources[-1], predictions=Beside()) as driver:
        assert "nothing is predicted: the script uses its model and trains nothing" in driver.text
        assert "~" not in total(driver)
        await driver.compare_by(OWNERS)
        said = " ".join(driver.text.split())
        assert "No prediction is set beside this run: the script uses its model and trains nothing." in said


def watched_run(steps: int, **settings: Any) -> FakeSource:
    source = gpu_run(0, **settings)
    source.run.kind, source.role = RunKind.WATCHED, ViewerRole.WATCHING
    for _ in range(steps):
        source.finish_step()
    return source


# --- recordings, with the predictor that the app has ----------------------------------------


async def test_an_opened_recording_of_a_gpu_is_compared_with_its_prediction() -> None:
    replay = opened([RECORDINGS / "h100-tiny-lora.gpumem"])
    with closing(Background(replay)) as predictions:
        async with shown(replay, predictions=predictions) as driver:
            await driver.press("5")
            for _ in range(1000):  # this run's comes first, those of what could be changed do not matter here
                if not isinstance(predictions.of_run(replay.runs()[0]), str):
                    break
                await driver.pilot.pause(0.1)
            await driver.tick()
            measured, predicted = driver.app.page.runs()
            assert predicted.predicted and not measured.predicted
            assert abs(predicted.peak_bytes - measured.peak_bytes) < measured.peak_bytes // 1000
            assert set(predicted.by_layer) == set(measured.by_layer)
            assert set(predicted.by_phase) == set(measured.by_phase)
            for phase, size in measured.by_phase.items():
                assert predicted.by_phase[phase] == pytest.approx(size, rel=0.01), phase
            assert (predicted.label, predicted.peak_module) == (measured.label, "loss")
            ran, here = "2.11.0", version("torch").split("+")[0]
            assert (f"~ predicted with torch {here} (run: {ran})" in driver.text) == (here != ran)


async def test_the_prediction_is_of_the_recording_that_is_shown(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.gpumem" for name in ("one", "two")]
    for path in paths:
        shutil.copy(RECORDINGS / "full.gpumem", path)
    async with shown(Recording(*paths), predictions=Beside()) as driver:
        await driver.press("5")
        assert [run.origin for run in driver.app.page.runs()] == ["one", "two", "one, predicted"]
        await driver.press("j")
        assert [run.origin for run in driver.app.page.runs()] == ["one", "two", "two, predicted"]


@pytest.mark.parametrize(
    ("wanted", "here", "expected"),
    [
        ("", GPU, WORKING),
        ("H100 80GB", GPU, WORKING),
        (
            "RTX 4090",
            GPU,
            "No prediction is set beside this run: it is on NVIDIA H100 80GB HBM3, predictions are of RTX",
        ),
        ("RTX 4090", CPU, "No prediction is set beside this run: it is on a CPU"),
        ("", CPU, "No prediction is set beside this run: it is on a CPU"),
    ],
)
def test_a_prediction_is_of_the_very_gpu_or_none(wanted: str, here: Environment, expected: str) -> None:
    source = FakeSource(here)
    source.start()
    with closing(Background(source, wanted)) as predictions:
        found = predictions.of_run(source.run)
        assert isinstance(found, str) and found.startswith(expected)


def test_what_is_dropped_is_not_worked_out() -> None:
    source = FakeSource(GPU)
    source.start()
    config = source.run.config or RunConfig()
    with closing(Background(source)) as predictions:
        for batch in range(1, 9):
            assert predictions.of(config.with_({"batch_size": batch})) is None
        assert predictions.waiting() == 8
        predictions.drop()
        assert predictions.waiting() == 0
        assert predictions._predictor is not None and predictions._predictor.wait(100)
        assert predictions.answers() <= 1, "what had been begun ends"


def test_what_cannot_be_predicted_says_why() -> None:
    source = FakeSource(GPU)
    source.start()
    own = dataclasses.replace(source.run.config, model="Sequential", architecture=None)
    source.run.config = dataclasses.replace(own, architecture=Architecture({"model_type": "no-such-model"}, "float32"))
    with closing(Background(source)) as predictions:
        assert predictions.of_run(source.run) == WORKING
        assert predictions.problem(own).startswith("Sequential is no transformers model"), "no process is asked"
        predictions.of(own)
        assert predictions.waiting() == 1
        assert predictions._predictor is not None and predictions._predictor.wait(100)
        assert predictions.waiting() == 0, "whether anybody looks again or not"
        found = predictions.of_run(source.run)
        assert isinstance(found, str) and "no-such-model" in found


# --- the command line ------------------------------------------------------------------------


def test_run_predict_on_a_cpu_says_that_it_cannot_be_compared(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "run.json"
    assert main([*QUICK, "--steps", "2", "--predict", "--json", str(target)]) == 0
    assert "This ran on a CPU and predictions are of GPUs: not compared." in capsys.readouterr().out
    document = json.loads(target.read_text())
    assert document["predicted"] is None and document["difference"] is None
    assert "not compared" in document["not_compared"]


def test_run_predict_gpu_compares_with_that_gpu_term_by_term(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    target = tmp_path / "run.json"
    assert main([*QUICK, "--steps", "2", "--predict", "RTX 4090", "--json", str(target)]) == 0
    document, printed = json.loads(target.read_text()), capsys.readouterr().out
    predicted, difference = document["predicted"], document["difference"]
    assert predicted["gpu"] == "RTX 4090 24GB" and predicted["fits"]
    assert predicted["safe_bound_bytes"] > predicted["peak"]["allocated_bytes"]
    assert difference["bytes"] == document["peak"]["allocated_bytes"] - predicted["peak"]["allocated_bytes"]
    assert sum(part["bytes"] for part in difference["by_category"].values()) == difference["bytes"]
    for part in difference["by_category"].values():
        assert sum(term["bytes"] for term in part["terms"]) == part["bytes"]
    # A CPU has no cuBLAS, and AdamW's counters of steps are on the device there.
    workspace = difference["by_category"]["workspace"]
    assert workspace["terms"] == [{"name": "cuBLAS", "bytes": workspace["bytes"], "owners": 1}]
    assert workspace["bytes"] == -predicted["peak"]["by_category"]["workspace"]
    assert all(term["name"].endswith(".step") or term["owners"] > 1
               for term in difference["by_category"]["optimizer_state"]["terms"])  # fmt: skip
    assert re.search(rf"\n    cuBLAS +{workspace['bytes']:,}\n", printed)
    assert f"{difference['bytes']:+,}" in printed
    assert "Predicted for RTX 4090 24GB: the peak is in step" in printed


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--steps", "1", "--predict"], "--predict: a run is compared from its second step on"),
        (["--steps", "2", "--predict", "Voodoo 2"], "--predict Voodoo 2: not a GPU known here"),
    ],
)
def test_what_could_not_be_compared_is_refused_before_the_run(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUICK, *arguments]) == 2
    printed = capsys.readouterr()
    assert complaint in printed.err and printed.err.count("\n") == 1
    assert printed.out == ""


def test_who_comes_later_finds_the_runs_before(engine: Engine) -> None:
    """Their traces are gone by then; what the engine said of them when they ended is not."""
    here = ViewState()
    for settings in ({}, {"lora": True}):
        engine.run(small_run(**settings))
        here.update(engine.session, 0.0)  # one that was there all along
    later = ViewState()
    later.update(engine.session, 0.0)
    assert [run.label for run in later.runs] == [run.label for run in here.runs] == ["B2×S16", "B2×S16 lora"]
    for one, other in zip(later.runs, here.runs, strict=True):
        assert one._replace(by_phase={}) == other._replace(by_phase={})
