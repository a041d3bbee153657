"""A recording holds what a source has, and is whole or not there at all."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpumem_tui.engine import recording
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.feed import Save, Stop
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.recording import Recording, save, write
from gpumem_tui.engine.run_events import Note, Saved

from .conftest import Engine, small_run, wait_until


@pytest.fixture(scope="module")
def recorded(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    engine.run(small_run(checkpointing="layers", steps=3))
    path = tmp_path_factory.mktemp("recording") / "run.gpumem"
    write(path, [engine.session.run])
    return path


def test_a_replay_is_the_run(engine: Engine, recorded: Path) -> None:
    live, replay = engine.session, Recording(recorded)
    assert replay.run.config == live.run.config
    assert replay.environment() == live.environment()
    assert list(replay.run.events()) == list(live.run.events())
    assert replay.run.id == live.run.id._replace(engine=recorded.stem)
    assert [t.step for t in replay.run.traces()] == [t.step for t in live.run.traces()] == [0, 1, 2, 3]
    for ours, theirs in zip(replay.run.traces(), live.run.traces(), strict=True):
        np.testing.assert_array_equal(Ledger(ours).curve, Ledger(theirs).curve)
        assert Ledger(ours).peak == Ledger(theirs).peak
        assert (ours.names, ours.phases) == (theirs.names, theirs.phases)


def test_a_replay_takes_no_commands(recorded: Path) -> None:
    with pytest.raises(UserError, match="this is a recording: there is no engine to stop"):
        Recording(recorded).command(Stop())


def test_saving_while_the_app_runs_tells_when_it_is_done(engine: Engine, tmp_path: Path) -> None:
    engine.run(small_run())
    path = tmp_path / "deep" / "live.gpumem"
    engine.session.command(Save(path))
    wait_until(lambda: engine.session.events(0)[-1].kind == "saved", engine.session)
    assert engine.session.events(0)[-1].path == str(path)
    assert Recording(path).run.config == engine.session.run.config


def test_saving_tells_how_far_it_is_and_can_be_cancelled(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.run(small_run())
    command, shares = Save(tmp_path / "run.gpumem"), []
    real = recording._write_trace

    def watched(*arguments: Any) -> None:
        real(*arguments)
        shares.append(command.work.share)
        command.work.cancelled = len(shares) == 2

    assert len(engine.session.run.traces()) > 2
    monkeypatch.setattr(recording, "_write_trace", watched)
    event = save(command, engine.session.run)
    assert (type(event), event.text) == (Note, f"{tmp_path / 'run.gpumem'}: not saved: cancelled")
    assert 0 < shares[0] < shares[1] < 1
    assert command.work.over
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    whole = Save(tmp_path / "run.gpumem")
    assert save(whole, engine.session.run) == Saved(text=f"saved {whole.path}", path=str(whole.path))
    assert whole.work.share == pytest.approx(1)


def test_saving_where_one_cannot_says_so(engine: Engine, tmp_path: Path) -> None:
    engine.run(small_run())
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    engine.session.command(Save(blocked / "run.gpumem"))
    wait_until(lambda: engine.session.events(0)[-1].kind == "refused", engine.session)
    assert "not saved" in engine.session.events(0)[-1].text


def test_a_failed_save_leaves_the_old_file_and_nothing_else(
    engine: Engine, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.gpumem"
    path.write_bytes(recorded.read_bytes())

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(recording, "_write_trace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write(path, [engine.session.run])
    assert path.read_bytes() == recorded.read_bytes()
    assert list(tmp_path.iterdir()) == [path]


def damaged(recorded: Path, tmp_path: Path, how: str) -> Path:
    path = tmp_path / f"{how}.gpumem"
    if how == "missing":
        return path
    if how == "cut":
        path.write_bytes(recorded.read_bytes()[: recorded.stat().st_size // 2])
    elif how == "text":
        path.write_text("hello")
    else:
        with zipfile.ZipFile(recorded) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                if how == "version" and name == "gpumem.json":
                    content = json.dumps(json.loads(content) | {"version": 99}).encode()
                if how == "pickle" and name == "runs/0/0/events.npy":
                    array = np.array([{"not": "numbers"}], dtype=object)
                    import io

                    buffer = io.BytesIO()
                    np.save(buffer, array, allow_pickle=True)
                    content = buffer.getvalue()
                if how == "columns" and name.endswith("marks.npy"):
                    continue
                new.writestr(name, content)
    return path


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("missing", "No such file"),
        ("cut", "not a gpumem recording, or a damaged one"),
        ("text", "not a gpumem recording, or a damaged one"),
        ("version", "written by a newer version .file format 99, this reads up to 3."),
        ("pickle", "not a gpumem recording, or a damaged one"),
        ("columns", "not a gpumem recording, or a damaged one"),
    ],
)
def test_a_file_that_cannot_be_opened(recorded: Path, tmp_path: Path, how: str, complaint: str) -> None:
    path = damaged(recorded, tmp_path, how)
    with pytest.raises(UserError, match=complaint) as refusal:
        Recording(path)
    assert str(refusal.value).startswith(str(path))
    assert "\n" not in str(refusal.value)
