"""A finished run as one document: what `run --json` prints and `sweep` compares."""

from __future__ import annotations

import dataclasses
from typing import Any

from .config import RunConfig
from .difference import owned
from .events import Category, Environment, Kind, Milestone, Phase, StepTrace
from .ledger import Bytes, Ledger

SCHEMA = "gpumem-run/1"


class Report:
    """Folds a run's traces as they come and its milestones at the end.

    Pass `add` as the session's `on_trace`; of the traces only the one with the highest peak is kept.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None
        self._after_first_step: dict[str, Any] | None = None
        self._highest: Ledger | None = None
        self._by_phase: dict[Phase, Bytes] = {}
        self._unknown_bytes_max = self._mismatch_bytes_max = 0

    def add(self, trace: StepTrace) -> None:
        """Fold one trace; partial ones say nothing final."""
        if trace.partial:
            return
        ledger = Ledger(trace)
        self._unknown_bytes_max = max(self._unknown_bytes_max, int(ledger.curve[Category.UNKNOWN].max()))
        self._mismatch_bytes_max = max(self._mismatch_bytes_max, ledger.mismatch_bytes)
        if trace.step == 0:
            self._loaded = composition(ledger.end)
        after_step = ledger.after(Phase.OPTIMIZER)
        if trace.step == 1 and after_step is not None:
            self._after_first_step = composition(after_step)
        for phase, sizes in ledger.fullest_by_phase.items():
            if phase not in self._by_phase or sum(sizes.values()) > sum(self._by_phase[phase].values()):
                self._by_phase[phase] = sizes
        if self._highest is None or ledger.peak.bytes > self._highest.peak.bytes:
            self._highest = ledger

    def memory(self) -> dict[str, Any]:
        """The parts of the document that say what held how much, and when; None for what was not traced."""
        return {
            "loaded": self._loaded,
            "after_first_step": self._after_first_step,
            "peak": None if self._highest is None else peak_of(self._highest),
            "highest_by_phase": {phase.name.lower(): sum(sizes.values()) for phase, sizes in self._by_phase.items()},
            "saved_by_layer": None if self._highest is None else self._highest.saved_by_layer,
        }

    def by_phase(self) -> dict[str, dict[str, int]]:
        """Composition at the highest moment of each phase over all steps, by the phases' and categories' keys."""
        return {
            phase.name.lower(): {category.key: size for category, size in sizes.items()}
            for phase, sizes in self._by_phase.items()
        }

    def document(self, environment: Environment, config: RunConfig, milestones: list[Milestone]) -> dict[str, Any]:
        """The whole run. Sizes are whole bytes; what never came to be is None.

        Args:
            environment: Where it ran.
            config: What ran.
            milestones: Of this run only.
        """
        found = {m.kind: m.data for m in milestones}
        loaded, ended = found.get(Kind.LOADED, {}), found.get(Kind.RUN_ENDED, {})
        failure = next((m.text for m in milestones if m.kind in (Kind.RUN_FAILED, Kind.OUT_OF_MEMORY)), None)
        return {
            "schema": SCHEMA,
            "environment": dataclasses.asdict(environment),
            "config": config.as_dict(),
            "parameters": loaded.get("parameters"),
            "trainable_parameters": loaded.get("trainable_parameters"),
            **self.memory(),
            "steps": [{key: m.data[key] for key in STEP_KEYS} for m in milestones if m.kind is Kind.STEP_ENDED],
            "recomputes": [dict(m.data) for m in milestones if m.kind is Kind.RECOMPUTED],
            "managed_bytes": ended.get("managed_bytes"),
            "workspace_bytes": ended.get("workspace_bytes"),
            "unknown_bytes_max": self._unknown_bytes_max,
            "mismatch_bytes_max": self._mismatch_bytes_max,
            "leaked_bytes": ended.get("leaked_bytes"),
            "failure": failure,
        }


STEP_KEYS = ("step", "seconds", "loss", "tokens", "allocated_bytes", "peak_bytes", "reserved_bytes")


def peak_of(ledger: Ledger) -> dict[str, Any]:
    """A step's peak: what held how much at it, by category, layer and owner, and the largest blocks."""
    peak = ledger.peak
    by_layer = ledger.by_layer(peak.event)
    return composition(peak.by_category) | {
        "step": peak.step,
        "phase": peak.phase.title,
        "micro_batch": peak.micro_batch,
        "module": peak.module,
        "by_layer": {name: {c.key: n for c, n in sizes.items()} for name, sizes in by_layer.items()},
        "by_owner": {c.key: kinds for c, kinds in owned(ledger, peak.event).items()},
        "largest": [
            {
                "bytes": b.bytes,
                "category": b.category.key,
                "owner": b.name,
                "dtype": b.dtype,
                "shape": list(b.shape),
                "made_in": b.phase.title,
                "made_by": b.module,
                "operator": b.operator,
            }
            for b in ledger.largest(peak.event)
        ],
    }


def composition(sizes: Bytes) -> dict[str, Any]:
    """A composition with its sum; categories of 0 bytes are listed too."""
    return {
        "allocated_bytes": sum(sizes.values()),
        "by_category": {category.key: size for category, size in sizes.items()},
    }
