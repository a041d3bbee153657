"""The door: the command line, and the only place where errors become exit codes.

Exit codes: see EXIT_CODES.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import textwrap
from collections.abc import Sequence
from typing import Any, NoReturn

from ..engine.config import UserError, did_you_mean
from .commands import app
from .commands.common import USER_MISTAKE
from .interrupt import INTERRUPTED
from .standard_streams import complain, standard_streams

EXIT_CODES = "exit codes: 0 done, 2 something you can put right (one line says what), 3 the run failed, 130 interrupted"


class _Help(argparse.HelpFormatter):
    """argparse's, with lines that end between words alone: a value stays as it can be typed."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors as one line."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": _Help} | settings)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # as from Python 3.14 on: -5GB is a value, no flag

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        flags, left = self.parse_known_args(args, namespace)
        if left:
            command = self._command(args)
            hint = did_you_mean(left[0].partition("=")[0], command._option_string_actions, least=0.75)
            command.error(f"unrecognized arguments: {' '.join(left)}{hint and f'; {hint}'}")
        return flags

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see: {self.prog} --help)")

    def _command(self, words: Sequence[str]) -> _Parser:
        """The command that is among the words; without one, this itself."""
        below = (a.choices for a in self._actions if isinstance(a, argparse._SubParsersAction))
        commands = [made for choices in below for name, made in choices.items() if name in words]
        return commands[0]._command(words) if commands else self

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse does, with the nearest choice instead of all of them where one is near."""
        if action.choices is not None and value not in action.choices:
            hint = did_you_mean(str(value), map(str, action.choices))
            if hint:
                raise argparse.ArgumentError(action, f"invalid choice: {value!r}; {hint}")
        super()._check_value(action, value)


class _Command(_Parser):
    """A command, with the options that were typed before its name: they count as if they came after it.

    argparse would have the defaults of the command's own options overwrite them.
    """

    def __init__(self, words: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(**settings)
        self._words = words

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        before = self._words[: len(self._words) - len(args) - 1]
        return super().parse_known_args([*before, *args], namespace)


COMMANDS = (
    ("attach", "attach:add", "show an engine that is running, in the app"),
    ("exec", "exec:add", "watch a training script of your own, without editing it"),
    ("ps", "ps:add", "the engines that are running"),
    ("stop", "stop:add", "end an engine"),
    ("warm", "warm:add", "keep ready what predictions load, so that they begin at once"),
    ("run", "run:add", "one run without the app: a table, JSON, a recording"),
    ("sweep", "sweep:add", "every row of a preset, published and measured side by side"),
    ("estimate", "estimate:add", "a run's memory before it is run, on a GPU that need not be here"),
    ("advise", "advise:add", "which techniques save most at the peak, and what they cost"),
    ("weights", "weights:add", "what quantization does to a model's weights, scheme by scheme"),
    ("check", "check:add", "a gate for CI: exit 1 where a run would not fit a budget or has grown"),
    ("why", "why:add", "why a run ran out of memory, and the smallest changes that would fit"),
    ("open", "app:add_open", "show recordings in the app"),
    ("export", "export:add", "runs as files that other programs open: memory_viz, Perfetto, a page, a table"),
    ("profiles", "listings:add_profiles", "the models and presets there are"),
    ("techniques", "listings:add_techniques", "what can be switched, and every setting of it"),
    ("doctor", "doctor:add", "GPU, driver, versions: what can run here, and what cannot and why"),
    ("config", "config:add", "show and change the settings"),
    ("completion", "completion:add", "what bash, zsh or fish needs to complete commands and flags"),
)
"""Name, where its flags are, summary."""


def parser(words: Sequence[str] | None = None) -> argparse.ArgumentParser:
    """The command line.

    Args:
        words: What was typed, of which some word may be a command; the others'
            flags are left out, so that their modules need not be imported.
            None: all flags.
    """
    top = _Parser(
        prog="gpumem-tui",
        description="Where every byte of GPU memory goes while a language model is fine-tuned. "
        "Without a command: train and watch, in the terminal.",
        epilog=EXIT_CODES,
    )
    app.add(top)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Command)
    for name, where, summary in COMMANDS:
        description = f"{summary[0].upper()}{summary[1:]}."
        inner = commands.add_parser(name, help=summary, description=description, words=words or ())
        if words is None or name in words:
            module, function = where.split(":")
            getattr(importlib.import_module(f"{__package__}.commands.{module}"), function)(inner)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    # On a CPU, OpenMP's threads would otherwise spin beside the one that draws.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        with standard_streams():
            words = sys.argv[1:] if arguments is None else arguments
            flags = parser(words).parse_args(words)
            return int(flags.command(flags))
    except UserError as error:
        complain(str(error))
        return USER_MISTAKE
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone: gpumem-tui ... | head
        return 0
