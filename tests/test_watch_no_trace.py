"""A watched model is what it is unwatched: pickled, copied, exported, compiled, and left as it was."""

from __future__ import annotations

import copy
import io
import pickle
import re
import signal
import sys
import threading
import types
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch.nn.modules import module as torch_module
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from gpumem_tui.engine import recompute
from gpumem_tui.engine.tracing.module_hooks import keyword_arguments, module_hooks
from gpumem_tui.engine.tracing.op_tracker import OpTracker
from gpumem_tui.watch import watch

pytestmark = pytest.mark.usefixtures("frozen_heap", "runtime_folder")


class Body(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.layer(x)
        return hidden.relu()


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Body(), torch.nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.body(x))
        return scores


def small() -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Net()
    return model, torch.optim.SGD(model.parameters(), 0.1)


def train(call: Callable[..., torch.Tensor], optimizer: torch.optim.Optimizer, steps: int = 2) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = call(torch.ones(3, 4)).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def contents(model: torch.nn.Module) -> list[Any]:
    """All attributes of all modules, and how many hooks they have."""
    return [
        {name: len(value) if "hooks" in name else type(value) for name, value in vars(module).items()}
        for module in model.modules()
    ]


def pickled(model: Net) -> int:
    return len(pickle.dumps(model))


def saved(model: Net) -> int:
    file = io.BytesIO()
    torch.save(model, file)
    return len(file.getvalue())


def spawned(model: Net) -> int:
    """As `multiprocessing` hands it to a process."""
    return len(bytes(ForkingPickler.dumps(copy.deepcopy(model))))


def copied(model: Net) -> list[Any]:
    return contents(copy.deepcopy(model))


def exported(model: Net) -> int:
    return len(torch.export.export(model, (torch.ones(3, 4),)).graph.nodes)


def strictly_exported(model: Net) -> int:
    return len(torch.export.export(model, (torch.ones(3, 4),), strict=True).graph.nodes)


def scripted(model: Net) -> str:
    return unnumbered(torch.jit.script(model).graph)  # type: ignore[no-untyped-call]


def traced(model: Net) -> str:
    return unnumbered(torch.jit.trace(model, torch.ones(3, 4)).inlined_graph)


def unnumbered(graph: Any) -> str:
    """Without the numbers that TorchScript gives to classes of one name."""
    return re.sub(r"___torch_mangle_\d+\.", "", str(graph))


def transformed(model: Net) -> torch.Size:
    return torch.vmap(torch.func.jacrev(model))(torch.ones(5, 4)).shape


USES: list[Callable[[Net], Any]] = [
    pickled, saved, spawned, copied, exported, strictly_exported, scripted, traced, transformed
]  # fmt: skip


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_watched_model_is_used_as_an_unwatched_one(use: Callable[[Net], Any]) -> None:
    results = []
    for watching in (False, True):
        model, optimizer = small()
        scope = watch(model, optimizer) if watching else nullcontext()
        before = contents(model)
        with scope:
            train(model, optimizer)
            assert contents(model) == before, "nothing hangs on a watched model"
            results.append(use(model))
            train(model, optimizer)
            assert not watching or not scope.barrier.off  # type: ignore[union-attr]
    assert results[0] == results[1]


def checkpointed() -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    # The new name came in with transformers 5.18; the old one warns from then on.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    return model


def test_checkpointed_layers_are_copied_and_pickled_without_their_observer() -> None:
    model = checkpointed()
    before, layers = contents(model), model.gpt_neox.layers
    with watch(model, torch.optim.SGD(model.parameters(), 0.1)):
        packed = pickle.dumps(layers)
        assert b"gpumem" not in packed
        assert contents(pickle.loads(packed)) == contents(copy.deepcopy(layers)) != contents(layers)
        ids = torch.zeros(1, 4, dtype=torch.int64)
        copy.deepcopy(model)(input_ids=ids, labels=ids).loss.backward()
    assert contents(model) == before


@pytest.mark.parametrize("how", ["torch.compile", "in place", "a layer in place"])
def test_a_compiled_model_stays_compiled(how: str) -> None:
    """As many graphs, no break, and the same losses."""
    told = []
    for watching in (False, True):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        model, optimizer = small()
        call: Any = model
        if how == "torch.compile":
            call = torch.compile(model, backend=counter)
        else:
            (model if how == "in place" else model.body).compile(backend=counter)
        before = contents(model)
        with watch(model, optimizer) if watching else nullcontext() as watched:
            losses = train(call, optimizer, 3)
            assert not watching or not watched.barrier.off  # type: ignore[union-attr]
        assert contents(model) == before
        told.append((losses, counter.frame_count, counter.op_count))
    assert told[0] == told[1]
    assert told[0][1] == 1


# --- the hooks ------------------------------------------------------------------------------


