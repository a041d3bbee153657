"""Predictions on disk: known once, known everywhere, and never wrong because of what lies there."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import pytest

from gpumem_tui.engine.config import RunConfig, UserError
from gpumem_tui.engine.prediction import known, prediction_store
from gpumem_tui.engine.prediction import predict as predict_module
from gpumem_tui.engine.prediction.disk_cache import DiskCache
from gpumem_tui.engine.prediction.forked_process import ForkedProcess, can_fork
from gpumem_tui.engine.prediction.gpus import Gpu, gpu
from gpumem_tui.engine.prediction.outcome import Prediction
from gpumem_tui.engine.prediction.prediction_store import PredictionStore, key_of
from gpumem_tui.engine.prediction.predictor import Answer, PredictingProcess, Predictor
from gpumem_tui.engine.prediction.several import Several

from .conftest import small_run
from .terminal import until

H100 = gpu("H100 80GB")


# --- the folder -----------------------------------------------------------------------


def test_what_is_put_is_there_for_every_other_process(tmp_path: Path) -> None:
    DiskCache(tmp_path / "new" / "folder", 1 << 20).put("key", b"value" * 1000)
    other = DiskCache(tmp_path / "new" / "folder", 1 << 20)
    assert other.get("key") == b"value" * 1000
    assert other.get("another key") is None
    other.put("key", b"newer")
    assert other.get("key") == b"newer"
    other.drop("key")
    assert other.get("key") is None


def damages(whole: bytes) -> list[bytes]:
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    return [b"", whole[:10], whole[:-1], whole + b"\0", b"\0" * len(whole), *flipped]


def test_a_damaged_entry_is_dropped(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, 1 << 20)
    disk.put("key", b"value")
    (entry,) = tmp_path.iterdir()
    for content in damages(entry.read_bytes()):
        entry.write_bytes(content)
        assert disk.get("key") is None
        assert not entry.exists()
    disk.put("key", b"value")
    assert disk.get("key") == b"value"


def test_what_is_asked_for_stays_when_there_is_too_much(tmp_path: Path) -> None:
    disk = DiskCache(tmp_path, largest_bytes=20_000)
    for n in range(40):
        disk.put(f"key {n}", bytes(1000))
        for age, entry in enumerate(sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime), 1):
            os.utime(entry, (age, age))  # so that the order does not depend on how fine the clock is
        assert disk.get("key 0") is not None
    assert disk.get("key 1") is None and disk.get("key 39") is not None
    assert 10_000 < sum(entry.stat().st_size for entry in tmp_path.iterdir()) <= 20_000


def test_without_a_folder_that_can_be_written_nothing_is_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (None, tmp_path / "file" / "folder", Path("/proc/nothing")):
        disk = DiskCache(folder, 1 << 20)
        disk.put("key", b"value")
        assert disk.get("key") is None


# --- predictions -----------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where predictions are kept, by the XDG specification."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "gpumem-tui" / "predictions"


def test_a_prediction_is_worked_out_once(kept: Path) -> None:
    first = known.predicted(small_run(), H100)
    assert len(list(kept.iterdir())) == 1
    asked = small_run(learning_rate=0.5)
    with patch.object(predict_module, "predict", side_effect=AssertionError("it is known")):
        again = known.predicted(asked, H100)
    assert again == dataclasses.replace(first, config=asked, whole_run=again.whole_run)
    assert again.run.config == asked
    assert again.document.as_dict() | {"config": 0} == first.document.as_dict() | {"config": 0}


def test_the_app_has_at_once_what_the_command_line_has_worked_out(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = known.predicted(small_run(), H100)
    monkeypatch.setattr(PredictingProcess, "_started", lambda _: pytest.fail("a process was started for what is known"))
    with closing(Predictor(H100)) as predictor:
        predictor.want([small_run(steps=9)])
        assert predictor.wait(60)
        answer = predictor.get(small_run())
    assert isinstance(answer, Prediction) and answer.peak_bytes == first.peak_bytes


def test_what_is_known_does_not_wait_for_what_is_not(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known.predicted(small_run(), H100)
    busy = threading.Event()
    monkeypatch.setattr(Predictor, "_ask", lambda *_: busy.wait(60) and UserError("never worked out"))
    with closing(Predictor(H100)) as predictor:
        predictor.want([small_run(batch_size=3), small_run()])
        until(lambda: predictor.answers() == 1)
        assert isinstance(predictor.get(small_run()), Prediction)
        busy.set()


def test_the_command_line_has_what_the_app_has_worked_out(kept: Path) -> None:
    with closing(Predictor(H100)) as predictor:
        predictor.want([small_run()])
        assert predictor.wait(100)
        answer = predictor.get(small_run())
    assert isinstance(answer, Prediction)
    with patch.object(predict_module, "predict", side_effect=AssertionError("it is known")):
        assert known.predicted(small_run(), H100).peak_bytes == answer.peak_bytes


def test_what_is_no_prediction_is_dropped_and_worked_out(kept: Path) -> None:
    store = PredictionStore(H100)
    for content in (b"", b"\xc1", msgspec.msgpack.encode({"figures": {}, "run": b""})):
        store.put(small_run(), content)
        assert store.get(small_run()) is None and not list(kept.iterdir())
    assert known.predicted(small_run(), H100).peak_bytes > 0


def test_without_a_home_predictions_are_worked_out_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    store = PredictionStore(H100)
    store.put(small_run(), b"a prediction")
    assert store.get(small_run()) is None


def test_what_is_known_is_told_without_torch(kept: Path) -> None:
    first = known.predicted(small_run(), H100)
    program = """if True:
        import json, sys
        from gpumem_tui.engine import techniques
        from gpumem_tui.engine.prediction.gpu_here import gpu_here
        from gpumem_tui.engine.prediction.gpus import Gpu, gpu
        from gpumem_tui.engine.prediction.known import predicted
        from gpumem_tui.tui.commands import advise, estimate
        config = techniques.parse_config(json.load(sys.stdin), "standard input")
        print(predicted(config, gpu("H100 80GB")).as_document()["peak"]["allocated_bytes"], "torch" in sys.modules)
    """
    asked = json.dumps(small_run().as_dict())
    done = subprocess.run([sys.executable, "-c", program], input=asked, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(first.peak_bytes), "False"]


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


def test_what_was_searched_for_is_known_as_well() -> None:
    asked: list[RunConfig] = []

    def predict(config: RunConfig) -> Prediction:
        asked.append(config)
        return predict_module.predict(config, H100)

    small = predict(small_run(seq_len=512))
    found = known.largest_known(small, predict, H100)
    searched = len(asked)
    assert found == known.largest_known(small, predict, H100) and len(asked) == searched > 1
    assert found["max_batch_size"] > 1 and found["max_sequence_length"] > 512
    store = PredictionStore(H100)
    for damage in (b"no json", b'{"max_batch_size": "many"}'):
        key = store._key_of_largest(small.config)
        assert key is not None
        store._disk.put(key, damage)
        assert store.get_largest(small.config) is None and store._disk.get(key) is None


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process in which no other test has left a thread."""
    count = threading.active_count
    others = count() - 1
    monkeypatch.setattr(threading, "active_count", lambda: max(1, count() - others))


