"""Any transformers task: the Auto class, the rows it is trained on, a run and its prediction."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import Architecture, RunConfig, UserError
from gpumem_tui.engine.prediction.capacity import largest_that_fit
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.prediction.prediction_text import heading
from gpumem_tui.engine.workload import prepare
from gpumem_tui.profiles import run_fields
from gpumem_tui.tui.cli import main

from .conftest import Engine

H100 = gpu("H100 80GB")

TEXT = {"vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
SEVERAL = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
           "decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 128,
           "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
         "image_size": 32, "patch_size": 8, "num_labels": 7}  # fmt: skip
STAGES = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1], "num_labels": 5}

MODELS: dict[str, dict[str, Any]] = {
    "bert": {"model_type": "bert", "architectures": ["BertForMaskedLM"], **TEXT},
    "llama": {"model_type": "llama", "num_key_value_heads": 1, "pad_token_id": None, **TEXT},
    "t5": {"model_type": "t5", "vocab_size": 128, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2,
           "num_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
    "bart": {"model_type": "bart", "architectures": ["BartForConditionalGeneration"], **SEVERAL},
    "whisper": {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "num_mel_bins": 8,
                "max_source_positions": 20, "max_target_positions": 32, **SEVERAL},
    "vit": {"model_type": "vit", "architectures": ["ViTForImageClassification"], **IMAGE},
    "yolos": {"model_type": "yolos", "num_detection_tokens": 10, **IMAGE, "image_size": [32, 32]},
    "segformer": {"model_type": "segformer", "num_attention_heads": [1, 2, 2, 2], "decoder_hidden_size": 16, **STAGES},
    "resnet": {"model_type": "resnet", "embedding_size": 8, **STAGES},
}  # fmt: skip


def tiny(model: str, **settings: Any) -> RunConfig:
    few = {"batch_size": 2, "seq_len": 16, "rows": 4, "steps": 2, "image_size": 32 if "size" not in model else 0}
    base = {"model": model, "architecture": Architecture(MODELS[model], "float32")}
    return techniques.configure(base, techniques.parse(few | settings, "test"))


RUNS = [
    ("bert", "masked-lm", {}),
    ("bert", "sequence-classification", {"lora": True, "lora.targets": "query,value"}),
    ("bert", "token-classification", {"checkpointing": "layers"}),
    ("bert", "question-answering", {"dtype": "mixed"}),
    ("llama", "sequence-classification", {}),
    ("t5", "seq2seq-lm", {"target_len": 8}),
    ("t5", "seq2seq-lm", {"checkpointing": "layers"}),
    ("bart", "seq2seq-lm", {"lora": True, "lora.targets": "q_proj"}),
    ("whisper", "speech-seq2seq", {}),
    ("vit", "image-classification", {"checkpointing": "layers"}),
    ("resnet", "image-classification", {"optimizer": "sgd-momentum"}),
    ("segformer", "semantic-segmentation", {}),
]


@pytest.mark.parametrize(("model", "task", "settings"), RUNS, ids=str)
def test_every_task_is_trained_and_predicted(engine: Engine, model: str, task: str, settings: dict[str, Any]) -> None:
    config = tiny(model, task=task, **settings)
    trained = engine.run(config)
    assert trained["failure"] is None
    assert all(step["loss"] > 0 for step in trained["steps"])
    found = predict(config, H100)
    assert found.document.parameters == trained["parameters"]
    assert found.document.trainable_parameters == trained["trainable_parameters"]
    assert (trained["unknown_bytes_max"], found.document.unknown_bytes_max) == (0, 0)
    for category in ("parameters", "gradients", "inputs"):
        at_loaded, measured = found.document.after_first_step, trained["after_first_step"]
        assert at_loaded is not None
        assert at_loaded.by_category[category] == measured["by_category"][category]


def test_a_detector_is_predicted_without_what_matches_its_boxes() -> None:
    found = predict(tiny("yolos", task="object-detection"), H100)
    assert found.document.unknown_bytes_max == 0
    assert found.by_category["inputs"] >= 2 * 3 * 32 * 32 * 4


@pytest.mark.parametrize(
    ("model", "told"),
    [("bert", "masked-lm"), ("llama", "causal-lm"), ("t5", "seq2seq-lm"), ("whisper", "speech-seq2seq"),
     ("vit", "image-classification"), ("resnet", "image-classification"), ("yolos", "object-detection")],
)  # fmt: skip
def test_a_model_says_what_it_is_for(model: str, told: str) -> None:
    """By its architectures, or else by the first task that its type has a model for."""
    assert prepare(tiny(model), torch.device("cpu"), shapes_only=True).task.name == told


def test_a_folder_with_another_model_gets_its_task(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, fields in (("bert", MODELS["bert"] | {"architectures": ["BertForTokenClassification"]}),
                         ("clap", {"model_type": "clap", "architectures": ["ClapModel"]})):  # fmt: skip
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(fields))
    arguments = ["--set", "batch_size=2", "--set", "seq_len=16", "--gpu", "T4", "--json", "-"]
    assert main(["estimate", "--model", str(tmp_path / "bert"), *arguments]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["max_batch_size"] > 2
    assert main(["estimate", "--model", str(tmp_path / "clap"), *arguments]) == 2
    assert "clap is of no task that is known here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "settings", "said"),
    [
        ("vit", {"task": "masked-lm"}, "vit has no model for task=masked-lm; it has for: image-classification"),
        ("bert", {"loss": "chunked"}, "loss=chunked is for causal language models, which BertForMaskedLM is not"),
        ("t5", {"checkpointing": "segments"}, "2 stacks of layers"),
        ("whisper", {"target_len": 33}, "learned positions for 32 tokens in a row: target_len=33"),
        ("llama", {"task": "nonsense"}, "task=nonsense is not allowed"),
    ],
)
def test_what_a_task_cannot_is_said_in_a_line(model: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        predict(tiny(model, **settings), H100)


def test_images_have_a_size_and_no_sequence() -> None:
    small, large = (predict(tiny("vit", image_size=size), H100) for size in (32, 64))
    assert heading(small) == "vit batch_size=2 image_size=32 rows=4 steps=2 on H100 80GB, predicted"
    assert large.by_category["inputs"] == pytest.approx(4 * small.by_category["inputs"], rel=0.01)
    assert set(largest_that_fit(small, lambda config: predict(config, H100), H100)) == {"max_batch_size"}


def test_equal_layers_stand_for_others_where_there_is_one_stack() -> None:
    from gpumem_tui.engine.prediction.rehearsal import rehearse

    def traced(name: str, **settings: Any) -> int | None:
        typed = techniques.parse({"batch_size": 1, "seq_len": 16, **settings}, "test")
        return rehearse(techniques.configure(run_fields(name), typed), H100).traced_layers

    assert traced("bert-base") == traced("vit-base") == 5
    assert traced("bart-base") is None
