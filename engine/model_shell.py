"""The shell of a model: its modules and shapes on the meta device, without storage."""

from __future__ import annotations

import functools
from typing import Any

import torch

from .recipe import Model
from .tasks import TASKS, Task


def shell_of(hf_config: Any, task: Task = TASKS["causal-lm"]) -> Model:
    """The model on the meta device: every shape, no storage. To be read only: whoever asks again gets the same."""
    return _shell(_Described(hf_config), task)


class _Described:
    """A configuration that equals every other of the same content."""

    def __init__(self, hf_config: Any) -> None:
        self.hf_config, self.content = hf_config, (type(hf_config), hf_config.to_json_string(use_diff=False))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Described) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.content)


@functools.lru_cache(maxsize=4)  # a restart and a prediction of another technique have the same model
def _shell(described: _Described, task: Task) -> Model:
    import transformers

    with torch.device("meta"):
        return getattr(transformers, task.auto_class).from_config(described.hf_config)


def positions(architecture: Any) -> int:
    """Tokens in a row that a model was made for; 0: not said."""
    text = architecture.get_text_config()
    names = ("max_position_embeddings", "max_target_positions")
    return int(next((size for name in names if (size := getattr(text, name, None))), 0))


def numel(parameter: torch.nn.Parameter) -> int:
    """Weights in a parameter, of all ranks; 4-bit storage packs two into one element."""
    if (partitioned := getattr(parameter, "ds_numel", None)) is not None:  # DeepSpeed's, of stage 3
        return int(partitioned)
    state = getattr(parameter, "quant_state", None)
    return int(torch.Size(state.shape).numel()) if state is not None else parameter.numel()