@pytest.mark.usefixtures("alone")
def test_a_copy_of_this_process_predicts_what_this_one_does() -> None:
    """It ends with its pipe, while another copy made later is still there; a killed one is replaced from scratch."""
    config = small_run()
    here = predict_module.predict(config, H100)
    assert can_fork()
    first, second = PredictingProcess(forked=True), PredictingProcess(forked=True)
    with closing(second), closing(first):
        first.start()
        second.start()
        for process in (first, second):
            answer = process.predict(config, H100)
            assert isinstance(answer, Prediction)
            assert (answer.by_phase, answer.reserved_bytes) == (here.by_phase, here.reserved_bytes)
        copy = first._process
        assert isinstance(copy, ForkedProcess)
        copy.stdin.close()
        copy.wait()
        copy.kill()  # of what has ended nothing is killed
    assert first.ended is False


@pytest.mark.usefixtures("alone")
def test_a_copy_that_dies_is_an_error_of_the_question_and_no_more() -> None:
    assert can_fork()
    process = PredictingProcess(forked=True)
    with closing(process):
        process.start()
        assert isinstance(process._process, ForkedProcess)
        process._process.kill()
        assert isinstance(process.predict(small_run(), H100), UserError)
        assert not process.ended
    beside = threading.Event()
    thread = threading.Thread(target=beside.wait)
    thread.start()
    assert not can_fork(), "another thread may hold a lock"
    beside.set()
    thread.join()


def test_where_there_is_much_to_predict_another_process_predicts_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers are learnt in the order of the questions, whoever had them; what cannot run is an error."""
    monkeypatch.setattr("gpumem_tui.engine.prediction.several.WORTH_S", 0.0)
    here: list[RunConfig] = []
    learnt: list[Answer] = []

    def predict_here(config: RunConfig) -> Prediction:
        here.append(config)
        return predict_module.predict(config, H100)

    configs = [small_run(batch_size=n) for n in (1, 2, 3)] + [small_run(**{"lora": True, "lora.targets": "none_such"})]

    def learn(answer: Answer) -> list[RunConfig]:
        learnt.append(answer)
        return configs if len(learnt) == 1 else []

    with closing(Several(H100, predict_here, processes=2)) as both:
        assert sum(1 for _ in both.work(configs[:1], learn)) == len(here) < 1 + len(configs)
    first, *answers = learnt
    assert isinstance(answers[3], UserError)
    assert [one.config.batch_size for one in answers[:3] if isinstance(one, Prediction)] == [1, 2, 3]
    assert isinstance(first, Prediction) and isinstance(answers[0], Prediction)
    assert first.peak_bytes == answers[0].peak_bytes


def test_what_goes_wrong_beside_is_raised_where_the_questions_come_from() -> None:
    """It ends the work: what is under way there is nobody's any more."""
    configs = [small_run(batch_size=n) for n in (1, 2, 3)]
    at_work = threading.Event()

    def breaks(_process: PredictingProcess, config: RunConfig, _gpu: Gpu) -> Prediction:
        at_work.set()
        raise RuntimeError(f"a fault of the program: {config.batch_size}")

    def waits(config: RunConfig) -> Prediction:
        assert at_work.wait(60)
        raise UserError("this cannot be predicted")

    with (
        patch.object(PredictingProcess, "known_or_predicted", breaks),
        patch.object(PredictingProcess, "start", lambda _: None),
        closing(Several(H100, waits, processes=2)) as both,
        patch("gpumem_tui.engine.prediction.several.WORTH_S", -1.0),
        pytest.raises(RuntimeError, match="a fault of the program: 2"),
    ):
        [*both.work(configs, lambda _: [])]
