"""`gpumem-tui profiles` and `gpumem-tui techniques`: what there is to choose from."""

from __future__ import annotations

import argparse
import sys

from ...engine.config import show
from ...engine.techniques import by_group
from ...profiles import model_profiles, presets
from .wrapping import columns, within


def add_profiles(parser: argparse.ArgumentParser) -> None:
    """No flags."""
    parser.set_defaults(command=list_profiles)


def add_techniques(parser: argparse.ArgumentParser) -> None:
    """No flags."""
    parser.set_defaults(command=list_techniques)


def list_profiles(_flags: argparse.Namespace) -> int:
    """Print the models and the presets, for a terminal within its width; elsewhere each is a line."""
    width = columns() if sys.stdout.isatty() else sys.maxsize

    def listed(figures: str, summary: str) -> list[str]:
        return within(width, summary, figures, " " * len(figures))

    lines = [f"{'model':<20}{'parameters':>16}  dtype"]
    for profile in sorted(model_profiles().values(), key=lambda p: p.parameters):
        lines += listed(f"{profile.name:<20}{profile.parameters:>16,}  {profile.dtype:<10} ", profile.summary)
    lines += ["", "preset"]
    for preset in presets().values():
        lines += listed(f"{preset.name:<20}", preset.summary)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def list_techniques(_flags: argparse.Namespace) -> int:
    """Print every technique with its settings."""
    lines: list[str] = []
    group = None
    for technique in by_group():
        if technique.group is not group:
            group = technique.group
            lines += [group.upper(), ""]
        lines += [f"{technique.name}: {technique.summary}", f"    {technique.formula}", f"    {technique.source}"]
        lines += [
            f"    --set {option.name}={show(option.default):<12} {option.summary} ({option.allowed})"
            for option in technique.options
        ]
        lines.append("")
    sys.stdout.write("\n".join(lines))
    return 0
