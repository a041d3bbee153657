"""Out of memory: the run that died of it, why it did not fit, and the smallest changes that would have."""

from __future__ import annotations

from functools import partial

from ...engine.out_of_memory.report import Fix, OutOfMemoryReport
from ...engine.run import Run, RunKind
from ...engine.run_events import Saved
from ..actions import Action, calling
from ..draw import Row
from ..out_of_memory_rows import SHOWN_FIXES, ReportRows
from ..predictions import FoundFixes
from .page import Page, Table, Topic

ROOMY = 34
"""Rows from which the largest tensors and the pools are shown beside the categories."""

BARRED = 20
"""Rows from which there is room for the device's bar."""


LEAST_HELD = 5
"""Rows of what was held that stay, however long the lines are that a script is told to write."""


class OutOfMemoryPage(Page):
    """The screen that comes up when a run has run out of memory; it has no digit: 1, 2 and 3 are the fixes here."""

    title = "out of memory"
    run: Run | None = None
    """The run that it is about; None: none has run out of memory."""
    details = False
    """The largest tensors and the pools are shown, and not the categories."""

    def make_actions(self) -> tuple[Action, ...]:
        """Restart with a fix, and where to look further."""
        fixes = (
            Action(f"out-of-memory.fix-{n}", (str(n),), f"Restart with fix {n}", "restart with what would fit",
                   partial(_restart, number=n), "restart with it", acts=True)
            for n in range(1, SHOWN_FIXES + 1)
        )  # fmt: skip
        return (
            *fixes,
            Action("out-of-memory.step", ("enter",), "The step it died in", "the step it died in, event by event",
                   lambda page: page.look("step"), "step"),
            Action("out-of-memory.layers", ("l",), "The layers then", "what each layer held",
                   lambda page: page.look("layers"), "layers"),
            Action("out-of-memory.details", ("tab",), "The largest tensors, or the categories",
                   "the largest tensors and the cache by stream, or the categories", calling("toggle_details"),
                   "largest tensors"),
        )  # fmt: skip

    def topic(self) -> Topic:
        """The report."""
        return Topic(
            "out of memory",
            "What was held at the moment an allocation was refused, why it did not fit, and the smallest changes that "
            "are predicted to fit: first those that keep the training's mathematics. The run is kept in a recording; "
            "gpumem-tui why prints this again.",
        )

    @property
    def report(self) -> OutOfMemoryReport | None:
        """The report on show."""
        refused = self.run.refused if self.run is not None else None
        return refused.report if refused is not None else None

    @property
    def found(self) -> FoundFixes | None:
        """Fixes as far as they are known; None: nobody predicts."""
        run, report = self.run, self.report
        return self.forecasts.fixes(run, report) if run is not None and report is not None else None

    def look(self, page: str) -> None:
        """Go to another screen, with the run that died on it."""
        if self.run is not None:
            self.control.look_at_run(self.run)
        self.go(page)

    def toggle_details(self) -> None:
        """Show the largest tensors, or the categories."""
        self.details = not self.details

    def table(self) -> Table | None:
        """Categories at that moment, whole bytes."""
        report = self.report
        return [["bytes", "held"], *([key, str(size)] for key, size in report.by_category.items())] if report else None

    # --- drawing ----------------------------------------------------------------------

    def rows(self, width: int, height: int) -> list[Row]:
        """The report, as much of it as there is room for."""
        run, report = self.run, self.report
        if run is None or report is None:
            return [Row(), Row().add(" No run has run out of memory here.", self.palette.dim)]
        drawn = ReportRows(report, run.config, self.palette, width, self.state.units)
        top = [drawn.title(), drawn.asked()]
        if height >= BARRED:
            top.append(drawn.device())
        reason, kept = drawn.reason(most=3 if height >= BARRED else 2), self._kept_in(run, width)
        fixes = self._fixes(drawn, run, height - len(top) - len(reason) - 1 - len(kept) - LEAST_HELD)
        below = [*reason, Row(), *fixes, *kept]
        room = height - len(top) - len(below)
        middle = self._middle(drawn, room, height)
        return [*top, *middle, *[Row()] * (room - len(middle)), *below][:height]

    def _fixes(self, drawn: ReportRows, run: Run, room: int) -> list[Row]:
        """As many fixes as there is room for; for a script each with the whole line to write."""
        if run.kind is not RunKind.WATCHED:
            return drawn.fixes(self.found)
        fewer = (drawn.fixes(self.found, most, whole=True) for most in range(SHOWN_FIXES, 1, -1))
        return next((rows for rows in fewer if len(rows) <= room), drawn.fixes(self.found, 1, whole=True))

    def _middle(self, drawn: ReportRows, room: int, height: int) -> list[Row]:
        """Categories and totals; on a tall screen, or where they are wanted instead, the largest tensors and pools."""
        if self.details:
            pools = drawn.pools()
            largest = drawn.largest(max(1, min(10, room - 1 - len(pools))))
            return [*largest, *pools][:room]
        totals = drawn.totals()
        rows = [*drawn.categories(room - len(totals)), *totals]
        if height < ROOMY:
            return rows
        for part in (drawn.largest(), drawn.pools()):
            if len(rows) + 1 + len(part) <= room:
                rows += [Row(), *part]
        return rows

    def _kept_in(self, run: Run, width: int) -> list[Row]:
        """The recording that it is kept in."""
        saved = next((event for event in reversed(run.events()) if isinstance(event, Saved)), None)
        if saved is None:
            return []
        room = width - len(" kept in ") - 1
        path = saved.path if len(saved.path) <= room else f"…{saved.path[1 - room :]}"
        return [Row().add(f" kept in {path}", self.palette.dim)]


def _restart(page: OutOfMemoryPage, number: int) -> None:
    """Restart with one of the fixes on show."""
    found = page.found
    fitting: list[Fix] = found.fitting if found is not None else []
    if number > len(fitting):
        page.state.say(f"there is no change {number} that is known to fit")
    elif page.run is not None and page.control.fix(page.run, fitting[number - 1]):
        page.go("live")
