"""The command line: documents on standard output, errors as one line, exit codes that mean something."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import WORKLOAD_OPTIONS
from gpumem_tui.tui.cli import main, parser
from gpumem_tui.tui.commands.app import goes_on
from gpumem_tui.tui.commands.common import config_from

from .conftest import LAYERS

QUICK = ["--batch-size", "2", "--seq-len", "16"]


def test_leaving_an_engine_says_how_to_get_back_in_lines_of_a_small_terminal() -> None:
    lines = goes_on("polyglot-ko-1.3b", ours=True).splitlines()
    assert [line.split(": ")[-1].strip() for line in lines] == [
        "polyglot-ko-1.3b goes on", "gpumem-tui attach polyglot-ko-1.3b", "gpumem-tui stop polyglot-ko-1.3b"
    ]  # fmt: skip
    assert max(map(len, lines)) < 60
    assert "stop" not in goes_on("train", ours=False)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gpumem_tui.tui", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The README's own line, in a process of its own: nothing but JSON may be on standard output."""
    done = command("run", "--profile", "tiny", "--steps", "3", *QUICK, "--set", "checkpointing=layers", "--json", "-")
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def test_the_document_has_every_part(document: dict[str, Any]) -> None:
    assert document["schema"] == "gpumem-run/1"
    assert document["environment"]["device"] == "cpu"
    assert document["config"]["options"]["checkpointing"] == "layers"
    assert document["parameters"] == document["trainable_parameters"] > 0
    assert document["unknown_bytes_max"] == 0
    assert document["leaked_bytes"] == 0
    assert document["failure"] is None


@pytest.mark.parametrize("moment", ["loaded", "after_first_step", "peak"])
def test_categories_sum_to_allocated_bytes(document: dict[str, Any], moment: str) -> None:
    part = document[moment]
    assert set(part["by_category"]) == {category.key for category in Category}
    assert sum(part["by_category"].values()) == part["allocated_bytes"] > 0
    assert all(isinstance(size, int) for size in part["by_category"].values())


def test_the_peak_says_where_it_was(document: dict[str, Any]) -> None:
    peak = document["peak"]
    assert peak["step"] in (1, 2, 3)
    assert peak["phase"] and peak["module"]
    assert sum(sum(sizes.values()) for sizes in peak["by_layer"].values()) == peak["allocated_bytes"]
    assert peak["allocated_bytes"] == max(step["peak_bytes"] for step in document["steps"])
    assert peak["largest"] == sorted(peak["largest"], key=lambda block: -block["bytes"])


def test_steps_and_recomputes_are_listed(document: dict[str, Any]) -> None:
    assert [step["step"] for step in document["steps"]] == [1, 2, 3]
    assert all(step["seconds"] > 0 and step["reserved_bytes"] is None for step in document["steps"])
    assert len(document["recomputes"]) == 3 * LAYERS
    first = document["recomputes"][0]
    assert first["layers"] == [f"gpt_neox.layers.{LAYERS - 1}"]
    assert {"step", "micro_batch", "layers", "bytes", "ms", "early_stop"} == set(first)


def test_without_json_a_person_reads_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    saved = tmp_path / "run.gpumem"
    assert main(["run", *QUICK, "--steps", "1", "--save", str(saved)]) == 0
    printed = capsys.readouterr().out
    for word in ("P parameters", "? unknown", "The peak was in step 1", "0 bytes leaked, at most 0 bytes unknown"):
        assert word in printed
    assert saved.stat().st_size > 1000


