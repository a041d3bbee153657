"""The config file: `$XDG_CONFIG_HOME/gpumem-tui/config.toml`, read once, written key by key.

    theme = "light"
    refresh = 4

    [keys]
    save = "S"
    "step.zoom-in" = ["+", "="]

What is set in the app is written back here; comments and order stay.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine.atomic_file import replacing
from ..engine.config import Option, UserError, Value

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


def config_path() -> Path:
    """Where the config file is, whether there is one or not."""
    return _home("XDG_CONFIG_HOME", ".config") / "config.toml"


def state_path(name: str) -> Path:
    """Where the program notes something for itself: that the tour has been seen."""
    return _home("XDG_STATE_HOME", ".local/state") / name


def _home(variable: str, fallback: str) -> Path:
    base = os.environ.get(variable, "")
    # The XDG specification: a relative path is to be ignored.
    return (Path(base) if base.startswith("/") else Path.home() / fallback) / "gpumem-tui"


@dataclass
class Settings:
    """What the config file says, and the defaults for what it does not.

    Attributes:
        path: The file.
        values: By name, all of them.
        keys: Of actions that have other keys than by default.
    """

    path: Path
    values: dict[str, Value] = field(default_factory=lambda: {option.name: option.default for option in OPTIONS})
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path | None = None) -> Settings:
        """Read the file; without one, the defaults.

        Raises:
            UserError: It cannot be read, or something in it cannot be: one line
                that names file and key.
        """
        path = path or config_path()
        found = cls(path)
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
        place = self.take(name, raw)
        self._write(lambda text: with_key(text, *place))

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
        value = self.values[name] = _option(name, "gpumem-tui config").parse(raw, "gpumem-tui config")
        return "", name, json.dumps(value)

    def _write(self, edit: Any) -> None:
        """Edit the file and replace it whole."""
        text = edit(_text(self.path))
        _parse(text, self.path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as file:
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
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: {error}") from None


def _option(name: str, where: str) -> Option:
    if name not in NAMED:
        close = difflib.get_close_matches(name, NAMED, 1)
        hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(NAMED)}, keys.<action>"
        raise UserError(f"{where}: there is no setting {name!r}; {hint}")
    return NAMED[name]


def _flat(table: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """`[keys] step.zoom-in = "+"` is a table in a table to TOML, and one name to us."""
    found: list[tuple[str, Any]] = []
    for name, value in table.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
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
    heads = [i for i, line in enumerate(lines) if line.lstrip().startswith("[")]
    begin = next((i + 1 for i in heads if lines[i].split("#")[0].strip() == f"[{table}]"), None) if table else 0
    if begin is None:
        return "\n".join([*lines, *([""] if lines else []), f"[{table}]", f"{key} = {value}"]) + "\n"
    end = next((i for i in heads if i >= begin), len(lines))
    same = re.compile(rf"\s*(?:{re.escape(key)}|{re.escape(key.strip(chr(34)))})\s*=")
    for i in range(begin, end):
        if same.match(lines[i]):
            lines[i] = f"{key} = {value}"
            break
    else:
        while end > begin and not lines[end - 1].strip():
            end -= 1
        lines.insert(end, f"{key} = {value}")
    return "\n".join(lines) + "\n"