class Caller(torch.nn.Module):
    """Its class has a call of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        if scale < 0:
            raise ValueError("negative")
        scaled: torch.Tensor = self.inner(x) * scale
        return scaled

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("kind", [Caller, Net])
def test_hooks_are_for_their_module_alone(kind: type[torch.nn.Module]) -> None:
    told: list[Any] = []
    model, other = kind(), kind()
    own = vars(kind).get("__call__")

    def before(module: torch.nn.Module, args: Any) -> None:
        told.append((module, len(args), dict(keyword_arguments())))

    def after(module: torch.nn.Module, _args: Any, output: Any) -> None:
        told.append((module, None if output is None else tuple(output.shape)))

    undo = module_hooks.add(model, before, after), module_hooks.add(model, before, after)
    assert not torch_module._has_any_global_hook(), "every module's call would take torch's slow path"
    other(torch.ones(3, 4))
    assert not told
    copy.deepcopy(model)(torch.ones(3, 4))
    assert not told
    model(torch.ones(3, 4))
    assert told == [(model, 1, {})] * 2 + [(model, (3, 2))] * 2
    undo[0]()
    if kind is Caller:
        told.clear()
        with pytest.raises(ValueError, match="negative"):
            model(torch.ones(3, 4), scale=-1.0)
        assert told == [(model, 1, {"scale": -1.0}), (model, None)]
    undo[1]()
    assert vars(kind).get("__call__") is own
    told.clear()
    model(torch.ones(3, 4))
    assert not told


def test_hooks_are_called_once_beneath_somebody_elses_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was put around ours and has stayed."""
    told: list[Any] = []
    model, plain = Net(), torch.nn.Module.__call__
    undo = module_hooks.add(model, lambda *_: None, lambda *_: None)
    ours = torch.nn.Module.__call__

    def around(*args: Any, **kwargs: Any) -> Any:
        return ours(*args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", around)
    undo()
    undo = module_hooks.add(model, lambda *_: told.append("before"), lambda *_: told.append("after"))
    model(torch.ones(3, 4))
    assert told == ["before", "after"]
    monkeypatch.undo()
    undo()
    assert torch.nn.Module.__call__ is plain


# --- away again, in whatever order ----------------------------------------------------------


def global_state() -> tuple[Any, ...]:
    modes = _python_dispatch._get_current_dispatch_mode_stack()
    flags = {name: value for name, value in vars(_python_dispatch).items() if name.startswith("_is_in_")}
    return (
        modes,
        flags,
        torch.nn.Module.__call__,
        torch_module._has_any_global_hook(),
        recompute.observers.listeners,
        sys.excepthook,
    )


def test_watches_that_end_in_the_wrong_order_leave_nothing() -> None:
    before = global_state()
    model, optimizer = small()
    layers = checkpointed()
    contents_before = contents(layers)
    one, other = watch(model, optimizer), watch(layers, torch.optim.SGD(layers.parameters(), 0.1))
    third = watch(layers, torch.optim.SGD(layers.parameters(), 0.1))
    for each in (one, other, third):
        each.begin()
    one.end()
    train(model, optimizer)
    other.end()
    third.end()
    assert global_state() == before
    assert contents(layers) == contents_before


class Counting(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_watch_that_ends_beneath_a_mode_of_the_scripts_is_gone_and_the_mode_stays() -> None:
    before = global_state()
    model, optimizer = small()
    watched = watch(model, optimizer)
    watched.begin()
    with Counting() as counting:
        train(model, optimizer)
        watched.end()
        assert _python_dispatch._get_current_dispatch_mode_stack() == [counting]
        counted = counting.count
        torch.ones(1)
        assert counting.count == counted + 1
    assert global_state() == before


# --- Ctrl-C --------------------------------------------------------------------------------


def test_nothing_of_ours_runs_where_an_interrupt_would_be_lost() -> None:
    """A weak reference's callback written in Python would swallow it: PyTorch frees tensors anywhere."""
    with OpTracker() as tracker:
        tensor = torch.ones(3)
    (reference,) = weakref.getweakrefs(tensor.untyped_storage())
    assert isinstance(reference.__callback__, types.BuiltinMethodType)
    assert tracker.allocated_bytes() == tensor.nbytes
    del tensor
    assert tracker.allocated_bytes() == 0


@pytest.mark.usefixtures("interruptible")
@pytest.mark.filterwarnings("ignore:.*meminfo:pytest.PytestUnraisableExceptionWarning")  # between its open and its with
def test_interrupts_end_a_watched_loop() -> None:
    """Wherever they arrive; `tests.benchmarks.watched_interrupts` tries 200."""
    model, optimizer = small()
    for moment in range(10):
        interrupt = threading.Timer(0.02 + 0.003 * moment, signal.raise_signal, [signal.SIGINT])
        with pytest.raises(KeyboardInterrupt), watch(model, optimizer):
            interrupt.start()
            train(model, optimizer, 100_000)
        interrupt.join()
