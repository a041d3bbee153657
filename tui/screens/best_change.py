"""The changes that would save most: a line or two of the live and of the techniques screen."""

from __future__ import annotations

from ...engine.config import show
from ...engine.technique import Effect
from ..changes import offered
from ..forecasts import Forecasts, Saving
from ..units import shorten


def best_change(forecasts: Forecasts, cells: int) -> list[str]:
    """The best changes found so far: `saves most: k checkpointing layers, ~-6.72 GiB`; empty if nobody predicts.

    The change that keeps the mathematics comes first. Changes that save still more follow, in a line of their own
    where there is no room in the first, and say what they do to the training.

    Args:
        forecasts: The changes and their savings.
        cells: Room in a line.
    """
    best, state, predictions = forecasts.strongest(), forecasts.state, forecasts.predictions
    if best is None or predictions is None or not best.of:
        return []
    done = best.tried == best.of
    if not best.found and not done:
        return [f"working out what saves most: {best.tried} of {best.of} changes"]
    if not best.found:
        return ["no single change is predicted to lower the peak"]
    first, *more = best.found
    head = "saves most" + f" on {predictions.gpu_name}" * (not (state.environment and state.environment.on_gpu))
    head += "" if done else f" so far ({best.tried} of {best.of})"
    head += ", as another training" * (first.effect is Effect.TRAINING)
    line = f"{head}: {_named(forecasts, first, first.effect is Effect.NUMERICS)}"
    if not more:
        return [shorten(line, cells)]
    # Of several, the one that saves most is the last.
    rest = next(
        text for n in range(len(more)) if len(text := _listed(forecasts, more[n:])) <= cells or n + 1 == len(more)
    )
    whole = f"{line}; {rest}"
    return [whole] if len(whole) <= cells else [shorten(line, cells), shorten(rest, cells)]


def _listed(forecasts: Forecasts, savings: list[Saving]) -> str:
    return "more: " + "; ".join(_named(forecasts, saving, saving.effect is not Effect.NONE) for saving in savings)


def _named(forecasts: Forecasts, saving: Saving, with_effect: bool) -> str:
    """`a accumulation 4 with b batch size 1, ~-6.00 GiB`, and what it does to the training."""
    live, unit = forecasts.state.live, forecasts.state.unit
    known = {option.name: (key if live else "", title) for key, title, option, _ in offered()}
    parts = [" ".join(filter(None, (*known[name], show(value)))) for name, value in saving.changes.items()]
    effect = f" ({saving.effect.title})" * with_effect
    return f"{' with '.join(parts)}, ~-{unit.full(saving.saved_bytes)}{effect}"
