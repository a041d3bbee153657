"""A configuration that arrives is parsed once: a valid object with defaults for what it lacks, or one line."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from gpumem_tui.engine import techniques, wire
from gpumem_tui.engine.config import Architecture, RunConfig, UserError
from gpumem_tui.engine.feed import Start
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.recording import Recording
from gpumem_tui.profiles import model_profile, resolved
from gpumem_tui.tui.commands.common import opened

from .conftest import small_run

CONFIG = small_run(checkpointing="layers", lora="on", lora__r=4, learning_rate=1e-4)
PLAIN = CONFIG.as_dict()
DEFAULT = techniques.configure({}, {})
SETTINGS = techniques.all_options()
RECORDING = Path(__file__).parent / "recordings" / "h100-tiny-lora.gpumem"

NOT_NUMBERS: list[Any] = [None, [], {}, "", "three", "nan", "inf", "-inf", float("nan"), float("inf"), True, "9" * 5000]
WRONG: dict[type, list[Any]] = {
    bool: [None, [], {}, "", "maybe", 2, 0.5],
    int: [*NOT_NUMBERS, 2.5, "2.5", -3, -1, 1 << 70],
    float: [*NOT_NUMBERS, -3, -1.0],
    str: [None, {}, "", 3, 2.5, "two\nlines", "\x1b[31m"],
}


def set_in(name: str, value: Any) -> dict[str, Any]:
    """The plain configuration with one field or one option of another value."""
    if name in PLAIN["options"]:
        return PLAIN | {"options": PLAIN["options"] | {name: value}}
    return PLAIN | {name: value}


def refusal_of(plain: object) -> str:
    with pytest.raises(UserError) as refused:
        techniques.parse_config(plain, "there")
    text = str(refused.value)
    assert text.startswith("there: ")
    assert "\n" not in text and len(text) < 300
    return text


def test_what_was_written_is_read_back() -> None:
    assert techniques.parse_config(json.loads(json.dumps(PLAIN)), "there") == CONFIG


@pytest.mark.parametrize("name", [*PLAIN, *PLAIN["options"]])
def test_what_is_missing_is_as_by_default(name: str) -> None:
    plain = {field: value for field, value in PLAIN.items() if field != name}
    if "options" in plain:
        plain["options"] = {option: value for option, value in PLAIN["options"].items() if option != name}
    expected = DEFAULT.as_dict() if name == "options" else DEFAULT.as_dict() | DEFAULT.as_dict()["options"]
    parsed = techniques.parse_config(plain, "there")
    if name == "options":
        assert parsed.options == DEFAULT.options
    else:
        assert (parsed[name] if name in SETTINGS else getattr(parsed, name)) == expected[name]
    kept = [option for option in PLAIN["options"] if name not in ("options", option)]
    assert {option: parsed[option] for option in kept} == {option: CONFIG[option] for option in kept}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_cannot_be_is_refused_in_a_line(name: str) -> None:
    for value in WRONG[type(SETTINGS[name].default)]:
        assert f"{name}=" in refusal_of(set_in(name, value)), value


@pytest.mark.parametrize("name", sorted(set(PLAIN) - set(SETTINGS) - {"options", "architecture", "foreign"}))
def test_a_field_that_cannot_be_is_refused_in_a_line(name: str) -> None:
    number = -3 if name == "memory_limit_bytes" else 3
    for value in [number, 2.5, [], {}, "", "two\nlines", *([] if name == "data" else [None])]:
        assert f"{name}=" in refusal_of(PLAIN | {name: value}), value


@pytest.mark.parametrize(
    "plain",
    [
        None,
        3,
        "text",
        [PLAIN],
        *(PLAIN | {name: wrong} for name in ("options", "foreign") for wrong in (None, [["lora", 1]])),
    ],
)
def test_what_is_no_configuration_is_refused_in_a_line(plain: object) -> None:
    assert "is a mapping" in refusal_of(plain)


@pytest.mark.parametrize(
    "foreign", [{"colour": "red"}, {"optimizer": 3}, {"optimizer": "two\nlines"}, {"optimizer": ""}]
)
def test_what_a_script_cannot_have_set_is_refused_in_a_line(foreign: dict[str, object]) -> None:
    assert "foreign." in refusal_of(PLAIN | {"foreign": foreign})


def test_a_setting_that_is_no_value_of_ours_is_shown_until_it_is_changed() -> None:
    config = techniques.parse_config(PLAIN | {"foreign": {"optimizer": "Adam"}}, "there")
    assert config.shown("optimizer") == "Adam" and techniques.parse_config(config.as_dict(), "there") == config
    assert config.with_({"optimizer": "sgd"}).shown("optimizer") == "sgd"


def test_unknown_keys_are_named() -> None:
    assert "unknown keys: colour" in refusal_of(PLAIN | {"colour": "red"})
    assert "no setting 'lora.q'; did you mean lora" in refusal_of(PLAIN | {"options": PLAIN["options"] | {"lora.q": 4}})
    assert "no setting 'colour'" in refusal_of(PLAIN | {"options": PLAIN["options"] | {"colour": "red"}})


@pytest.mark.parametrize("name", ["seed", "steps"])
def test_whole_numbers_are_exact(name: str) -> None:
    exact = (1 << 40) - 1 if name == "steps" else (1 << 63) - 1
    assert techniques.parse({name: str(exact)}, "--set") == {name: exact}
    assert techniques.parse({name: "1e6"}, "--set") == {name: 1_000_000}


# --- the model's architecture ---------------------------------------------------


SPOILED: list[tuple[str, list[Any]]] = [
    ("config", [None, 3, [], {}, {"model_type": 3}, {"model_type": "gpt2", 3: 4}, {"model_type": "gpt2", "x": {1, 2}}]),
    ("config", [{"model_type": "gpt2", key: "somebody/code"} for key in ("auto_map", "attn_implementation", "_x")]),
    ("dtype", [None, 3, [], "", "int8"]),
    ("lora_targets", [None, 3, "q_proj", {}, [3], [""]]),
    ("tokenizer", [None, 3, [], "two\nlines"]),
]


@pytest.mark.parametrize(("name", "values"), SPOILED)
def test_an_architecture_that_cannot_be_is_refused_in_a_line(name: str, values: list[Any]) -> None:
    for value in values:
        spoiled = PLAIN | {"architecture": PLAIN["architecture"] | {name: value}}
        assert f"architecture.{name}=" in refusal_of(spoiled), value


@pytest.mark.parametrize("plain", [3, "tiny", [], {"config": {"model_type": "gpt2"}}, {"dtype": "float32"}, {"new": 1}])
def test_what_is_no_architecture_is_refused_in_a_line(plain: object) -> None:
    assert "architecture" in refusal_of(PLAIN | {"architecture": plain})


def test_fields_that_transformers_refuses_are_told_in_a_line() -> None:
    spoiled = PLAIN["architecture"] | {"config": {"model_type": "gpt_neox", "hidden_size": "wide"}}
    with pytest.raises(UserError, match=r"tiny: .*hidden_size") as refused:
        predict(techniques.parse_config(PLAIN | {"architecture": spoiled}, "there"), gpu("H100 80GB"))
    assert "\n" not in str(refused.value)


def test_a_run_means_the_same_whatever_becomes_of_its_profile(tmp_path: Path) -> None:
    """A recording of today has its architecture; one of an older version has its profile's, while there is one."""
    mine = Architecture(dict(model_profile("tiny").config) | {"hidden_size": 64}, "bfloat16")
    config = dataclasses.replace(CONFIG, architecture=mine)
    assert resolved(techniques.parse_config(config.as_dict(), "there")).architecture == mine
    old = {name: value for name, value in PLAIN.items() if name != "architecture"}
    assert resolved(techniques.parse_config(old, "there")) == CONFIG
    gone = techniques.parse_config(old | {"model": "no-such-profile"}, "there")
    assert resolved(gone).architecture is None
    with pytest.raises(UserError, match="no-such-profile is no transformers model whose architecture is known"):
        predict(gone, gpu("H100 80GB"))


