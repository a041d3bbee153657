"""A step whose operators are watched takes as much memory as any other: gradients are added up where they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpumem_tui.engine.tracing.describe import OperatorWatch

Tensor = torch.Tensor


class Said:
    """The operators that were watched, and what they returned."""

    def __init__(self) -> None:
        self.operators: list[str] = []
        self.returned_at: list[int] = []

    def operator(self, name: str) -> None:
        self.operators.append(name)

    def returned(self, _name: str, tensor: Tensor) -> None:
        self.returned_at.append(tensor.data_ptr())


class Tripled(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return gradient * 3


def backward(loss_of: Callable[[Tensor], Tensor], alone: bool = True) -> tuple[list[str], Tensor]:
    """The sums of gradients that were watched, and the gradient that came of it."""
    leaf = torch.linspace(0.1, 1.0, 100, requires_grad=True)
    loss = loss_of(leaf * 1)
    said = Said()
    with OperatorWatch(said, {}, alone):
        loss.backward()
    assert leaf.grad is not None
    return [name for name in said.operators if name.startswith("aten.add")], leaf.grad


def unwatched(loss_of: Callable[[Tensor], Tensor]) -> Tensor:
    leaf = torch.linspace(0.1, 1.0, 100, requires_grad=True)
    loss_of(leaf * 1).backward()
    assert leaf.grad is not None
    return leaf.grad


def loss(h: Tensor) -> Tensor:
    return (h.cos() + h.exp() + Tripled.apply(h)).sum()  # type: ignore[no-untyped-call]


def test_a_sum_that_autograd_alone_has_is_made_in_place() -> None:
    sums, gradient = backward(loss)
    assert sums == ["aten.add_", "aten.add_"]
    assert torch.equal(gradient, unwatched(loss))
    assert backward(loss, alone=False)[0] == ["aten.add", "aten.add"], "as a dispatch mode has it by itself"


@pytest.mark.parametrize("view", [False, True])
def test_what_the_script_has_as_well_is_left_alone(view: bool) -> None:
    """A gradient that a hook has kept, itself or a view of it, is none of ours to write to."""
    kept: list[Tensor] = []

    def keeping(h: Tensor) -> Tensor:
        other = h.cos()
        first = h.exp()  # the last made is the first to have its gradient, to which the other's is added
        made = first.grad_fn
        assert made is not None
        made.register_hook(lambda inputs, _: kept.append(inputs[0].view(10, 10) if view else inputs[0]))
        return (other + first).sum()

    sums, gradient = backward(keeping)
    assert sums == ["aten.add"]
    assert torch.equal(kept[0].flatten(), torch.linspace(0.1, 1.0, 100).exp())
    assert torch.equal(gradient, unwatched(keeping))


def test_what_python_adds_in_backward_is_its_own() -> None:
    def hooked(h: Tensor) -> Tensor:
        h.register_hook(lambda gradient: gradient + gradient)
        return h.exp().sum()

    sums, gradient = backward(hooked)
    assert sums == ["aten.add"]
    assert torch.equal(gradient, unwatched(hooked))


def test_a_graph_of_gradients_and_an_expanded_one_are_left_alone() -> None:
    leaf = torch.ones(100, requires_grad=True)
    twice, said = leaf * 1, Said()
    with OperatorWatch(said, {}, alone=True):
        (gradient,) = torch.autograd.grad((twice.cos() + twice.exp()).sum(), leaf, create_graph=True)
        expanded = leaf * 1
        (expanded.sum() + expanded.sum()).backward()
    assert gradient.requires_grad and "aten.add_" not in said.operators
