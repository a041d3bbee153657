"""Figures that leave while a run goes on: OpenMetrics in a file and over HTTP, and the Trainer's own log."""

from __future__ import annotations

import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.metrics import published
from gpumem_tui.engine.prediction.gpus import gpu_of
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.run import Run, RunId, RunKind
from gpumem_tui.engine.watch.trackers import PredictedPeak, figures_of
from gpumem_tui.tui.cli import main
from gpumem_tui.watch import MemoryCallback

from .conftest import small_run
from .fake_source import CPU, GPU, FakeSource
from .watching import small_model

QUICK = ["--profile", "tiny", "--batch-size", "2", "--seq-len", "16", "--steps", "2"]


def samples(text: str) -> dict[tuple[str, str | None], float]:
    parser = pytest.importorskip("prometheus_client.openmetrics.parser")
    return {
        (sample.name, sample.labels.get("category")): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def source() -> Iterator[FakeSource]:
    made = FakeSource(GPU)
    made.start()
    made.finish_step()
    yield made


def test_a_run_leaves_its_figures_in_a_file(tmp_path: Path) -> None:
    file, document = tmp_path / "run.prom", tmp_path / "run.json"
    assert main(["run", *QUICK, "--metrics", str(file), "--json", str(document)]) == 0
    found, peak = samples(file.read_text()), json.loads(document.read_text())["peak"]
    assert {c.key: found["gpumem_peak_bytes", c.key] for c in Category} == peak["by_category"]
    assert found["gpumem_step", None] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json", "run.prom"], "no half of one is left"


def get(url: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, ""


def test_a_run_is_scraped_on_loopback(source: FakeSource, port: int) -> None:
    with published(source, str(port), "tiny"):
        status, text = get(f"http://127.0.0.1:{port}/metrics")
        run = source.runs()[-1]
        last = Ledger(run.traces()[-1])
        assert status == 200
        assert {c: samples(text)["gpumem_allocated_bytes", c.key] for c in Category} == last.end
        source.finish_step()
        assert samples(get(f"http://127.0.0.1:{port}/metrics")[1])["gpumem_step", None] == 2
        assert get(f"http://127.0.0.1:{port}/")[0] == 404
        assert get(f"http://127.0.0.1:{port}/metrics", Host="evil.example")[0] == 403
        with pytest.raises(UserError, match=f"--metrics {port}: cannot be had"), published(source, str(port), "tiny"):
            pass
    with pytest.raises(urllib.error.URLError):
        get(f"http://127.0.0.1:{port}/metrics")


def test_nothing_is_published_before_the_first_run(tmp_path: Path) -> None:
    path = tmp_path / "run.prom"
    with published(FakeSource(GPU), str(path), "tiny"):
        assert path.read_text() == "# EOF\n"


def test_what_cannot_be_published_is_one_line(source: FakeSource, tmp_path: Path) -> None:
    for target in (str(tmp_path), str(tmp_path / "none" / "x"), "99999", "0", "9" * 5000, "/dev/full"):
        with pytest.raises(UserError, match=f"^--metrics {target:.20}") as refused, published(source, target, "tiny"):
            pass
        assert "\n" not in str(refused.value)


# --- a Trainer's log ------------------------------------------------------------------------


class Reporter(TrainerCallback):  # type: ignore[misc]
    """Stands where a reporter of the Trainer's stands: before the user's own callbacks."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logged.append(dict(logs))


def test_a_trainer_reports_memory_to_whatever_it_reports_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    model, _ = small_model()
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(8)]
    arguments = TrainingArguments(
        str(tmp_path / "out"), per_device_train_batch_size=2, max_steps=3, logging_steps=1, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    reporter, callback = Reporter(), MemoryCallback(log=True)
    seen: list[dict[str, int]] = []

    class Peaks(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            assert callback.watch is not None
            run = callback.watch.source.run
            traces = [trace for trace in run.traces() if trace.is_complete] if run is not None else []
            seen.append({c.key: n for c, n in Ledger(traces[-1]).peak.by_category.items()} if traces else {})

    before = CallbackHandler.on_log
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[reporter, Peaks(), callback])
    trainer.train()
    steps = [logs for logs in reporter.logged if "loss" in logs]
    assert len(steps) == 3
    assert steps[-1]["memory/peak"] >= steps[-1]["memory/allocated"] > 0
    categories = {key: steps[-1][f"memory/{key}"] for key in seen[-1]}
    assert categories in seen, "what is logged is the peak of a traced step"
    assert sum(categories.values()) == steps[-1]["memory/peak"]
    assert trainer.state.log_history[2]["memory/peak"] == steps[2]["memory/peak"]
    assert CallbackHandler.on_log is before, "undone when the training has ended"


def test_a_callback_that_was_not_asked_logs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    model, optimizer = small_model()
    callback, before = MemoryCallback(), CallbackHandler.on_log
    callback.on_train_begin(None, None, None, model=model, optimizer=optimizer)
    assert CallbackHandler.on_log is before
    callback.close()


def test_a_predicted_peak_is_worked_out_beside_the_training() -> None:
    """For a run on a GPU; on a CPU nobody asks."""
    config = small_run()
    run, here = Run(RunId("watched", 1), config, GPU, RunKind.WATCHED), Run(RunId("watched", 1), config, CPU)
    with closing(PredictedPeak()) as predicted:
        predicted.ask(here)
        assert predicted.bytes is None
        deadline = time.monotonic() + 100
        while predicted.bytes is None and time.monotonic() < deadline:
            predicted.ask(run)
            time.sleep(0.05)
        assert predicted.bytes == predict(config, gpu_of(GPU)).peak_bytes
        assert figures_of(run, predicted) == {"memory/predicted_peak": predicted.bytes}
