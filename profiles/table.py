"""A TOML table whose keys are checked as they are taken, so that a mistake is one clear line."""

from __future__ import annotations

import math
import reprlib
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from ..engine.config import UserError, did_you_mean

T = TypeVar("T")


class Table:
    """One table of a file.

    Args:
        values: Its keys and values as `tomllib` gives them.
        where: The file, named first in every error.
        prefix: What leads to this table within the file: `lora.`, `rows 2: `.
    """

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.values, self.where, self.prefix = MappingProxyType(values), where, prefix
        self._known: list[str] = []

    @classmethod
    def read(cls, path: Path) -> Table:
        """A file's topmost table.

        Raises:
            UserError: It cannot be read, or is not TOML.
        """
        try:
            return cls(tomllib.loads(path.read_text(encoding="utf-8")), str(path))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, or brackets a thousand deep
            raise UserError(f"{path}: {error}") from None

    def take(self, key: str, kind: type[T], allowed: str, admits: Callable[[T], bool] = lambda _: True) -> T:
        """A value that has to be there.

        Args:
            key: Its key in this table.
            kind: The type it has to be of.
            allowed: What it may be, for people.
            admits: Whether a value of that type is allowed.

        Raises:
            UserError: It is missing, of another type, or not allowed.
        """
        self._known.append(key)
        if key not in self.values:
            raise self.error(f"{self.prefix}{key} is missing; it takes {allowed}")
        value = self.values[key]
        # bool is an int to Python, and not to whoever writes a file.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not admits(value):
            raise self.error(f"{self.prefix}{key} = {_shown(value)} is not allowed; {key} takes {allowed}")
        return value

    def text(self, key: str, choices: Sequence[str] = ()) -> str:
        """One line of text, or one of `choices`."""
        if choices:
            return self.take(key, str, ", ".join(choices), lambda value: value in choices)
        return self.take(key, str, "one line of text", lambda value: bool(value.strip()) and value.isprintable())

    def table(self, key: str) -> Table:
        """A table within this one."""
        return Table(self.take(key, dict, f"a table: [{key}]"), self.where, f"{self.prefix}{key}.")

    def tables(self, key: str) -> list[Table]:
        """An array of tables, empty if it is not there."""
        if key not in self.values:
            return []
        found = self.take(key, list, f"tables: [[{key}]]", lambda items: all(isinstance(i, dict) for i in items))
        return [Table(values, self.where, f"{self.prefix}{key} {n}: ") for n, values in enumerate(found, 1)]

    def numbers(self, key: str, names: Sequence[str]) -> Mapping[str, float]:
        """Some numbers by name from a table within this one, none if that is not there."""
        if key not in self.values:
            return MappingProxyType({})
        table = self.table(key)
        allowed = "a number from 0, with a decimal point"
        given = [name for name in names if name in table.values]
        found = {name: table.take(name, float, allowed, lambda number: 0 <= number < math.inf) for name in given}
        table.end(*names)
        return MappingProxyType(found)

    def end(self, *optional: str) -> None:
        """Say that every key there may be has been taken, but for those that need not be there.

        Raises:
            UserError: There is another one.
        """
        known = list(dict.fromkeys([*self._known, *optional]))
        for key in self.values:
            if key not in known:
                hint = did_you_mean(key, known, "known: " + ", ".join(known))
                inside = self.prefix.rstrip(".: ")
                raise self.error(f"{inside + ': ' if inside else ''}there is no key {key!r}; {hint}")

    def error(self, problem: str) -> UserError:
        """A mistake in this file, for the caller to raise. One line, whatever was in the file."""
        return UserError(" ".join(f"{self.where}: {problem}".split()))


def _shown(value: object) -> str:
    try:
        return reprlib.repr(value)
    except ValueError:  # Python writes no integer of more than 4,300 digits
        return "(a number too long to show)"
