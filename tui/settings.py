"""The config file: `$XDG_CONFIG_HOME/gpumem-tui/config.toml`, read once, written key by key.

    theme = "light"
    refresh = 4

    [keys]
    save = "S"
    "step.zoom-in" = ["+", "="]

What is set in the app is written back here; comments and order stay.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine.atomic_file import replacing
from ..engine.config import Option, UserError, Value, did_you_mean
from ..engine.user_folders import user_folder
from .interrupt import answered_by, raise_interrupt

LOCAL_HZ, SSH_HZ = 10.0, 4.0
"""Refreshes a second where nobody has set any."""

OPTIONS: tuple[Option, ...] = (
    Option("theme", "auto", "colours; auto asks the terminal for its background", ("auto", "dark", "light", "ansi")),
    Option("refresh", 0.0, "refreshes a second; 0: 10, and 4 over SSH", (), False, 0, 60),
    Option("units", "GiB", "count in GiB (2^30) or GB (10^9)", ("GiB", "GB")),
    Option("profile", "tiny", "what is trained where no --profile or --model is given", (), True),
    Option("gpu", "", "GPU that is predicted for; empty: this one, and where there is none an H100 80GB", (), True),
    Option("predict", True, "work out beforehand what a change would do"),
    Option("ascii", False, "draw without Unicode blocks"),
    Option("mouse", False, "take the mouse; off, the terminal selects text as always"),
)
"""The settings; the keys of `[keys]` are the names of actions."""

NAMED = {option.name: option for option in OPTIONS}


NO_HOME = "there is no home folder for a config file; HOME or XDG_CONFIG_HOME would name one"


def automatic_hz() -> float:
    """Refreshes a second that suit the link."""
    return SSH_HZ if "SSH_CONNECTION" in os.environ else LOCAL_HZ


def config_path() -> Path | None:
    """The path of the config file, whether there is one or not; None without a home folder."""
    folder = user_folder("XDG_CONFIG_HOME", ".config")
    return folder / "config.toml" if folder is not None else None


@dataclass
class Settings:
    """The settings of the config file, and defaults for all that it does not set.

    Attributes:
        path: The file; None: there is nowhere to have one, and what is set holds for this session only.
        values: By name, all of them.
        keys: Of actions that have other keys than by default.
        where: Named in errors: the file, or what was typed.
    """

    path: Path | None
    values: dict[str, Value] = field(default_factory=lambda: {option.name: option.default for option in OPTIONS})
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)
    where: str = ""

    def __post_init__(self) -> None:
        self.where = self.where or str(self.path or "settings")

    @classmethod
    def load(cls, path: Path | None = None) -> Settings:
        """Read the file; without one, the defaults.

        Raises:
            UserError: It cannot be read, or something in it cannot be: one line
                that names file and key.
        """
        path = path or config_path()
        found = cls(path)
        if path is None:
            return found
        plain = dict(_parse(_text(path), path))
        keys = plain.pop("keys", {})
        if not isinstance(keys, dict):
            raise UserError(f"{path}: keys takes a table: [keys]")
        for name, raw in plain.items():
            found.values[name] = _option(name, str(path)).parse(raw, str(path))
        found.keys = dict(_key(name, raw, path) for name, raw in _flat(keys))
        return found

    def __getitem__(self, name: str) -> Value:
        """A setting's value."""
        return self.values[name]

    def set(self, name: str, raw: object) -> None:
        """Change one setting, here and in the file.

        Args:
            name: Of a setting, or `keys.` and an action's name.
            raw: As typed.

        Raises:
            UserError: There is no such setting, it does not take that, or the
                file cannot be written.
        """
        table, key, value = self.take(name, raw)
        self._write(lambda text: with_key(text, table, key, value))

    def unset(self, name: str) -> None:
        """Have a setting or an action's keys as by default again, here and in the file.

        Raises:
            UserError: There is no such setting, or the file cannot be written.
        """
        action = name.removeprefix("keys.")
        if action == name:
            self.values[name] = _option(name, "config").default
            self._write(lambda text: without_key(text, "", name))
        else:
            self.keys.pop(action, None)
            self._write(lambda text: without_key(text, "keys", json.dumps(action)))

    def take(self, name: str, raw: object) -> tuple[str, str, str]:
        """Change one setting here, and not in the file.

        Returns:
            Table, key and value, as they are written there.

        Raises:
            UserError: There is no such setting, or it does not take that.
        """
        table, _, action = name.partition("keys.")
        if action and not table:
            keys = self.keys[action] = tuple(str(raw).split())
            return "keys", json.dumps(action), json.dumps(keys[0] if len(keys) == 1 else keys)
        value = self.values[name] = _option(name, "config").parse(raw, "config")
        return "", name, json.dumps(value)

    def _write(self, edit: Callable[[str], str]) -> None:
        """Edit the file and replace it whole."""
        if self.path is None:
            raise UserError(NO_HOME)
        text = edit(_text(self.path))
        _parse(text, self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with answered_by(raise_interrupt), replacing(self.path) as file:
                file.write(text.encode())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None


def _parse(text: str, path: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits, brackets a thousand deep
        raise UserError(f"{path}: {error}") from None


def _option(name: str, where: str) -> Option:
    if name not in NAMED:
        hint = did_you_mean(name, NAMED, f"known: {', '.join(NAMED)}, keys.<action>")
        raise UserError(f"{where}: there is no setting {name!r}; {hint}")
    return NAMED[name]


def _flat(table: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """`[keys] step.zoom-in = "+"` is a table in a table to TOML, and one name to us."""
    found: list[tuple[str, Any]] = []
    left = list(table.items())
    while left:  # no recursion: a name may have ten thousand dots
        name, value = left.pop(0)
        if isinstance(value, dict):
            left = [(f"{name}.{rest}", below) for rest, below in value.items()] + left
        else:
            found.append((name, value))
    return found


def _key(name: str, raw: Any, path: Path) -> tuple[str, tuple[str, ...]]:
    keys = [raw] if isinstance(raw, str) else raw
    if not isinstance(keys, list) or not all(isinstance(key, str) and key.strip() for key in keys):
        raise UserError(f'{path}: keys.{name} takes a key, or several: "S", ["S", "ctrl+w"]')
    return name, tuple(keys)


def with_key(text: str, table: str, key: str, value: str) -> str:
    """A TOML text with one key set, everything else as it was.

    Args:
        text: Valid TOML.
        table: Name of a table; empty: the topmost.
        key: As written there.
        value: As written there; one line.
    """
    lines = text.splitlines()
    begin, end, found = _find(lines, table, key)
    if begin is None:
        lines += [*([""] if lines else []), f"[{table}]", f"{key} = {value}"]
    elif found is not None:
        lines[found] = f"{key} = {value}"
    else:
        while end > begin and not lines[end - 1].strip():
            end -= 1
        lines.insert(end, f"{key} = {value}")
    return "\n".join(lines) + "\n"


def without_key(text: str, table: str, key: str) -> str:
    """A TOML text without a key, everything else as it was; the arguments are those of `with_key`."""
    lines = text.splitlines()
    _, _, found = _find(lines, table, key)
    if found is None:
        return text
    del lines[found]
    return "".join(f"{line}\n" for line in lines)


def _find(lines: list[str], table: str, key: str) -> tuple[int | None, int, int | None]:
    """The lines of a table, and that of a key in it; None where there is none."""
    heads = [i for i, line in enumerate(lines) if line.lstrip().startswith("[")]
    begin = next((i + 1 for i in heads if lines[i].split("#")[0].strip() == f"[{table}]"), None) if table else 0
    if begin is None:
        return None, 0, None
    end = next((i for i in heads if i >= begin), len(lines))
    same = re.compile(rf"\s*(?:{re.escape(key)}|{re.escape(key.strip(chr(34)))})\s*=")
    return begin, end, next((i for i in range(begin, end) if same.match(lines[i])), None)
