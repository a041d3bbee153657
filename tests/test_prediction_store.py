"""Predictions on disk: known once, known everywhere, and never wrong because of what lies there."""

from __future__ import annotations

import dataclasses
import json
import os
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from gpumem_tui.engine.prediction import prediction_store
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.prediction_store import PredictionStore, default_store, key_of

from .conftest import small_run

H100 = gpu("H100 80GB")


def test_what_is_put_is_there_for_every_other_process(tmp_path: Path) -> None:
    PredictionStore(tmp_path / "new" / "folder").put("key", b"value" * 1000)
    other = PredictionStore(tmp_path / "new" / "folder")
    assert other.get("key") == b"value" * 1000
    assert other.get("another key") is None
    other.put("key", b"newer")
    assert other.get("key") == b"newer"


def damages(whole: bytes) -> list[bytes]:
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 3)]
    return [b"", whole[:10], whole[:-1], whole + b"\0", b"\0" * len(whole), *flipped]


def test_a_damaged_entry_is_dropped(tmp_path: Path) -> None:
    store = PredictionStore(tmp_path)
    store.put("key", b"value")
    (entry,) = tmp_path.iterdir()
    for content in damages(entry.read_bytes()):
        entry.write_bytes(content)
        assert store.get("key") is None
        assert not entry.exists()
    store.put("key", b"value")
    assert store.get("key") == b"value"


def test_what_is_asked_for_stays_when_there_is_too_much(tmp_path: Path) -> None:
    store = PredictionStore(tmp_path, largest_bytes=20_000)
    for n in range(40):
        store.put(f"key {n}", os.urandom(1000))
        for age, entry in enumerate(sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime), 1):
            os.utime(entry, (age, age))  # so that the order does not depend on how fine the clock is
        assert store.get("key 0") is not None
    assert store.get("key 1") is None and store.get("key 39") is not None
    assert sum(entry.stat().st_size for entry in tmp_path.iterdir()) <= 20_000


def test_without_a_folder_that_can_be_written_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for folder in (None, tmp_path / "file" / "folder", Path("/proc/nothing")):
        store = PredictionStore(folder)
        store.put("key", b"value")
        assert store.get("key") is None
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    default_store().put("key", b"value")
    assert default_store().get("key") is None


def test_the_users_folder_is_the_one_of_the_xdg_specification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    default_store().put("key", b"value")
    assert [entry.parent for entry in tmp_path.rglob("*") if entry.is_file()] == [
        tmp_path / "gpumem-tui" / "predictions"
    ]


# --- what decides a prediction, and nothing else ------------------------------------


@pytest.mark.parametrize("changes", [{"steps": 9}, {"seed": 9}, {"rows": 9}, {"learning_rate": 0.5}])
def test_what_decides_nothing_costs_no_prediction(changes: dict[str, Any]) -> None:
    assert key_of(small_run(**changes), H100) == key_of(small_run(), H100)
    assert key_of(dataclasses.replace(small_run(), device="cuda:1", trace="auto"), H100) == key_of(small_run(), H100)


@pytest.mark.parametrize("changes", [{"batch_size": 3}, {"lora": "on"}, {"lora__r": 4}, {"dtype": "bfloat16"}])
def test_another_configuration_is_predicted_anew(changes: dict[str, Any]) -> None:
    assert key_of(small_run(**changes), H100) != key_of(small_run(), H100)


def test_another_gpu_library_allocator_or_code_is_predicted_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {key_of(small_run(), H100), key_of(small_run(), gpu("A100 80GB"))}
    seen.add(key_of(small_run(), dataclasses.replace(H100, memory_bytes=H100.memory_bytes - 1)))
    with monkeypatch.context() as patched:
        patched.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        seen.add(key_of(small_run(), H100))
    with monkeypatch.context() as patched:
        patched.setattr(metadata, "version", lambda name: "99" if name == "transformers" else "1")
        seen.add(key_of(small_run(), H100))
    with monkeypatch.context() as patched:
        patched.setattr(prediction_store, "_code", lambda: "another")
        seen.add(key_of(small_run(), H100))
    assert len(seen) == 6 and None not in seen


def test_a_changed_model_folder_is_predicted_anew(tmp_path: Path) -> None:
    config = dataclasses.replace(small_run(), model=str(tmp_path), pretrained=True, architecture=None)
    assert key_of(config, H100) is None, "what cannot be told is not kept"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    before = key_of(config, H100)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_layer": 3}))
    assert None is not before != key_of(config, H100)


def test_a_model_of_the_hub_that_was_never_loaded_is_not_kept() -> None:
    config = dataclasses.replace(small_run(), model="nobody/has-this", pretrained=True, architecture=None)
    assert key_of(config, H100) is None
