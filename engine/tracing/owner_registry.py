"""The tensors of models and optimizers, looked up and noted as the owners of a step's blocks."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from ..categories import Category
from ..events import OWNER
from ..module_names import strip_wrappers
from . import owners, sharding, zero
from .labels import Labels
from .recorder import Recorder, columns
from .storages import parts_of


@dataclass
class OwnerRows:
    """Owners noted for one step.

    Attributes:
        noted: Fields of OWNER, row after row.
        repeated: More owners, as columns.
    """

    noted: array[int] = field(default_factory=lambda: array("q"))
    repeated: list[npt.NDArray[Any]] = field(default_factory=list)


class OwnerRegistry:
    """The owners whose tensors are looked for, and the tensors found that stay where they are.

    Only the model that is trained and its optimizers are held; everything else
    by weak references, since a strong one would keep memory alive.

    Args:
        recorder: Knows blocks by their tensors' addresses.
        labels: Names and descriptions.
    """

    def __init__(self, recorder: Recorder, labels: Labels) -> None:
        self._recorder, self._labels = recorder, labels
        self._model: torch.nn.Module | None = None
        self._optimizers: Sequence[torch.optim.Optimizer] = ()
        self._other_models: list[tuple[str, weakref.ref[torch.nn.Module]]] = []
        self._other_optimizers: list[weakref.ref[torch.optim.Optimizer]] = []
        self._scalers: list[weakref.ref[torch.amp.GradScaler]] = []
        self._trained: dict[int, tuple[int, int, weakref.ref[torch.Tensor]]] = {}
        self._leaves: list[tuple[str, weakref.ref[torch.Tensor]]] = []
        self._int8: list[tuple[str, weakref.ref[torch.nn.Module]]] = []
        self._found = np.empty(0, OWNER)

    # --- whose ----------------------------------------------------------------

    def adopt(self, model: torch.nn.Module, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Look for the tensors of this model and these optimizers."""
        for optimizer in optimizers:
            zero.optimizer_in(optimizer)
        self._model, self._optimizers = model, optimizers
        for name, _ in model.named_parameters():
            self._labels.name(name)
        self._found = np.empty(0, OWNER)

    def beside(
        self,
        models: Iterable[tuple[str, torch.nn.Module]],
        optimizers: Iterable[torch.optim.Optimizer],
        scalers: Iterable[torch.amp.GradScaler],
    ) -> None:
        """Look for the tensors of these as well, for as long as they are alive.

        Args:
            models: Each with what its tensors' names begin with.
            optimizers: Of any parameters.
            scalers: Of a loss.
        """
        self._other_models = [(prefix, weakref.ref(model)) for prefix, model in models]
        self._other_optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        self._scalers = [weakref.ref(scaler) for scaler in scalers]
        self._found = np.empty(0, OWNER)

    def leaf(self, name: str, tensor: torch.Tensor) -> None:
        """Look for the `.grad` of a tensor that is no parameter, for as long as it is alive.

        `enable_input_require_grads`, which checkpointing a frozen model needs,
        makes such a leaf of the embedding's output.
        """
        self._leaves.append((name, weakref.ref(tensor)))

    def release(self) -> None:
        """Forget everything."""
        self._model, self._optimizers = None, ()
        others = (self._other_models, self._other_optimizers, self._scalers)
        for known in (*others, self._trained, self._leaves, self._int8):
            known.clear()
        self._found = np.empty(0, OWNER)

    def parameter_names(self) -> dict[int, str]:
        """Names of the model's parameters by their storages' `_cdata`."""
        named = self._model.named_parameters() if self._model is not None else ()
        return {part.untyped_storage()._cdata: strip_wrappers(name) for name, p in named for part in parts_of(p)}

    # --- noting ---------------------------------------------------------------

    def note(self, rows: OwnerRows, mark: int, owned: Iterable[owners.Owned]) -> None:
        """The blocks alive at the tensors' addresses belong to them from a mark on."""
        address_of, labels, add = self._recorder.address, self._labels, rows.noted.extend
        for category, name, tensor in owned:
            for part in parts_of(tensor):
                address = address_of(part)
                if address:
                    add((address, mark, category, labels.name(name), labels.tensor("", part)))

    def note_all(self, rows: OwnerRows, mark: int, anew: bool) -> None:
        """The models, the optimizers and the libraries, whose tensors stay where they are.

        Looking all of them up takes longer than a small step's other tracing: so
        they are only repeated, but for the ends of the steps in which something new
        comes (quantized weights move in the first forward, optimizer state is made
        in the first step).

        Args:
            rows: Of the step.
            mark: From which on they own what they own.
            anew: Whether to look them up.
        """
        if self._model is not None and (anew or not len(self._found)):
            first = len(rows.noted)
            self._look_up(self._model, rows, mark)
            self._found = columns(rows.noted[first:], OWNER)
        else:
            again = self._found.copy()
            again["mark"] = mark
            rows.repeated.append(again)
        self.note(rows, mark, sharding.at_rest())
        for address, name in self._recorder.workspaces.items():
            rows.noted.extend((address, mark, Category.WORKSPACE, self._labels.name(name), -1))
        self.note(rows, mark, owners.of_last_batch(_alive(self._int8)))
        self.note_gradients(rows, mark)

    def _look_up(self, model: torch.nn.Module, rows: OwnerRows, mark: int) -> None:
        models = [("", model), *_alive(self._other_models)]
        optimizers = [*self._optimizers, *(o for reference in self._other_optimizers if (o := reference()))]
        self.note(rows, mark, zero.at_rest())
        # What is gathered at the moment moves: it is no parameter, and is noted wherever it is gathered.
        stand_ins = sharding.stand_ins()
        held = (*sharding.sharded_parameters(), *zero.master_weights())
        named = {id(tensor): (name, tensor) for name, tensor in held}
        found = [(prefix, owners.ModelTensors(each)) for prefix, each in models]
        for prefix, tensors in found:
            own = (
                owned for owned in tensors.owned() if not (id(owned[2]) in stand_ins or zero.is_partitioned(owned[2]))
            )
            self.note(rows, mark, ((c, prefix + strip_wrappers(name), t) for c, name, t in own))
            for name, parameter in tensors.parameters:
                named.setdefault(id(parameter), (prefix + strip_wrappers(name), parameter))
        for optimizer in optimizers:
            for name, tensor in owners.parameters_of(optimizer):
                if named.setdefault(id(tensor), (name, tensor))[0] == name:
                    self.note(rows, mark, [(Category.PARAMETERS, name, tensor)])
        names = {key: name for key, (name, _) in named.items()}
        for optimizer in optimizers:
            self.note(rows, mark, owners.of_optimizer(names, optimizer))
        for scaler in (scaler for reference in self._scalers if (scaler := reference())):
            self.note(rows, mark, owners.of_scaler(scaler))
        self.note(rows, mark, owners.of_libraries())
        self._int8 = [
            (prefix + strip_wrappers(name), weakref.ref(module))
            for prefix, tensors in found
            for name, module in tensors.int8_modules
        ]
        name_of, describe = self._labels.name, self._labels.tensor
        self._trained = {key: (name_of(name), describe("", p), weakref.ref(p)) for key, (name, p) in named.items()}

    def note_gradients_of(self, rows: OwnerRows, mark: int, optimizer: torch.optim.Optimizer) -> None:
        """The `.grad` of every parameter that an optimizer updates."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                name, made, _ = self._trained.get(id(parameter), (0, -1, None))
                for part in parts_of(parameter.grad) if parameter.grad is not None else ():
                    rows.noted.extend((self._recorder.address(part), mark, Category.GRADIENTS, name, made))

    def note_gradients(self, rows: OwnerRows, mark: int) -> None:
        """The `.grad` of every parameter and leaf that has one, and what stands for it with DeepSpeed."""
        self.note(rows, mark, zero.for_now())
        address_of = self._recorder.address
        for name, made, reference in self._trained.values():
            parameter = reference()
            if parameter is not None and parameter.grad is not None:
                for part in parts_of(parameter.grad):
                    rows.noted.extend((address_of(part), mark, Category.GRADIENTS, name, made))
        self._leaves = [(name, leaf) for name, leaf in self._leaves if leaf() is not None]
        for leaf_name, leaf in _alive(self._leaves):
            kept = [(Category.ACTIVATIONS, leaf_name, leaf)]
            if leaf.grad is not None:
                kept.append((Category.ACTIVATIONS, f"{leaf_name}.grad", leaf.grad))
            self.note(rows, mark, kept)


T = TypeVar("T")


def _alive(references: Iterable[tuple[str, weakref.ref[T]]]) -> Iterator[tuple[str, T]]:
    for name, reference in references:
        value = reference()
        if value is not None:
            yield name, value
