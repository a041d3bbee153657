"""What a change would do to a loop that is not ours: advice instead of a restart."""

from __future__ import annotations

from . import techniques
from .config import RunConfig, show
from .events import Category
from .feed import Command, Source, Start, peak_bytes
from .ledger import Bytes, Ledger

HOW: dict[str, tuple[str, tuple[Category, ...]]] = {
    "checkpointing": ("model.gradient_checkpointing_enable()", (Category.ACTIVATIONS,)),
    "lora": (
        "peft.get_peft_model(model, LoraConfig(...))",
        (Category.GRADIENTS, Category.OPTIMIZER_STATE),
    ),
    "quantization": ("from_pretrained(..., quantization_config=BitsAndBytesConfig(...))", (Category.PARAMETERS,)),
    "dtype": ("from_pretrained(..., dtype=...)", (Category.PARAMETERS, Category.GRADIENTS, Category.ACTIVATIONS)),
    "optimizer": ("another optimizer's class", (Category.OPTIMIZER_STATE,)),
    "kv_cache": ("model.config.use_cache", (Category.KV_CACHE,)),
    "attention": ("from_pretrained(..., attn_implementation=...)", (Category.ACTIVATIONS,)),
    "accumulation": ("smaller micro-batches, more of them to a step", (Category.ACTIVATIONS, Category.LOGITS_LOSS)),
    "keep_outputs": ("del outputs after backward", (Category.LOGITS_LOSS, Category.KV_CACHE)),
    "batch_size": ("the loader's batch size", (Category.ACTIVATIONS, Category.LOGITS_LOSS, Category.KV_CACHE)),
    "seq_len": ("the rows' length", (Category.ACTIVATIONS, Category.LOGITS_LOSS, Category.KV_CACHE)),
}
"""How a setting is changed in a script of one's own, and the categories it acts on."""


def advice(command: Command, source: Source) -> str:
    """Why a command is refused on a watched script, and what to do instead. One line."""
    if not isinstance(command, Start):
        return "the loop is your own script's: pause it, stop it and end it there"
    config = source.config()
    name = _changed(config, command.config) if config is not None else None
    if name is None:
        return "the loop is your own script's: start it again there"
    line = f"{name}={show(command.config[name])} is for your script to set"
    how, categories = HOW.get(name, ("", ()))
    line += f": {how}" if how else ""
    held = _at_the_peak(source)
    if held and categories:
        parts = " + ".join(f"{c.info.title} {held[c] / 2**20:.1f} MiB" for c in categories if held[c])
        line += f"; it acts on {parts or 'nothing that is held'} of {sum(held.values()) / 2**20:.1f} MiB at the peak"
    technique = techniques.registry().get(name)
    return line + (f"; {technique.summary}" if technique else "")


def _changed(old: RunConfig, new: RunConfig) -> str | None:
    return next((name for name in techniques.all_options() if old[name] != new[name]), None)


def _at_the_peak(source: Source) -> Bytes | None:
    traces = [*source.traces()]
    return Ledger(max(traces, key=peak_bytes)).peak.by_category if traces else None
