"""`gpumem-tui export`: runs as files that other programs open."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ...engine.config import UserError, one_line
from .common import opened, telling_how_far


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    from ...engine.exports import registry

    formats = registry().values()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    width = max(len(made.name) for made in formats)
    parser.epilog = "formats:\n" + "\n".join(f"  {made.name:<{width}}  {made.summary}" for made in formats)
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="*",
        help="a .gpumem recording, or a snapshot of PyTorch's; several go into one file",
    )
    parser.add_argument("-f", "--format", help="see below")
    parser.add_argument("-o", "--output", metavar="FILE", help="where; - for standard output (default: beside you)")
    parser.add_argument("--step", metavar="N", type=int, help="of which step (default: the one with the highest peak)")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of --format json, and end")
    parser.set_defaults(command=main)


def main(flags: argparse.Namespace) -> int:
    """Export; 0 if the file is there."""
    from ...engine import exports
    from ...engine.exports.exported_run import named
    from ...engine.feed import Work

    if flags.schema:
        from ...engine.exports.json import schema

        sys.stdout.write(json.dumps(schema(), indent=1) + "\n")
        return 0
    if not flags.format:
        raise UserError("--format: say which: " + ", ".join(exports.registry()))
    made = exports.format_named(flags.format)
    if not flags.runs:
        raise UserError("name a recording to export: gpumem-tui export RUN.gpumem --format " + made.name)
    work = Work()
    runs = named(opened([Path(name) for name in flags.runs]).runs(), flags.step)
    if flags.output == "-":
        exports.write(runs, made, sys.stdout.buffer)
        return 0
    path = Path(flags.output) if flags.output else Path(f"{Path(flags.runs[0]).stem}{made.suffix}")
    try:
        with telling_how_far(f"writing {path}", work):
            exports.export(runs, made, path, work)
    except OSError as error:
        raise UserError(f"{path}: not written: {error.strerror or one_line(error)}") from None
    sys.stdout.write(f"{path}\n")
    return 0
