"""The names and descriptions that traces refer to by index."""

from __future__ import annotations

import torch

from ..events import Made
from ..module_names import strip_wrappers


class Labels:
    """Names and descriptions of one run, numbered in the order they come up.

    `names[0]` is the model itself, whose name is empty.
    """

    def __init__(self) -> None:
        self._names: dict[str, int] = {"": 0}
        self._descriptions: dict[Made, int] = {}
        self._tensors: dict[tuple[str, torch.dtype, torch.Size], int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """All names so far, by index."""
        return tuple(self._names)

    @property
    def descriptions(self) -> tuple[Made, ...]:
        """All descriptions so far, by index."""
        return tuple(self._descriptions)

    def name(self, name: str) -> int:
        """The index of a name, without the prefixes that wrappers put before it."""
        return self._names.setdefault(strip_wrappers(name), len(self._names))

    def name_of(self, index: int) -> str:
        """The name behind an index."""
        return list(self._names)[index]

    def tensor(self, operator: str, tensor: torch.Tensor) -> int:
        """The index of a tensor's description.

        Args:
            operator: That returned it; empty if nobody watched.
            tensor: Of which dtype and shape are noted.
        """
        key = operator, tensor.dtype, tensor.shape
        index = self._tensors.get(key)
        if index is None:
            made = Made(operator, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            index = self._tensors[key] = self.description(made)
        return index

    def description(self, made: Made) -> int:
        """The index of a description."""
        return self._descriptions.setdefault(made, len(self._descriptions))
