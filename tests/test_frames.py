"""The live screen without a terminal: as plain text, as JSON, as a line for each tick."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.recording import Recording, write
from gpumem_tui.tui.cli import main

from .app_driver import trained


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("recordings")
    paths = []
    for name, settings in (("plain", {}), ("checkpointed", {"checkpointing": "layers"})):
        write(folder / f"{name}.gpumem", [trained(3, **settings).run])
        paths.append(str(folder / f"{name}.gpumem"))
    return paths


def test_once_prints_the_live_screen_as_plain_text(recordings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["open", recordings[0], "--once"]) == 0
    out = capsys.readouterr().out
    assert "P parameters" in out
    assert "The peak is inside AdamW.step()" in out
    assert "\x1b" not in out


def test_json_says_what_the_screen_shows(recordings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["open", recordings[0], "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    ledger = max(
        (Ledger(trace) for trace in Recording(Path(recordings[0])).run.traces()), key=lambda one: one.peak.bytes
    )
    assert document["schema"] == "gpumem-live/1"
    assert document["peak"]["allocated_bytes"] == ledger.peak.bytes
    assert sum(document["peak"]["by_category"].values()) == ledger.peak.bytes
    assert document["step"] == 3


def test_jsonl_is_a_line_each(recordings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["open", recordings[0], "--jsonl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["recording"]


def test_where_there_is_no_terminal_it_is_plain_text(recordings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["open", recordings[0]]) == 0
    out = capsys.readouterr().out
    assert "step ended     step 3" in out
    assert "P parameters" in out
    assert "\x1b" not in out
