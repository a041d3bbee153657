"""Predictions of a process of its own: what somebody waits for first, and what nobody wants never."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpumem_tui.engine.config import RunConfig, UserError
from gpumem_tui.engine.launch import Launcher
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.prediction.predictor import Predictor

from .conftest import small_run

H100 = gpu("H100 80GB")


def test_a_process_of_its_own_predicts_in_the_background() -> None:
    predictor = Predictor(H100)
    try:
        wanted = [small_run(), small_run(lora=True)]
        assert predictor.get(wanted[0]) is None
        predictor.want(wanted)
        assert predictor.wait(90)
        answers = [predictor.get(config) for config in wanted]
        assert all(not isinstance(answer, UserError | None) for answer in answers)
        here = predict(wanted[1], H100)
        assert answers[1].peak_bytes == here.peak_bytes  # type: ignore[union-attr]
        assert answers[1].by_category == here.by_category  # type: ignore[union-attr]
        # What does not decide the memory is no other question.
        assert predictor.get(dataclasses.replace(wanted[0], steps=7, seed=3)) is answers[0]
        impossible = small_run(**{"lora": True, "lora.targets": "nothing_is_called_so"})
        predictor.want([impossible])
        assert predictor.wait(60)
        assert isinstance(predictor.get(impossible), UserError)
    finally:
        predictor.close()


def test_a_file_beside_the_user_stands_in_for_no_library(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A working folder with a `transformers` or a `queue.py` of its own is common."""
    (tmp_path / "msgspec.py").write_text("raise SystemExit('not the library')")
    monkeypatch.chdir(tmp_path)
    predictor, launcher = Predictor(H100), Launcher()
    try:
        predictor.want([small_run()])
        assert predictor.wait(90)
        assert not isinstance(predictor.get(small_run()), UserError | None)
        assert launcher(small_run()).alive()
    finally:
        predictor.close()
        launcher.kill()


def test_what_is_no_longer_wanted_is_never_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    begun: list[int] = []
    go, first = threading.Event(), threading.Event()

    def ask(_self: Predictor, config: RunConfig) -> Any:
        begun.append(config.batch_size)
        first.set()
        go.wait()
        return UserError("pretended")

    monkeypatch.setattr(Predictor, "_ask", ask)
    predictor = Predictor(H100)
    predictor.want([small_run(batch_size=n) for n in (1, 2, 3)])
    first.wait()
    predictor.want([small_run(batch_size=4)])
    go.set()
    assert predictor.wait(30)
    predictor.close()
    assert begun == [1, 4]


def test_it_ends_with_whoever_asks_in_the_middle_of_an_answer() -> None:
    code = (
        "import time; from gpumem_tui.engine.prediction import questions;"
        "questions.answer_all = lambda *_: time.sleep(60); questions.serve(0, 0)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.close()  # as of an asker that was killed
        assert process.wait(30) == 0


def test_asking_loads_no_torch() -> None:
    code = (
        "import sys, gpumem_tui.engine.prediction.predictor, gpumem_tui.engine.prediction.advice;"
        "import gpumem_tui.tui.commands.estimate, gpumem_tui.tui.commands.advise;"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'torch was loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
