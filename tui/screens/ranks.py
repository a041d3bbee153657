"""Ranks: the processes of a job on one axis, the highest and the lowest, and why they differ."""

from __future__ import annotations

from collections.abc import Sequence

from ...engine.categories import Category
from ...engine.difference import difference
from ...engine.ledger import Bytes
from ...engine.run import Run
from ..actions import Action, moves
from ..draw import Row, paragraph, whole_clauses
from ..job_ranks import RankPeak, RankPeaks, by_host
from ..units import UNKNOWN, Unit, shorten, tail, unit_for
from ..widgets.bars import Part, stacked
from .page import Page, Table, Topic

NAME, FIGURE, NARROW = 17, 11, 10
LABEL, HOST, BAR_FIGURE = 10, 14, 10
"""Cells before a rank's bar, of the name of its host, and of the figure behind it."""

ALL_FROM = 74
"""Columns from which the sum over all ranks has room."""

NOTES = 3
LEAST_BARS, LEAST_CATEGORIES = 5, 4
NAMED = 3
"""Owners named in the sentence that says why ranks differ."""


class RanksPage(Page):
    """The ranks of a job."""

    place = 8
    title = "ranks"
    selected: int | None = None
    """The rank selected; None: the one on the screens."""
    hosts = False
    """True if there is a bar for each host, and not for each rank."""

    def make_actions(self) -> tuple[Action, ...]:
        """Select a rank, look at it."""
        self._peaks = RankPeaks()
        return (
            *moves("select a rank"),
            Action("ranks.look", ("enter",), "Look at this rank", "have the rank selected on all screens",
                   lambda page: page.look(), "look at it"),
            Action("ranks.hosts", ("tab",), "Ranks by host", "a bar for each host, of its highest rank, or for each "
                   "rank", lambda page: page.turn_to_hosts(), "by host"),
        )  # fmt: skip

    def topic(self) -> Topic:
        """The explanation of the screen."""
        return Topic(
            "ranks",
            "Each bar is a rank at its own highest peak, all on one axis; by host, a host's highest rank. The table "
            "sets the rank selected beside the highest and the lowest; what one GPU would need is predicted, and "
            "marked ~. Ranks differ where rows do not divide evenly, and where batches or buckets do.",
        )

    def runs(self) -> list[Run]:
        """The ranks of the job that is on the screens, by rank."""
        return self.state.job

    @property
    def in_footer(self) -> bool:
        """True if there is a job to show."""
        return len(self.runs()) > 1

    def move(self, by: int) -> None:
        """Select another rank."""
        ranks = list(self._named(self._peaks.of(self.runs())))
        if ranks:
            at = ranks.index(self._at(ranks)) + by
            self.selected = ranks[max(0, min(at, len(ranks) - 1))]

    def look(self) -> None:
        """Have the rank selected on all screens."""
        runs = {run.id.rank: run for run in self.runs()}
        if runs:
            self.control.look_at_run(runs[self._at(list(self._named(self._peaks.of(self.runs()))))])

    def turn_to_hosts(self) -> None:
        """Show a bar for each host, or for each rank again."""
        self.hosts = not self.hosts

    def turned(self) -> None:
        """Select what is looked at."""
        self.selected = None

    def progress(self) -> object:
        """The number of ranks folded so far."""
        return self._peaks.known

    def table(self) -> Table | None:
        """Categories by rank, in bytes."""
        peaks = self._peaks.of(self.runs(), float("inf"))
        heads = ["bytes", *(f"rank {rank}" for rank in peaks)]
        return [heads, *([c.key, *(str(one.peak.by_category[c]) for one in peaks.values())] for c in Category)]

    def _named(self, peaks: dict[int, RankPeak]) -> dict[int, str]:
        """The ranks that have a bar, and what stands before it: all of them, or the highest of each host."""
        runs = self.runs()
        if not self.hosts:
            return {run.id.rank: f"rank {run.id.rank}" for run in runs}
        ranks = {host: [run.id.rank for run in there] for host, there in by_host(runs).items()}
        highest = {host: max(there, key=lambda rank: _bytes_of(peaks, rank)) for host, there in ranks.items()}
        return {rank: f"{shorten(host, HOST):<{HOST}} rank {rank}" for host, rank in highest.items()}

    def _at(self, ranks: Sequence[int]) -> int:
        shown = self.state.shown
        looked_at = shown.id.rank if shown is not None else 0
        wanted = looked_at if self.selected is None else self.selected
        return wanted if wanted in ranks else ranks[0]

    # --- drawing ----------------------------------------------------------------

    def rows(self, width: int, height: int) -> list[Row]:
        """A title, a bar a rank, categories beside each other, and why ranks differ."""
        return self.drawn(width, height, self._peaks.of(self.runs()))

    def whole(self, width: int) -> list[Row]:
        """Every rank, however long that takes, for a printed page; nothing for a run alone."""
        runs = self.runs()
        return self.drawn(width, len(runs) + len(Category) + 8, self._peaks.of(runs, float("inf"))) if runs[1:] else []

    def drawn(self, width: int, height: int, peaks: dict[int, RankPeak]) -> list[Row]:
        """The screen, from the peaks that are known."""
        runs = self.runs()
        if len(runs) < 2 or not peaks:
            return self._alone(len(runs), width)
        highest, lowest = (pick(peaks.values(), key=lambda one: one.peak.bytes) for pick in (max, min))
        named = self._named(peaks)
        ranks = list(named)
        here = peaks.get(self._at(ranks), highest)
        unit = unit_for(highest.peak.bytes, self.state.units)
        spare = height - 1 - NOTES - 3 - LEAST_CATEGORIES
        room = max(LEAST_BARS, min(len(ranks), spare))
        rows = [self._title(runs, peaks, highest, lowest, unit, width)]
        rows += self._bars(named, peaks, (highest.rank, lowest.rank, here.rank), room, unit, width)
        rows += self._categories(here, highest, lowest, peaks, height - len(rows) - NOTES, unit, width)
        return [*rows, *self._notes(here, highest, lowest, unit, width)]

    def _alone(self, count: int, width: int) -> list[Row]:
        text = "The peaks of the ranks will show here."
        if count < 2:
            text = "This run is of one rank. Set parallel to train on several GPUs, or open the recordings of a job."
        return [Row().add(" ranks", self.palette.bold), *paragraph(text, width, self.palette.dim)]

    def _title(
        self,
        runs: Sequence[Run],
        peaks: dict[int, RankPeak],
        highest: RankPeak,
        lowest: RankPeak,
        unit: Unit,
        width: int,
    ) -> Row:
        hosts = len(by_host(runs))
        row = Row().add(f" {len(runs)} ranks{f', {hosts} hosts' if hosts > 1 else ''}", self.palette.bold)
        missing = len(runs) - len(peaks)
        same = highest.peak.bytes == lowest.peak.bytes
        sizes = f"all {unit.full(highest.peak.bytes)}" if same else (
            f"highest rank {highest.rank} {unit.show(highest.peak.bytes)}, "
            f"lowest rank {lowest.rank} {unit.full(lowest.peak.bytes)}"
        )  # fmt: skip
        sizes += f", {missing} to come" * bool(missing)
        room = width - row.width - 3
        texts = (f"at the peak: {sizes}", sizes, sizes.replace("rank ", ""))
        text = next((text for text in texts if len(text) <= room), shorten(texts[-1], room))
        return row.add(f"  {text}", self.palette.dim)

    def _bars(
        self,
        named: dict[int, str],
        peaks: dict[int, RankPeak],
        wanted: Sequence[int],
        room: int,
        unit: Unit,
        width: int,
    ) -> list[Row]:
        """A bar a rank on one axis; of more than there is room for those wanted and the first, and how many between."""
        scale = max(one.peak.bytes for one in peaks.values())
        ranks = list(named)
        chosen = _chosen(ranks, [rank for rank in wanted if rank in named], room)
        rows: list[Row] = []
        last = -1
        for rank in chosen:
            place = ranks.index(rank)
            rows += self._between(ranks[last + 1 : place], peaks, unit)
            rows.append(self._bar(rank, named[rank], peaks.get(rank), scale, rank == wanted[-1], unit, width))
            last = place
        return rows + self._between(ranks[last + 1 :], peaks, unit)

    def _between(self, left_out: Sequence[int], peaks: dict[int, RankPeak], unit: Unit) -> list[Row]:
        if not left_out:
            return []
        sizes = [peaks[rank].peak.bytes for rank in left_out if rank in peaks]
        text = f"{len(left_out)} between" if len(left_out) > 1 else f"rank {left_out[0]}"
        if sizes:
            low, high = unit.show(min(sizes)), unit.show(max(sizes))
            text += f", {low}" if low == high else f", {low} to {high}"
        return [Row().to(LABEL).add(f"… {text}", self.palette.dim)]

    def _bar(
        self, rank: int, name: str, one: RankPeak | None, scale: int, selected: bool, unit: Unit, width: int
    ) -> Row:
        palette, shown = self.palette, self.state.shown
        looked_at = shown is not None and shown.id.rank == rank
        mark = (">" if palette.ascii else "▸") if selected else " "
        row = Row().add(mark, palette.accent)
        label = LABEL + (HOST + 1) * self.hosts
        row.add(name, palette.bold if looked_at else palette.plain).to(label)
        if one is None:
            return row.add(UNKNOWN, palette.dim)
        parts = [Part(c.info.letter, n, palette.paint[c]) for c, n in one.peak.by_category.items() if n > 0]
        row.extend(stacked(parts, scale, width - label - BAR_FIGURE - 1, palette))
        return row.right(unit.show(one.peak.bytes), width - 1)

    def _categories(
        self,
        here: RankPeak,
        highest: RankPeak,
        lowest: RankPeak,
        peaks: dict[int, RankPeak],
        height: int,
        unit: Unit,
        width: int,
    ) -> list[Row]:
        alone = self._on_one_gpu()
        every = {c: sum(one.peak.by_category[c] for one in peaks.values()) for c in Category}
        one_gpu = None if alone is None else {c: alone.get(c.key, 0) for c in Category}
        columns: list[tuple[str, Bytes | None]] = [
            (f"rank {here.rank}", here.peak.by_category),
            ("highest", highest.peak.by_category),
            ("lowest", lowest.peak.by_category),
            ("all ranks", every),
            ("one GPU", one_gpu),
        ]
        columns = [column for column in columns if column[0] != "all ranks" or width >= ALL_FROM]
        cells = FIGURE if width >= ALL_FROM else NARROW
        head = Row().add(f" {unit.name}", self.palette.dim)
        for n, (title, _) in enumerate(columns, 1):
            head.right(title, NAME + n * cells, self.palette.dim)
        every_column = [sizes for _, sizes in columns]
        shown, others = _rows_of_categories(every_column, highest.peak.by_category, max(0, height - 2), unit)
        rows = [head]
        for category in shown:
            name = f"{category.info.letter} {category.info.title}"
            rows.append(self._figures(name, [sizes and sizes[category] for sizes in every_column], unit, cells))
        if others:
            together = [sizes and sum(sizes[c] for c in others) for sizes in every_column]
            rows.append(self._figures("  others", together, unit, cells))
        allocated = [sizes and sum(sizes.values()) for sizes in every_column]
        return [*rows, self._figures("  allocated", allocated, unit, cells)]

    def _figures(self, name: str, sizes: Sequence[int | Bytes | None], unit: Unit, cells: int) -> Row:
        row = Row().add(f" {name}")
        for n, size in enumerate(sizes, 1):
            text = unit.show(size) if isinstance(size, int) else UNKNOWN
            predicted = n == len(sizes) or self.state.run.predicted
            row.right(f"~{text}" if predicted and text != UNKNOWN else text, NAME + n * cells)
        return row

    def _on_one_gpu(self) -> dict[str, int] | None:
        """Bytes by category that the same would take on one GPU, if that is known by now."""
        shown, predictions = self.state.shown, self.forecasts.predictions
        if shown is None or predictions is None or "parallel" not in shown.config.options:
            return None
        found = predictions.of(shown.config.with_({"parallel": "none"}), hurry=False)
        return found.by_category if found is not None else None

    def _notes(self, here: RankPeak, highest: RankPeak, lowest: RankPeak, unit: Unit, width: int) -> list[Row]:
        peak = here.peak
        where = f"step {peak.step}, {peak.phase.title}" if peak.step else "loading"
        module = f", {tail(peak.module, 40)}" if peak.module else ""
        text = f"The peak of rank {here.rank} is in {where}{module}. {_why(highest, lowest, unit)}"
        lines = whole_clauses(text, width - 2, NOTES)
        return [Row().add(f" {line}") for line in lines]


