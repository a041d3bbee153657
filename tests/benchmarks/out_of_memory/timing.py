"""Seconds from a refusal to its report."""

from __future__ import annotations

import time
from typing import Any
from unittest import mock

from gpumem_tui.engine.out_of_memory.refusal import Refused
from gpumem_tui.engine.publisher import RunPublisher
from gpumem_tui.engine.tracing.refusal_log import RefusalLog

_clock = {"refused": 0.0, "told": 0.0}


def measure() -> None:
    """Have every refusal and every report note its time from now on."""
    refused, told = RefusalLog._refused, RunPublisher.out_of_memory

    def note_refused(self: RefusalLog, of: Refused) -> None:
        _clock["refused"] = time.monotonic()
        refused(self, of)

    def note_told(self: RunPublisher, *arguments: Any) -> None:
        told(self, *arguments)
        _clock["told"] = time.monotonic()

    mock.patch.object(RefusalLog, "_refused", note_refused).start()
    mock.patch.object(RunPublisher, "out_of_memory", note_told).start()


def report_s() -> float:
    """Of the last."""
    return _clock["told"] - _clock["refused"]
