"""`gpumem-tui config`: show the settings, say where they are, edit them."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

from ...engine.atomic_file import replacing
from ...engine.config import UserError, show
from ..settings import NO_HOME, OPTIONS, Settings, config_path

DEFAULT_EDITOR = "vi"


def add(parser: argparse.ArgumentParser) -> None:
    """Add the argument: the action."""
    parser.set_defaults(command=show_all)
    what = parser.add_subparsers(title="what", metavar="WHAT")
    for name, function, summary in (
        ("show", show_all, "every setting, its value and what it takes (the default)"),
        ("path", show_path, "where the config file is"),
        ("edit", edit, "open it in $EDITOR, and check it afterwards"),
    ):
        what.add_parser(name, help=summary, description=summary).set_defaults(command=function)
    setter = what.add_parser("set", help="change settings", description="Change settings in the config file.")
    setter.add_argument("settings", nargs="+", metavar="KEY=VALUE", help="theme=light, keys.save='S ctrl+w', ...")
    setter.set_defaults(command=change)
    unsetter = what.add_parser(
        "unset", help="have settings as by default", description="Take settings out of the file."
    )
    unsetter.add_argument("settings", nargs="+", metavar="KEY", help="theme, keys.save, ...")
    unsetter.set_defaults(command=unset)


def show_all(_flags: argparse.Namespace) -> int:
    """Print the settings."""
    settings = Settings.load()
    if settings.path is None:
        lines = [f"# {NO_HOME}; what is set holds for one session only"]
    else:
        there = "" if settings.path.exists() else " (not there: these are the defaults)"
        lines = [f"# {settings.path}{there}"]
    lines += [f"{o.name + ' = ' + show(settings[o.name]):<24} # {o.summary}; {o.allowed}" for o in OPTIONS]
    lines += [f"keys.{name} = {' '.join(keys)}" for name, keys in settings.keys.items()]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def show_path(_flags: argparse.Namespace) -> int:
    """Print where they are."""
    sys.stdout.write(f"{_path()}\n")
    return 0


def change(flags: argparse.Namespace) -> int:
    """Change some; all of them, or, where one is wrong, none: the next start reads what is written here."""
    changes = []
    for item in flags.settings:
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"config set {item}: write it as key=value")
        changes.append((name.strip(), value.strip()))
    tried = Settings.load()
    tried.where = "config"
    for name, value in changes:
        tried.take(name, value)
    _check(tried)
    settings = Settings.load()
    for name, value in changes:
        settings.set(name, value)
    return 0


def unset(flags: argparse.Namespace) -> int:
    """Have some as by default again."""
    settings = Settings.load()
    for name in flags.settings:
        settings.unset(name)
    return 0


def edit(_flags: argparse.Namespace) -> int:
    """Open the editor."""
    path = _path()
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = [f"# {o.summary}; {o.allowed}\n# {o.name} = {_toml(o.default)}\n" for o in OPTIONS]
            with replacing(path) as file:
                file.write(("\n".join(lines) + '\n[keys]\n# save = "S"\n').encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or DEFAULT_EDITOR
    try:
        subprocess.run([*shlex.split(editor), str(path)], check=True)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise UserError(f"{editor}: {error}") from None
    _check(Settings.load())
    return 0


def _path() -> Path:
    path = config_path()
    if path is None:
        raise UserError(NO_HOME)
    return path


def _check(settings: Settings) -> None:
    """Keys that are taken are found only beside all the others."""
    from ...profiles import model_profile
    from ..board import check

    model_profile(str(settings["profile"]))
    check(settings)


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value).lower()
