"""Runs that ran out of memory, kept as recordings in the user's state folder, of which the oldest go.

$XDG_STATE_HOME/gpumem-tui/out-of-memory/oom-20261126-174211-gpt2-4711.1.gpumem
"""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from ..config import UserError, one_line
from ..recording import write
from ..run import Run
from ..run_events import Note, Saved
from ..user_folders import state_folder

MOST_FILES = 20
MOST_BYTES = 200 << 20


def keep(run: Run) -> Saved | Note:
    """Write a run that ran out of memory, and tell where it is, or why it is not kept."""
    folder = kept_folder()
    if folder is None:
        return Note(text="the run is not kept: there is no home folder; HOME or XDG_STATE_HOME would name one")
    path = folder / _name(run)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write(path, [run])
    except (OSError, UserError) as error:
        return Note(text=f"the run is not kept: {path}: {one_line(error)}")
    _drop_oldest(path)
    return Saved(text=f"kept in {path}; gpumem-tui why shows it", path=str(path))


def kept_folder() -> Path | None:
    """Folder that they are in, whether there are any or not; None without a home folder."""
    folder = state_folder()
    return folder / "out-of-memory" if folder is not None else None


def latest() -> Path | None:
    """The one written last; None if there is none."""
    files = _files()
    return files[-1] if files else None


def _files() -> list[Path]:
    """Files of all that are kept, the oldest first."""
    folder = kept_folder()
    if folder is None:
        return []
    found = []
    with contextlib.suppress(OSError):
        for path in folder.glob("oom-*.gpumem"):
            with contextlib.suppress(OSError):  # another process has just dropped it
                found.append((path.stat().st_mtime_ns, path))
    return [path for _, path in sorted(found)]


def _name(run: Run) -> str:
    model = run.config.model.rsplit("/", 1)[-1]
    safe = "".join(c if c.isalnum() or c in "-._" else "-" for c in model)[:60] or "model"
    rank = f"-rank{run.id.rank}" if run.id.rank else ""
    return f"oom-{time.strftime('%Y%m%d-%H%M%S')}-{safe}{rank}-{os.getpid()}.{run.id.number}.gpumem"


def _drop_oldest(newest: Path) -> None:
    """Let go of what is too many or too much; the newest stays, however large it is."""
    files, room = 1, MOST_BYTES
    with contextlib.suppress(OSError):
        room -= newest.stat().st_size
        for path in reversed(_files()):
            if path == newest:
                continue
            files += 1
            room -= path.stat().st_size
            if files > MOST_FILES or room < 0:
                path.unlink(missing_ok=True)