def test_json_into_a_file_leaves_the_table_on_the_screen(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    target = tmp_path / "run.json"
    assert main(["run", *QUICK, "--steps", "1", "--json", str(target)]) == 0
    assert json.loads(target.read_text())["schema"] == "gpumem-run/1"
    assert "P parameters" in capsys.readouterr().out


def test_a_local_folder_is_loaded_with_its_real_weights(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The first loss is the loss of the saved weights, not of new ones."""
    import torch
    from transformers import AutoModelForCausalLM

    from gpumem_tui.engine.batches import random_rows
    from gpumem_tui.engine.tasks import Row

    from .conftest import small_run

    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    config = small_run(rows=64)
    recipe = SimpleNamespace(dtype=torch.float32, packing="off")
    ids, labels = random_rows(config, dict.fromkeys("ab", Row((config.seq_len,), 32, 64)), recipe).rows.values()
    with torch.no_grad():
        expected = model(input_ids=ids[:2], labels=labels[:2]).loss.item()
    assert main(["run", "--model", str(checkpoint), *QUICK, "--steps", "1", "--json", "-"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["steps"][0]["loss"] == pytest.approx(expected, abs=1e-4)
    assert printed["parameters"] == model.num_parameters()


def test_a_local_folder_quantizes_too(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", str(checkpoint), "--preset", "qlora", *QUICK, "--steps", "1", "--json", "-"]
    assert main(["run", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["unknown_bytes_max"] == 0


@pytest.mark.parametrize("style", ["table", "md", "csv", "json"])
def test_sweep_runs_every_row_of_the_preset(style: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--profile", "tiny", "--batch-size", "2", "--seq-len", "8", "--steps", "1", "--format", style]
    code = main(["sweep", "--preset", "reference", *arguments])
    printed = capsys.readouterr().out
    assert code == 3, "the paged optimizers cannot run without a GPU, and say so"
    if style == "csv":
        rows = list(csv.DictReader(io.StringIO(printed)))
    elif style == "json":
        rows = json.loads(printed)["rows"]
    else:
        assert "it moves state between a GPU and the host" in printed
        assert "10.186" not in printed, "what was published is of another model"
        return
    assert len(rows) == 9
    assert sum(bool(row["problem"]) for row in rows) == 2
    assert all(row["after_step"] for row in rows if not row["problem"])


def test_the_shelves_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profiles"]) == 0
    assert "polyglot-ko-1.3b" in (listed := capsys.readouterr().out) and "1,331,810,304" in listed
    assert main(["techniques"]) == 0
    assert "--set lora.r=8" in capsys.readouterr().out
    assert main(["doctor", "--device", "cpu"]) == 0
    assert "cannot run    optimizer=paged-adamw: it moves state" in capsys.readouterr().out


def test_in_a_terminal_the_profiles_are_within_its_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profiles"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("gpt2 ") for line in lines) == 1 and max(map(len, lines)) > 80, "for grep: whole lines"
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["profiles"]) == 0
    narrow = capsys.readouterr().out
    assert max(map(len, narrow.splitlines())) < 80
    assert narrow.split() == " ".join(lines).split(), "no word is broken"


def test_a_run_that_generates_counts_tokens_and_steps_no_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *QUICK, "--workload", "generate", "--new-tokens", "8", "--steps", "2"]) == 0
    printed = capsys.readouterr()
    assert printed.err == "gpumem-tui: --steps 2: it ends after 2 of the 8 new tokens\n"
    assert "loaded" in printed.out and "after first step" not in printed.out


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["run", "--profile", "tinny"], "tiny"),
        (["run", "--preset", "qlorra"], "qlora"),
        (["run", "--set", "lora.rank=4"], "there is no setting 'lora.rank'"),
        (["run", "--set", "optimizer=adamx"], "optimizer takes adamw"),
        (["run", "--set", "lora"], "write it as key=value"),
        (["run", "--set", "quantization=nf4"], "set lora=on"),
        (["run", "--batch-size", "0"], "a whole number from 1"),
        (["run", "--steps", "0"], "needs an end"),
        (["run", "--device", "cuda:9"], "this machine has"),
        (["run", "--device", "tpu"], "takes auto, cpu, cuda"),
        (["--device", "cuda:9"], "this machine has"),
        (["--once", "--device", "cuda:9"], "this machine has"),
        (["--json", "--device", "cpu", "--set", "optimizer=paged-adamw"], "there is no GPU"),
        (["--once", "--device", "cuda:9", "--set", "parallel=ddp"], "the engine did not come up: --device cuda:9"),
        (["run", "--device", "cpu", "--set", "optimizer=paged-adamw"], "there is no GPU"),
        (["run", "--model", "/no/such/folder"], "--model /no/such/folder: no such folder"),
        (["run", "--data", "/no/such/file.txt", *QUICK], "no such file"),
        (["run", "--data", "x" * 300, *QUICK], "no such file"),
        (["run", "--data", ".", *QUICK], "--data .: it is a folder"),
        (["run", "--model", "/" + "x" * 300, *QUICK], "no such folder"),
        (["run", "--json", "x" * 300, *QUICK], "cannot write there"),
        (["run", "--json", "/no/such/folder/out.json"], "cannot write there"),
        (["run", "--profile", "tiny", "--model", "x"], "not allowed with"),
        (["run", "--frobnicate"], "unrecognized arguments: --frobnicate (see: gpumem-tui run --help)"),
        (["advise", "--script", "f.py:f"], "unrecognized arguments: --script f.py:f (see: gpumem-tui advise --help)"),
        (["--onec"], "unrecognized arguments: --onec; did you mean --once?"),
        (["estimate", "--batchsize=3"], "unrecognized arguments: --batchsize=3; did you mean --batch-size?"),
        (["run", "--theme", "dark"], "unrecognized arguments: --theme dark (see"),
        (["estimate", "--gpu", "-5GB"], "--gpu -5GB: not a GPU known here"),
        (["estimat"], "invalid choice: 'estimat'; did you mean estimate?"),
        (["open", "/no/such/file.gpumem"], "No such file"),
        (["sweep", "--format", "pdf"], "invalid choice"),
        (["jump"], "invalid choice: 'jump'"),
        (["--once", "--hz", "1e9"], "--hz 1e+09: takes a number from 0.1 to 60"),
        (["--once", "--hz", "nan"], "takes a number from 0.1 to 60"),
        (["exec", "--", ""], "exec: what is to be run?"),
        (["run", "--steps", "1e999"], "steps takes a whole number from 0 to 1099511627776"),
        (["run", "--set", "rows=1e9", "--seq-len", "1048576"], "does not fit: 1000000000 rows"),
    ],
)
def test_bad_input_is_one_line_and_not_zero(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = main(arguments)
    printed = capsys.readouterr()
    assert code != 0
    assert printed.out == ""
    assert printed.err.startswith("gpumem-tui: ") and printed.err.count("\n") == 1, printed.err
    assert complaint in printed.err


def test_without_a_temporary_folder_nothing_is_started(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/proc"])
    for words in (["--once"], ["run"], ["estimate"], ["advise"], ["sweep"]):
        assert main(words) == 2
        said = "gpumem-tui: no folder for temporary files can be written; TMPDIR may name one\n"
        assert capsys.readouterr().err == said


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ('{"model_type": "clap"}', "clap is of no task that is known here"),
        ('{"model_type": "gpt2", "n_layer": "two"}', "n_layer"),
        ('{"model_type": "gpt2", "n_embd": 7, "n_head": 2}', "must be divisible"),
        ('{"model_type": "none"}', "none"), ("{", "JSON"), ("[]", ""), ("[" * 5000, ""),
    ],
)  # fmt: skip
def test_a_folder_that_holds_no_model_of_a_known_task_is_one_line(
    tmp_path: Path, written: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(written)
    assert main(["estimate", "--model", str(tmp_path), "--gpu", "A100 40GB"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"gpumem-tui: {tmp_path}: ") and said.count("\n") == 1 and complaint in said
    assert len(said) < 500


@pytest.mark.parametrize("before", [["--profile", "gpt2"], ["--set", "lora=on"], ["--batch-size", "3"]])
def test_options_before_a_command_count_as_if_they_came_after_it(before: list[str]) -> None:
    first, second = (parser(words).parse_args(words) for words in ([*before, "estimate"], ["estimate", *before]))
    assert first == second
    assert config_from(first) != config_from(parser().parse_args(["estimate"]))


@pytest.mark.parametrize("words", [["--once", "estimate"], ["--ascii", "exec", "--", "true"], ["--hz", "3", "ps"]])
def test_options_before_a_command_that_it_does_not_have_are_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert f"unrecognized arguments: {words[0]}" in capsys.readouterr().err


def test_help_lists_the_values_that_a_flag_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["estimate", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "--preset PRESET a named combination of settings: checkpointing, full, lora," in said
    assert "--workload WORKLOAD what is done with the model; one of train, generate" in said
    task = next(option for option in WORKLOAD_OPTIONS if option.name == "task")
    assert f"--task TASK what the model is for; auto: what its architectures say; one of {task.allowed}" in said


def test_help_comes_without_torch() -> None:
    code = "import sys; from gpumem_tui.tui.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    check = "assert not {'torch', 'transformers', 'textual'} & set(sys.modules), 'too much was imported'"
    done = subprocess.run([sys.executable, "-c", code + check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "sweep" in done.stdout


def test_without_a_terminal_the_program_itself_writes_plain_text_and_ends_with_the_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--steps", "2", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "step ended     step 2: loss" in out
    assert "0 bytes leaked" in out
    assert "P parameters" in out
    assert "\x1b" not in out


def test_a_loss_that_is_no_number_is_said_in_a_frame(capsys: pytest.CaptureFixture[str]) -> None:
    diverging = [*QUICK, "--learning-rate", "1e30"]
    assert main(["--once", *diverging]) == 0
    assert re.search(r"loss (nan|inf)", capsys.readouterr().out)
    assert main(["--json", *diverging]) == 0
    frame = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # NaN is no JSON
    assert frame["loss"] is None and frame["lost_loss"] in ("nan", "inf")


def test_once_is_one_frame_and_the_run_is_stopped(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--once", *QUICK]) == 0
    out = capsys.readouterr().out
    assert "The peak is" in out
    assert "step ended" not in out
