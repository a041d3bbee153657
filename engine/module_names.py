"""Names of modules and parameters: those of the model's parts, and the layer that each belongs to."""

from __future__ import annotations

import re
from functools import lru_cache

LOGITS = "logits"
"""Name of the output embedding's output."""

LOSS = "loss"
"""Name of the part of the model's forward that follows the output embedding."""

OUTPUT_LOSS = "outputs.loss"
"""Name of the loss as the model has returned it: with it the graph is kept."""

OTHER_MODEL = ": "
"""Stands between the name of another model than the one that is trained and those of its tensors."""

_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")
_NUMBERED = re.compile(r"^(.*\.)\d+$")
CACHED = "layers."
"""The name of a KV cache's layers, of which the cache knows nothing but the number."""

_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")
_INNER_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")
"""Stand before any module's name that is wrapped, not only before the model's own."""


NAMES = 2**15
"""So many names' forms are kept: a model has thousands, asked for again with every trace and every run."""


@lru_cache(NAMES)
def layer_of(module: str) -> str:
    """The layer a module belongs to.

    `gpt_neox.layers.3.mlp.dense` -> `gpt_neox.layers.3`; outside the repeated
    layers the module itself: `lm_head`. Another model is one layer:
    `teacher: gpt_neox.layers.3.mlp.dense.weight` -> `teacher`.
    """
    other, colon, _ = module.partition(OTHER_MODEL)
    if colon:
        return other
    module = strip_wrappers(module)
    match = _LAYER.match(module)
    return match.group(1) if match else module


@lru_cache(maxsize=16)
def modules_of(names: tuple[str, ...], tensors: frozenset[str]) -> tuple[str, ...]:
    """The module that each name belongs to; of a name of no tensor, that name.

    `rnn.weight_hh_l0` -> `rnn`, as the name of a tensor in a module has no dots; likewise what is
    kept for it, by an optimizer for example, and named behind it: `rnn.weight_hh_l0.exp_avg` -> `rnn`.

    Args:
        names: Of modules, of tensors, of what is kept for tensors.
        tensors: Names of the modules' own tensors: parameters, buffers.
    """
    tensors = frozenset(map(strip_wrappers, tensors))

    def module_of(name: str) -> str:
        parts = (name := strip_wrappers(name)).split(".")
        of_tensor = (n for n in range(len(parts)) if ".".join(parts[: n + 1]) in tensors)
        return ".".join(parts[: next(of_tensor, len(parts))])

    return tuple(name if OTHER_MODEL in name else module_of(name) for name in names)


@lru_cache(NAMES)
def strip_wrappers(name: str) -> str:
    """A module's name in the model itself, whatever wraps it (PEFT, DDP, FSDP, compile)."""
    dotted = _INNER_WRAPPERS.sub("", f"{name}.")
    for wrapper in _WRAPPERS:
        if wrapper.startswith(dotted):
            return ""  # the wrapper itself stands for the model
        dotted = dotted.removeprefix(wrapper)
    return dotted[:-1]


@lru_cache(maxsize=16)
def numbered_layers(names: tuple[str, ...]) -> list[str]:
    """The repeated layers of a model, in order: those of the most frequent prefix, a KV cache's own aside."""
    groups: dict[str, list[str]] = {}
    for layer in dict.fromkeys(map(layer_of, names)):
        if match := _NUMBERED.match(layer):
            groups.setdefault(match.group(1), []).append(layer)
    found = max(groups, key=lambda prefix: (len(groups[prefix]), prefix != CACHED), default=None)
    return sorted(groups[found], key=lambda layer: int(layer.rsplit(".", 1)[1])) if found is not None else []
