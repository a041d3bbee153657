"""Which single change would save most: a line of the live and of the techniques screen."""

from __future__ import annotations

from ...engine.config import show
from ..control import Control, offered
from ..units import shorten


def saves_most(control: Control, cells: int) -> str:
    """As far as it has been worked out: `saves most: l LoRA on, ~-6.72 GiB`; empty if nobody predicts.

    Args:
        control: Who knows.
        cells: Room; the name of a GPU that is not here goes first.
    """
    found, state, predictions = control.strongest(), control.state, control.predictions
    if found is None or predictions is None or not found.of:
        return ""
    done = found.tried == found.of
    if not found.changes and not done:
        return f"working out what saves most: {found.tried} of {found.of} changes"
    if not found.changes:
        return "no single change is predicted to lower the peak"
    known = {option.name: (key if state.live else "", title) for key, title, option, _ in offered()}
    parts = [" ".join(filter(None, (*known[name], show(value)))) for name, value in found.changes.items()]
    elsewhere = not (state.environment and state.environment.on_gpu)
    so_far = "" if done else f" so far ({found.tried} of {found.of})"
    text = f"saves most{so_far}: {' with '.join(parts)}, ~-{state.unit.full(found.saved_bytes)}"
    there = f"{text} on {predictions.gpu_name}"
    return there if elsewhere and len(there) <= cells else shorten(text, cells)
