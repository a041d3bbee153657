"""Every technique, and every pair of two in some run, trains two real steps and every byte of them has a name."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import RunConfig, UserError
from gpumem_tui.engine.device import environment
from gpumem_tui.engine.events import Environment
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.technique import Effect
from gpumem_tui.engine.workload import build, prepare
from gpumem_tui.profiles import run_fields

from .conftest import LAYERS, TINY, Engine, small_run, smaller
from .covering import covering

FIELDS = run_fields("tiny")
VARIANTS = {name: [dict(v) for v in t.variants] for name, t in techniques.registry().items()}
CPU = environment(torch.device("cpu"))


def runs_on(settings: dict[str, Any], machine: Environment) -> bool:
    try:
        techniques.check(configured(settings, FIELDS), machine)
    except UserError:
        return False
    return True


def configured(settings: dict[str, Any], base: dict[str, Any] | None = None) -> RunConfig:
    return small_run(base, **{name.replace(".", "__"): value for name, value in settings.items()})


def _label(settings: dict[str, Any]) -> str:
    return " ".join(f"{k}={v}" for k, v in settings.items()) or "defaults"


def possible(settings: dict[str, Any]) -> bool:
    try:
        configured(settings, FIELDS)
    except UserError:
        return False
    return True


def runs_here(settings: dict[str, Any]) -> bool:
    return runs_on(settings, CPU)


# DeepSpeed is an extra: tests/test_jobs.py.
GROUPS = [[v for v in variants if not str(v.get("parallel")).startswith("zero")] for variants in VARIANTS.values()]
SINGLES = [{}, *filter(runs_here, itertools.chain(*GROUPS))]
ALONE = [settings for settings in SINGLES if "parallel" not in settings]
PAIRS = covering(GROUPS, runs_here)
GPU_SINGLES = [variant for variant in itertools.chain(*GROUPS) if not runs_here(variant)]
GPU_PAIRS = covering(GROUPS, possible, lambda pair: not runs_here(pair))


def check(engine: Engine, settings: dict[str, Any], base: dict[str, Any] | None = None) -> None:
    config = configured(settings, base)
    document = engine.run(config)
    if document["unknown_bytes_max"] and config.text("parallel") != "none" and not torch.cuda.is_available():
        # Seen twice in whole runs and never again: gloo's thread, it seems, still had what it had sent. Not twice.
        document = engine.run(config)
    assert document["failure"] is None
    steps, peak = document["steps"], document["peak"]
    assert [s["step"] for s in steps] == [1, 2]
    assert all(math.isfinite(s["loss"]) for s in steps) or config["dtype"] == "float16"
    # Every byte has a name, and the names add up to what was counted.
    assert document["unknown_bytes_max"] == 0
    assert document["mismatch_bytes_max"] == 0
    assert document["leaked_bytes"] == 0
    for moment in ("loaded", "after_first_step", "peak"):
        assert sum(document[moment]["by_category"].values()) == document[moment]["allocated_bytes"]
    assert document["after_first_step"]["allocated_bytes"] == steps[0]["allocated_bytes"]
    if peak["step"]:
        assert peak["allocated_bytes"] == max(s["peak_bytes"] for s in steps)
    assert sum(sum(layer.values()) for layer in peak["by_layer"].values()) == peak["allocated_bytes"]
    assert len(document["recomputes"]) == 2 * config.integer("accumulation") * segments(config)


def segments(config: RunConfig) -> int:
    assert config.architecture is not None
    layers = config.architecture.config["num_hidden_layers"]
    size = {"off": 0, "selective": 1, "layers": 1, "segments": config.integer("checkpointing.every"), "input": layers}[
        config.text("checkpointing")
    ]
    return math.ceil(layers / size) if size else 0


@pytest.mark.parametrize("settings", SINGLES, ids=_label)
def test_each_technique(engine: Engine, settings: dict[str, Any]) -> None:
    check(engine, settings)


@pytest.mark.parametrize("settings", PAIRS, ids=_label)
def test_every_pair_of_techniques_in_some_run(engine: Engine, settings: dict[str, Any]) -> None:
    check(engine, settings, smaller())


def test_a_tenth_of_the_runs_covers_every_pair() -> None:
    groups = [[{name: value} for value in range(4)] for name in "abcde"]

    def can_be(settings: dict[str, Any]) -> bool:
        return settings.get("a") != settings.get("b") or "a" not in settings

    rows = covering(groups, can_be)
    for left, right in itertools.combinations(groups, 2):
        for one, other in itertools.product(left, right):
            both = one | other
            assert any(both.items() <= row.items() for row in rows) == can_be(both)
    assert all(map(can_be, rows))
    assert len(rows) < 40, "of 160 pairs"


def test_the_variants_are_valid_and_set_every_value() -> None:
    for name, technique in techniques.registry().items():
        for settings in VARIANTS[name]:
            assert techniques.parse(settings, name) == settings
        tried = {v[name] for v in VARIANTS[name]} | {technique.switch.default}
        if not technique.switch.open_ended:  # any number; one stands for all
            # A dtype that is the profile's own, or wider, is what every other test trains in.
            assert set(technique.switch.choices) - tried <= {"float32"}, name


def test_a_technique_says_all_of_itself() -> None:
    for name, technique in techniques.registry().items():
        assert technique.switch.name == name
        assert all(option.name.startswith(f"{name}.") for option in technique.options[1:])
        assert technique.in_script and technique.acts_on and technique.variants
        costs = [technique.cost_of(value) for value in technique.switch.choices]
        assert not any(cost.startswith(("none", "nothing", "next to")) for cost in costs), "what costs nothing is empty"
        assert techniques.of_option(technique.options[-1].name) is technique
        assert set(technique.savers(small_run())) <= set(technique.switch.choices)


@pytest.mark.parametrize(
    ("before", "after", "effect"),
    [
        ({}, {"checkpointing": "layers", "kv_cache": "off", "keep_outputs": "off", "attention": "sdpa"}, Effect.NONE),
        ({}, {"optimizer": "paged-adamw"}, Effect.NONE),
        ({}, {"optimizer": "adamw-8bit"}, Effect.NUMERICS),
        ({}, {"optimizer": "sgd"}, Effect.TRAINING),
        ({"optimizer": "sgd"}, {"optimizer": "sgd-momentum"}, Effect.TRAINING),
        ({}, {"dtype": "bfloat16"}, Effect.NUMERICS),
        ({}, {"dtype": "mixed"}, Effect.NUMERICS),
        ({}, {"dtype": "float16"}, Effect.UNSOUND),  # the loss becomes nan
        ({"lora": "on"}, {"quantization": "nf4"}, Effect.NUMERICS),
        ({}, {"lora": "on"}, Effect.TRAINING),
        ({"lora": "on"}, {"lora.r": 4}, Effect.TRAINING),
        ({"batch_size": 8}, {"batch_size": 2, "accumulation": 4}, Effect.NONE),
        ({}, {"accumulation": 4}, Effect.TRAINING),
        ({}, {"seq_len": 32}, Effect.TRAINING),
        ({"dtype": "float16"}, {"checkpointing": "layers", "dtype": "float16"}, Effect.NONE),
    ],
)
def test_whether_a_change_keeps_the_mathematics_is_known(
    before: dict[str, Any], after: dict[str, Any], effect: Effect
) -> None:
    old, new = configured(before), configured(before | after)
    assert techniques.effect(old, new) is effect
    assert techniques.effect(new, old) is (effect if effect is not Effect.UNSOUND else Effect.NUMERICS)
    assert techniques.effect(new, new) is Effect.NONE


def test_what_may_not_train_is_known_also_of_a_model_s_own_dtype() -> None:
    polyglot = techniques.configure(run_fields("polyglot-ko-1.3b"), {})  # published in float16
    for config in (configured({"dtype": "float16"}), configured({"dtype": "mixed-float16"}), polyglot):
        assert "float16 without loss scaling" in techniques.unsound(config)[0]
    scaled = configured({"dtype": "mixed-float16", "loss_scaling": "on"})
    assert not techniques.unsound(scaled) and not techniques.unsound(configured({}))


@pytest.mark.parametrize(("dtype", "arithmetic"), [("mixed", torch.bfloat16), ("float32", torch.float32)])
def test_quantized_layers_compute_in_the_dtype_of_the_arithmetic(dtype: str, arithmetic: torch.dtype) -> None:
    config = configured({"lora": "on", "quantization": "nf4", "dtype": dtype})
    model = build(prepare(config, torch.device("cpu"))).model
    from bitsandbytes.nn import Linear4bit

    found = {module.compute_dtype for module in model.modules() if isinstance(module, Linear4bit)}
    assert found == {arithmetic}


@pytest.mark.parametrize("settings", [s for s in ALONE if s.get("checkpointing", "off") == "off"], ids=_label)
def test_a_technique_is_recognised_by_what_it_leaves(settings: dict[str, Any]) -> None:
    config = configured(settings)
    made = build(prepare(config, torch.device("cpu")))
    with torch.autocast("cpu", made.recipe.autocast, enabled=made.recipe.autocast is not None):
        found = techniques.recognise(made.model, made.optimizer)
    said = {
        "dtype": "float32",
        "attention": "sdpa",
        "lora.targets": "dense_4h_to_h,query_key_value" if config["lora.kind"] == "ia3" else "query_key_value",
        "quantization.compute": "float32",
    }
    if config["lora.targets"] == "all-linear":  # PEFT has put in their names
        said["lora.targets"] = "dense,dense_4h_to_h,dense_h_to_4h,query_key_value"
    expected = {
        name: said.get(name, value) if value in ("auto", "profile", "dtype", "all-linear") else value
        for name, value in config.options.items()
        if name in found
    }
    assert found == expected
    assert {"dtype", "attention", "kv_cache", "quantization", "lora", "checkpointing", "optimizer"} <= found.keys()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_recognised_in_a_script(reentrant: bool) -> None:
    made = build(prepare(small_run(), torch.device("cpu")))
    made.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    found = techniques.recognise(made.model, made.optimizer)
    assert (found["checkpointing"], found["checkpointing.reentrant"]) == ("layers", reentrant)


def test_two_runs_of_equal_memory_have_equal_keys() -> None:
    config = small_run()
    same = replace(config, steps=9, rows=9, seed=9, learning_rate=0.5, device="cuda:0", trace="auto")
    assert techniques.memory_key(same) == techniques.memory_key(config)
    assert techniques.memory_key(config.with_({"lora.alpha": 64})) == techniques.memory_key(config)
    for other in ({"batch_size": 9}, {"seq_len": 9}, {"lora": True}, {"checkpointing": "layers"}):
        assert techniques.memory_key(config.with_(other)) != techniques.memory_key(config)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({}, "on"), ({"kv_cache": "off"}, "off"), ({"checkpointing": "layers"}, "off (checkpointing)")],
)
def test_a_kv_cache_is_said_to_be_on_where_there_is_one(engine: Engine, settings: dict[str, Any], said: str) -> None:
    config = small_run(**settings)
    assert techniques.registry()["kv_cache"].in_effect(config) == said
    held = engine.run(config)["after_first_step"]["by_category"]["kv_cache"]
    assert (held > 0) == (said == "on")


@pytest.mark.parametrize("settings", GPU_SINGLES, ids=_label)
def test_what_needs_a_gpu_is_refused_without_one(engine: Engine, settings: dict[str, Any]) -> None:
    engine.run(small_run())  # the environment is known once the engine has run
    with pytest.raises(UserError, match=r"cannot run here: .*GPU"):
        engine.run(small_run(**settings))


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"quantization": "nf4"}, "set lora=on"),
        (
            {"quantization": "nf4", "lora": "on", "lora.kind": "ia3", "quantization.prepared": "off"},
            "set quantization.prepared=on",
        ),
        ({"attention": "flash_attention_2", "dtype": "float32"}, "needs 16-bit"),
    ],
)
def test_what_cannot_be_combined_is_refused_in_one_line(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason) as refusal:
        small_run(**settings)
    assert "\n" not in str(refusal.value)


def test_segments_train_like_no_checkpointing(engine: Engine) -> None:
    """Dropping activations must not change what is learned."""
    losses = [
        [step["loss"] for step in engine.run(small_run(checkpointing=mode, steps=3))["steps"]]
        for mode in ("off", "layers", "segments", "input")
    ]
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], abs=1e-5)


def test_accumulation_adds_up_to_the_larger_batch(engine: Engine) -> None:
    whole = engine.run(small_run(batch_size=8))["steps"]
    parts = engine.run(small_run(batch_size=2, accumulation=4))["steps"]
    assert [s["loss"] for s in parts] == pytest.approx([s["loss"] for s in whole], abs=1e-4)
    assert parts[0]["peak_bytes"] < whole[0]["peak_bytes"]


@pytest.mark.parametrize(("value", "size"), [("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_dtype_sets_the_bytes_per_parameter(engine: Engine, value: str, size: int) -> None:
    document = engine.run(small_run(dtype=value))
    assert document["loaded"]["by_category"]["parameters"] == size * document["parameters"]
    after = document["after_first_step"]["by_category"]
    assert after["gradients"] == size * document["trainable_parameters"]


def test_lora_trains_r_times_in_plus_out(engine: Engine) -> None:
    document = engine.run(small_run(lora="on", lora__r=8))
    trainable = LAYERS * 8 * (TINY["hidden_size"] + 3 * TINY["hidden_size"])
    assert document["trainable_parameters"] == trainable
    after = document["after_first_step"]["by_category"]
    assert after["gradients"] == 4 * trainable
    steps_of_adamw = 2 * LAYERS * 4  # one float32 counter per trained tensor
    assert after["optimizer_state"] == 2 * 4 * trainable + steps_of_adamw


def test_nf4_takes_four_and_a_half_bits_a_weight(engine: Engine) -> None:
    plain = engine.run(small_run(lora="on", quantization="nf4", quantization__double="off"))
    double = engine.run(small_run(lora="on", quantization="nf4"))
    assert plain["parameters"] == double["parameters"]
    assert double["loaded"]["allocated_bytes"] < plain["loaded"]["allocated_bytes"]


def test_all_linear_wraps_more_than_the_default(engine: Engine) -> None:
    default = engine.run(small_run(lora="on"))
    everywhere = engine.run(small_run(lora="on", lora__targets="all-linear"))
    assert everywhere["trainable_parameters"] > default["trainable_parameters"]


@pytest.mark.parametrize(
    ("typed", "complaint"),
    [
        ({"optimiser": "sgd"}, "did you mean optimizer"),
        ({"optimizer": "adam"}, "takes adamw, adamw-fused"),
        ({"lora.r": "0"}, "a whole number from 1"),
        ({"lora.r": "eight"}, "a whole number"),
        ({"kv_cache": "maybe"}, "kv_cache takes on, off"),
        ({"lora.dropout": "nan"}, "a number from 0"),
        ({"batch_size": "2.5"}, "a whole number"),
    ],
)
def test_a_wrong_setting_says_what_is_allowed(typed: dict[str, str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as refusal:
        techniques.parse(typed, "--set")
    assert str(refusal.value).startswith("--set: ")


@pytest.mark.parametrize(
    ("name", "typed", "shown"),
    [
        ("steps", "inf", "inf"), ("steps", "1e999", "1e999"), ("steps", "nan", "nan"),
        ("steps", 10**5000, "(a number of"),
        ("steps", "9" * 5000, "9" * 57 + "..."), ("learning_rate", "inf", "inf"), ("learning_rate", [1.0], "(list)"),
        ("lora.targets", "q_proj\x1b[2J", "q_proj\ufffd[2J"), ("lora.targets", "q_proj\nv_proj", "q_proj v_proj"),
        ("lora.targets", ["q_proj", ["v_proj"]], "(list)"), ("attention", {"a": 1}, "(dict)"),
    ],
    ids=lambda value: type(value).__name__,  # pytest, too, writes no integer of 5,000 digits
)  # fmt: skip
def test_what_no_setting_can_be_is_refused_in_a_line(name: str, typed: object, shown: str) -> None:
    with pytest.raises(UserError) as refused:
        techniques.parse({name: typed}, "--set")
    line = str(refused.value)
    assert line.startswith(f"--set: {name}={shown}") and line.isprintable() and len(line) < 300


def test_whole_numbers_are_exact() -> None:
    typed = {"seed": str(2**53 + 1), "steps": "1e3", "rows": 8.0}
    assert techniques.parse(typed, "--set") == {"seed": 2**53 + 1, "steps": 1000, "rows": 8}


@pytest.mark.parametrize("settings", ALONE, ids=_label)
def test_what_a_value_holds_is_predicted(engine: Engine, settings: dict[str, Any]) -> None:
    """Category by category, where a CPU's kernels do as CUDA's: its dropout keeps a mask of another size."""
    config = configured(settings, smaller()).with_({"lora.dropout": 0.0})
    measured, predicted = engine.run(config), predict(config, gpu("H100 80GB")).document.as_dict()
    assert predicted["unknown_bytes_max"] == 0
    # A step that a GPU runs as one compiled kernel has temporaries on a CPU, where it is watched uncompiled.
    uncompiled = config.text("optimizer").startswith("ao-")
    for moment in ("after_first_step",) if uncompiled else ("after_first_step", "peak"):
        real, guess = measured[moment]["by_category"], predicted[moment]["by_category"]
        # AdamW counts its steps in tensors of 4 bytes on the host, which on a CPU is the device.
        steps = real["optimizer_state"] - guess["optimizer_state"]
        assert steps % 4 == 0 and 0 <= steps <= 4 * 4 * measured["trainable_parameters"] / TINY["hidden_size"]
        only_there = {"optimizer_state", "workspace", "slack"}
        for category in guess.keys() - only_there:
            rel = 0.1 if category == "activations" else 0  # a CPU keeps other statistics of norms and attention
            # The numbers of a prompt's tokens stay on the host.
            host = 8 * config.integer("lora.tokens") if category == "buffers" and config["lora.kind"] == "prompt" else 0
            assert guess[category] + host == pytest.approx(real[category], rel=rel, abs=0), (moment, category)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"loss_scaling": "on"}, "loss_scaling=on is for float16"),  # the profile's dtype is known once it is loaded
        ({"loss_scaling": "on", "dtype": "mixed"}, "loss_scaling=on is for float16"),
        ({"loss_scaling": "on", "dtype": "float16"}, "GradScaler unscales no float16 gradients"),
    ],
)
def test_what_a_loss_scaler_cannot_scale_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        prepare(configured(settings), torch.device("cpu"))


def test_a_scaled_loss_is_told_as_the_model_has_it(engine: Engine) -> None:
    scaled = engine.run(configured({"dtype": "mixed-float16", "loss_scaling": "on"}))["steps"]
    plain = engine.run(configured({"dtype": "mixed"}))["steps"]
    assert scaled[0]["loss"] == pytest.approx(plain[0]["loss"], rel=0.01)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"trainable": "norms-biases", "lora": "on"}, "lora=on trains adapters and nothing else"),
        ({"trainable.embeddings": "off", "lora": "on"}, "lora=on trains adapters and nothing else"),
    ],
)
def test_what_cannot_be_trained_so_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        configured(settings)


def test_what_is_frozen_has_no_gradient_and_what_is_below_it_keeps_nothing(engine: Engine) -> None:
    parameters, peaks, saved = [], [], []
    for count in (1, 3, LAYERS):
        document = engine.run(configured({"trainable": "last-layers", "trainable.layers": count}))
        after = document["after_first_step"]["by_category"]
        assert after["gradients"] == 4 * document["trainable_parameters"]
        parameters.append(document["trainable_parameters"])
        peaks.append(document["peak"]["allocated_bytes"])
        saved.append({name for name in document["saved_by_layer"] if "layers." in name})
    a_layer = (parameters[1] - parameters[0]) // 2
    assert parameters[2] - parameters[1] == (LAYERS - 3) * a_layer
    assert peaks == sorted(peaks)
    assert [len(names) for names in saved] == [2, 4, LAYERS], "the input of the first is what the layer before has made"


def test_selective_checkpointing_keeps_what_attention_returns(engine: Engine) -> None:
    """Beside a layer's input its attention's output and the sums of its softmax, in the run and in the prediction."""
    kept = {}
    for mode in ("layers", "selective"):
        config = configured({"checkpointing": mode})
        documents = engine.run(config), predict(config, gpu("H100 80GB")).document.as_dict()
        kept[mode] = [document["saved_by_layer"]["gpt_neox.layers.3"] for document in documents]
    output, sums = 2 * 16 * TINY["hidden_size"] * 4, 2 * 16 * TINY["num_attention_heads"] * 4
    more = [selective - layers for selective, layers in zip(kept["selective"], kept["layers"], strict=True)]
    assert more[0] == output + sums
    assert output + sums <= more[1] <= output + 2 * 32 * TINY["num_attention_heads"] * 4, "CUDA's kernel rounds rows up"


def test_selective_checkpointing_is_recognised_and_wants_the_newer_implementation() -> None:
    made = build(prepare(configured({"checkpointing": "selective"}), torch.device("cpu")))
    made.model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": lambda: (None, None)})
    assert techniques.recognise(made.model, made.optimizer)["checkpointing"] == "selective"
    with pytest.raises(UserError, match=r"needs checkpointing\.reentrant=off"):
        configured({"checkpointing": "selective", "checkpointing.reentrant": "on"})


def test_rows_steps_and_the_seed_are_no_techniques() -> None:
    config = small_run(rows=7, steps=3, seed=5, lora=True)
    assert dict(techniques.notable(config)) == {
        name: value for name, value in techniques.changed(config) if name not in ("rows", "steps", "seed")
    }
    assert "lora" in dict(techniques.notable(config))
