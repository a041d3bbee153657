"""Makes the recordings that the snapshots are taken from: `python -m tests.recordings.make`.

Synthetic: believable steps of a small transformer on a pretended GPU, the same on every machine.
Two are real, of three steps on an NVIDIA H100 (torch 2.11.0+cu130, transformers 5.17.0):

    gpumem-tui run --profile tiny --steps 3 --save h100-tiny.gpumem
    gpumem-tui run --profile tiny --steps 3 --set checkpointing=layers --set lora=on --set dtype=mixed \\
        --save h100-tiny-lora.gpumem
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from gpumem_tui.engine.recording import write
from gpumem_tui.engine.run import Run
from gpumem_tui.engine.run_events import placed

from ..fake_source import GPU, MIB, FakeSource

HERE = Path(__file__).parent
UNIT = 48 * MIB

RECORDINGS: dict[str, dict[str, Any]] = {
    "full": {},
    "checkpointed": {"checkpointing": "layers", "accumulation": 2},
    "lora": {"lora": True},
}


def ran(settings: dict[str, Any], unit: int = UNIT, rank: int = 0) -> Run:
    """Three steps of one configuration."""
    source = FakeSource(GPU, layers=8, unit=unit)
    source.start(**settings)
    for _ in range(3):
        source.finish_step()
    # Times of the wall clock would be others every time.
    live = source.run
    assert live is not None and live.gauge is not None
    run = Run(live.id._replace(rank=rank), live.config, live.environment)
    for event in live.events():
        run.tell(placed(event, event.index, event.index * 0.1, event.run))
    run.keep(live.traces())
    run.gauge = dataclasses.replace(live.gauge, time_s=len(live.events()) * 0.1)
    return run


def job(ranks: int, lowest: int = 1) -> list[Run]:
    """The ranks of a job, from the last to 0: the second last holds most, the one named least."""
    settings = {"parallel": "fsdp2", "parallel.ranks": ranks}
    units = dict.fromkeys(range(ranks), UNIT) | {ranks - 2: UNIT + 4 * MIB, lowest: UNIT - 3 * MIB}
    return [ran(settings, units[rank], rank) for rank in reversed(range(ranks))]


if __name__ == "__main__":
    for name, settings in RECORDINGS.items():
        write(HERE / f"{name}.gpumem", [ran(settings)])
    write(HERE / "ranks.gpumem", job(4))
