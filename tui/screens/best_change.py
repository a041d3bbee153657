"""The changes that would save most: a line or two of the live and of the techniques screen."""

from __future__ import annotations

from collections.abc import Sequence

from ...engine.config import show
from ...engine.technique import Effect
from ..changes import offered
from ..draw import wrap
from ..forecasts import Forecasts, Saving
from ..units import shorten

MOST_ROWS = 3
"""Rows that the reason why nothing is predicted may take."""


def best_change(forecasts: Forecasts, cells: int) -> list[str]:
    """The best changes found so far: `saves most: k checkpointing layers, ~-6.72 GiB`; empty if nobody predicts.

    Where nothing can be predicted, the reason.

    The change that keeps the mathematics comes first, and of such the one of the fewest settings: where others save
    more, it is only what to try first. These follow, in a line of their own where there is no room in the first, and
    say what they do to the training.

    Args:
        forecasts: The changes and their savings.
        cells: Room in a line.
    """
    best, state, predictions = forecasts.strongest(), forecasts.state, forecasts.predictions
    if best is None and (problem := forecasts.impossible()):
        return wrap(f"nothing is predicted: {problem}", cells)[:MOST_ROWS]
    if best is None or predictions is None or not best.of:
        return []
    done = best.tried == best.of
    if not best.found and not done:
        return [f"working out what saves most: {best.tried} of {best.of} changes"]
    if not best.found:
        return ["no single change is predicted to lower the peak"]
    first, *more = best.found
    on = f" on {predictions.gpu_name}" * (not (state.environment and state.environment.on_gpu))
    so_far = "" if done else f" so far ({best.tried} of {best.of})"
    training = ", as another training" * (first.effect is Effect.TRAINING)
    most = "try first" if more else "saves most"
    heads = [f"{most}{on}{so_far}{training}", f"{most}{so_far}{training}", f"{most}{training}"]
    names = _names(forecasts, first, first.effect is Effect.NUMERICS)
    line = _fitting([*(f"{head}: {names[0]}" for head in heads), *(f"{heads[-1]}: {name}" for name in names)], cells)
    if not more:
        return [line]
    # Of several, the one that saves most is the last.
    several = ["; ".join(_names(forecasts, one, one.effect is not Effect.NONE)[0] for one in more[n:])
               for n in range(len(more))]  # fmt: skip
    whole = f"{heads[0]}: {names[0]}; saves more: {several[0]}"
    if len(whole) <= cells:
        return [whole]
    last = _names(forecasts, more[-1], more[-1].effect is not Effect.NONE)
    return [line, _fitting([f"saves more: {text}" for text in (*several, *last)], cells)]


def _fitting(texts: Sequence[str], cells: int) -> str:
    """The first of some texts, each with fewer parts than that before, that has room whole."""
    return next((text for text in texts if len(text) <= cells), shorten(texts[-1], cells))


def _names(forecasts: Forecasts, saving: Saving, with_effect: bool) -> list[str]:
    """`k checkpointing layers, ~-6.00 GiB (other rounding)`, then with its key alone, then no effect.

    A key is named where its first press gives the value.
    """
    named, unit = forecasts.named() if forecasts.state.acts else {}, forecasts.state.unit
    titles = {option.name: (key, title) for key, title, option, _ in offered()}
    known = [
        (titles[name][0] if len(saving.changes) == 1 and named.get(name) == value else "", titles[name][1], show(value))
        for name, value in saving.changes.items()
    ]
    whole = [" ".join(filter(None, parts)) for parts in known]
    brief = [f"{key or title} {value}" for key, title, value in known]
    effect = f" ({saving.effect.title})" * with_effect
    forms = ((whole, effect), (brief, effect), (brief, ""))
    return [f"{' with '.join(parts)}, ~-{unit.full(saving.saved_bytes)}{said}" for parts, said in forms]
