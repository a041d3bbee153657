"""Disks and standard streams that are full, closed or narrow: one line, and all that could be told is told."""

from __future__ import annotations

import json
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from gpumem_tui.engine.recording import Recording
from gpumem_tui.tui.cli import main

SMALL = ["--batch-size", "2", "--seq-len", "16", "--steps", "1"]
QUICK = [*SMALL, "--device", "cpu"]


def shell(words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = f"{shlex.quote(sys.executable)} -m gpumem_tui.tui {words}"
    named = [f"{name}={value}" for name, value in environment.items()]
    return subprocess.run(
        ["env", *named, "sh", "-c", line], capture_output=True, text=True, timeout=120, check=False, encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("profiles > /dev/full", 2, "gpumem-tui: standard output: cannot write: No space left on device\n"),
        ("--help > /dev/full", 2, "gpumem-tui: standard output: cannot write: No space left on device\n"),
        ("profiles >&-", 2, "gpumem-tui: standard output: cannot write: Bad file descriptor\n"),
        ("ps x <&- >&-", 2, "gpumem-tui: unrecognized arguments: x (see: gpumem-tui ps --help)\n"),
        ("ps x 2>&-", 2, ""),
        ("ps x 2> /dev/full", 2, ""),
        ("profiles 2>&-", 0, ""),
        ("attach <&-", 2, "gpumem-tui: no engine is running; gpumem-tui starts one\n"),
        ("techniques | head -c 1 > /dev/null", 0, ""),
    ],
)
def test_a_stream_that_takes_nothing_is_one_line(words: str, code: int, said: str, tmp_path: Path) -> None:
    done = shell(words, XDG_RUNTIME_DIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (code, said)


def test_what_an_encoding_has_no_character_for_is_a_question_mark() -> None:
    wide, narrow = (shell("techniques", PYTHONIOENCODING=encoding) for encoding in ("utf-8", "ascii"))
    assert (narrow.returncode, narrow.stderr) == (0, "")
    assert not wide.stdout.isascii()
    assert narrow.stdout == wide.stdout.encode("ascii", "replace").decode()


def test_a_slow_reader_of_a_descriptor_that_does_not_wait_gets_everything() -> None:
    waits_not = "import os, sys; os.set_blocking(1, False); from gpumem_tui.tui.cli import main; sys.exit(main())"
    words = f"-c {shlex.quote(waits_not)} completion zsh | (sleep 1; cat)"
    done = subprocess.run(
        f"{shlex.quote(sys.executable)} {words}", shell=True, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.stderr == ""
    assert done.stdout == shell("completion zsh").stdout


@contextmanager
def a_disk_that_is_full() -> Iterator[None]:
    """No file grows beyond 100 bytes: the kernel says so as it does of a full disk, with another word."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("words", "printed"),
    [
        (["run", *QUICK, "--json"], "P parameters"),
        (["run", *QUICK, "--save"], "P parameters"),
        (["estimate", *SMALL, "--gpu", "A100 40GB", "--json"], "P parameters"),
        (["estimate", *SMALL, "--gpu", "A100 40GB", "--table", "--json"], "predicted peak in GiB"),
    ],
)  # fmt: skip
def test_a_full_disk_takes_nothing_from_what_is_printed(
    words: list[str], printed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with a_disk_that_is_full():
        code = main([*words, str(tmp_path / "result")])
    out, err = capsys.readouterr()
    assert code == 2
    assert err == f"gpumem-tui: {tmp_path}/result: not written: File too large\n"
    assert printed in out
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_leaves_what_was_there_and_what_else_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document, recording = tmp_path / "run.json", tmp_path / "run.gpumem"
    assert main(["run", *QUICK, "--json", str(document), "--save", str(recording)]) == 0
    before = document.read_text()
    assert Recording(recording).run is not None
    assert json.loads(before)["failure"] is None
    recording.unlink()
    with a_disk_that_is_full():
        assert main(["run", *QUICK, "--json", str(document), "--save", str(recording)]) == 2
    assert document.read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
    assert capsys.readouterr().err.count("\n") == 1
