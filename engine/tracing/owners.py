"""The owners of tensors: the names behind the addresses."""

from __future__ import annotations

import ctypes
import functools
import re
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from ..categories import Category
from ..module_names import LOGITS, OUTPUT_LOSS

INT8_WEIGHT = ("CB", "SCB")

CUBLAS = "cuBLAS"
DROPOUT_STATE = "cuDNN dropout state"
"""Names of what libraries keep for as long as the process lives."""

Owned = tuple[Category, str, torch.Tensor]
T = TypeVar("T", bound=torch.Tensor)


class ModelTensors:
    """The tensors of a model, all found in one pass over its modules.

    Attributes:
        parameters: By their names, each once.
        buffers: Likewise.
        int8_modules: bitsandbytes' Linear8bitLt: weight, scales and more live on its `state`.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.parameters: list[tuple[str, torch.nn.Parameter]] = []
        self.buffers: list[tuple[str, torch.Tensor]] = []
        self.int8_modules: list[tuple[str, Any]] = []
        self._prompts = getattr(model, "prompt_tokens", {})  # PEFT's, of a prompt that is trained
        known: set[int] = set()
        for name, module in model.named_modules():
            prefix = f"{name}." if name else ""
            self.parameters += _unknown(known, prefix, module._parameters)
            self.buffers += _unknown(known, prefix, module._buffers)
            if type(module).__name__ == "Linear8bitLt" and hasattr(module, "state"):  # PEFT's wrapper has none
                self.int8_modules.append((name, module))

    def owned(self) -> Iterator[Owned]:
        """Parameters with their quantization state, and buffers."""
        for name, parameter in self.parameters:
            yield Category.PARAMETERS, name, parameter
            for part, tensor in _quantized_parts(parameter):
                yield Category.PARAMETERS, f"{name}.{part}", tensor
        for name, module in self.int8_modules:
            for part, tensor in tensors_in(vars(module.state)):
                if part in INT8_WEIGHT:
                    yield Category.PARAMETERS, f"{name}.{part}", tensor
        for name, buffer in self.buffers:
            yield Category.BUFFERS, name, buffer
        for name, tensor in tensors_in(self._prompts):
            yield Category.BUFFERS, f"prompt_tokens.{name}", tensor


def _unknown(known: set[int], prefix: str, held: Mapping[str, T | None]) -> Iterator[tuple[str, T]]:
    """Tensors of a module that no other has had, by their whole names."""
    for name, tensor in held.items():
        if tensor is not None and id(tensor) not in known:
            known.add(id(tensor))
            yield prefix + name, tensor


def of_last_batch(modules: Iterable[tuple[str, torch.nn.Module]]) -> Iterator[Owned]:
    """Outlier columns' indices that int8 layers keep of the batch they last saw."""
    for name, module in modules:
        for part, tensor in tensors_in(vars(module.state)):
            if part not in INT8_WEIGHT:
                yield Category.ACTIVATIONS, f"{name}.{part}", tensor


