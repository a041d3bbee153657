"""Advice for a loop that is not ours, in place of a restart: the change to make and what it would do."""

from __future__ import annotations

from . import techniques
from .categories import Category
from .config import RunConfig, show
from .feed import Command, Start
from .ledger import Bytes, Ledger
from .run import Run, highest_of

OF_A_BATCH = (Category.ACTIVATIONS, Category.LOGITS_LOSS, Category.KV_CACHE)

OF_WORKLOAD: dict[str, tuple[str, tuple[Category, ...]]] = {
    "batch_size": ("the loader's batch size", OF_A_BATCH),
    "seq_len": ("the rows' length", OF_A_BATCH),
}
"""Advice for settings that are no technique's: the change in a script of one's own, and the categories it acts on."""


def advice(command: Command, run: Run | None) -> str:
    """The answer to a command that a watched script refuses: the reason, and what to do instead. One line."""
    if not isinstance(command, Start):
        return "the loop is your own script's: pause it, stop it and end it there"
    name = _changed(run.config, command.config) if run is not None else None
    if run is None or name is None:
        return "the loop is your own script's: start it again there"
    line = f"{name}={show(command.config[name])} is for your script to set"
    technique = techniques.of_option(name)
    how, categories = (technique.in_script, technique.acts_on) if technique else OF_WORKLOAD.get(name, ("", ()))
    line += f": {how}" if how else ""
    held = _at_the_peak(run)
    if held and categories:
        parts = " + ".join(f"{c.info.title} {held[c] / 2**20:.1f} MiB" for c in categories if held[c])
        line += f"; it acts on {parts or 'nothing that is held'} of {sum(held.values()) / 2**20:.1f} MiB at the peak"
    return line + (f"; {technique.summary}" if technique else "")


def _changed(old: RunConfig, new: RunConfig) -> str | None:
    return next((name for name in techniques.all_options() if old[name] != new[name]), None)


def _at_the_peak(run: Run) -> Bytes | None:
    highest = highest_of(run.traces())
    return Ledger(highest).peak.by_category if highest is not None else None
