"""The shelf: every model is what it says it is, every preset can be run, and a mistake in a file is one clear line."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import RunConfig, UserError
from gpumem_tui.engine.events import Environment
from gpumem_tui.engine.workload import prepare
from gpumem_tui.profiles import (
    MODELS,
    PRESETS,
    Preset,
    model_profile,
    model_profiles,
    preset,
    presets,
    read_model,
    read_preset,
    run_fields,
)

GIB = 2**30

# --- models -----------------------------------------------------------------

every_model = pytest.mark.parametrize("name", sorted(model_profiles()))


def shell(name: str) -> Any:
    """The profile's model with every shape and no weights."""
    return prepare(techniques.configure(run_fields(name), {"seq_len": 16}), torch.device("cpu"), shapes_only=True).shell


@every_model
def test_a_model_has_the_published_number_of_parameters(name: str) -> None:
    assert sum(p.numel() for p in shell(name).parameters()) == model_profile(name).parameters


@every_model
def test_what_lora_adapts_is_in_every_layer_of_the_model(name: str) -> None:
    model = shell(name)
    for target in model_profile(name).lora_targets:
        matrices = [m for path, m in model.named_modules() if path.endswith(f".{target}") and m.weight.ndim == 2]
        stacks = {False: (1,), True: (2, 3)}[bool(model.config.is_encoder_decoder)]  # with and without cross attention
        assert len(matrices) in [stack * model.config.num_hidden_layers for stack in stacks]


@every_model
def test_transformers_knows_every_field_of_a_configuration(name: str) -> None:
    """It ignores one it does not know, so a typing error would leave the default in force."""
    config = AutoConfig.for_model(**model_profile(name).config)
    of_all = {"model_type", "num_labels", "decoder_start_token_id"}
    assert set(model_profile(name).config) - of_all <= set(type(config).__dataclass_fields__)


@every_model
def test_transformers_builds_a_model_without_a_warning(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [caplog.handler])
    caplog.set_level(logging.WARNING, "transformers")
    shell(name)
    assert not caplog.messages


@every_model
def test_special_tokens_are_in_the_vocabulary(name: str) -> None:
    config = model_profile(name).config
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    encoders = ("bert", "vit")
    assert {"eos_token_id"} <= set(special) or config["model_type"] in encoders
    assert all(0 <= token < config["vocab_size"] for token in special.values())


def test_a_profile_is_read_afresh_each_time() -> None:
    """Building a model completes its nested tables in place; the next model starts from the file again."""
    model_profile("tiny").config["rope_parameters"]["rope_theta"] = 1.0
    assert model_profile("tiny").config["rope_parameters"]["rope_theta"] == 10_000.0


# --- presets ----------------------------------------------------------------


def runs_of(chosen: Preset) -> dict[str, RunConfig]:
    """What a preset comes to: one run, or one for each of its rows."""
    settings = techniques.parse(chosen.settings, chosen.where)
    base = techniques.configure(run_fields(chosen.model or "tiny"), settings)
    return {row.name: base.with_(techniques.parse(row.settings, chosen.where)) for row in chosen.rows} or {"": base}


@pytest.mark.parametrize("name", sorted(presets()))
def test_the_settings_of_a_preset_exist_and_can_be_combined(name: str) -> None:
    for config in runs_of(preset(name)).values():
        techniques.check(config)
        assert config.model in model_profiles()


@pytest.mark.parametrize("name", sorted(set(presets()) - {"reference", "smallest"}))
def test_a_preset_can_be_run_without_a_gpu(name: str) -> None:
    packages = {"bitsandbytes": "0.50.2", "peft": "0.21.0"}
    laptop = Environment(device="cpu", device_name="laptop", device_total_bytes=16 * GIB, packages=packages)
    for config in runs_of(preset(name)).values():
        techniques.check(config, laptop)


