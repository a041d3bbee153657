"""A model measured: entries as they become known, and all of them as one document."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import msgspec

from .report import Entry, Measured, ModelEnd, ModelHead, TensorReport, figures
from .scheme import Scheme
from .tensors import ModelWeights, geometry
from .totals import propose, total

SCHEMA = "gpumem-weights/1"


def entries(name: str, weights: ModelWeights, schemes: Sequence[Scheme], exact: bool) -> Iterator[Entry]:
    """Measure a model; what is yielded first says what there is to come.

    Raises:
        UserError: A tensor cannot be read, or holds NaN or an infinity.
    """
    from .lens import reports
    from .quantizable import among, quantizable_modules

    unavailable = {scheme.key: why for scheme in schemes if (why := scheme.unavailable) is not None}
    yield ModelHead(
        model=name,
        random=weights.random,
        exact=exact,
        tensors=len(weights.tensors),
        parameters=sum(geometry(tensor).numel for tensor in weights.tensors),
        vectors=weights.vectors,
        left_out=dict(weights.left_out),
        unavailable=unavailable,
    )
    names = [tensor.name for tensor in weights.tensors]
    measured = [scheme for scheme in schemes if scheme.key not in unavailable]
    modules: Future[frozenset[str] | None] = Future()
    for report in reports(
        weights.tensors, measured, exact, lambda: modules.set_result(quantizable_modules(weights.config))
    ):
        yield Measured(report=report)
    quantized = among(modules.result(), names)
    kept = () if quantized is None else tuple(name for name in names if name not in quantized)
    yield ModelEnd(architecture_known=quantized is not None, kept=kept)


def document(found: Iterable[Entry], schemes: Sequence[Scheme]) -> dict[str, Any]:
    """One document of all that was measured."""
    made: dict[str, Any] = {"schema": SCHEMA}
    reports: list[TensorReport] = []
    for entry in found:
        if isinstance(entry, Measured):
            reports.append(entry.report)
        elif isinstance(entry, ModelHead | ModelEnd):
            made |= {key: value for key, value in msgspec.to_builtins(entry).items() if key != "kind"}
    kept = set(made["kept"])
    made["total"] = total_entry([report for report in reports if report.name not in kept], schemes)
    made["tensors"] = [figures(report) | {"quantized": report.name not in kept} for report in reports]
    return made


def total_entry(reports: Sequence[TensorReport], schemes: Sequence[Scheme]) -> dict[str, Any]:
    """The tensors that are quantized, together; under the schemes a run can have, what to keep in 16 bit."""
    added = ((scheme.key, total(reports, scheme)) for scheme in schemes)
    totals = {key: found.as_entry() for key, found in added if found is not None}
    keep = {scheme.key: kept.as_entry() for scheme in schemes if scheme.setting and (kept := propose(reports, scheme))}
    return {
        "tensors": len(reports),
        "parameters": sum(report.parameters for report in reports),
        "schemes": totals,
        "keep": keep,
    }
