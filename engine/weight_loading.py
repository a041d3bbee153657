"""Weights read through `from_pretrained`, real ones and random ones alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from .config import UserError, one_line
from .recipe import Model

if TYPE_CHECKING:
    from .workload import Plan

RANDOM_STD = 0.02
"""Standard deviation of a profile's random matrices."""


def load(plan: Plan, reading: Callable[[str], None]) -> Model:
    """Load through `from_pretrained`, real weights or random ones alike."""
    import transformers

    config, dtype = plan.config, plan.recipe.dtype
    device = plan.recipe.parallelism.load_device(plan.device)
    arguments = {
        "config": plan.architecture,
        "dtype": dtype,
        "device_map": {"": str(device)},
        **plan.recipe.load_arguments,
    }
    with _loading_on_this_thread():
        if config.pretrained and not plan.shapes_only:
            try:
                with _told_of_weights(reading):
                    return getattr(transformers, plan.task.auto_class).from_pretrained(config.model, **arguments)
            except OSError as error:
                raise UserError(f"{config.model}: {one_line(error)}") from None
        shell, persistent = plan.shell, plan.shell.state_dict(keep_vars=True)
        generator = torch.Generator(device).manual_seed(config.seed)
        weights = {
            name: _RandomWeight(
                name, tuple(tensor.shape), dtype if tensor.is_floating_point() else tensor.dtype, generator, reading
            )
            for name, tensor in [*shell.named_parameters(), *shell.named_buffers()]
            if name in persistent
        }
        return type(shell).from_pretrained(None, state_dict=weights, **arguments)


@contextmanager
def _loading_on_this_thread() -> Iterator[None]:
    """Have transformers load in the calling thread, where tags and trackers see it."""
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before


@contextmanager
def _told_of_weights(reading: Callable[[str], None]) -> Iterator[None]:
    """Hear from transformers which module's weight is read next; before 5.5 it does not tell."""
    from transformers.utils import logging

    def told(bar: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        weights = bar(*args, **kwargs)
        return _reading_each(weights, reading) if kwargs.get("desc") == "Loading weights" else weights

    if not hasattr(logging, "set_tqdm_hook"):
        yield
        return
    before = logging.set_tqdm_hook(told)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _reading_each(weights: Iterable[tuple[str, Any]], reading: Callable[[str], None]) -> Iterator[tuple[str, Any]]:
    for weight in weights:
        reading(weight[0].rpartition(".")[0])
        yield weight


class _RandomWeight:
    """Stands in for a safetensors slice: the tensor is made when it is read.

    So a profile's random weights take the very path of real ones, quantization
    included, one tensor at a time and directly on the device.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        generator: torch.Generator,
        reading: Callable[[str], None],
    ) -> None:
        self.name, self.shape, self.dtype, self.generator, self.reading = name, shape, dtype, generator, reading

    def __getitem__(self, _index: Any) -> torch.Tensor:
        self.reading(self.name.rpartition(".")[0])
        tensor = torch.empty(self.shape, dtype=self.dtype, device=self.generator.device)
        if len(self.shape) < 2 or not self.dtype.is_floating_point:  # norms and biases; counters
            return tensor.fill_(1.0 if self.name.endswith("weight") else 0.0)
        return tensor.normal_(0.0, RANDOM_STD, generator=self.generator)

    def get_dtype(self) -> str:
        return _SAFETENSORS[self.dtype]


_SAFETENSORS = {
    torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32",
    torch.bool: "BOOL",
}  # fmt: skip
"""Safetensors' names of the dtypes of parameters and buffers."""
