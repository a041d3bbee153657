"""Training loops that raise, some of them ending an interpreter of their own: raising.py [watched]"""

import contextlib
import dataclasses
import gc
import os
import signal
import sys
from collections.abc import Callable

import torch
import torch._dynamo  # here, not in every child

from gpumem_tui.watch import watch


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, fails: bool = False) -> torch.Tensor:
        if fails:
            raise ValueError("in forward")
        return self.layer(x)


class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, gradient: torch.Tensor) -> torch.Tensor:
        raise ValueError("in backward")


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    """Its traceback cannot be set from Python."""

    why: str


class TwoArgumentsError(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)
        self.two = two

    def __str__(self) -> str:
        raise RuntimeError("cannot be printed")


def wrong_shape(model: Net) -> None:
    model(torch.ones(2, 5))


def in_forward(model: Net) -> None:
    model(torch.ones(2, 4), fails=True)


def in_backward(model: Net) -> None:
    Backward.apply(model(torch.ones(2, 4))).sum().backward()


def in_backward_twice(model: Net) -> None:
    loss = model(torch.ones(2, 4)).square().sum()
    loss.backward()
    loss.backward()


def chained(model: Net) -> None:
    try:
        wrong_shape(model)
    except RuntimeError as error:
        raise LookupError("from another") from error


def during_another(model: Net) -> None:
    try:
        wrong_shape(model)
    finally:
        {}["missing"]


def with_a_note(model: Net) -> None:
    error = OSError(5, "no such disk")
    error.add_note("a note")
    raise error


def group(model: Net) -> None:
    errors = []
    for fail in (wrong_shape, in_forward):
        try:
            fail(model)
        except Exception as error:
            errors.append(error)
    raise ExceptionGroup("two at once", errors)


def recursion(model: Net) -> None:
    recursion(model)


def frozen(model: Net) -> None:
    raise FrozenError("as it is")


def unprintable(model: Net) -> None:
    raise TwoArgumentsError("one", "two")


def out_of_memory(model: Net) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def stop_iteration(model: Net) -> None:
    next(iter(()))


def interrupted(model: Net) -> None:
    signal.raise_signal(signal.SIGINT)


def exits(model: Net) -> None:
    sys.exit(3)


ENDS = [in_backward, interrupted, exits]
KINDS: list[Callable[[Net], None]] = [
    wrong_shape, in_forward, in_backward, in_backward_twice, chained, during_another, with_a_note, group, recursion,
    frozen, unprintable, out_of_memory, stop_iteration, interrupted,
]  # fmt: skip


def loop(kind: Callable[[Net], None]) -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer) if "watched" in sys.argv else contextlib.nullcontext():
        for step in range(2):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
            if step:
                kind(model)


gc.collect()
gc.freeze()  # each watch looks for other models among all objects

for kind in ENDS:
    child = os.fork()
    if not child:
        loop(kind)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(kind.__name__, status, file=sys.stderr, flush=True)
for kind in KINDS:
    print(kind.__name__, file=sys.stderr)
    try:
        loop(kind)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
