"""The addition of `run --predict`: the run as it was predicted, and the difference from it."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Any

from ...engine.categories import Category
from ...engine.config import RunConfig, UserError
from ...engine.difference import compare
from ...engine.events import Environment
from ...engine.prediction.gpus import Understood, gpu_of, understand
from ...engine.prediction.predictor import Predictor
from ..layer_table import NO_LAYER
from ..units import GIB, MIB, Unit, tail

ON_A_CPU = (
    "This ran on a CPU and predictions are of GPUs: not compared. --predict GPU compares with what that GPU would hold."
)
NAME, FIGURE = 36, 18
TIMEOUT_S = 600.0
"""A prediction takes seconds; what takes this long will not come."""


def check(name: str, config: RunConfig) -> None:
    """Refuse before the run what could not be predicted after it.

    Raises:
        UserError: No such GPU, or a run too short to be compared.
    """
    if config.steps < 2:
        raise UserError("--predict: a run is compared from its second step on; give it --steps 2 or more")
    if name and (said := _named(name).said):
        sys.stderr.write(f"--predict {said}\n")


def predicted(document: dict[str, Any], config: RunConfig, environment: Environment, name: str = "") -> dict[str, Any]:
    """The entries that are added to a run's document.

    Args:
        document: Of the run.
        config: What ran.
        environment: Where.
        name: Of the GPU to predict for; empty: the one it ran on.

    Returns:
        `predicted` and `difference`; both None where there is nothing to
        compare with, and then `not_compared` says why.
    """
    nothing: dict[str, Any] = {"predicted": None, "difference": None}
    if not name and not environment.on_gpu:
        return nothing | {"not_compared": ON_A_CPU}
    card = _named(name).gpu if name else gpu_of(environment)
    with closing(Predictor(card)) as predictor:
        predictor.want([config])
        predictor.wait(TIMEOUT_S)
        answer = predictor.get(config)
    if answer is None or isinstance(answer, UserError):
        return nothing | {"not_compared": str(answer or "the prediction took too long")}
    told = answer.as_document()
    return {"predicted": told, "difference": compare(told, document), "not_compared": None}


def table(document: dict[str, Any]) -> str:
    """The difference for people: by category, and under each its terms in whole bytes."""
    if document["predicted"] is None:
        return str(document["not_compared"])
    difference, peak = document["difference"], document["peak"]["allocated_bytes"]
    unit = Unit("GiB", GIB, 3) if peak >= GIB else Unit("MiB", MIB, 3)
    heads = ("~predicted", "measured", "difference, bytes")
    lines = [f"{unit.name + ' at the peak':<{NAME}}" + "".join(f"{head:>{FIGURE}}" for head in heads)]
    for category in Category:
        part = difference["by_category"].get(category.key)
        if part is not None:
            name = f"{category.info.letter} {category.info.title}"
            lines.append(_line(name, part["predicted_bytes"], part["measured_bytes"], unit))
            for term in part["terms"]:
                owner = f"{term['owners']} others" if term["owners"] > 1 else term["name"] or NO_LAYER
                lines.append(
                    f"    {tail(owner, NAME + 2 * FIGURE - 5):<{NAME + 2 * FIGURE - 4}}{term['bytes']:>+{FIGURE},}"
                )
    places = difference["predicted_peak"], difference["measured_peak"]
    lines.append(_line("allocated", places[0]["allocated_bytes"], places[1]["allocated_bytes"], unit))
    lines += ["", f"Predicted for {document['predicted']['gpu']}: the peak is {_place(places[0])}; "
                  f"measured on {document['environment']['device_name']}: {_place(places[1])}."]  # fmt: skip
    return "\n".join(lines)


def _line(name: str, before: int, after: int, unit: Unit) -> str:
    signed = f"{after - before:+,}" if after != before else "0"
    return f"{name:<{NAME}}{'~' + unit.show(before):>{FIGURE}}{unit.show(after):>{FIGURE}}{signed:>{FIGURE}}"


def _place(place: dict[str, Any]) -> str:
    where = f"in step {place['step']}, {place['phase']}" if place["step"] else "while loading"
    return where + (f" of {place['module']}" if place["module"] else "")


def _named(name: str) -> Understood:
    try:
        return understand(name)
    except UserError as error:
        raise UserError(str(error).replace("--gpu", "--predict", 1)) from None
