"""The progress of a start or restart: stopping, freeing, loading, warm-up, each as it happens."""

from __future__ import annotations

from ...engine.events import Phase
from ...engine.techniques import memory_key
from ..draw import Row
from ..palette import Palette
from ..state import ViewState
from ..units import UNKNOWN

STAGES = ("stopping", "freeing", "loading", "warm-up")


def stage(state: ViewState) -> str | None:
    """The stage of a start; None: there is none under way."""
    if not state.live:
        return None
    if state.stopping and state.run.running:
        # The loop has been left, and what it held is going.
        return "freeing" if state.phase is Phase.IDLE and state.run.step else "stopping"
    if state.requested is not None or state.run.status == "loading":
        return "loading"
    return "warm-up" if state.run.status == "training" and not state.run.step else None


def progress(state: ViewState, palette: Palette) -> Row | None:
    """The stages in a row, the present one with its figures; None: nothing is being started."""
    now = stage(state)
    if now is None:
        return None
    first = state.run.number <= 1 and not state.stopping
    row = Row().add(" starting " if first else " restarting " if state.requested or state.run.number > 1 else " ")
    stages = STAGES[2:] if first else STAGES[:2] if state.stopping and state.requested is None else STAGES
    reached = STAGES.index(now)
    for name in stages:
        at = STAGES.index(name)
        if at < reached:
            row.add("  ").add("+ " if palette.ascii else "✓ ", palette.good).add(_done(name, state), palette.dim)
        elif at == reached:
            row.add("  ").add("> " if palette.ascii else "▸ ", palette.busy).add(_doing(name, state), palette.busy)
        else:
            row.add(f"    {name}", palette.dim)
    return row


def _done(name: str, state: ViewState) -> str:
    """A stage that is behind; of freeing, what it left."""
    if name != "freeing" or state.run.number <= 1:
        return {"stopping": "stopped", "loading": "loaded", "freeing": "freed"}[name]
    leaked = UNKNOWN if state.leaked_bytes is None else f"{state.leaked_bytes:,}"
    return f"freed, {leaked} bytes leaked"


def _doing(name: str, state: ViewState) -> str:
    """The stage under way, with how far it is."""
    gauge, unit = state.gauge, state.unit
    if gauge is None:
        return "loading the libraries" if name == "loading" else name
    held = unit.show(gauge.allocated_bytes)
    if name == "freeing":
        return f"freeing {held} {unit.name}"
    if name == "loading":
        config = state.run.config
        known = state.loaded.get(memory_key(config)) if config is not None else None
        seconds = max(0.0, gauge.time_s - state.run.began_s)
        of = f" of {unit.show(known)}" if known else ""
        return f"loading {held}{of} {unit.name}, {seconds:.0f} s"
    return f"warm-up: {state.phase.title}" if name == "warm-up" else name
