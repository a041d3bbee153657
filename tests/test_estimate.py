"""`gpumem-tui estimate`: does it fit, what is the most that would, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from gpumem_tui.engine.prediction.capacity import largest_that_fit
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.neighbours import Neighbours
from gpumem_tui.engine.prediction.outcome import Prediction, Verdict
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.prediction.prediction_text import cautions, verdict
from gpumem_tui.engine.prediction.search import largest
from gpumem_tui.tui import interrupt
from gpumem_tui.tui.cli import main
from gpumem_tui.tui.commands import estimate

from .conftest import small_run

H100 = gpu("H100 80GB")


def test_the_largest_that_fits_is_found_in_few_questions() -> None:
    asked: list[int] = []

    def bound_at(n: int) -> int:
        asked.append(n)
        return 1000 + 37 * n

    assert (100_000 - 1000) // 37 * 63 // 64 <= largest(bound_at, 8, 100_000, 65_536) <= (100_000 - 1000) // 37
    assert len(asked) <= 5
    assert 179 <= largest(lambda n: 500 + 3 * n * n, 8, 100_000, 65_536) <= 182
    assert largest(lambda n: 37 * n, 8, 1000, 65_536) == 27
    assert largest(lambda _: 10, 8, 5, 100) == 0
    assert largest(lambda _: 1, 8, 5, 100) == 100


def test_gaps_between_blocks_are_part_of_the_one_verdict() -> None:
    """The smaller the GPU, the more has to be given back; what is allocated would fit in all but the smallest."""
    config = small_run()
    plenty = predict(config, H100)
    bound, gaps = plenty.safe_bound_bytes, plenty.reserved_bytes - plenty.peak_bytes

    def on(share_of_gaps: float) -> Prediction:
        available = int(bound + share_of_gaps * gaps)
        return predict(config, dataclasses.replace(H100, name="mine", memory_bytes=H100.context_bytes + available))

    found = {share: on(share) for share in (-0.01, 0.0, 0.7, 1.0)}
    assert [one.verdict for one in found.values()] == [
        Verdict.TOO_LARGE,
        Verdict.FRAGMENTED,
        Verdict.TIGHT,
        Verdict.FITS,
    ]
    assert [one.fits for one in found.values()] == [False, False, True, True]
    assert all(one.reserved_bytes == plenty.reserved_bytes for one in found.values())
    assert found[1.0].expandable_bytes is None
    assert plenty.peak_bytes < (found[0.7].expandable_bytes or 0) < plenty.reserved_bytes
    assert "gaps between blocks" in verdict(found[0.0]) and "It does not fit" in verdict(found[0.0])
    assert "tightly" in verdict(found[0.7]) and "expandable_segments:True it would be" in verdict(found[0.7])


def test_the_verdict_says_what_has_to_fit_and_how_much_is_left_or_missing_of_what_torch_can_have() -> None:
    """What is allocated is never said to be more than what is reserved, and what is outside torch is off already."""
    plenty, gib = predict(small_run(), H100), 1 << 30

    def on(available: int) -> str:
        return verdict(predict(small_run(), dataclasses.replace(H100, memory_bytes=H100.context_bytes + available)))

    needed, allocated = plenty.reserved_bound_bytes, plenty.safe_bound_bytes
    room = f"the {(needed + gib) / gib:.2f} GiB that torch can have on H100 80GB"
    whole = (needed + gib + H100.context_bytes) / gib
    assert on(needed + gib) == (
        f"It fits with 1.00 GiB to spare: up to {needed / gib:.2f} GiB are reserved, at most {allocated / gib:.2f} GiB "
        f"of them allocated ({plenty.peak_bytes / gib:.2f} GiB expected), of {room} ({whole:.2f} GiB less 0.83 GiB for "
        "CUDA's context)."
    )
    half = f"{allocated / 2 / gib:.2f}"
    assert on(allocated // 2).startswith(
        f"It does not fit: up to {allocated / gib:.2f} GiB are allocated at once, {half} GiB more than the {half} GiB "
    )
    assert on(-gib // 2) == (
        "It does not fit: of the 0.33 GiB on H100 80GB nothing is left for torch after 0.83 GiB for CUDA's context."
    )


def test_the_largest_batch_that_fits_is_one_that_fits_with_its_gaps() -> None:
    card = gpu("RTX 3060:2GiB")
    now = predict(small_run(), card)
    found = largest_that_fit(now, lambda config: predict(config, card), card)["max_batch_size"]
    assert predict(small_run(batch_size=found), card).fits


def test_estimate_writes_the_document_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "estimate.json"
    quick = ["--batch-size", "2", "--seq-len", "1024"]
    assert main(["estimate", "--profile", "tiny", *quick, "--gpu", "H200", "--json", str(target)]) == 0
    document = json.loads(target.read_text())
    assert document["schema"] == "gpumem-run/1"
    assert document["predicted"] is True
    assert document["gpu"] == "H200"
    assert document["fits"] is True
    assert document["margin_bytes"] > 0
    assert document["safe_bound_bytes"] > document["peak"]["allocated_bytes"]
    assert document["max_batch_size"] > 100
    assert document["max_sequence_length"] == document["max_positions"] == 2048  # what the model was made for
    said = " ".join(capsys.readouterr().out.split())
    assert "sequence length at this batch size: 2048, all the 2048 positions that the model was made for." in said


def test_an_estimate_says_its_batch_and_what_surprises(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["estimate", "--profile", "tiny", "--preset", "qlora", "--gpu", "L4 24GB"]
    assert main([*line, "--set", "checkpointing=off"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("tiny batch_size=8 seq_len=256 dtype=mixed")
    assert "K-bit preparation makes embeddings, head and norms float32" in said


@pytest.mark.parametrize("command", [["estimate", "--json", "-"], ["check", "--budget", "1GiB"]])
def test_a_device_on_which_nothing_is_run_is_told_of(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--profile", "tiny", "--device", "cuda", "--gpu", "L4"]) == 0
    said = "--device cuda: nothing is run there; the prediction is for --gpu 'L4 24GB'\n"
    assert capsys.readouterr().err == said


def test_a_flag_is_blamed_by_its_own_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--profile", "tiny", "--generate", "0"]) == 2
    assert capsys.readouterr().err.startswith("gpumem-tui: --generate: new_tokens=0 is not allowed")


def test_layers_without_checkpoints_are_cautioned_of_where_there_are_none() -> None:
    qlora = {"lora": True, "quantization": "nf4", "dtype": "mixed"}
    said = {each: cautions(small_run(**qlora, checkpointing=each)) for each in ("off", "layers", "selective")}
    assert "with no layer checkpointed" in "".join(said.pop("off")) and not any(said.values())
    assert not cautions(small_run(**qlora, workload="generate"))


def test_rows_longer_than_a_model_was_made_for_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--profile", "tiny", "--batch-size", "1", "--seq-len", "3000", "--gpu", "L4"]) == 0
    assert "3000 tokens in a row: the model was made for 2048." in capsys.readouterr().out


def test_the_calculator_has_a_row_for_each_data_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--profile", "tiny", "--table", "--json", "-", "--gpu", "L4 24GB"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["batch_size"], document["seq_len"]) == (8, 256)
    rows = {row["dtype"]: row for row in document["rows"]}
    assert list(rows) == ["float32", "float16/bfloat16", "int8", "int4"]
    assert rows["float32"]["weights_bytes"] == pytest.approx(2 * rows["float16/bfloat16"]["weights_bytes"], rel=0.01)
    assert rows["int4"]["weights_bytes"] < rows["int8"]["weights_bytes"] < rows["float16/bfloat16"]["weights_bytes"]
    assert rows["int4"]["training_adam_bytes"] is None
    assert rows["float32"]["lora_bytes"] < rows["float32"]["training_adam_bytes"]


def test_the_search_after_the_answer_says_what_it_looks_for_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    settings = ["--set", "lora=on", "--set", "lora.dropout=0.25", "--set", "lora.targets=all-linear"]
    assert main(["estimate", "--batch-size", "2", "--seq-len", "24", "--gpu", "L4:1.25GiB", *settings]) == 0
    told = [line.partition(" ")[2] for line in capsys.readouterr().err.split("\r\x1b[K") if line]
    assert told[0].startswith("predicting tiny batch_size=2 seq_len=24 lora=on") and told[0].endswith(" ...")
    assert any(re.fullmatch(r"largest batch that fits: trying \d+", line) for line in told)
    assert all(len(line) <= 79 - len("00:00:00 ") for line in told)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--script", "mine.py:training", "--batch-size", "4", "--preset", "lora", "--set", "dtype=bfloat16"],
         "--script does not go with --preset, --set, --batch-size: what is run is all in the script"),
        (["--script", "mine.py:training", "--generate", "5", "--table"], "not go with --generate, --table:"),
        (["--table", "--preset", "lora", "--set", "dtype=float16", "--set", "lora.r=4", "--save", "x"],
         "--table does not go with --preset, --save, dtype=float16: its rows and columns set dtype, lora,"),
        (["--table", "--workload", "generate"], "--table does not go with workload=generate:"),
    ],
)  # fmt: skip
def test_flags_that_could_play_no_part_beside_another_are_refused(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_an_estimate_says_the_answer_first_and_keeps_it_when_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C while the largest batch is searched: what was said stands, and is in the document."""
    said: list[str] = []

    def left(*_: object) -> None:
        said.append(capsys.readouterr().out)
        interrupt._interrupted()

    monkeypatch.setattr(estimate, "largest_known", left)
    monkeypatch.setattr(estimate, "end", lambda: sys.exit(interrupt.INTERRUPTED))
    target = tmp_path / "estimate.json"
    with pytest.raises(SystemExit, match="130"):
        main(["estimate", "--batch-size", "2", "--seq-len", "16", "--gpu", "H200", "--json", str(target)])
    assert "It fits with" in said[0] and "Largest" not in said[0] + capsys.readouterr().out
    document = json.loads(target.read_text())
    assert document["peak"]["allocated_bytes"] > 0 and "max_batch_size" not in document


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--profile", "tiny", "--gpu", "Voodoo 2"], "--gpu Voodoo 2"),
        (["--profile", "tiny", "--gpu", ""], "--gpu '': not a GPU known here"),
        (["--profile", "tiny", "--gpu", "24"], "--gpu 24: not a GPU known here; did you mean 24GB?"),
        (["--profile", "tiny", "--gpu=-5GB"], "--gpu -5GB: not a GPU known here; known: B200,"),
        (["--model", "."], ".: Unrecognized model"),
        (["--profile", "tiny", "--set", "quantization=nf4"], "lora=on"),
        (
            ["--profile", "tiny", "--set", "new_tokens=64"],
            "new_tokens=64 is for what is generated: set workload=generate",
        ),
        (["--profile", "tiny", "--json", "/nowhere/x.json"], "cannot write there"),
    ],
    ids=["gpu", "no name", "no unit", "negative", "folder without a config", "combination", "no part", "json"],
)
@pytest.mark.parametrize("command", ["estimate", "advise"])
def test_what_cannot_be_is_one_clear_line(
    command: str, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpumem-tui: ") and error.count("\n") == 1
    assert says in error


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_hidden_layers": 10**8}, "num_hidden_layers=100000000; there may be 10000"),
        ({"hidden_size": 2**20, "intermediate_size": 10**9}, "parameters; there may be 1e+14"),
        ({"vocab_size": 2**63 - 1}, "overflow"),
        ({"num_attention_heads": 0}, "its configuration makes no model: ZeroDivisionError"),
    ],
    ids=["layers", "parameters", "beyond 64 bits", "no heads"],
)
@pytest.mark.parametrize("command", [("estimate",), ("run", "--device", "cpu")], ids=["estimate", "run"])
def test_a_model_beyond_all_measure_is_refused_in_one_line(
    command: tuple[str, ...], fields: dict[str, int], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain: dict[str, object] = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128}
    plain |= {"num_attention_heads": 4, "intermediate_size": 128, "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(plain | fields))
    assert main([*command, "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gpumem-tui: {tmp_path}: ") and error.count("\n") == 1 and len(error) < 300
    assert says in error


def test_only_the_config_of_a_folder_is_read(tmp_path: Path) -> None:
    from gpumem_tui.profiles import model_profile

    fields = dict(model_profile("tiny").config) | {"architectures": ["GPTNeoXForCausalLM"], "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    base = {"model": str(tmp_path), "pretrained": True}
    from_folder = predict(small_run(base), H100)
    assert from_folder.peak_bytes == predict(small_run(), H100).peak_bytes


def test_neighbours_tell_where_gaps_between_blocks_end_what_fits() -> None:
    """Gaps are on no line: what is asked of the allocator is, and so few predictions find the largest batch."""
    card = gpu("RTX 3060:2GiB")
    asked: list[int] = []

    def predicted(config: Any) -> Prediction:
        asked.append(config.batch_size)
        return predict(config, card)

    found = largest_that_fit(predict(small_run(batch_size=8), card), predicted, card)["max_batch_size"]
    batches = [n for n in asked if n != 8]
    assert predict(small_run(batch_size=found), card).fits
    assert len(set(batches)) <= 6

    neighbours = Neighbours(card, card.available_bytes)
    assert neighbours.largest_between(1, 10) is None
    for n in (found // 4, found // 2, 2 * found):
        neighbours.learn(n, predict(small_run(batch_size=n), card))
    told = neighbours.largest_between(found // 2, 2 * found)
    assert told is not None and abs(told - found) <= found // 16

    near = Neighbours(card, card.available_bytes)
    for n in (64, 80):
        near.learn(n, predict(small_run(batch_size=n, seq_len=128), card))
    told = near.largest_between(80, 1000)
    assert told is not None and not near.is_confirmed(told)
    near.learn(told, predict(small_run(batch_size=told, seq_len=128), card))
    assert near.is_confirmed(told) and near.largest_between(told, 1000) == told
    fits = [predict(small_run(batch_size=n, seq_len=128), card).fits for n in (told, told + 1)]
    assert fits == [True, False]


def test_what_kernels_round_up_to_tiles_may_be_expected_to_be_nothing_in_between() -> None:
    """Attention's statistics are as large at 32 tokens as at 126 and larger at 130: a parabola dips below zero."""
    found = {n: predict(small_run(batch_size=1, seq_len=n), H100) for n in (32, 80, 126, 130)}
    near = Neighbours(H100, found[80].safe_bound_bytes)
    for n in (32, 126, 130):
        near.learn(n, found[n])
    told = near.largest_between(32, 126)
    assert told is not None and 32 <= told <= 88


def test_what_came_out_as_it_was_expected_ends_the_search_and_what_did_not_goes_on() -> None:
    """The last number is predicted, and nothing beyond it: all of it was foretold, so the next one is as well."""

    class Line:
        def __init__(self, honest: bool) -> None:
            self.honest = honest

        def largest_between(self, low: int, high: int) -> int:
            return max(low, min(700, high - 1))

        def is_confirmed(self, n: int) -> bool:
            return self.honest and n == 700

    for honest, beyond in ((True, False), (False, True)):
        asked: list[int] = []

        def bound_at(n: int, asked: list[int] = asked) -> int:
            asked.append(n)
            return n

        assert largest(bound_at, 8, 700, 65_536, Line(honest)) == 700
        assert (max(asked) > 700) is beyond and (not honest or asked == [8, 700])
