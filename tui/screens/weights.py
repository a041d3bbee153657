"""Weights: what every quantization scheme does to the weights of the model that is looked at."""

from __future__ import annotations

import string
from collections.abc import Mapping
from functools import cached_property

from ...engine.weights.measurement import Measurement, weights_of
from ...engine.weights.report import Fidelity, TensorReport
from ...engine.weights.scheme import Scheme
from ...engine.weights.schemes import registry
from ...engine.weights.totals import Proposal, Total, propose, total
from ..actions import Action, moves
from ..draw import Row, paragraph
from ..units import UNKNOWN, Unit, count, difference, shorten, unit_for
from . import weights_pictures as pictures
from .page import Page, Table, Topic, scrolled

PICTURES = ("weights", "codes", "bits", "tensors")

ROOMY = 76
"""Columns from which nothing is said in short."""

TITLE = 23
COLUMNS = (5, 7, 8, 12, 8, 7, 6)
"""Cells of bits, size, SQNR, levels used, entropy, wasted bits, the worst tensor's SQNR."""

WHAT = (
    "What each scheme does to the weights of this model: bits with all constants, signal to noise, how many levels "
    "are used and how many bits of a code are wasted; and which few tensors are worth keeping in 16 bit."
)
RANDOM = (
    "These weights are random, so they are normal: kurtosis 3, nothing beyond 6 sigma. Trained ones have outliers, "
    "which cost a scale for a whole tensor 5 to 20 dB more, and NF4 less than 1."
)


