"""What a change would do to a loop that is not ours: advice instead of a restart."""

from __future__ import annotations

from . import techniques
from .config import RunConfig, show
from .events import Category
from .feed import Command, Source, Start, peak_bytes
from .ledger import Bytes, Ledger

OF_A_BATCH = (Category.ACTIVATIONS, Category.LOGITS_LOSS, Category.KV_CACHE)

OF_WORKLOAD: dict[str, tuple[str, tuple[Category, ...]]] = {
    "batch_size": ("the loader's batch size", OF_A_BATCH),
    "seq_len": ("the rows' length", OF_A_BATCH),
}
"""How what is no technique is changed in a script of one's own, and the categories it acts on."""


def advice(command: Command, source: Source) -> str:
    """Why a command is refused on a watched script, and what to do instead. One line."""
    if not isinstance(command, Start):
        return "the loop is your own script's: pause it, stop it and end it there"
    config = source.config()
    name = _changed(config, command.config) if config is not None else None
    if name is None:
        return "the loop is your own script's: start it again there"
    line = f"{name}={show(command.config[name])} is for your script to set"
    technique = techniques.of_option(name)
    how, categories = (technique.in_script, technique.acts_on) if technique else OF_WORKLOAD.get(name, ("", ()))
    line += f": {how}" if how else ""
    held = _at_the_peak(source)
    if held and categories:
        parts = " + ".join(f"{c.info.title} {held[c] / 2**20:.1f} MiB" for c in categories if held[c])
        line += f"; it acts on {parts or 'nothing that is held'} of {sum(held.values()) / 2**20:.1f} MiB at the peak"
    return line + (f"; {technique.summary}" if technique else "")


def _changed(old: RunConfig, new: RunConfig) -> str | None:
    return next((name for name in techniques.all_options() if old[name] != new[name]), None)


def _at_the_peak(source: Source) -> Bytes | None:
    traces = [*source.traces()]
    return Ledger(max(traces, key=peak_bytes)).peak.by_category if traces else None
