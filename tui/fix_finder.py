"""Fixes for a run that ran out of memory, searched on a thread by a process that predicts."""

from __future__ import annotations

import threading
from dataclasses import replace

from ..engine.config import UserError
from ..engine.out_of_memory.fixes import FixSearch
from ..engine.out_of_memory.report import OutOfMemoryReport
from ..engine.prediction.predictor import PredictingProcess
from ..engine.run import Run
from .predictions import FoundFixes


class FixFinder:
    """A search under way; a daemon thread, so that it holds up nobody's end.

    Args:
        run: That ran out of memory.
        report: Of that moment.

    Attributes:
        found: Anybody may read it at any time.
    """

    def __init__(self, run: Run, report: OutOfMemoryReport) -> None:
        self.run, self.report, self.found = run, report, FoundFixes()
        self._process = PredictingProcess()
        self._thread = threading.Thread(target=self._find, name="fixes", daemon=True)
        self._thread.start()

    def _find(self) -> None:
        search = FixSearch(self.run, self.report, self._process.known_or_predicted)
        try:
            for fix in search:
                self.found = replace(self.found, fixes=(*self.found.fixes, fix))
        except UserError as error:
            self.found = replace(self.found, problem=str(error))
        finally:
            self._process.close()
            self.found = replace(self.found, over=True, unfit_by_bytes=search.unfit_by_bytes)

    def close(self) -> None:
        """End the search."""
        self._process.kill()
        self._thread.join()


def found_at_once(search: FixSearch) -> FoundFixes:
    """All that a search finds, however long that takes."""
    try:
        fixes = tuple(search)
    except UserError as error:
        return FoundFixes(over=True, problem=str(error))
    return FoundFixes(fixes, True, search.unfit_by_bytes)
