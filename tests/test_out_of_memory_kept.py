"""Runs that ran out of memory are kept: a few, not too much, and where nothing can be written nothing is lost."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpumem_tui.engine import techniques
from gpumem_tui.engine.out_of_memory import kept
from gpumem_tui.engine.recording import Recording
from gpumem_tui.engine.run import Run, RunId
from gpumem_tui.engine.run_events import Note, Saved

from .fake_source import GPU


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "gpumem-tui" / "out-of-memory"


def run(number: int, model: str = "org/my model") -> Run:
    return Run(RunId("e", number, rank=number % 2), techniques.configure({"model": model}, {}), GPU)


def keep(number: int) -> Path:
    """Keep one, written so many seconds after the beginning of time."""
    told = kept.keep(run(number))
    assert isinstance(told, Saved) and told.path in told.text
    os.utime(told.path, (number, number))
    return Path(told.path)


def test_it_is_a_recording_that_says_when_which_model_and_rank(folder: Path) -> None:
    path = keep(1)
    assert path.parent == folder and path.name.startswith("oom-2") and "-my-model-rank1-" in path.name
    assert [found.config.model for found in Recording(path).runs()] == ["org/my model"]
    assert folder.stat().st_mode & 0o077 == 0


def test_the_latest_twenty_stay(folder: Path) -> None:
    assert kept.latest() is None
    paths = [keep(number) for number in range(1, 24)]
    assert sorted(folder.iterdir()) == sorted(paths[3:])
    assert kept.latest() == paths[-1]


def test_of_too_many_bytes_the_oldest_go_and_the_newest_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = keep(1), keep(2)
    monkeypatch.setattr(kept, "MOST_BYTES", 2 * second.stat().st_size + 20)
    third = keep(3)
    assert not first.exists() and second.exists()
    monkeypatch.setattr(kept, "MOST_BYTES", 1)
    fourth = keep(4)
    assert [*folder.iterdir()] == [fourth] and not third.exists()


def test_what_is_not_ours_in_the_folder_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep(1)
    (folder / "notes.txt").write_text("mine")
    monkeypatch.setattr(kept, "MOST_BYTES", 1)
    keep(2)
    assert (folder / "notes.txt").exists()


def test_a_folder_that_cannot_be_written_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gpumem-tui").write_text("a file where a folder should be")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    told = kept.keep(run(1))
    assert isinstance(told, Note) and told.text.startswith("the run is not kept: ") and "\n" not in told.text


def test_without_a_home_it_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "state_folder", lambda: None)
    assert kept.keep(run(1)).text.startswith("the run is not kept: there is no home folder")
    assert kept.latest() is None
