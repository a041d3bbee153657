"""The door: the command line, and the only place where errors become exit codes.

Exit codes: 0 done; 2 something the user can put right; 3 a run that failed;
130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..engine.config import UserError
from .commands import advise, app, attach, doctor, estimate, exec, ps, run, shelf, stop, sweep

USAGE_ERROR = 2
INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see: {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = _Parser(
        prog="gpumem-tui",
        description="Where every byte of GPU memory goes while a language model is fine-tuned. "
        "Without a command: train and watch, in the terminal.",
    )
    app.add(top)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)
    for name, module, summary in (
        ("attach", attach.add, "show an engine that is running, in the app"),
        ("exec", exec.add, "watch a training script of your own, without editing it"),
        ("ps", ps.add, "the engines that are running"),
        ("stop", stop.add, "end an engine"),
        ("run", run.add, "one run without the app: a table, JSON, a recording"),
        ("sweep", sweep.add, "every row of a preset, published and measured side by side"),
        ("estimate", estimate.add, "a run's memory before it is run, on a GPU that need not be here"),
        ("advise", advise.add, "which techniques save most at the peak, and what they cost"),
        ("open", app.add_open, "show a recording in the app"),
        ("profiles", shelf.add_profiles, "the models and presets there are"),
        ("techniques", shelf.add_techniques, "what can be switched, and every setting of it"),
        ("doctor", doctor.add, "GPU, driver, versions: what can run here, and what cannot and why"),
    ):
        module(commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + "."))
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    # On a CPU, OpenMP's threads would otherwise spin beside the one that draws.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        flags = parser().parse_args(arguments)
        return int(flags.command(flags))
    except UserError as error:
        sys.stderr.write(f"gpumem-tui: {error}\n")
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone: gpumem-tui ... | head
        sys.stderr.close()
        return 0


if __name__ == "__main__":
    sys.exit(main())
