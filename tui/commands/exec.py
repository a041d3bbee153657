"""`gpumem-tui exec -- python train.py`: a script of one's own, watched without editing it."""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
from importlib import util
from pathlib import Path

from ...engine.config import MEMORY_LIMIT_VARIABLE, UserError, parse_bytes
from ...engine.watch.exec_report import FILE_VARIABLE, PROCESS_VARIABLE

PYTHON_VARIABLE = "GPUMEM_PYTHON"
"""The environment variable with the interpreter to name to another that this program is not installed for.

What reads it, `autoload/sitecustomize.py`, cannot import it from here.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """The command is everything that follows."""
    parser.epilog = (
        "Every Python that the command starts is watched from the first forward of the first model whose parameters "
        "an optimizer has. Not seen: what runs before that, a second model or optimizer, the inside of compiled "
        "models, and Pythons started with -I, -S or -E."
    )
    about = "have the device behave as one with less memory: 24GiB"
    parser.add_argument("--memory-limit", metavar="SIZE", help=about)
    parser.add_argument("line", metavar="COMMAND", nargs=argparse.REMAINDER, help="python train.py ..., torchrun ...")
    parser.set_defaults(command=main)


def main(flags: argparse.Namespace) -> int:
    """Become the command."""
    line = flags.line[1:] if flags.line[:1] == ["--"] else flags.line
    if not line or not line[0]:
        raise UserError("exec: what is to be run? gpumem-tui exec -- python train.py")
    watching = util.find_spec("gpumem_tui.engine.watch")
    assert watching is not None
    assert watching.origin is not None
    autoload = Path(watching.origin).parent / "autoload"
    if flags.memory_limit:
        parse_bytes(flags.memory_limit, "--memory-limit")
        os.environ[MEMORY_LIMIT_VARIABLE] = flags.memory_limit
    os.environ[PYTHON_VARIABLE] = sys.executable
    os.environ[PROCESS_VARIABLE] = str(os.getpid())  # the command's, too
    os.environ[FILE_VARIABLE] = os.path.join(tempfile.gettempdir(), f"gpumem-watched-{secrets.token_hex(8)}")  # noqa: PTH118
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(autoload), *([path] if path else [])])
    try:
        os.execvp(line[0], line)
    except OSError as error:
        raise UserError(f"exec: {line[0]}: {error.strerror}") from None
