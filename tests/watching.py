"""Training scripts to be watched, all that is said of them, and what hangs on their models."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn.modules import module as torch_module
from torch.optim import optimizer as torch_optimizer

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.events import Phase, StepTrace
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.run_events import RunEvent, StepEnded
from gpumem_tui.engine.watch.leftovers import SCRIPT
from gpumem_tui.engine.watch.watched_source import WatchedSource

if TYPE_CHECKING:
    from transformers import GPTNeoXForCausalLM

Kind = TypeVar("Kind", bound=RunEvent)

EXAMPLES = Path(__file__).parent / "examples"


class Seen:
    """All that was said while scripts were watched."""

    def __init__(self) -> None:
        self.sources: list[WatchedSource] = []
        self.traces: list[StepTrace] = []

    @property
    def ledgers(self) -> list[Ledger]:
        return [Ledger(trace) for trace in self.traces]

    def told(self, kind: type[Kind]) -> list[Kind]:
        return [m for m in self.sources[-1].events(0) if isinstance(m, kind)]


def small_model() -> tuple[GPTNeoXForCausalLM, torch.optim.AdamW]:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM  # for `Seen` alone it would be loaded in vain

    torch.manual_seed(0)
    config = GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=64,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPTNeoXForCausalLM(config)
    # The new name came in with transformers 5.18; the old one warns from then on.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    return model, torch.optim.AdamW(model.parameters())


def train(model: Any, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for step in range(steps):
        ids = torch.arange(32).view(2, 16) + step
        outputs = model(input_ids=ids, labels=ids)
        outputs.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(outputs.loss.item())
    return losses


def hook_tables(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[tuple[int, str, str], Any]:
    """What hangs on modules, on the optimizer and on torch's lists for all of them, their call, and their attributes.

    By place, class and attribute: `(3, "Linear", "_forward_hooks")`. The lists for all have place -1.
    """
    tables: dict[tuple[int, str, str], Any] = {}
    for place, thing in enumerate((*model.modules(), optimizer)):
        kind = type(thing).__name__
        for name, value in vars(thing).items():
            if "hook" in name or callable(value):
                tables[place, kind, name] = copy.copy(value) if "hooks" in name else id(value)
        tables[place, kind, "attributes"] = sorted(vars(thing))
    for lists in (torch_module, torch_optimizer):
        for name, value in vars(lists).items():
            if name.startswith("_global_") and isinstance(value, dict):
                tables[-1, lists.__name__, name] = dict(value)
    tables[-1, "Module", "__call__"] = torch.nn.Module.__call__
    return tables


def check_exact(seen: Seen, script_bytes_max: int = 64) -> None:
    """At every event everything has a name; the sums are the recorder's own at its readings."""
    steps = {m.step: m for m in seen.told(StepEnded)}
    assert [trace.step for trace in seen.traces] == sorted(steps)
    for ledger in seen.ledgers:
        told, after = steps[ledger.trace.step], ledger.after(Phase.OPTIMIZER)
        assert ledger.curve[Category.UNKNOWN].max() == 0
        assert ledger.unmatched_frees == 0
        assert after is not None and sum(after.values()) == told.allocated_bytes
        assert ledger.peak.bytes == told.peak_bytes
        held = ledger.by_name(len(ledger.trace.events) - 1, Category.HELD_BY_SCRIPT)
        assert held.get(SCRIPT, 0) <= script_bytes_max, held


def run_under_exec(*arguments: str, limit: str = "") -> subprocess.Popen[str]:
    limited = ["--memory-limit", limit] if limit else []
    command = [sys.executable, "-m", "gpumem_tui.tui", "exec", *limited, "--", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
