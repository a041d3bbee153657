"""`gpumem-tui completion SHELL`: what the shell needs to complete commands and flags.

Made from the argparse tree, so that it knows what the program knows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ...engine.config import WORKLOAD_OPTIONS, Option, show
from ...engine.prediction.gpus import gpus
from ...engine.techniques import all_options
from ...profiles import model_profiles, presets
from ..settings import OPTIONS
from .common import flag_of

PROGRAM = "gpumem-tui"


class Command(NamedTuple):
    """One command, or the program itself (an empty path)."""

    path: tuple[str, ...]
    summary: str
    words: tuple[tuple[str, str], ...]
    """Flags and sub-commands, with what they do."""
    values: dict[str, tuple[str, ...]]
    """Values of a flag, where they can be listed; empty: file names."""
    positional: tuple[str, ...]
    """Values of the first argument, where they can be listed."""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the argument: the shell."""
    parser.add_argument("shell", choices=tuple(SHELLS))
    parser.set_defaults(command=main)


def main(flags: argparse.Namespace) -> int:
    """Print the script."""
    from ..cli import parser

    sys.stdout.write(SHELLS[flags.shell](list(commands(parser()))))
    return 0


def commands(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> Iterator[Command]:
    """A parser and all below it."""
    gpu_names = tuple(name.replace(" ", "-") for name in gpus())
    known = {
        "--profile": tuple(model_profiles()), "--preset": tuple(presets()), "--gpu": gpu_names, "--predict": gpu_names,
        "--set": _pairs(all_options().values()), "KEY=VALUE": _pairs(OPTIONS),
    } | {flag_of(option): tuple(map(show, option.choices)) for option in WORKLOAD_OPTIONS}  # fmt: skip
    words: list[tuple[str, str]] = []
    values: dict[str, tuple[str, ...]] = {}
    positional: tuple[str, ...] = ()
    below: list[tuple[str, argparse.ArgumentParser]] = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            below = list(action.choices.items())
            words += [(choice.dest, choice.help or "") for choice in action._choices_actions]
        elif action.option_strings:
            words += [(flag, action.help or "") for flag in action.option_strings if flag.startswith("--")]
            if action.nargs != 0:
                listed = tuple(map(str, action.choices or ()))
                values |= {flag: listed or known.get(flag, ()) for flag in action.option_strings}
        else:
            positional = tuple(map(str, action.choices or ())) or known.get(str(action.metavar), ())
    yield Command(path, parser.description or "", tuple(words), values, positional)
    for name, inner in below:
        yield from commands(inner, (*path, name))


def _pairs(options: Iterable[Option]) -> tuple[str, ...]:
    """`name=value` for what can be listed, `name=` for what cannot."""
    pairs: list[str] = []
    for option in options:
        values = (False, True) if isinstance(option.default, bool) else option.choices
        pairs += [f"{option.name}={show(value)}" for value in values] or [f"{option.name}="]
    return tuple(pairs)


BASH = """\
_gpumem_tui() {
  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" before=""
  # bash takes a = for a word: name=va is three.
  if [[ $cur == "=" ]]; then
    before="$prev=" cur="" prev="${COMP_WORDS[COMP_CWORD-2]}"
  elif [[ $prev == "=" ]]; then
    before="${COMP_WORDS[COMP_CWORD-2]}=" prev="${COMP_WORDS[COMP_CWORD-3]}"
  fi
  _gpumem_tui_words "$before$cur" "$prev"
  COMPREPLY=("${COMPREPLY[@]#"$before"}")
}
_gpumem_tui_words() {
  local path="" word cur="$1" prev="$2"
  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
    case "$path $word" in
"""


def bash(found: list[Command]) -> str:
    """The script for bash: one function, a case a command."""
    lines = []
    for command in found[1:]:
        before, name = " ".join(command.path[:-1]), command.path[-1]
        lines.append(f'      "{before} {name}") path="{" ".join(command.path)}" ;;')
    lines += ["    esac", "  done", '  case "$path $prev" in']
    for command in found:
        for flag, choices in command.values.items():
            reply = f'compgen -W "{" ".join(choices)}" -- "$cur"' if choices else 'compgen -f -- "$cur"'
            lines.append(f'    "{" ".join(command.path)} {flag}") COMPREPLY=($({reply})); return ;;')
    lines += ["  esac", '  case "$path" in']
    for command in found:
        words = " ".join([*(word for word, _ in command.words), *command.positional])
        lines.append(f'    "{" ".join(command.path)}") COMPREPLY=($(compgen -W "{words}" -- "$cur")) ;;')
    return BASH + "\n".join([*lines, "  esac", "}", f"complete -o default -F _gpumem_tui {PROGRAM}"]) + "\n"


def zsh(found: list[Command]) -> str:
    """The script for zsh: bash's function through its own emulation."""
    return f"#compdef {PROGRAM}\nautoload -U +X bashcompinit && bashcompinit\n{bash(found)}"


def fish(found: list[Command]) -> str:
    """The script for fish: a line a word."""
    lines = [f"complete -c {PROGRAM} -f"]
    for command in found:
        inner = [other.path[-1] for other in found if other.path[:-1] == command.path and other.path]
        seen = [f"__fish_seen_subcommand_from {name}" for name in command.path]
        unseen = [f"not __fish_seen_subcommand_from {' '.join(inner)}"] if inner else []
        when = f' -n "{"; and ".join([*seen, *unseen])}"' if seen or unseen else ""
        for word, summary in command.words:
            text = summary.replace("'", "\\'")
            if not word.startswith("--"):
                lines.append(f"complete -c {PROGRAM}{when} -a {word} -d '{text}'")
                continue
            takes = ""
            if word in command.values:
                listed = " ".join(command.values[word])
                takes = f" -x -a '{listed}'" if listed else " -r -F"
            lines.append(f"complete -c {PROGRAM}{when} -l {word[2:]}{takes} -d '{text}'")
        if command.positional:
            lines.append(f"complete -c {PROGRAM}{when} -a '{' '.join(command.positional)}'")
        elif command.path == ("open",):
            lines.append(f"complete -c {PROGRAM}{when} -F")
    return "\n".join(lines) + "\n"


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}
