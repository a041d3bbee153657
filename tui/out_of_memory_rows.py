"""The report of an allocation that was refused, as rows: on a screen of the app, and what `gpumem-tui why` prints."""

from __future__ import annotations

from functools import cached_property

from ..engine import techniques
from ..engine.categories import CATEGORIES, Category, CategoryInfo
from ..engine.config import RunConfig
from ..engine.out_of_memory.fixes import OF_A_GPU, settings_text
from ..engine.out_of_memory.report import Fix, OutOfMemoryReport, Verdict
from .draw import Row, wrap
from .palette import Palette
from .predictions import FoundFixes
from .units import UNKNOWN, Unit, shorten, tail, unit_for
from .widgets.bars import Part, bar, stacked

SHOWN_FIXES = 3
"""Fixes that a key takes."""

NAME_WIDTH, FIGURE_WIDTH = 17, 9
SET_WIDTH, PEAK_WIDTH = 34, 9
COSTS_FROM = 76
"""Columns from which it is said what a fix costs."""

BENEATH = "     "
"""Before what goes on beneath a fix."""

OF_KEY = {category.key: category for category in Category}

SAVED_BY_NONE = "nothing that is set: whatever is gained, what grows will take"


class ReportRows:
    """The parts of a report, each drawn for a width.

    Args:
        report: Of the moment.
        config: Of the run.
        palette: Colours.
        width: Of the terminal.
        units: The setting: GiB or GB.
    """

    def __init__(
        self, report: OutOfMemoryReport, config: RunConfig, palette: Palette, width: int, units: str = "GiB"
    ) -> None:
        self.report, self.config, self.palette, self.width, self.units = report, config, palette, width, units

    @cached_property
    def unit(self) -> Unit:
        """The unit of all its figures."""
        return unit_for(max(self.report.allocated_bytes, self.report.room_bytes), self.units)

    def _size(self, size: int) -> str:
        """A size that may be far smaller than the others, in a unit of its own."""
        return (
            "0" if not size else (self.unit if size >= self.unit.bytes / 8 else unit_for(size, self.units)).full(size)
        )

    # --- where and what -----------------------------------------------------------------

    def title(self) -> Row:
        """Step, phase, micro-batch, module, rank: `step 2, backward 1/4  layers.3.mlp`."""
        report, palette = self.report, self.palette
        row = (
            Row()
            .add(" OUT OF MEMORY", palette.bad)
            .add(f"  {'step ' + str(report.step) if report.step else 'loading'}")
        )
        parts = self.config.integer("accumulation")
        if report.step and report.phase:
            row.add(f", {report.phase}").add(f" {report.micro_batch + 1}/{parts}" * (parts > 1))
        rank = f"rank {report.rank}" if report.rank else ""
        row.add("  ").add(tail(report.module, self.width - row.width - len(rank) - 3), palette.bold)
        return row.right(rank, self.width - 1, palette.dim) if rank else row

    def asked(self) -> Row:
        """The allocation that was refused, and what was free."""
        report, palette = self.report, self.palette
        shape = str(list(report.shape)) if report.shape or report.dtype else ""
        made = " ".join(filter(None, (report.operator, shape, report.dtype)))
        row = Row().add(" asked for ").add(self._size(report.asked_bytes), palette.bold)
        free = f"; free {self._size(report.free_bytes)}"
        return row.add(shorten(f" ({made})", self.width - row.width - len(free) - 1) if made else "").add(free)

    def device(self) -> Row:
        """The device from 0 to its capacity: categories, what is cached, what lies outside torch, what was asked."""
        report, palette = self.report, self.palette
        parts = [Part(info.letter, size, palette.paint[c]) for c, info, size in self._held]
        outside = (("c", report.cached_bytes), ("x", report.context_bytes), ("o", report.others_bytes))
        parts += [Part(letter, size, palette.device[letter]) for letter, size in outside if size]
        return Row().add(" ").extend(stacked(parts, report.total_bytes, self.width - 2, palette))

    # --- what was held ------------------------------------------------------------------

    @property
    def _held(self) -> list[tuple[Category, CategoryInfo, int]]:
        known = ((OF_KEY[key], size) for key, size in self.report.by_category.items() if key in OF_KEY and size)
        return [(category, CATEGORIES[category], size) for category, size in sorted(known)]

    def categories(self, room: int) -> list[Row]:
        """A heading, and a row for each category that held anything; the smallest share one if there is no room."""
        by_size = sorted(self._held, key=lambda one: -one[2])
        shown = [one for one in by_size if float(self.unit.show(one[2]))]
        share_a_row = len(shown) > max(1, room - 1) or len(by_size) - len(shown) > 1
        shown = shown[: max(1, room - 2)] if share_a_row else by_size
        held, rest = ([one for one in self._held if (one in shown) is wanted] for wanted in (True, False))
        scale = max((size for _, _, size in held), default=0)
        rows = [Row().to(3).add(self.unit.name, self.palette.dim).to(NAME_WIDTH).add("  held then", self.palette.bold)]
        for category, info, size in held:
            row = Row().add(" ").add(info.letter, self.palette.paint[category]).add(f" {info.title}")
            style = self.palette.bad if category is Category.UNKNOWN else self.palette.plain
            row.right(self.unit.show(size), NAME_WIDTH + FIGURE_WIDTH, style).add(" ")
            room_for_bar = self.width - row.width - 1
            rows.append(row.extend(bar(size, scale, room_for_bar, self.palette.ink[category], self.palette)))
        if rest:
            row = Row().to(3).add("others").right(self.unit.show(sum(s for *_, s in rest)), NAME_WIDTH + FIGURE_WIDTH)
            words = "  ".join(f"{info.letter} {self.unit.show(size)}" for _, info, size in rest)
            rows.append(row.add(" ").add(shorten(words, self.width - row.width - 1), self.palette.dim))
        return rows

    def totals(self) -> list[Row]:
        """Allocated, cached and its largest piece; what lies outside of torch."""
        report, palette, show = self.report, self.palette, self.unit.show
        end = NAME_WIDTH + FIGURE_WIDTH
        row = Row().to(3).add("allocated", palette.dim).right(show(report.allocated_bytes), end, palette.bold)
        row.add("  cached, free ", palette.dim).add(show(report.cached_bytes))
        row.add("  largest piece ", palette.dim).add(show(report.largest_free_block_bytes))
        outside = Row().to(3).add("outside torch", palette.dim).right(show(report.outside_torch_bytes), end)
        names = (("context", report.context_bytes), ("NCCL", report.nccl_bytes), ("others", report.others_bytes))
        for name, size in names:
            if size is not None:
                outside.add(f"  {name} ", palette.dim).add(show(size))
        limit = f"  limit {self.unit.full(report.limit_bytes)}" if report.limit_bytes is not None else ""
        if row.width + len(limit) < self.width:
            row.add(limit, palette.busy)
        return [row, outside]

    def reason(self, most: int = 9) -> list[Row]:
        """The verdict and its sentence."""
        verdict = self.report.verdict.words
        text = self.report.reason
        text = text if text.lower().startswith(verdict) else f"{verdict}: {text}"
        lines = wrap(text, self.width - 2)
        lines = [*lines[: most - 1], " ".join(lines[most - 1 :])] if len(lines) > most else lines
        return [Row().add(f" {shorten(line, self.width - 2)}", self.palette.busy) for line in lines]

    def largest(self, most: int = 10) -> list[Row]:
        """The largest tensors."""
        unit = unit_for(max((one.bytes for one in self.report.largest), default=0), self.units)
        rows = [Row().add(f" the largest tensors, {unit.name}", self.palette.dim)]
        for one in self.report.largest[:most]:
            category = OF_KEY.get(one.category, Category.UNKNOWN)
            row = Row().right(unit.show(one.bytes), FIGURE_WIDTH).add(" ")
            row.add(category.info.letter, self.palette.paint[category]).add(f" {category.info.title:<13}")
            made = shorten(one.description, max(0, (self.width - row.width) // 2))
            row.add(tail(one.owner or one.module or UNKNOWN, self.width - row.width - len(made) - 2))
            rows.append(row.right(made, self.width - 1, self.palette.dim))
        return rows

    def pools(self) -> list[Row]:
        """Bytes that the caching allocator held free, by stream and pool."""
        rows = [Row().add(f" cached and free by stream and pool, {self.unit.name}", self.palette.dim)]
        for pool in self.report.pools:
            row = (
                Row().right(self.unit.show(pool.cached_bytes), FIGURE_WIDTH).add(f"  stream {pool.stream}, {pool.pool}")
            )
            row.add(f", largest piece {self.unit.show(pool.largest_free_block_bytes)}", self.palette.dim)
            rows.append(row)
        return rows if self.report.pools else []

    # --- what would fit -----------------------------------------------------------------

    def fixes(
        self, found: FoundFixes | None, most: int = SHOWN_FIXES, numbered: bool = True, whole: bool = False
    ) -> list[Row]:
        """A heading, and a row for each fix.

        Args:
            found: As far as they are known; None: nobody predicts.
            most: Rows of fixes.
            numbered: Each begins with its number.
            whole: What a fix costs, or the line to write for it, goes on beneath it where it is too long.
        """
        palette = self.palette
        said = self._said(found)
        fixes = found.fixes[:most] if found is not None else ()
        if not fixes:
            return [Row().add(" what would fit: ", palette.bold).add(said)]
        nearest = not fixes[0].fits
        row = Row().add(" nothing fits; what comes nearest" if nearest else " what would fit", palette.bold)
        row.add(f", ~predicted, of {self.unit.full(self._room)}", palette.dim)
        row.right("peak", 3 + self._set_width + PEAK_WIDTH, palette.dim)
        row.add("  costs" * (self.width >= COSTS_FROM and not said), palette.dim)
        row.add(f"  {said}" if row.width + len(said) + 2 < self.width else "", palette.busy)
        rows = [row]
        for number, fix in enumerate(fixes, 1):
            rows += self._fix(number, fix, numbered, whole)
        if self.report.device == "cpu":
            rows.append(Row().add(f" ~ is {OF_A_GPU}; this run was on a CPU", palette.dim))
        return rows

    @property
    def _room(self) -> int:
        return self.report.allocated_bytes + self.report.cached_bytes + self.report.free_bytes

    @property
    def _set_width(self) -> int:
        return SET_WIDTH if self.width >= COSTS_FROM else self.width - 4 - PEAK_WIDTH

    def _said(self, found: FoundFixes | None) -> str:
        if self.report.verdict is Verdict.GROWN:
            return SAVED_BY_NONE
        if found is None:
            return "nobody predicts here"
        if found.problem:
            return found.problem
        if found.unfit_by_bytes is not None:
            return f"{self._size(found.unfit_by_bytes)} too much"
        return "" if found.over else "more is looked for" if found.fixes else "is being predicted"

    def _fix(self, number: int, fix: Fix, numbered: bool, whole: bool) -> list[Row]:
        palette = self.palette
        row = Row().add(f" {number if numbered and fix.fits else '-'} ", palette.accent)
        row.add(
            shorten(settings_text(fix.set), self._set_width), palette.plain if fix.keeps_mathematics else palette.busy
        )
        row.right(f"~{self.unit.show(fix.peak_bytes)}", 3 + self._set_width + PEAK_WIDTH)
        effect = "" if fix.keeps_mathematics else techniques.effect(self.config, self.config.with_(fix.set)).title
        costs = "; ".join(filter(None, (effect, fix.text))) or "nothing measurable"
        room = self.width - row.width - 3 if self.width >= COSTS_FROM else 0
        if len(costs) <= room:
            return [row.add(f"  {costs}", palette.dim)]
        if not whole:
            return [row.add(f"  {_clauses(costs, room)}" if room else "", palette.dim)]
        row.add(f"  {effect}" if room else "", palette.dim)
        lines = wrap(fix.text if room else costs, self.width - len(BENEATH) - 1)
        return [row, *(Row().add(f"{BENEATH}{line}", palette.dim) for line in lines)]


def _clauses(text: str, room: int) -> str:
    """The part of a text that there is room for, up to the end of a clause."""
    ends = [at for at, mark in enumerate(text) if mark in ";,:" and at < room - 1]
    return f"{text[: ends[-1]]} …" if ends else shorten(text, room)
