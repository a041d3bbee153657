"""A fault in watching costs the watching only, and a script's errors are its own."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
from transformers import GPTNeoXForCausalLM

from gpumem_tui.engine import server
from gpumem_tui.engine.publisher import RunPublisher
from gpumem_tui.engine.run_events import OutOfMemory, Refused
from gpumem_tui.engine.tracing import hooks
from gpumem_tui.engine.tracing.op_tracker import OpTracker
from gpumem_tui.engine.tracing.step_writer import StepWriter
from gpumem_tui.engine.tracing.tracer import Tracer
from gpumem_tui.engine.watch import loop, watched_source, watcher
from gpumem_tui.engine.watch import loss as loss_module
from gpumem_tui.engine.watch.loop import WatchedLoop
from gpumem_tui.engine.watch.watched_source import WatchedSource
from gpumem_tui.watch import watch

from .watching import EXAMPLES, Seen, hook_tables, run_under_exec, small_model, train

# transformers and PEFT still use names that newer transformers call deprecated.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore::FutureWarning:(transformers|peft|accelerate)\..*"),
    pytest.mark.usefixtures("frozen_heap", "runtime_folder"),
]


def boom(*_: Any, **__: Any) -> Any:
    raise RuntimeError("injected")


ONCE: list[tuple[Any, str]] = [
    (Tracer, "adopt"), (Tracer, "release"), (watcher.watch, "_install"), (loop, "config_of"),
    (watcher, "device_of"), (WatchedSource, "open"), (WatchedSource, "begin_run"),
]  # fmt: skip
"""What is called once for all that is watched."""

OFTEN: list[tuple[Any, str]] = [
    *[(Tracer, name) for name in ("own_batch", "own_held", "phase", "step", "recomputing")],
    *[(StepWriter, name) for name in ("tag", "own", "name", "leaf", "own_model", "taken")],
    *[(OpTracker, name) for name in ("see", "start", "drain", "stamp", "address", "allocated_bytes", "counters")],
    *[(hooks, name) for name in ("_enter", "_leave", "_before_backward", "_tensor_in")],
    *[(WatchedLoop, name) for name in ("forward_begins", "forward_ends", "_backward_begins", "optimizer_begins")],
    *[(WatchedLoop, name) for name in ("optimizer_ends", "_begin_step", "look_for_others")],
    *[(loop, name) for name in ("batch_of", "_of_outputs", "find_others")],
    *[(WatchedSource, name) for name in ("publish", "stepped", "recomputed")],
    (watched_source, "name_leftovers"), (loss_module.Losses, "note"), (loss_module.Losses, "read"),
    (OpTracker, "look"), (RunPublisher, "read_gauge"),
]  # fmt: skip


def frozen_model() -> tuple[GPTNeoXForCausalLM, torch.optim.AdamW]:
    """Its embedding is frozen and its inputs require gradients, as under LoRA: leaves that get a `.grad`."""
    model, optimizer = small_model()
    model.get_input_embeddings().requires_grad_(False)
    model.enable_input_require_grads()
    return model, optimizer


@pytest.mark.parametrize(
    ("where", "name", "good_calls"),
    [*((*fault, 0) for fault in ONCE + OFTEN), *((*fault, 1) for fault in OFTEN)],
    ids=lambda part: getattr(part, "__name__", str(part)),
)
def test_a_fault_in_watching_is_logged_once_and_the_run_goes_on(
    where: Any, name: str, good_calls: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alone = train(*frozen_model(), 3)
    model, optimizer = frozen_model()
    before = hook_tables(model, optimizer)
    good, calls = getattr(where, name), 0

    def fails(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return good(*args, **kwargs) if calls <= good_calls else boom()

    monkeypatch.setattr(where, name, fails)
    with caplog.at_level(logging.WARNING), watch(model, optimizer) as watched:
        assert train(model, optimizer, 3) == alone
        if watched.barrier.off:
            with torch.no_grad():
                model(input_ids=torch.zeros(1, 2, dtype=torch.int64))
            assert hook_tables(model, optimizer) == before, "the next forward takes everything away"
    assert hook_tables(model, optimizer) == before
    warned = [record.getMessage() for record in caplog.records if record.name == "gpumem_tui.watch"]
    assert calls > good_calls, "the fault was never injected"
    assert len(warned) == 1 and "the run goes on: injected" in warned[0]


@pytest.mark.parametrize("where", [(server.Server, "serve"), (watched_source, "EngineLock")])
def test_a_fault_in_serving_costs_the_viewers_only(
    where: tuple[Any, str], seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*where, boom)
    model, optimizer = small_model()
    with watch(model, optimizer):
        assert len(train(model, optimizer, 3)) == 3


def test_exceptions_of_the_script_are_the_scripts(seen: Seen) -> None:
    model, optimizer = small_model()
    with pytest.raises(IndexError), watch(model, optimizer):
        model(input_ids=torch.full((1, 4), 1_000_000))
    assert not seen.told(Refused), "watching itself has not failed"
    with pytest.raises(torch.OutOfMemoryError), watch(model, optimizer):
        train(model, optimizer, 1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert "2.00 GiB" in seen.told(OutOfMemory)[0].text
    with pytest.raises(TypeError, match=r"is no torch\.optim\.Optimizer"):
        watch(model, "adamw")


# Torch's own frames differ wherever a module has a hook; a caption of a group of errors is no source line.
TORCH_FRAME = re.compile(r'^[ |]*File "[^"]*/torch/[^"]*", line \d+, in .*\n(?:[ |]* {4}(?!\+)(?!.*File ").*\n)*', re.M)


@pytest.mark.usefixtures("interruptible")
def test_errors_of_a_script_are_printed_and_end_it_as_without_watching() -> None:
    """Traceback, cause, notes and exit code; KeyboardInterrupt among them."""
    raising = [sys.executable, str(EXAMPLES / "raising.py")]
    alone = subprocess.Popen(raising, stderr=subprocess.PIPE, text=True)
    watched = subprocess.Popen([*raising, "watched"], stderr=subprocess.PIPE, text=True)
    under_exec = run_under_exec(*raising)
    expected, *told = (TORCH_FRAME.sub("", script.communicate()[1]) for script in (alone, watched, under_exec))
    assert "Traceback" in expected and "\ninterrupted -2\n" in expected and "\nexits 3\n" in expected
    for printed in told:
        ours, theirs = split_lines(printed)
        assert theirs == expected
        assert all("; to see it: gpumem-tui attach raising" in line for line in ours)


def split_lines(printed: str) -> tuple[list[str], str]:
    """The lines that gpumem-tui has said, and the script's own text."""
    lines = printed.splitlines(keepends=True)
    ours = [line for line in lines if line.startswith("gpumem-tui: ")]
    return ours, "".join(line for line in lines if line not in ours)


WITHOUT_DESCRIPTORS = """
import os, resource, torch
model = torch.nn.Linear(4, 4)
torch.optim.SGD([torch.ones(1, requires_grad=True)], 0.1).step()  # loads what a first optimizer loads
soft, hard = len(os.listdir("/proc/self/fd")) - 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(3):
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
print("trained")
"""


def test_a_script_that_has_no_descriptors_left_is_left_alone() -> None:
    script = run_under_exec(sys.executable, "-c", WITHOUT_DESCRIPTORS)
    out, err = script.communicate(timeout=100)
    assert (script.returncode, out) == (0, "trained\n"), err
    (ours,) = [line for line in err.splitlines() if "gpumem" in line]
    assert ours.startswith("gpumem-tui: not watched, the run goes on: "), err
