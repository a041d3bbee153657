"""The first row of every screen, and one-line descriptions of a run."""

from __future__ import annotations

from rich.style import Style

from ...engine import techniques
from ...engine.config import RunConfig, show
from ...engine.events import Phase
from ..draw import Row
from ..palette import Palette
from ..state import ViewState
from ..units import shorten, tail, whole_parts

ELSEWHERE = ("batch_size", "seq_len", *techniques.ROUTINE)
"""Shown in another way, or in no label."""


def summary(config: RunConfig, before: RunConfig | None = None) -> str:
    """Size of a batch, and every setting that is not the default.

    Args:
        config: Of the run.
        before: Of the one before; what differs from it comes first, also where it is the default again.
    """
    # Rows of one token are as a rule no tokens: a watched script's images.
    words = [f"B{config.batch_size}" + f"×S{config.seq_len}" * (config.seq_len > 1)]
    names = [name for name, _ in techniques.changed(config)]
    if before is not None:
        differ = [name for name in techniques.all_options() if name in before.options and config[name] != before[name]]
        names = [*differ, *(name for name in names if name not in differ)]
    for name in names:
        if name in ELSEWHERE:
            continue
        value = config[name]
        words.append(name if value is True else f"{name}={show(value)}")
    return " ".join(words)


def header(state: ViewState, palette: Palette, width: int, frozen: bool = False) -> Row:
    """The engine's activity, that the view is frozen meanwhile, or the recording's name; then model and settings."""
    mark, style = status_style(state, palette)
    # What changes most stands leftmost: a row is sent from its left end.
    text = "view paused" if frozen else status_text(state)
    row = Row().add(f" {mark} ", style).add(text, palette.cursor if frozen else style)
    if not state.origin:
        row.to(18)
    else:
        number = f", {state.place + 1} of {len(state.listed)}" * (state.several and state.place < len(state.listed))
        row.add(f" {tail(state.origin, width // 4)}", palette.bold).add(f"{number}  ")
    config = state.config
    if config is None:
        return row.add("gpumem-tui", palette.bold)
    room = width - row.width - 1
    if state.run.imported:
        return row.add(shorten(config.model, room), palette.bold)
    model = shorten(config.model, max(room // 2, 12))
    row.add(model, palette.bold).add("  ")
    batch, *settings = summary(config, _before(state)).split(" ")
    room -= len(model) + len(batch) + 3
    return row.add(f"{batch} {whole_parts(settings, ' ', room, counted=True)}".rstrip(), palette.dim)


def _before(state: ViewState) -> RunConfig | None:
    """The configuration of the run before the one on the screens."""
    runs = state.run_list.runs
    at = next((n for n, run in enumerate(runs) if run is state.shown), 0)
    return runs[at - 1].config if at else None


def status_text(state: ViewState) -> str:
    """The state, and the phase while it trains."""
    if state.run.refused:
        return "out of memory"
    if state.status == "training" and state.phase is not Phase.IDLE:
        return state.phase.title
    return state.status


def status_style(state: ViewState, palette: Palette) -> tuple[str, Style]:
    """A mark and a style for the state."""
    status = "failed" if state.run.refused else state.status
    if status in ("training", "done"):
        return ("*" if palette.ascii else "●"), palette.good
    if status == "failed":
        return ("!" if palette.ascii else "✗"), palette.bad
    if status in ("stopped", "ended", "recording", "prediction", "snapshot"):
        return ("-" if palette.ascii else "■"), palette.dim
    if status == "held":
        return ("=" if palette.ascii else "‖"), palette.busy
    return ("~" if palette.ascii else "◌"), palette.busy
