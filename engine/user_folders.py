"""Folders of a user's files of this program: the folders of the XDG base directory specification."""

from __future__ import annotations

import os
from pathlib import Path


def user_folder(variable: str, fallback: str) -> Path | None:
    """This program's folder of one kind, whether it is there or not; None without a home folder.

    Args:
        variable: Names the folder of all programs: `XDG_STATE_HOME`.
        fallback: Below the home folder, where the variable is not set: `.local/state`.
    """
    base = os.environ.get(variable, "")
    if base.startswith("/"):  # the specification: a relative path is to be ignored
        return Path(base) / "gpumem-tui"
    try:
        return Path.home() / fallback / "gpumem-tui"
    except RuntimeError:  # no HOME, and no entry in passwd: a container that is run as any user
        return None


def state_folder() -> Path | None:
    """Folder for what the program notes for itself, such as that the tour has been seen."""
    return user_folder("XDG_STATE_HOME", ".local/state")