def _rows_of_categories(
    columns: Sequence[Bytes | None], sizes: Bytes, room: int, unit: Unit
) -> tuple[list[Category], list[Category]]:
    """The categories that have a row of their own, and those that share one.

    Args:
        columns: Bytes by category; None: not known.
        sizes: Bytes by which the largest are kept where there is not room for all.
        room: Rows.
        unit: In which nothing must be seen of what is left out.
    """

    def seen(categories: Sequence[Category]) -> bool:
        totals = (sum(column[c] for c in categories) for column in columns if column)
        return any(float(unit.show(total)) for total in totals)

    own = [c for c in Category if seen([c])]
    if len(own) > room:
        largest = sorted(own, key=lambda c: -sizes[c])[: max(0, room - 1)]
        own = [c for c in Category if c in largest]
    rest = [c for c in Category if c not in own]
    return own, rest if len(own) < room and seen(rest) else []


def _bytes_of(peaks: dict[int, RankPeak], rank: int) -> int:
    """The peak of a rank; less than any if it is to come."""
    return peaks[rank].peak.bytes if rank in peaks else -1


def _why(highest: RankPeak, lowest: RankPeak, unit: Unit) -> str:
    """Bytes that the highest rank holds beyond the lowest, in a sentence."""
    beyond = highest.peak.bytes - lowest.peak.bytes
    if not beyond:
        return "All ranks hold the same there."
    parts = difference(lowest.owners, highest.owners, NAMED)
    parts = sorted((part for part in parts if part.difference_bytes), key=lambda part: -abs(part.difference_bytes))
    fine = unit_for(beyond * 4)
    named = [f"{part.category.info.title} {part.difference_bytes / fine.bytes:+.{fine.decimals}f}" for part in parts]
    elsewhere = (highest.peak.phase, highest.peak.module) != (lowest.peak.phase, lowest.peak.module)
    other = f" The peak of rank {lowest.rank} is elsewhere, in {lowest.peak.phase.title}." if elsewhere else ""
    listed = ", ".join(named[:NAMED])
    return f"Rank {highest.rank} holds {fine.full(beyond)} more than rank {lowest.rank}: {listed} {fine.name}.{other}"


def _chosen(ranks: Sequence[int], wanted: Sequence[int], room: int) -> list[int]:
    """The ranks that have a row, at most `room` rows with those that say how many are left out."""
    if len(ranks) <= room:
        return list(ranks)
    chosen = set(wanted)
    for rank in ranks:
        if _lines(ranks, chosen | {rank}) <= room:
            chosen.add(rank)
    return [rank for rank in ranks if rank in chosen]


def _lines(ranks: Sequence[int], chosen: set[int]) -> int:
    gaps = sum(rank not in chosen and (place == 0 or ranks[place - 1] in chosen) for place, rank in enumerate(ranks))
    return len(chosen) + gaps