def test_recordings_of_an_older_version_open_with_their_profiles_architecture() -> None:
    config = opened([RECORDING]).runs()[0].config
    assert config is not None and config.architecture == model_profile("tiny").architecture


def test_an_architecture_cannot_be_changed_through_what_it_was_made_of_or_gives() -> None:
    fields = dict(model_profile("tiny").config)
    mine = Architecture(fields, "float32")
    for copied in (fields, mine.fields(), mine.as_dict()["config"]):
        copied["rope_parameters"]["rope_theta"] = 1.0
    assert mine.fields()["rope_parameters"]["rope_theta"] == 10_000.0


# --- where configurations arrive --------------------------------------------------


def test_the_wire_passes_only_what_can_be() -> None:
    sent = wire.pack_command(Start(CONFIG))
    assert wire.unpack_command(sent) == Start(CONFIG)
    with pytest.raises(UserError, match=r"lora\.r=-3 is not allowed"):
        wire.unpack_command(wire.Do("start", set_in("lora.r", -3)))
    stripped = wire.unpack_command(wire.Do("start", {"model": "tiny", "options": {}}))
    assert stripped == Start(RunConfig(options=techniques.defaults()))


def test_a_recording_of_fewer_options_opens_and_one_of_impossible_ones_is_refused(tmp_path: Path) -> None:
    def rewritten(**changes: Any) -> Path:
        path = tmp_path / "other.gpumem"
        with zipfile.ZipFile(RECORDING) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                if name == "gpumem.json":
                    head = json.loads(data)
                    head["config"]["options"] |= changes
                    head["config"]["options"] = {k: v for k, v in head["config"]["options"].items() if v is not None}
                    data = json.dumps(head).encode()
                new.writestr(name, data)
        return path

    config = Recording(rewritten(keep_outputs=None)).run.config
    assert config is not None and config["keep_outputs"] is True
    with pytest.raises(UserError, match=r"other\.gpumem: .*lora\.r=-3 is not allowed"):
        Recording(rewritten(**{"lora.r": -3}))


def test_module_names_are_refused_also_while_lora_is_off() -> None:
    with pytest.raises(UserError, match=r"lora\.targets: no module is called 'zzz'; there are .*query_key_value"):
        predict(small_run(lora__targets="zzz"), gpu("H100 80GB"))
