"""A recording holds what a source has, and is whole or not there at all."""

from __future__ import annotations

import io
import json
import os
import re
import resource
import zipfile
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from gpumem_tui.engine import recording
from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.feed import Save, Stop
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.recording import Recording, save, write
from gpumem_tui.engine.run_events import AnyRunEvent, Note, RunEvent, Saved
from gpumem_tui.engine.trace_check import COLUMNS

from .benchmarks.attacks import recordings as attacks
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


def test_every_kind_of_event_is_read_again() -> None:
    assert {*get_args(AnyRunEvent)} == {*RunEvent.__subclasses__()}


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
    event = save(command, [engine.session.run])
    assert (type(event), event.text) == (Note, f"{tmp_path / 'run.gpumem'}: not saved: cancelled")
    assert 0 < shares[0] < shares[1] < 1
    assert command.work.over
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    whole = Save(tmp_path / "run.gpumem")
    assert save(whole, [engine.session.run]) == Saved(text=f"saved {whole.path}", path=str(whole.path))
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
                if how == "empty" and name == "gpumem.json":
                    content = json.dumps(json.loads(content) | {"runs": []}).encode()
                if how == "pickle" and name == "runs/0/0/events.npy":
                    array = np.array([{"not": "numbers"}], dtype=object)
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
        ("cut", "a gpumem recording that is cut off or damaged"),
        ("text", "neither a gpumem recording nor a snapshot of PyTorch's"),
        ("version", "written by a newer version .file format 99, this reads up to 5."),
        ("empty", "no run is recorded in it"),
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


def test_the_categories_of_an_older_version_are_todays(recorded: Path, tmp_path: Path) -> None:
    """Up to version 3 there were no gathered parameters and no communication, and the numbers behind them differed."""
    before_4 = [c for c in Category if c not in (Category.GATHERED, Category.COMMUNICATION)]
    path = tmp_path / "older.gpumem"
    with zipfile.ZipFile(recorded) as new, zipfile.ZipFile(path, "w") as old:
        for name in new.namelist():
            content = new.read(name)
            if name == "gpumem.json":
                content = json.dumps(json.loads(content) | {"version": 3}).encode()
            if name.endswith("owners.npy"):
                owners = np.load(io.BytesIO(content))
                owners["category"] = [before_4.index(Category(category)) for category in owners["category"]]
                buffer = io.BytesIO()
                np.save(buffer, owners)
                content = buffer.getvalue()
            old.writestr(name, content)
    todays, olders = (Recording(each).runs()[0].traces() for each in (recorded, path))
    assert len({*todays[-1].owners["category"]}) > 3
    for today, older in zip(todays, olders, strict=True):
        assert np.array_equal(today.owners, older.owners)


# --- what is none ---------------------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        Recording(path)
    line = str(caught.value)
    assert line.startswith(str(path)) and line.isprintable() and len(line) <= 300
    return line


def changed(recorded: Path, tmp_path: Path, part: str, data: bytes) -> Path:
    """The recording with one of its parts replaced."""
    with zipfile.ZipFile(recorded) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    path = tmp_path / "changed.gpumem"
    with zipfile.ZipFile(path, "w") as archive:
        for name, before in parts.items():
            archive.writestr(name, data if name == part else before)
    return path


def test_what_unpacks_to_more_than_there_may_be_is_not_unpacked(tmp_path: Path) -> None:
    """Two megabytes of zeros packed are two gigabytes; it is refused by what it declares."""
    path = tmp_path / "bomb.gpumem"
    path.write_bytes(attacks.bomb("gpumem.json", 2 << 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "more than 1024 MiB when unpacked" in refused(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.gpumem"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero"), tmp_path):
        assert "no regular file" in refused(path)


@pytest.mark.parametrize("packing", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_what_is_packed_in_another_way_is_not_unpacked(recorded: Path, tmp_path: Path, packing: int) -> None:
    path = tmp_path / "other.gpumem"
    with zipfile.ZipFile(recorded) as archive, zipfile.ZipFile(path, "w", packing) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    assert "packed in another way" in refused(path)


def test_a_column_is_as_long_as_its_file_and_no_longer(recorded: Path, tmp_path: Path) -> None:
    name = "runs/0/1/events.npy"
    with zipfile.ZipFile(recorded) as archive:
        data = archive.read(name)
    length = len(np.load(io.BytesIO(data)))
    lying = data.replace(f"({length},), }}   ".encode(), f"({length}000,), }}".encode())
    assert lying != data
    refused(changed(recorded, tmp_path, name, lying))
    refused(changed(recorded, tmp_path, name, data[:-1]))
    refused(changed(recorded, tmp_path, name, data + b"\0"))


ANY = {"address", "time_us", "nth", "micro_batch"}
"""Fields of which every value is one."""
FIELDS = [(column, field) for column, dtype in COLUMNS.items() for field in dtype.names or () if field not in ANY]


@pytest.mark.parametrize(("column", "field"), [pair for pair in FIELDS if pair != ("made", "bytes")])
def test_an_index_that_leads_nowhere_is_found_when_it_is_opened(
    recorded: Path, tmp_path: Path, column: str, field: str
) -> None:
    name = f"runs/0/1/{column}.npy"
    with zipfile.ZipFile(recorded) as archive:
        before = np.load(io.BytesIO(archive.read(name)))
    array = np.append(before, np.zeros(1, before.dtype))
    array[field][-1] = np.iinfo(array.dtype[field]).max
    file = io.BytesIO()
    np.save(file, array)
    assert "damaged" in refused(changed(recorded, tmp_path, name, file.getvalue()))


@pytest.mark.parametrize("number", ["1e999", "9" * 400, str(2**63)])
def test_a_number_that_64_bits_do_not_hold_is_none(recorded: Path, tmp_path: Path, number: str) -> None:
    with zipfile.ZipFile(recorded) as archive:
        head = archive.read("gpumem.json").decode()
    assert '"allocated_bytes":' in head
    other = re.sub(r'"allocated_bytes":\d+', f'"allocated_bytes":{number}', head)
    assert "damaged" in refused(changed(recorded, tmp_path, "gpumem.json", other.encode()))
