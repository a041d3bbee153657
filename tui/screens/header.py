"""The first row of every screen."""

from __future__ import annotations

from rich.style import Style

from ...engine.events import Phase
from ...engine.techniques import label
from ..draw import Row
from ..palette import Palette
from ..state import ViewState
from ..units import shorten, tail, whole_parts


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
    batch, *settings = label(config).split(" ")
    room -= len(model) + len(batch) + 3
    return row.add(f"{batch} {whole_parts(settings, ' ', room, counted=True)}".rstrip(), palette.dim)


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
