"""The ranks of one job: which runs they are, and what each held at its peak."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..engine.difference import Owned, owned
from ..engine.ledger import Ledger, Peak
from ..engine.run import Run, highest_of
from ..engine.techniques import memory_key

FOLDING_S = 0.05
"""Time that one drawing gives to folding ranks that have not been folded yet."""


def of_job(run: Run, runs: Iterable[Run]) -> list[Run]:
    """The runs of a job, by rank; a run alone is its own only one.

    They have one number and configuration. Recordings of several hosts are joined by
    that; of a rank that is told of twice it is the run from where `run` is from.

    Args:
        run: One of them.
        runs: All that there are.
    """
    key = memory_key(run.config)
    found = {run.id.rank: run}
    for other in sorted(runs, key=lambda other: other.id.engine != run.id.engine):
        if (other.id.number, other.kind) == (run.id.number, run.kind) and other.id.rank not in found:
            same = other.id.engine == run.id.engine or memory_key(other.config) == key
            found |= {other.id.rank: other} if same else {}
    return [found[rank] for rank in sorted(found)]


def by_host(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """The runs of each host, in the order of its first rank; those of whose host nothing is known are of one."""
    hosts: dict[str, list[Run]] = {}
    for run in runs:
        hosts.setdefault(run.environment.host or "host", []).append(run)
    return hosts


@dataclass(frozen=True)
class RankPeak:
    """A rank at its highest peak.

    Attributes:
        run: The rank's.
        peak: Where it was, and of what.
        owners: Bytes at it by category and owner.
    """

    run: Run
    peak: Peak
    owners: Owned

    @property
    def rank(self) -> int:
        """Number of the rank."""
        return self.run.id.rank


class RankPeaks:
    """The peaks of ranks, each trace folded at most once and only if it is a rank's highest.

    Attributes:
        known: Number of peaks worked out so far: when it grows, there is more to draw.
    """

    def __init__(self) -> None:
        self.known = 0
        self._peaks: dict[Run, tuple[object, RankPeak]] = {}

    def of(self, runs: Sequence[Run], within_s: float | None = None) -> dict[int, RankPeak]:
        """The peaks by rank that are known by now, and as many more as there is time for.

        Args:
            runs: The ranks.
            within_s: Time to fold in; None: `FOLDING_S`.
        """
        until_s = time.monotonic() + (FOLDING_S if within_s is None else within_s)
        found: dict[int, RankPeak] = {}
        for run in runs:
            highest = highest_of(trace for trace in run.traces() if len(trace.events))
            if highest is None:
                continue
            before = self._peaks.get(run)
            if before is None or before[0] is not highest:
                if time.monotonic() > until_s:
                    continue
                ledger = Ledger(highest)
                before = highest, RankPeak(run, ledger.peak, owned(ledger, ledger.peak.event))
                self._peaks[run] = before
                self.known += 1
            found[run.id.rank] = before[1]
        return found
