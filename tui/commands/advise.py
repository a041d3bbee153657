"""`gpumem-tui advise`: which techniques save most at the peak, and what they cost."""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack
from itertools import groupby
from typing import Any

from ...engine.prediction.advice import Advice, Advised, stages
from ...engine.prediction.fewest_gpus import COUNTS, Fewest, fewest_gpus
from ...engine.prediction.known import predicted
from ...engine.prediction.outcome import Prediction
from ...engine.prediction.prediction_text import heading
from ...engine.prediction.several import several
from ..units import GIB, Unit
from .common import add_run_flags, end_progress, refuse_unwritable, telling, write_document
from .estimate import add_gpu_flag, config_and_gpu
from .wrapping import columns, within

GIB_3 = Unit("GiB", GIB, 3)
SHOWN = 8
"""Lines of each list; the document has all of them."""


def add(parser: argparse.ArgumentParser) -> None:
    """Flags of this command."""
    add_run_flags(parser)
    add_gpu_flag(parser)
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON; - for standard output")
    parser.set_defaults(command=main)


def main(flags: argparse.Namespace) -> int:
    """Predict every change; 0 also if nothing fits."""
    config, card = config_and_gpu(flags)
    refuse_unwritable("json", flags.json)
    predict = telling(predicted, card)

    def say(text: str) -> None:
        end_progress()
        if flags.json != "-":
            sys.stdout.write(text)
            sys.stdout.flush()  # each answer as soon as it is known

    with several(card, predict) as predictions:
        known = stages(config, predictions.work)
        say(_now(next(known)))
        say(_lines(_table("one change", next(known).alone)))
        advised = next(known)
    say(_lines(_together(advised)))
    fewest = fewest_gpus(config, predict)
    say(_gpus(fewest))
    with ExitStack() as results:  # what cannot be written takes nothing away from what can be printed
        if flags.json:
            document = {
                "schema": "gpumem-advice/1",
                "predicted": True,
                "gpu": card.name,
                "config": config.as_dict(),
                "now": _figures(advised.now),
                "single": [_entry(advice) for advice in advised.alone],
                "combinations": [_entry(advice) for advice in advised.combined],
                "fewest_gpus": None
                if fewest is None
                else {"gpus": fewest.gpus, "changes": fewest.changes, **_figures(fewest.prediction)},
            }
            results.callback(write_document, document, flags.json)
    return 0


def _figures(prediction: Prediction) -> dict[str, Any]:
    return {
        "peak_bytes": prediction.peak_bytes,
        "safe_bound_bytes": prediction.safe_bound_bytes,
        "reserved_bytes": prediction.reserved_bytes,
        "fits": prediction.fits,
        "margin_bytes": prediction.margin_bytes,
    }


def _entry(advice: Advice) -> dict[str, Any]:
    return {
        "changes": advice.changes,
        "saved_bytes": advice.saved_bytes,
        "effect": advice.effect.title,
        "costs": advice.costs,
        **_figures(advice.prediction),
    }


def _now(advised: Advised) -> str:
    now = advised.now
    fits = "fits" if now.fits else "does not fit"
    return f"{heading(now)}: peak {GIB_3.full(now.peak_bytes)}, {fits}\n"


def _lines(lines: list[str]) -> str:
    """A part of the answer; nothing of none."""
    return "".join(f"{line}\n" for line in ["", *lines]) if lines else ""


def _together(advised: Advised) -> list[str]:
    combined = advised.combined
    fits = [advice for advice in combined if advice.prediction.fits]
    if fits:
        return _table("together, what fits", fits)
    if combined:
        return _table("together; nothing that was tried fits", combined)
    if not advised.now.fits and not any(advice.prediction.fits for advice in advised.alone):
        return ["No combination that was tried fits."]
    return []


def _gpus(fewest: Fewest | None) -> str:
    """The fewest GPUs, and the way to use them."""
    if fewest is None:
        return f"\nOn {COUNTS[-1]} GPUs it does not fit either, at this batch size a GPU.\n"
    peak = GIB_3.full(fewest.prediction.peak_bytes)
    return f"\nFewest GPUs on which it fits: {fewest.words}; peak {peak} on the one that holds most.\n"


def _table(title: str, listed: list[Advice]) -> list[str]:
    """Figures and the change, and below it what it costs, within the terminal's width; by what is computed."""
    if not listed:
        return [f"{title}: nothing saves anything"]
    width = columns()
    lines = [f"{'saves GiB':>10}{'peak GiB':>10}  fits  {title}"]
    for effect, some in groupby(listed[:SHOWN], lambda advice: advice.effect):
        lines.append(f"{effect.title}:")
        for a in some:
            fits = "yes" if a.prediction.fits else "no"
            figures = f"{GIB_3.show(a.saved_bytes):>10}{GIB_3.show(a.prediction.peak_bytes):>10}  {fits:<6}"
            lines += within(width, a.text, figures, " " * len(figures))
            lines += within(width, f"costs: {a.costs}", " " * 4, " " * 4)
    return lines
