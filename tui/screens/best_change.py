"""Which single change would save most: a line of the live and of the techniques screen."""

from __future__ import annotations

from ...engine.config import show
from ..control import Control, offered
from ..units import shorten


def best_change(control: Control, cells: int) -> str:
    """As far as it has been worked out: `saves most: l LoRA on, ~-6.72 GiB`; empty if nobody predicts.

    Args:
        control: Who knows.
        cells: Room; what saves still more and takes two settings is left out first.
    """
    best, state, predictions = control.strongest(), control.state, control.predictions
    if best is None or predictions is None or not best.of:
        return ""
    done = best.tried == best.of
    if not best.found and not done:
        return f"working out what saves most: {best.tried} of {best.of} changes"
    if not best.found:
        return "no single change is predicted to lower the peak"
    known = {option.name: (key if state.live else "", title) for key, title, option, _ in offered()}
    texts = []
    for changes, saved_bytes in best.found:
        parts = [" ".join(filter(None, (*known[name], show(value)))) for name, value in changes.items()]
        texts.append(f"{' with '.join(parts)}, ~-{state.unit.full(saved_bytes)}")
    elsewhere = not (state.environment and state.environment.on_gpu)
    head = "saves most" + f" on {predictions.gpu_name}" * elsewhere
    head += "" if done else f" so far ({best.tried} of {best.of})"
    whole = f"{head}: {'; '.join(texts)}"
    return whole if len(whole) <= cells else shorten(f"{head}: {texts[0]}", cells)