def test_presets_that_are_compared_differ_in_what_they_are_named_after() -> None:
    """So that a diff of two runs shows one technique's doing and no other's."""
    full = dict(techniques.changed(runs_of(preset("full"))[""]))
    for name, technique in {"lora": "lora", "checkpointing": "checkpointing", "mixed-precision": "dtype"}.items():
        other = dict(techniques.changed(runs_of(preset(name))[""]))
        assert {key.split(".")[0] for key, _ in full.items() ^ other.items()} == {technique}


def test_the_reference_has_the_published_rows_and_two_more() -> None:
    rows = preset("reference").rows
    assert [bool(row.published) for row in rows] == [True] * 7 + [False] * 2
    assert all(row.bare_h100 for row in rows)


FULL_ROWS = [row for row in preset("reference").rows if "optimizer" not in row.settings and "lora" not in row.settings]


@pytest.mark.parametrize("row", FULL_ROWS, ids=lambda row: row.name)
def test_the_figures_of_the_reference_add_up(row: Any) -> None:
    """After a step there are weights, gradients, two moments, logits, KV cache and cuBLAS workspaces."""
    chosen = preset("reference")
    profile, config = model_profile(str(chosen.model)), runs_of(chosen)[row.name]
    layers, hidden, vocabulary = (profile.config[k] for k in ("num_hidden_layers", "hidden_size", "vocab_size"))
    weights, tokens = profile.parameters * 2, config.batch_size * config.seq_len
    kv_cache = 2 * layers * tokens * hidden * 2 if config["kv_cache"] else 0
    for figures, workspaces in ((row.published, 0.016), (row.bare_h100, 0.0635)):
        assert figures["gradients"] == pytest.approx(weights / GIB, abs=0.001)
        assert figures["optimizer"] == pytest.approx(2 * weights / GIB, abs=0.001)
        assert figures["loaded"] - figures.get("leftover", 0.0) == pytest.approx(weights / GIB, abs=0.002)
        after = (4 * weights + tokens * vocabulary * 2 + kv_cache) / GIB + workspaces
        assert figures["after_step"] == pytest.approx(after, abs=0.006)  # blocks the allocator did not split


# --- names ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("find", "typed", "meant", "folder"),
    [(model_profile, "tinny", "tiny", MODELS), (preset, "qlorra", "qlora", PRESETS)],
    ids=["model", "preset"],
)
def test_an_unknown_name_says_what_is_close_and_what_there_is(find: Any, typed: str, meant: str, folder: Path) -> None:
    with pytest.raises(UserError) as refused:
        find(typed)
    message = one_line(refused)
    assert repr(typed) in message
    assert f"did you mean {meant}" in message
    assert all(path.stem in message for path in folder.iterdir())


def one_line(refused: pytest.ExceptionInfo[UserError]) -> str:
    message = str(refused.value)
    assert len(message.splitlines()) == 1
    return message


# --- files that are wrong ---------------------------------------------------

MODEL = """
name = "mine"
title = "Mine"
summary = "a model of my own"
source = "https://example.org/mine"
dtype = "bfloat16"
parameters = 1000

[lora]
targets = ["q_proj", "v_proj"]

[config]
model_type = "llama"
hidden_size = 64
"""

PRESET = """
name = "mine"
title = "Mine"
summary = "settings of my own"
source = "https://example.org/mine"
model = "tiny"

[set]
"lora.r" = 4
optimizer = "sgd"

[[rows]]
name = "first"
[rows.set]
batch_size = 2
[rows.published]
loaded = 1.5
[rows.bare_h100]
peak_all_steps = 2.5

[[rows]]
name = "second"
[rows.set]
batch_size = 4
"""


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    return tmp_path / "mine.toml"


def test_a_model_is_read_as_it_is_written(mine: Path) -> None:
    mine.write_text(MODEL)
    profile = read_model(mine)
    assert (profile.name, profile.title, profile.summary) == ("mine", "Mine", "a model of my own")
    assert (profile.source, profile.dtype, profile.parameters) == ("https://example.org/mine", "bfloat16", 1000)
    assert profile.lora_targets == ("q_proj", "v_proj")
    assert profile.config == {"model_type": "llama", "hidden_size": 64}