class WeightsPage(Page):
    """The damage of quantization to the model's weights."""

    place = 7
    title = "weights"
    measurement: Measurement | None = None
    selected = 0
    top = 0
    tensor = 0
    """Place of the selected tensor among those by rising SQNR; 0: all of them."""
    tensor_top = 0
    picture = 0

    def make_actions(self) -> tuple[Action, ...]:
        """Measure, select, look, keep."""
        text = "select a tensor, the worst first; before them: all"
        return (
            Action("weights.measure", ("enter",), "Measure the weights", "measure, or leave it",
                   lambda page: page.measure(), "measure"),
            Action("weights.exact", ("e",), "Measure every weight", "measure every weight and not a sample: minutes",
                   lambda page: page.measure(exact=True), "exact"),
            *moves("select a scheme"),
            Action("weights.before", ("left",), "Tensor before", text, lambda page: page.step(-1), "tensor"),
            Action("weights.next", ("right",), "Next tensor", text, lambda page: page.step(1), "tensor"),
            Action("weights.picture", ("tab",), "Next picture",
                   "pictures: weights and levels, codes, bits and SQNR, all tensors",
                   lambda page: page.next_picture(), "picture"),
            Action("weights.keep", ("k",), "Keep the worst in 16 bit",
                   "restart under this scheme with the worst tensors kept in 16 bit", lambda page: page.keep(),
                   "keep", acts=True),
        )  # fmt: skip

    def topic(self) -> Topic:
        """The selected scheme."""
        scheme = self.scheme
        return Topic(scheme.title, f"{scheme.explanation} {scheme.formula}.")

    # --- what can be done -------------------------------------------------------------

    def measure(self, exact: bool = False) -> None:
        """Begin, or leave what is under way; what is known stays."""
        config = self.changes.base()
        if self.measurement is not None and self.measurement.running:
            self.measurement.stop()
            return
        weights = weights_of(config) if config is not None else None
        if weights is None:
            self.state.say("the weights of this model are its script's own: gpumem-tui weights FILE measures a file")
            return
        self.tensor = 0
        self._select_setting()
        self.measurement = Measurement(weights, exact)
        self.measurement.start()

    def _select_setting(self) -> None:
        """Begin with the scheme that the run has, if it has any."""
        config = self.changes.base()
        for place, scheme in enumerate(self.schemes.values()):
            if config is not None and scheme.setting and all(config[name] == value for name, value in scheme.setting):
                self.selected = place

    def move(self, by: int) -> None:
        """Select another scheme; where tensors are listed, another of them."""
        if PICTURES[self.picture] == "tensors":
            self.step(by)
        else:
            self.selected = max(0, min(self.selected + by, len(self.schemes) - 1))

    def step(self, by: int) -> None:
        """Select another tensor."""
        self.tensor = max(0, min(self.tensor + by, len(self.quantized())))

    def next_picture(self) -> None:
        """Show another picture."""
        self.picture = (self.picture + 1) % len(PICTURES)

    def keep(self) -> None:
        """Restart with what is proposed."""
        proposal = self.proposal()
        if proposal is None:
            self.state.say("there is nothing to keep: measure first, and select a scheme that a run can have")
        else:
            self.control.change(self.settings_for(proposal))

    def turned(self) -> None:
        """Leave what is of another model's weights."""
        measurement, config = self.measurement, self.changes.base()
        if measurement is not None and (config is None or weights_of(config) != measurement.weights):
            measurement.stop()
            self.measurement = None
            self.tensor = 0

    def progress(self) -> object:
        """The state of measuring."""
        found = self.measurement
        return None if found is None else (len(found.reports), found.head, found.end, found.failure)

    # --- what is known ------------------------------------------------------------------

    @cached_property
    def schemes(self) -> Mapping[str, Scheme]:
        """The schemes measured, by the letter they have in pictures."""
        usual = [scheme for scheme in registry().values() if scheme.usual]
        return dict(zip(string.ascii_lowercase, usual, strict=False))

    @property
    def scheme(self) -> Scheme:
        """The selected scheme."""
        return [*self.schemes.values()][self.selected]

    def quantized(self) -> list[TensorReport]:
        """The tensors that a run would quantize, by rising SQNR under the selected scheme."""
        if self.measurement is None:
            return []
        end = self.measurement.end
        kept = frozenset(end.kept) if end is not None else frozenset()
        found = [report for report in self.measurement.reports if report.name not in kept]
        return sorted(found, key=lambda report: _sqnr(report.schemes.get(self.scheme.key)))

    def proposal(self) -> Proposal | None:
        """The tensors to keep under the selected scheme, if a run can have it and all is known."""
        measurement, scheme = self.measurement, self.scheme
        if measurement is None or measurement.end is None or not scheme.setting:
            return None
        return propose(self.quantized(), scheme)

    def settings_for(self, proposal: Proposal) -> dict[str, bool | int | float | str]:
        """The settings that it takes."""
        return {**dict(self.scheme.setting), "quantization.skip": proposal.skip}

    def table(self) -> Table | None:
        """Every tensor under every scheme."""
        keys = [scheme.key for scheme in self.schemes.values()]
        found = self.quantized()
        if not found:
            return None
        cells = [
            [r.name, f"{r.kurtosis:.1f}", *(_db(r.schemes[key].sqnr_db if key in r.schemes else None) for key in keys)]
            for r in found
        ]
        return [["tensor", "kurtosis", *keys], *cells]

    # --- drawing --------------------------------------------------------------------------

    def rows(self, width: int, height: int) -> list[Row]:
        """The schemes, the picture of one of them, and what to keep."""
        self.turned()
        if self.measurement is None:
            return self._invitation(width)
        shows = (self.progress(), self.selected, self.tensor, self.picture, self.state.units, width, height,
                 self.forecasts.answers, self.changes.base())  # fmt: skip
        return self.kept("all", shows, lambda: self._measured(self.measurement, width, height))

    def _invitation(self, width: int) -> list[Row]:
        config = self.changes.base()
        if config is None:
            return [Row(), Row().add(" No run has started yet.", self.palette.dim)]
        model = shorten(config.model, width - 40)
        rows = [Row(), *paragraph(WHAT, width), Row()]
        ways = (("enter", f"measures a sample of {model}, seconds"), ("e", "measures every weight, minutes for 8B"))
        rows += [Row().add(f" {key:<6}", self.palette.accent).add(text) for key, text in ways]
        said = "On the CPU, in a process that gives way to the training; a tensor at a time, never the whole model."
        return [*rows, Row(), *paragraph(said, width, self.palette.dim)]

    def _measured(self, measurement: Measurement | None, width: int, height: int) -> list[Row]:
        assert measurement is not None
        found = self.quantized()
        self.tensor = min(self.tensor, len(found))
        below = self._below(measurement, width)
        rows = [self._headline(measurement, found, width)]
        room = height - len(rows) - len(below)
        if PICTURES[self.picture] == "tensors":
            rows += self._map(found, width, room)
        else:
            listed = max(3, min(len(self.schemes), room - 10))
            rows += self._list(found, width, listed)
            rows += self._picture(found, width, height - len(rows) - len(below))
        rows = rows[: height - len(below)]
        return [*rows, *[Row()] * (height - len(rows) - len(below)), *below]

    def _headline(self, measurement: Measurement, found: list[TensorReport], width: int) -> Row:
        palette, head, end = self.palette, measurement.head, measurement.end
        weights = sum(report.parameters for report in found)
        text, style = "every weight" if measurement.exact else "sampled, ±0.1 dB", palette.dim
        if measurement.failure:
            text = ""
        elif end is None:
            text = f"measuring {len(measurement.reports)} of {head.tensors}" if head else "loading the libraries"
            style = palette.busy
        what = f"  {len(found)} tensors, {count(weights)} weights" if found else ""
        model = shorten(measurement.weights.model.rsplit("/", 1)[-1], max(width - len(what) - len(text) - 4, 6))
        return Row().add(f" {model}", palette.bold).add(what).right(text, width - 1, style)

    def _list(self, found: list[TensorReport], width: int, height: int) -> list[Row]:
        """The schemes, of all tensors or of the selected one."""
        one = found[self.tensor - 1] if self.tensor else None
        figures = {
            scheme.key: one.schemes.get(scheme.key) if one is not None else total(found, scheme)
            for scheme in self.schemes.values()
        }
        sizes = [it.storage_bytes for it in figures.values() if it is not None]
        unit = unit_for(max(sizes, default=0), self.state.units)
        rows = [self._headings(unit, one is not None, width)]
        self.top = scrolled(self.top, self.selected, height, len(self.schemes))
        for place, (letter, scheme) in enumerate(self.schemes.items()):
            if self.top <= place < self.top + height:
                rows.append(self._line(letter, scheme, figures[scheme.key], unit, place == self.selected, width))
        return rows

    def _headings(self, unit: Unit, of_one: bool, width: int) -> Row:
        heads = ("bits", unit.name, "SQNR dB", "levels used", "entropy", "wasted", "" if of_one else "worst")
        row = Row().to(TITLE + 3)
        for head, cells in zip(heads, _cells(width), strict=False):
            row.add(f"{head:>{cells}}", self.palette.dim)
        return row

    def _line(
        self, letter: str, scheme: Scheme, it: Fidelity | Total | None, unit: Unit, selected: bool, width: int
    ) -> Row:
        palette = self.palette
        style = palette.cursor if selected else palette.plain
        row = Row().add(f" {letter} ", palette.cursor if selected else palette.accent)
        row.add(f"{shorten(scheme.title, TITLE):<{TITLE}}", style)
        if it is None:
            head = self.measurement.head if self.measurement is not None else None
            known = self.tensor or (self.measurement is not None and self.measurement.end is not None)
            missing = head is not None and scheme.key in head.unavailable
            reason = "not installed" if missing else "suits no tensor" if known else ""
            row.add(shorten(f" {UNKNOWN} {reason}", width - row.width - 1), palette.cursor if selected else palette.off)
        else:
            texts = (
                f"{it.bits_per_parameter:.2f}",
                unit.show(it.storage_bytes),
                _db(it.sqnr_db),
                f"{it.levels_used:.0f} of {it.levels}",
                f"{it.entropy_bits:.2f}",
                f"{it.wasted_bits:.2f}",
                _db(it.worst_sqnr_db) if isinstance(it, Total) else "",
            )
            for text, cells in zip(texts, _cells(width), strict=False):
                row.add(f"{text:>{cells}}", style)
        return row.add(" " * (width - row.width), style) if selected else row

    def _picture(self, found: list[TensorReport], width: int, height: int) -> list[Row]:
        """The picture of the selected tensor, or of the worst."""
        palette, scheme = self.palette, self.scheme
        if not found or height < 4:
            return []
        one = found[max(self.tensor - 1, 0)]
        said = [*([] if self.tensor else ["the worst"]), *(["transposed"] if one.transposed else [])]
        which = f" ({', '.join(said)})" if said else ""
        largest = f"largest {one.largest_sigma:.1f} sigma" if width >= ROOMY else f"{one.largest_sigma:.0f} sigma"
        shape = f"  kurtosis {one.kurtosis:.1f}, {largest}"
        whose = pictures.brief(one.name, width - len(which) - len(shape) - 2)
        row = Row().add(f" {whose}", palette.bold).add(which, palette.dim).add(shape)
        fidelity = one.schemes.get(scheme.key)
        if PICTURES[self.picture] == "bits":
            points = [
                pictures.Point(letter, it.bits_per_parameter, it.sqnr_db)
                for letter, other in self.schemes.items()
                if (it := one.schemes.get(other.key)) is not None and it.sqnr_db is not None
            ]
            chosen = string.ascii_lowercase[self.selected]
            return [row, *pictures.bits_against_sqnr(points, chosen, width, height - 1, palette)]
        if fidelity is None:
            head = self.measurement.head if self.measurement is not None else None
            missing = head.unavailable if head is not None else {}
            reason = missing.get(scheme.key) or one.unsuited.get(scheme.key, "not measured")
            return [row, *paragraph(reason, width, palette.off)]
        rows = [row, Row().add(shorten(f" {_error(fidelity)}", width - 1), palette.dim)]
        if PICTURES[self.picture] == "codes":
            return [*rows, *pictures.codes(scheme, fidelity, width, height - 2, palette)]
        return [*rows, *pictures.density(one, fidelity, width, height - 2, palette)]

    def _map(self, found: list[TensorReport], width: int, height: int) -> list[Row]:
        """All tensors by all schemes."""
        room = height - 1
        self.tensor_top = scrolled(self.tensor_top, max(self.tensor - 1, 0), room, len(found))
        shown = found[self.tensor_top : self.tensor_top + room]
        chosen = found[self.tensor - 1].name if self.tensor else ""
        return pictures.tensor_map(shown, self.schemes, (chosen, self.scheme.key), width, self.palette)

    def _below(self, measurement: Measurement, width: int) -> list[Row]:
        """The failure, or the tensors to keep and the peak that follows."""
        palette = self.palette
        if measurement.failure:
            return paragraph(measurement.failure, width, palette.bad)[:3]
        if measurement.end is None:
            return []
        proposal = self.proposal()
        if proposal is not None:
            said, style = self._kept_text(proposal), palette.accent
        else:
            none = "No tensor stands out: keeping a few in 16 bit would gain little."
            said = none if self.scheme.setting else "No run stores its weights like this: it is here to compare with."
            style = palette.dim
        rows = paragraph(said, width, style)
        notes = [RANDOM] if measurement.head is not None and measurement.head.random else []
        if not measurement.end.architecture_known:
            notes.append("The architecture is not known: every matrix counts as quantized.")
        return rows + [row for text in notes for row in paragraph(text, width, palette.dim)]

    def _kept_text(self, proposal: Proposal) -> str:
        """`k keeps the 3 worst in 16 bit: +0.02 GiB, worst 14.1 → 20.2 dB; peak ~12.31, +0.02`."""
        worst = len(proposal.tensors)
        size = unit_for(proposal.added_bytes, self.state.units).full(proposal.added_bytes)
        base, asked = self.changes.base(), self.forecasts.predictions
        wanted = base.with_(self.settings_for(proposal)) if base is not None else None
        text = (
            f"{'the run' if wanted == base else 'k'} keeps the {f'{worst} worst' if worst > 1 else 'worst'} in 16 bit: "
            f"+{size}, worst {proposal.worst_before_db:.1f} → {proposal.worst_after_db:.1f} dB"
        )
        if base is None or wanted is None or asked is None or wanted == base:
            return text
        if problem := self.changes.problem(wanted):
            return f"{text}; {problem}"
        then, now = asked.of(wanted), asked.of(base)
        if then is None or now is None:
            return text
        unit = self.state.unit
        return f"{text}; peak ~{unit.show(then.peak_bytes)}, {difference(then.peak_bytes, now.peak_bytes, unit)}"


def _cells(width: int) -> list[int]:
    """Cells of as many columns as there is room for."""
    fitting: list[int] = []
    for cells in COLUMNS:
        if TITLE + 3 + sum(fitting) + cells <= width:
            fitting.append(cells)
    return fitting


def _error(it: Fidelity) -> str:
    """`error 9.3 % of the weights (root mean square), at most 0.0123; of the scales 0.41 %`."""
    text = f"error {100 * it.relative_rmse:.2g} % of the weights (root mean square), at most {it.largest_error:.2g}"
    if it.scales_sqnr_db is None:
        return text
    return f"{text}; of the scales {100 * 10 ** (-it.scales_sqnr_db / 20):.2g} %"


def _sqnr(found: Fidelity | None) -> float:
    return found.sqnr_db if found is not None and found.sqnr_db is not None else float("inf")


def _db(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.1f}"
