"""What the command line says of a run that ran out of memory: where it is kept, why, what would fit, and going on."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.out_of_memory import telling
from gpumem_tui.engine.out_of_memory.kept import latest
from gpumem_tui.engine.out_of_memory.report import Fix
from gpumem_tui.engine.out_of_memory.telling import Told
from gpumem_tui.engine.prediction import known
from gpumem_tui.engine.prediction.gpus import Gpu
from gpumem_tui.engine.prediction.outcome import Prediction
from gpumem_tui.engine.recording import Recording
from gpumem_tui.engine.run import Run, RunId, RunKind
from gpumem_tui.engine.run_events import RunEnded
from gpumem_tui.tui.cli import main
from gpumem_tui.tui.commands import run as run_command
from gpumem_tui.watch import watch

from .app_driver import foretold
from .fake_source import CPU
from .watching import run_under_exec

MIB = 1 << 20
RUN = ["run", "--profile", "tiny", "--device", "cpu", "--batch-size", "8", "--seq-len", "64", "--steps", "1"]
KEYS = [
    "asked_bytes", "step", "phase", "module", "rank", "allocated_bytes", "by_category", "cached_bytes",
    "largest_free_block_bytes", "outside_torch_bytes", "verdict", "reason", "fixes",
]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_of_other_tests() -> None:
    """Their models and optimizers, not collected yet, would be others that a watched script holds beside its own."""
    gc.collect()


def rule(config: RunConfig, card: Gpu) -> Prediction:
    """A peak that goes by the rows of a micro-batch alone: those of two fit."""
    peak = config.batch_size * 20 * MIB
    fits = peak <= card.available_bytes
    run = Run(RunId("predicted", 1), config, CPU, RunKind.PREDICTED)
    held = {Category.ACTIVATIONS.key: peak}
    return replace(foretold(config, peak, run, fits), by_phase={"forward": held})


class Ruled:
    """Predicts by the rule, in this process: another would load its libraries first."""

    ended = False

    def __init__(self, longest_s: int = 0) -> None:
        pass

    def known_or_predicted(self, config: RunConfig, card: Gpu) -> Prediction:
        return rule(config, card)

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def predicted_by_a_rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "gpu" in request.keywords:
        return
    monkeypatch.setattr(telling, "PredictingProcess", Ruled)
    monkeypatch.setattr(known, "predicted", rule)


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, list[str]]:
    out, err = capsys.readouterr()
    return out, [line.removeprefix("gpumem-tui: ") for line in err.splitlines()]


def test_retry_goes_on_with_the_first_change_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*RUN, "--memory-limit", "46MiB", "--retry", "--json", "-"]) == 0
    out, lines = said(capsys)
    reason, kept, fits, goes_on = lines
    assert reason.startswith("out of memory: asked for ")
    assert kept == f"kept in {latest()}; gpumem-tui why shows it"
    assert fits.startswith("accumulation=4 batch_size=2 would fit, with about ") and fits.endswith(
        " of 46.0 MiB, predicted with a GPU's kernels"
    )
    assert goes_on == "goes on with accumulation=4 batch_size=2 (retry 1 of 3)"
    document = json.loads(out)
    assert document["failure"] is None and document["peak"]["allocated_bytes"] <= 46 * MIB
    assert (document["config"]["batch_size"], document["config"]["options"]["accumulation"]) == (2, 4)


@pytest.mark.gpu
def test_on_a_gpu_the_first_change_that_is_predicted_to_fit_does(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["run", "--profile", "tiny", "--device", "cuda", "--batch-size", "64", "--seq-len", "512", "--steps", "2"]
    assert main([*run, "--memory-limit", "2GiB", "--retry", "--json", "-"]) == 0
    out, lines = said(capsys)
    document = json.loads(out)
    assert sum(line.startswith("goes on with ") for line in lines) == 1, lines
    assert document["config"]["batch_size"] * document["config"]["options"]["accumulation"] == 64


def test_retries_come_to_an_end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = iter(range(100))

    def another_seed(*_: object) -> Told:
        return Told("so it is said", Fix(set={"seed": next(seeds)}, peak_bytes=0, fits=True, keeps_mathematics=True))

    monkeypatch.setattr(run_command, "would_fit", another_seed)
    assert main([*RUN, "--memory-limit", "30MiB", "--retry"]) == 3
    out, lines = said(capsys)
    assert not out and next(seeds) == run_command.MOST_RETRIES == sum(line.startswith("goes on") for line in lines)
    assert lines[-1].startswith("kept in ")


def test_a_run_that_died_is_kept_and_why_shows_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main([*RUN, "--memory-limit", "46MiB"]) == 3
    path = latest()
    assert path is not None
    (run,) = Recording(path).runs()
    refused, ended = run.refused, run.ended
    assert refused is not None and refused.report is not None and isinstance(ended, RunEnded)
    assert ended.reason == "failed" and ended.leaked_bytes == 0
    assert run.traces()[-1].is_aborted and run.config.memory_limit_bytes == 46 * MIB
    said(capsys)

    assert main(["why", "--json", "-"]) == 0
    document = json.loads(said(capsys)[0])
    assert list(document) == KEYS
    assert sum(document["by_category"].values()) == document["allocated_bytes"] == refused.report.allocated_bytes
    assert document["verdict"] == "full" and document["outside_torch_bytes"] == 0
    assert document["fixes"][0]["set"] == {"accumulation": 4, "batch_size": 2}
    assert all(list(fix) == ["set", "peak_bytes", "fits", "keeps_mathematics"] for fix in document["fixes"])

    target = tmp_path / "why.json"
    assert main(["why", str(path), "--json", str(target)]) == 0
    out, _ = said(capsys)
    assert json.loads(target.read_text()) == document
    assert "OUT OF MEMORY  step 1, forward" in out and "full: " in out
    assert "accumulation=4 batch_size=2" in out and "the largest tensors" in out and f"gpumem-tui open {path}" in out
    fixes = out[out.index(" what would fit") : out.index(" the largest tensors")]
    assert "…" not in fixes and fixes.rstrip().endswith("~ is predicted with a GPU's kernels; this run was on a CPU")


def test_what_did_not_run_out_of_memory_is_refused_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["why"]) == 2
    assert said(capsys)[1][0].startswith("no run that ran out of memory is kept in ")
    recording = Path(__file__).parent / "recordings" / "full.gpumem"
    assert main(["why", str(recording)]) == 2
    assert said(capsys)[1] == [f"{recording}: nothing in it ran out of memory"]


# --- scripts ------------------------------------------------------------------------------------


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, rows: int) -> None:
    model(torch.ones(rows, 256)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def net() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256))
    return model, torch.optim.AdamW(model.parameters())


def test_a_loop_that_catches_it_is_told_at_once_where_it_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = net()
    with watch(model, optimizer, memory_limit="24MiB"):
        for rows in (4096, 64):
            try:
                train(model, optimizer, rows)
            except torch.OutOfMemoryError:
                said(capsys)
        lines = said(capsys)[1]
    assert lines == [f"kept in {latest()}; gpumem-tui why shows it"]


def test_a_script_that_dies_of_it_ends_with_where_it_is_kept_and_what_would_fit(tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text(
        "import torch\n"
        "model = torch.nn.Sequential(torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256))\n"
        "optimizer = torch.optim.AdamW(model.parameters())\n"
        "model(torch.ones(4096, 256)).sum().backward()\n"
    )
    done = run_under_exec(sys.executable, str(script), limit="24MiB")
    out, err = done.communicate(timeout=100)
    lines = err.splitlines()
    assert done.returncode == 1 and not out
    assert lines[-3].startswith("torch.OutOfMemoryError: CPU out of memory.")
    assert lines[-2] == f"gpumem-tui: kept in {latest()}; gpumem-tui why shows it"
    assert lines[-1].startswith("gpumem-tui: what would fit cannot be told: the architecture of the model is not known")
    assert sum(line.startswith("Traceback") for line in lines) == 1 and "gpumem_tui" not in "".join(lines[:-2])


def test_of_a_transformers_model_it_is_said_what_to_write(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    at_exit: list[Any] = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    model = GPTNeoXForCausalLM(
        GPTNeoXConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256, vocab_size=512)
    )
    optimizer, ids = torch.optim.AdamW(model.parameters()), torch.zeros(16, 64, dtype=torch.long)
    with pytest.raises(torch.OutOfMemoryError), watch(model, optimizer, memory_limit="24MiB"):
        for _ in range(2):
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    said(capsys)
    at_exit[-1]()
    kept, fits = said(capsys)[1]
    assert kept == f"kept in {latest()}; gpumem-tui why shows it"
    assert fits.startswith("accumulation=") and "(the loader's batch size) would fit, with about " in fits