def test_a_preset_is_read_as_it_is_written(mine: Path) -> None:
    mine.write_text(PRESET)
    chosen = read_preset(mine)
    assert (chosen.name, chosen.title, chosen.summary) == ("mine", "Mine", "settings of my own")
    assert (chosen.source, chosen.model) == ("https://example.org/mine", "tiny")
    assert chosen.settings == {"lora.r": 4, "optimizer": "sgd"}
    first, second = chosen.rows
    assert (first.name, first.settings) == ("first", {"batch_size": 2})
    assert (first.published, first.bare_h100) == ({"loaded": 1.5}, {"peak_all_steps": 2.5})
    assert (second.name, second.published, second.bare_h100) == ("second", {}, {})


def test_a_preset_needs_neither_model_nor_rows(mine: Path) -> None:
    mine.write_text(PRESET.split("[[rows]]", maxsplit=1)[0].replace('model = "tiny"', ""))
    assert (read_preset(mine).model, read_preset(mine).rows) == (None, ())


@pytest.mark.parametrize(
    ("written", "instead", "problem"),
    [
        ('title = "Mine"', "", "title is missing; it takes one line of text"),
        ('title = "Mine"', "title = 3", "title = 3 is not allowed; title takes one line of text"),
        ('title = "Mine"', 'title = ""', "title = '' is not allowed; title takes one line of text"),
        ('title = "Mine"', r'title = "a\nb"', r"title = 'a\nb' is not allowed; title takes one line of text"),
        ('name = "mine"', 'name = "yours"', "name = 'yours' is not allowed; name takes mine"),
        ('"bfloat16"', '"bf16"', "dtype = 'bf16' is not allowed; dtype takes float32, float16, bfloat16"),
        ("1000", '"1000"', "parameters = '1000' is not allowed; parameters takes a whole number from 1"),
        ("1000", "true", "parameters = True is not allowed; parameters takes a whole number from 1"),
        ("1000", "0", "parameters = 0 is not allowed; parameters takes a whole number from 1"),
        ("parameters", "paramters", "parameters is missing; it takes a whole number from 1"),
        ("parameters", "big = 1\nparameters", "there is no key 'big'; known: lora, config, name, title"),
        ("parameters", "sourced = 1\nparameters", "there is no key 'sourced'; did you mean source?"),
        ("[lora]\n", "", "lora is missing; it takes a table: [lora]"),
        ('["q_proj", "v_proj"]', '"q_proj"', "lora.targets = 'q_proj' is not allowed; targets takes a list of module"),
        ('["q_proj", "v_proj"]', "[]", "lora.targets = [] is not allowed; targets takes a list of module names"),
        ("targets =", "r = 8\ntargets =", "lora: there is no key 'r'; known: targets"),
        ('model_type = "llama"', "", "config.model_type is missing; it takes one line of text"),
        ("parameters = 1000", "parameters 1000", "Expected '=' after a key"),
    ],
)
def test_a_mistake_in_a_model_is_one_line(mine: Path, written: str, instead: str, problem: str) -> None:
    assert written in MODEL
    mine.write_text(MODEL.replace(written, instead))
    with pytest.raises(UserError) as refused:
        read_model(mine)
    assert one_line(refused).startswith(f"{mine}: {problem}")


