"""Texts of several lengths: what is padded is masked, and packed ones know nothing of one another."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.packing import IGNORED, of_random, of_texts
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.workload import build, prepare
from gpumem_tui.profiles import run_fields

from .conftest import Engine, small_run

TEXTS = [[5, 6, 7, 8, 9], [11, 12, 13], [21, 22, 23, 24, 25, 26, 27, 28, 29, 30], [31]]
CPU = torch.device("cpu")


def test_packed_texts_are_the_longest_first_where_there_is_room() -> None:
    rows, lengths = of_texts("packed", TEXTS, seq_len=9)
    assert not lengths
    assert rows["input_ids"].tolist() == [[21, 22, 23, 24, 25, 26, 27, 28, 29], [5, 6, 7, 8, 9, 11, 12, 13, 31]]
    assert rows["position_ids"].tolist()[1] == [0, 1, 2, 3, 4, 0, 1, 2, 0]
    assert rows["labels"].tolist()[1] == [IGNORED, 6, 7, 8, 9, IGNORED, 12, 13, IGNORED]


def test_padded_texts_are_one_a_row_and_masked() -> None:
    rows, lengths = of_texts("padded", TEXTS, seq_len=9)
    assert lengths == [5, 3, 9, 1]
    assert rows["attention_mask"].sum(1).tolist() == lengths
    assert rows["labels"][1].tolist() == [IGNORED, 12, 13] + [IGNORED] * 6


def test_a_packed_text_is_computed_as_if_it_were_alone() -> None:
    model = build(prepare(small_run(packing="packed", kv_cache="off"), CPU)).model
    rows, _ = of_texts("packed", TEXTS, seq_len=16)
    with torch.no_grad():
        packed = model(**rows).logits[0]
        at = 0
        for text in sorted(TEXTS[:3], key=len, reverse=True)[:2]:
            alone = model(input_ids=torch.tensor([text])).logits[0]
            assert torch.allclose(packed[at : at + len(text)], alone, atol=1e-5)
            at += len(text)


def test_a_batch_is_as_long_as_its_longest_and_some_are_as_long_as_can_be() -> None:
    batches = prepare(small_run(packing="padded", batch_size=2, rows=8, seq_len=32), CPU).batches
    for _ in range(4):
        batch = batches.next()
        assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 32)
        assert bool(batch["attention_mask"].all()) is False or 32 in batch["attention_mask"].sum(1)
    batches.lengths = [3] * 8
    assert batches.next()["labels"].shape == (2, 3)


def test_the_rows_of_a_flash_kernel_are_one() -> None:
    config = small_run(packing="packed", kv_cache="off", dtype="bfloat16", attention="flash_attention_2")
    assert prepare(config, CPU, shapes_only=True).recipe.one_row
    plan = prepare(small_run(packing="packed", kv_cache="off"), CPU)
    plan.batches.one_row = True
    batch = plan.batches.next()
    assert batch["position_ids"].shape == (1, 32) and (batch["position_ids"] == 0).sum() >= 4


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_random_texts_are_the_same_every_time(kind: str) -> None:
    rows = {name: torch.arange(64).view(4, 16) for name in ("input_ids", "labels")}
    first, again = (of_random(kind, rows, batch_size=2, seed=3) for _ in range(2))
    assert all(torch.equal(first.rows[name], again.rows[name]) for name in first.rows)
    assert (first.rows["labels"] == IGNORED).sum() >= 4


@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_texts_of_a_file_have_their_own_lengths(engine: Engine, checkpoint: Path, tmp_path: Path, kind: str) -> None:
    data = tmp_path / "texts.jsonl"
    texts = ["the cat", "the cat sat on the mat", "the cat sat", "mat"] * 3
    data.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    base = {"model": str(checkpoint), "pretrained": True, "data": str(data)}
    config = replace(small_run(base, packing=kind, kv_cache="off", seq_len=16))
    rows = prepare(config, CPU).batches.rows
    assert len(rows["input_ids"]) == (12 if kind == "padded" else 3), "36 words fill three rows of 16"
    document = engine.run(config)
    assert document["failure"] is None and document["unknown_bytes_max"] == 0


def test_a_mask_and_padding_are_predicted() -> None:
    """A mask keeps CUDA from flash attention, and is as large as a row's tokens squared."""
    settings: dict[str, Any] = {"seq_len": 256, "kv_cache": "off", "dtype": "bfloat16"}
    plain, padded, packed = (predict(small_run(**settings, packing=kind), gpu("A100 40GB"))
                             for kind in ("off", "padded", "packed"))  # fmt: skip
    for one in (padded, packed):
        assert one.by_phase["forward"]["activations"] > plain.by_phase["forward"]["activations"]
        assert one.document.as_dict()["unknown_bytes_max"] == 0


@pytest.mark.parametrize(
    ("base", "settings", "reason"),
    [
        ("tiny", {"packing": "packed"}, "set kv_cache=off"),
        ("tiny", {"packing": "packed", "kv_cache": "off", "lora": "on", "lora.kind": "prompt"}, "another lora.kind"),
    ],
)
def test_what_cannot_be_packed_is_refused(base: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        techniques.configure(run_fields(base), techniques.parse(settings, "test"))
