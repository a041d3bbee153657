"""Runs of our own that die where it is aimed at: a limit between what two moments of theirs need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.events import Phase, StepTrace
from gpumem_tui.engine.feed import Start
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.out_of_memory.report import Verdict
from gpumem_tui.engine.run import Run
from gpumem_tui.engine.run_events import Refused, RunFailed
from gpumem_tui.engine.session import Session
from gpumem_tui.profiles import run_fields

WITHOUT_END = 1 << 45
"""Memory limit with which a CPU has the allocator's model, and never refuses."""


class Needs(NamedTuple):
    """What a run needs in torch when nothing is in its way.

    Attributes:
        loaded: When the model is there.
        steps: The most in step 1 and in step 2.
        before_optimizer: The most in step 1 before its optimizer step.
    """

    loaded: int
    steps: tuple[int, int]
    before_optimizer: int


Aim = Callable[[Needs], int]


def loading(needs: Needs) -> int:
    """Dies while the weights are loaded."""
    return needs.loaded // 2


def share(part: float) -> Aim:
    """Dies when it holds this part of what its first step needs beyond the model."""
    return lambda needs: int(needs.loaded + part * (needs.steps[0] - needs.loaded))


def second_step(needs: Needs) -> int:
    """Dies in the second step, half way between what the first needs and what it does."""
    return int(needs.steps[0] + 0.5 * (needs.steps[1] - needs.steps[0]))


def optimizer_step(needs: Needs) -> int:
    """Dies in the first optimizer step."""
    return int(needs.before_optimizer + 0.6 * (needs.steps[0] - needs.before_optimizer))


@dataclass(frozen=True)
class Case:
    """A run, where it is to die, and why."""

    name: str
    settings: dict[str, Any]
    aim: Aim
    expected: Verdict = Verdict.FULL
    gpu_only: bool = False
    cpu_only: bool = False
    model: str = ""


FULL = {"dtype": "float32"}
LORA = {"lora": "on", "dtype": "bfloat16"}
QLORA = LORA | {"quantization": "nf4"}
ONE_ROW = {"batch_size": 1, "seq_len": 32}

CASES = [
    Case("full, loading", FULL, loading),
    Case("full, early", FULL, share(0.3)),
    Case("full, half way", FULL, share(0.6)),
    Case("full, late", FULL, share(0.8)),
    Case("full, second step", FULL, second_step, Verdict.MOVED),
    Case("full, optimizer step", FULL | ONE_ROW, optimizer_step, cpu_only=True),
    Case("bfloat16", {"dtype": "bfloat16"}, share(0.6)),
    Case("bfloat16, second step", {"dtype": "bfloat16"}, second_step, Verdict.MOVED, gpu_only=True),
    Case("mixed", {"dtype": "mixed"}, share(0.6)),
    Case("mixed, second step", {"dtype": "mixed"}, second_step, Verdict.MOVED, gpu_only=True),
    Case("checkpointing", FULL | {"checkpointing": "layers"}, share(0.6)),
    Case("accumulation", FULL | {"accumulation": 2}, share(0.7)),
    Case("accumulation, second step", FULL | {"accumulation": 2}, second_step, Verdict.MOVED, gpu_only=True),
    Case("eager attention", FULL | {"attention": "eager"}, share(0.9)),
    Case("chunked loss", FULL | {"loss": "chunked"}, share(0.6), gpu_only=True),
    Case("SGD", FULL | {"optimizer": "sgd"}, share(0.6)),
    Case("AdamW 8-bit", FULL | {"optimizer": "adamw-8bit"}, share(0.6), gpu_only=True),
    Case("AdamW fused, second step", FULL | {"optimizer": "adamw-fused"}, second_step, Verdict.MOVED),
    Case("long rows", FULL | {"batch_size": 8, "seq_len": 1024}, share(0.6), gpu_only=True),
    Case("LoRA, before the loss", LORA, share(0.55)),
    Case("LoRA, half way", LORA, share(0.6)),
    Case("LoRA, late", LORA, share(0.8)),
    Case("LoRA, checkpointing", LORA | {"checkpointing": "layers"}, share(0.6)),
    Case("QLoRA, early", QLORA, share(0.3), gpu_only=True, model="qwen2.5-0.5b"),
    Case("QLoRA, half way", QLORA, share(0.6), gpu_only=True, model="qwen2.5-0.5b"),
    Case("QLoRA, late", QLORA, share(0.8), gpu_only=True, model="qwen2.5-0.5b"),
    Case("int8", LORA | {"quantization": "int8"}, share(0.8), gpu_only=True, model="qwen2.5-0.5b"),
]


class Bench:
    """One session for all runs.

    Args:
        device: Where.

    Attributes:
        on_gpu: Whether that is a GPU.
    """

    def __init__(self, device: str) -> None:
        self.on_gpu = device != "cpu"
        self._traces: list[StepTrace] = []
        self._session = Session(device, self._seen)
        self._needs: dict[tuple[str, str], Needs] = {}

    def _seen(self, trace: StepTrace) -> None:
        if not trace.is_open:
            self._traces.append(trace)

    def close(self) -> None:
        """End the session."""
        self._session.close()

    def config(self, case: Case) -> RunConfig:
        """The case's run, of two steps, without a limit."""
        # So large that activations have segments of their own: what smaller ones leave of theirs are gaps.
        size = {"batch_size": 16, "seq_len": 512} if self.on_gpu else {"batch_size": 16, "seq_len": 64}
        settings = size | {"rows": 64, "steps": 2} | case.settings
        model = (case.model or "gpt2") if self.on_gpu else "tiny"
        config = techniques.configure(run_fields(model), techniques.parse(settings, case.name))
        return replace(config, trace="every")

    def limited(self, case: Case) -> RunConfig:
        """The case's run with the limit that it is to die of."""
        config = self.config(case)
        wanted = case.aim(self._needs_of(config))
        return replace(config, memory_limit_bytes=wanted + outside_bytes(self.on_gpu))

    def run(self, config: RunConfig) -> Run:
        """Run to the end, however that is."""
        before = self._session.run.id.number if self._session.run is not None else 0
        self._traces.clear()
        self._session.command(Start(config))
        if not self._session.wait(120):
            raise TimeoutError("the run did not end")
        run = next(run for run in self._session.runs() if run.id.number > before)
        failed = [event.text for event in run.events() if isinstance(event, RunFailed | Refused)]
        if failed:
            raise RuntimeError(failed[0])
        return run

    def _needs_of(self, config: RunConfig) -> Needs:
        key = (config.model, techniques.memory_key(config))
        if key not in self._needs:
            self.run(config if self.on_gpu else replace(config, memory_limit_bytes=WITHOUT_END))
            ledgers = {trace.step: Ledger(trace) for trace in self._traces}
            highest = ledgers[1].highest_by_phase
            before = max(size for phase, size in highest.items() if phase not in (Phase.OPTIMIZER, Phase.ZERO_GRAD))
            loaded = sum(ledgers[0].end.values())
            self._needs[key] = Needs(loaded, (ledgers[1].peak.bytes, ledgers[2].peak.bytes), before)
        return self._needs[key]


def outside_bytes(on_gpu: bool) -> int:
    """Of the GPU, neither free nor torch's."""
    if not on_gpu:
        return 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())