@pytest.mark.parametrize(
    ("written", "instead", "problem"),
    [
        ("[set]", "[sets]", "set is missing; it takes a table: [set]"),
        ('"lora.r"', "lora.r", 'set.lora is a table; write names with a dot in quotes: "lora.r"'),
        ('model = "tiny"', "model = 3", "model = 3 is not allowed; model takes one line of text"),
        ('model = "tiny"', 'modell = "tiny"', "there is no key 'modell'; did you mean model?"),
        ('name = "second"', "", "rows 2: name is missing; it takes one line of text"),
        ("loaded = 1.5", 'loaded = "1.5"', "rows 1: published.loaded = '1.5' is not allowed; loaded takes a number"),
        ("loaded = 1.5", "loaded = -1.5", "rows 1: published.loaded = -1.5 is not allowed; loaded takes a number"),
        ("loaded = 1.5", "loaded = inf", "rows 1: published.loaded = inf is not allowed; loaded takes a number"),
        ("loaded = 1.5", "lodaed = 1.5", "rows 1: published: there is no key 'lodaed'; did you mean loaded?"),
        ("[rows.bare_h100]", "[rows.bare_a100]", "rows 1: there is no key 'bare_a100'; did you mean bare_h100?"),
    ],
)
def test_a_mistake_in_a_preset_is_one_line(mine: Path, written: str, instead: str, problem: str) -> None:
    assert written in PRESET
    mine.write_text(PRESET.replace(written, instead, 1))
    with pytest.raises(UserError) as refused:
        read_preset(mine)
    assert one_line(refused).startswith(f"{mine}: {problem}")


def test_rows_have_to_be_tables(mine: Path) -> None:
    mine.write_text("rows = 3\n" + PRESET.split("[[rows]]", maxsplit=1)[0])
    with pytest.raises(UserError) as refused:
        read_preset(mine)
    assert one_line(refused) == f"{mine}: rows = 3 is not allowed; rows takes tables: [[rows]]"


def test_a_wrong_setting_is_refused_where_settings_are_checked_and_names_the_file(mine: Path) -> None:
    mine.write_text(PRESET.replace("lora.r", "lora.rank"))
    chosen = read_preset(mine)
    with pytest.raises(UserError) as refused:
        techniques.parse(chosen.settings, chosen.where)
    assert one_line(refused).startswith(f"{mine}: there is no setting 'lora.rank'")


def test_a_file_that_cannot_be_read(mine: Path) -> None:
    with pytest.raises(UserError) as refused:
        read_model(mine)
    assert one_line(refused) == f"{mine}: No such file or directory"
    mine.write_bytes(b'name = "\xff"')
    with pytest.raises(UserError) as refused:
        read_model(mine)
    assert one_line(refused).startswith(f"{mine}: 'utf-8' codec can't decode byte 0xff")


def test_the_preset_of_the_trainer_is_what_transformers_does_by_default(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    arguments, config = transformers.TrainingArguments(str(tmp_path)), runs_of(preset("trainer"))[""]
    assert arguments.per_device_train_batch_size == config.batch_size
    assert arguments.gradient_accumulation_steps == config["accumulation"]
    assert arguments.learning_rate == config.learning_rate
    assert arguments.optim == "adamw_torch_fused" and config["optimizer"] == "adamw-fused"
    assert (arguments.gradient_checkpointing, config["checkpointing"]) == (False, "off")
    assert (arguments.bf16, arguments.fp16, config["dtype"]) == (False, False, "float32")
    assert arguments.use_cache == config["kv_cache"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # TRL uses a name that transformers calls deprecated
def test_the_presets_of_trl_are_what_the_installed_trl_does_by_default(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    config, adapters = runs_of(preset("trl-sft"))[""], runs_of(preset("trl-sft-qlora"))[""]
    arguments, model = trl.SFTConfig(str(tmp_path), use_cpu=True), trl.ModelConfig()
    assert arguments.max_length == config.seq_len
    assert arguments.per_device_train_batch_size == config.batch_size
    assert arguments.learning_rate == config.learning_rate
    assert (arguments.gradient_checkpointing, config["checkpointing"]) == (True, "layers")
    assert (arguments.bf16, model.dtype, config["dtype"]) == (True, "float32", "mixed")
    assert (arguments.loss_type, config["loss"]) == ("nll", "chunked")
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == tuple(
        adapters[f"lora.{name}"] for name in ("r", "alpha", "dropout")
    )
    assert (model.bnb_4bit_quant_type, model.use_bnb_nested_quant) == (
        adapters["quantization"], adapters["quantization.double"],
    )  # fmt: skip
