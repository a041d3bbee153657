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
    if nothing := meaningless(name, run.config):
        return nothing
    line = f"{name}={show(command.config[name])} is for your script to set"
    technique = techniques.of_option(name)
    line += f": {how}" if (how := script_lines(name, command.config)) else ""
    categories = technique.acts_on if technique else OF_WORKLOAD.get(name, ("", ()))[1]
    held = _at_the_peak(run)
    if held and categories:
        parts = " + ".join(f"{c.info.title} {held[c] / 2**20:.1f} MiB" for c in categories if held[c])
        line += f"; it acts on {parts or 'nothing that is held'} of {sum(held.values()) / 2**20:.1f} MiB at the peak"
    return line + (f"; {technique.summary}" if technique else "")


def script_lines(name: str, config: RunConfig) -> str:
    """The way a setting comes to be as it is in a configuration, in a script of one's own; "": that is not known."""
    technique = techniques.of_option(name)
    return technique.script_lines(name, config) if technique else OF_WORKLOAD.get(name, ("", ()))[0]


def meaningless(name: str, config: RunConfig) -> str:
    """The reason why a setting means nothing to the model of a watched script; "": it can be changed there."""
    technique = techniques.of_option(name)
    if technique is not None and not technique.means_something(config):
        return f"{technique.title} is a setting of transformers' models; {config.model} is none that is known here"
    if name == "seq_len" and config.seq_len == 1:
        return f"the rows of {config.model} are no tokens: they have no sequence length"
    return ""


def _changed(old: RunConfig, new: RunConfig) -> str | None:
    return next((name for name in techniques.all_options() if old[name] != new[name]), None)


def _at_the_peak(run: Run) -> Bytes | None:
    highest = highest_of(run.traces())
    return Ledger(highest).peak.by_category if highest is not None else None