def _quantized_parts(parameter: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that bitsandbytes keeps beside the packed weight: scales and code tables."""
    state = getattr(parameter, "quant_state", None)
    prefix = ""
    while state is not None:
        for part in ("absmax", "code", "offset"):
            tensor = getattr(state, part, None)
            if isinstance(tensor, torch.Tensor):
                yield prefix + part, tensor
        prefix, state = prefix + "state2.", getattr(state, "state2", None)
    for part in INT8_WEIGHT:
        tensor = getattr(parameter, part, None)
        if isinstance(tensor, torch.Tensor):
            yield part, tensor


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters that an optimizer updates, named after it: for those that no module has."""
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    for index, parameter in enumerate(parameters):
        yield f"{type(optimizer).__name__}.parameters.{index}", parameter


def of_optimizer(names: Mapping[int, str], optimizer: torch.optim.Optimizer) -> Iterator[Owned]:
    """State tensors by parameter, and what the optimizer keeps for itself.

    Args:
        names: Of parameters, by their `id`.
        optimizer: Whose state to list.
    """
    for parameter, state in optimizer.state.items():
        name = names.get(id(parameter), "")
        for part, tensor in tensors_in(state):
            yield Category.OPTIMIZER_STATE, f"{name}.{part}" if name else part, tensor
    # bitsandbytes keeps its code tables on the optimizer itself.
    for part, tensor in tensors_in(getattr(optimizer, "name2qmap", {})):
        yield Category.OPTIMIZER_STATE, f"{type(optimizer).__name__}.{part}", tensor
    # torchao's learning rates are tensors; of an optimizer for each parameter, each has its own.
    for each in (optimizer, *getattr(optimizer, "optimizers", {}).values()):
        for group in each.param_groups:
            for part, tensor in tensors_in({k: v for k, v in group.items() if k != "params"}):
                yield Category.OPTIMIZER_STATE, f"{type(each).__name__}.{part}", tensor


def of_scaler(scaler: torch.amp.GradScaler) -> Iterator[Owned]:
    """The loss's scale, and how many steps it has fitted."""
    for name in ("_scale", "_growth_tracker"):
        tensor = getattr(scaler, name, None)
        if tensor is not None:
            yield Category.OPTIMIZER_STATE, f"GradScaler.{name.removeprefix('_')}", tensor


def of_outputs(outputs: Any) -> Iterator[Owned]:
    """Logits, loss and KV cache of a transformers output."""
    if outputs is None:
        return
    for name, attribute in ((LOGITS, "logits"), (OUTPUT_LOSS, "loss")):
        tensor = getattr(outputs, attribute, None)
        if isinstance(tensor, torch.Tensor):
            yield Category.LOGITS_LOSS, name, tensor
    yield from of_cache(cache_in(outputs))


def cache_in(outputs: Any) -> Any:
    """The KV cache of a transformers output, under the name it has in this version.

    Only what the output holds itself is asked: its class has a property by the old name, which warns.
    """
    held = getattr(outputs, "__dict__", {})
    return held.get("cache", held.get("past_key_values"))


def of_cache(cache: Any) -> Iterator[Owned]:
    """Keys and values by layer; an encoder-decoder has two caches."""
    for part in ("self_attention_cache", "cross_attention_cache"):
        if hasattr(cache, part):
            yield from ((category, f"{part}.{name}", t) for category, name, t in of_cache(getattr(cache, part)))
    layers = getattr(cache, "layers", None)
    if layers is None:  # older caches: a list of keys and a list of values, or tuples
        layers = cache if isinstance(cache, list | tuple) else []
    for index, layer in enumerate(layers):
        parts = layer if isinstance(layer, list | tuple) else vars(layer)
        for part, tensor in tensors_in(parts):
            yield Category.KV_CACHE, f"layers.{index}.{part}", tensor


def of_libraries() -> Iterator[Owned]:
    """Tensors that libraries keep for themselves between calls: bitsandbytes' code tables."""
    module = sys.modules.get("bitsandbytes.functional")
    for name, tensor in getattr(module, "name2qmap", {}).items():
        yield Category.WORKSPACE, f"bitsandbytes.{name}", tensor


def drop_library_caches() -> None:
    """Empty them; they are filled again when they are needed.

    bitsandbytes also keeps a reference to every paged tensor there ever was.
    """
    module = sys.modules.get("bitsandbytes.functional")
    getattr(module, "name2qmap", {}).clear()
    pages = getattr(module, "GlobalPageManager", None)
    if pages is not None:
        pages.get_instance().paged_tensors.clear()


def of_tensors(category: Category, named: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Owned]:
    """Plain tensors under one category: a batch, a data set."""
    for name, tensor in named:
        yield category, name, tensor


def tensors_in(value: Any, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested containers, with its path."""
    if isinstance(value, torch.Tensor):
        yield prefix, value
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    for key, item in items:
        yield from tensors_in(item, f"{prefix}.{key}" if prefix else str(key))


class Paged(NamedTuple):
    """Optimizer state in CUDA managed memory (bitsandbytes marks it).

    To torch it is a CPU tensor; no CUDA statistic of its counts it. NVML counts
    the pages that are on the device to the device, and to no process.
    """

    tensor: weakref.ref[torch.Tensor]
    address: int
    bytes: int


def paged(optimizer: torch.optim.Optimizer) -> list[Paged]:
    """The managed tensors of an optimizer."""
    states = optimizer.state.values()
    return [Paged(weakref.ref(tensor), tensor.data_ptr(), tensor.nbytes) for tensor in _managed(states)]


def paged_bytes(states: Iterable[Any]) -> int:
    """Bytes in managed memory of some parameters' optimizer state."""
    return sum(tensor.nbytes for tensor in _managed(states))


def _managed(states: Iterable[Any]) -> Iterator[torch.Tensor]:
    for state in states:
        for _, tensor in tensors_in(state):
            if getattr(tensor, "is_paged", False):
                yield tensor


def free_paged(allocations: Iterable[Paged]) -> int:
    """Give managed memory back, which bitsandbytes never does; call it when the optimizer is gone.

    Returns:
        Bytes that stay: still in use, or the library offers no way to free them.
    """
    staying = 0
    for tensor, address, size in allocations:
        freed = tensor() is None and (runtime := _cuda_runtime()) and not runtime.cudaFree(ctypes.c_void_p(address))
        staying += 0 if freed else size
    return staying


@functools.cache
def _cuda_runtime() -> ctypes.CDLL | None:
    """The CUDA runtime that torch has loaded; its own bindings offer no `cudaFree`."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        if re.search(r"/libcudart\.so[.\d]*$", path):
            return ctypes.CDLL(path)
    return None
