"""`gpumem-tui doctor`: what this machine is and what it can run."""

from __future__ import annotations

import argparse
import sys

from ...engine.config import show
from ...engine.techniques import registry


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:<i> (default: auto)")
    parser.set_defaults(command=main)


def main(flags: argparse.Namespace) -> int:
    """Print what was found; 0 also where there is no GPU."""
    from ...engine import device

    chosen = device.select(flags.device)
    found = device.environment(chosen)
    lines = [
        f"device        {found.device}, {found.device_name}, {found.device_total_bytes / 2**30:.1f} GiB",
        f"capability    {found.capability or '–'}",
        f"driver        {found.driver or '–'}",
        f"python        {found.python}",
        *(f"{name:<14}{found.packages.get(name, 'not installed')}" for name in device.packages()),
        "",
    ]
    if chosen.type == "cuda":
        import torch

        torch.zeros(1, device=chosen)  # NVML lists a process once it has a CUDA context
        nvml = device.Nvml(chosen)
        lines.append(
            "NVML          sees this process"
            if nvml.process_bytes() is not None
            else "NVML          does not see processes here (a container?): other processes are not told apart"
        )
    else:
        lines.append("no GPU        runs train on the CPU; memory is counted operator by operator")
    for technique in registry().values():
        for value in technique.switch.choices:
            problem = technique.unavailable(value, found)
            if problem:
                lines.append(f"cannot run    {technique.name}={show(value)}: {problem}")
    sys.stdout.write("\n".join(lines) + "\n")
    return 0
