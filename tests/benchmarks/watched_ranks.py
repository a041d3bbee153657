"""Other people's loops on several ranks, each watched: what of every rank's memory has no owner.

    python -m tests.benchmarks.watched_ranks [--ranks 2] [--only fsdp2,zero3] [--small] [--json FILE]

On GPUs at a real size over NCCL, on a CPU tiny over gloo. torchrun starts the ranks; if a case
fails or hangs, that is said and they are started again for the cases after it. A line for every
case and rank: the peak, unknown bytes, held by the script, gathered (U), communication (C), NCCL
outside of torch, and how far the sums are from the allocator's own counters. Fails where anything
is unknown, more than 1 % of the peak is held by the script, or a sum is off.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT = 0.01
CASE_TAKES_S = 75.0
"""A case that has told nothing for so long hangs."""

NCCL_WITHIN = 16 << 20

TRAINS = 6
"""Steps of a case."""


@dataclasses.dataclass
class Told:
    """What one rank tells of one case; sizes in bytes, the most of any traced step.

    Attributes:
        problem: Why it could not be run, or watched; empty: all went well.
        missing: The library that it needs and that is not there.
        steps: That were traced.
        nccl: Outside of torch's allocator, in NCCL's buffers; None: not known.
        nccl_off: A second communicator's, from what the process holds more on its GPU with it.
    """

    case: str
    rank: int
    problem: str = ""
    missing: str = ""
    steps: int = 0
    peak: int = 0
    unknown: int = 0
    held: int = 0
    gathered: int = 0
    communication: int = 0
    mismatch: int = 0
    nccl: int | None = None
    nccl_off: int = 0

    @property
    def failed(self) -> bool:
        """True where anything is not as it should be."""
        wrong = self.unknown or self.mismatch or self.held > max(LIMIT * self.peak, 1 << 17)
        wrong |= abs(self.nccl_off) > NCCL_WITHIN or (not self.steps and self.case != "nccl")
        return not self.missing and bool(self.problem or wrong)

    def line(self) -> str:
        """For people."""
        head = f"{self.case:18} rank {self.rank}  "
        if self.missing:
            return f"{head}not run: {self.missing}"
        if self.problem:
            return f"{head}FAILED: {self.problem}"
        if self.case == "nccl":
            return f"{head}NCCL {self.nccl} B, {self.nccl_off} B off{'   <-- FAILED' if self.failed else ''}"
        nccl = "–" if self.nccl is None else f"{self.nccl / 2**20:.0f}"
        return (
            f"{head}{self.steps} steps, peak {self.peak / 2**20:9.1f} MiB, unknown {self.unknown} B, held by script "
            f"{self.held / 2**20:.3f} MiB, U {self.gathered / 2**20:.1f}, C {self.communication / 2**20:.1f}, "
            f"NCCL {nccl} MiB, mismatch {self.mismatch} B{'   <-- FAILED' if self.failed else ''}"
        )


# --- starting the ranks ---------------------------------------------------------------


def main() -> int:
    """Run all cases; a line for each case and rank."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--ranks", type=int, default=0)
    flags.add_argument("--only", default="")
    flags.add_argument("--small", action="store_true")
    flags.add_argument("--json", type=Path)
    flags.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    chosen = flags.parse_args()
    wanted = [case for case in CASES if not chosen.only or case in chosen.only.split(",")]
    if chosen.folder is not None:
        return _as_rank(chosen.folder, wanted, chosen.small)
    ranks = chosen.ranks or max(2, _gpus())
    told: list[Told] = []
    with tempfile.TemporaryDirectory(prefix="w-") as folder:
        left = wanted
        while left:
            together = list(next(itertools.groupby(left, _setting))[1])
            left = [*_start(Path(folder), together, ranks, chosen.small, told), *left[len(together) :]]
    if chosen.json is not None:
        chosen.json.write_text(json.dumps([dataclasses.asdict(one) for one in told], indent=1) + "\n")
    failed = sum(one.failed for one in told)
    print(f"{len(told)} cases and ranks, {failed} failed")
    return int(failed > 0)


def _setting(case: str) -> str:
    """Cases of one setting can follow one another in a process.

    accelerate leaves a state of the process behind, and torch's FSDP1 its flat parameters.
    """
    return case if case.startswith(("accelerate", "trainer", "fsdp1")) else "zero" * case.startswith("zero")


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _start(folder: Path, cases: list[str], ranks: int, small: bool, told: list[Told]) -> list[str]:
    """Run cases on ranks of their own until one fails; returns those that are left."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
        "-m", "tests.benchmarks.watched_ranks", "--folder", str(folder), "--only", ",".join(cases),
        *(["--small"] if small else []),
    ]  # fmt: skip
    environment = os.environ | {"XDG_RUNTIME_DIR": str(folder), "TOKENIZERS_PARALLELISM": "false"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    log = folder / "log"
    with log.open("w") as output:
        job = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        done, began_s = 0, time.monotonic()
        while done < len(cases):
            files = [folder / f"{cases[done]}-{rank}.json" for rank in range(ranks)]
            if all(file.exists() for file in files):
                found = [Told(**json.loads(file.read_text())) for file in files]
                for one in found:
                    told.append(one)
                    print(one.line(), flush=True)
                done, began_s = done + 1, time.monotonic()
                if any(one.problem for one in found):  # ranks may have lost step: start anew
                    break
            elif job.poll() is not None or time.monotonic() - began_s > CASE_TAKES_S:
                why = "hangs" if job.poll() is None else f"ended with {job.returncode}"
                last = [line for line in log.read_text(errors="replace").splitlines() if "Error" in line][-1:]
                told.append(Told(cases[done], -1, problem=f"{why}; {' '.join(last)[:300]}"))
                print(told[-1].line(), flush=True)
                done += 1
                break
            else:
                time.sleep(0.1)
        else:
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(20.0)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)
        job.wait()
    return cases[done:]


def _as_rank(folder: Path, cases: list[str], small: bool) -> int:
    """Run the cases on this rank, and write what is told of each."""
    import gc
    from datetime import timedelta

    import torch
    from torch import distributed

    from gpumem_tui.engine import nccl

    rank = int(os.environ["RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    nccl.observe()  # as under `exec`
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=60))
    for case in cases:
        told = Told(case, rank)
        try:
            (_measure_nccl if case == "nccl" else _run)(told, Scale(device, device.type == "cuda" and not small))
        except ImportError as error:
            told.missing = str(error)
        except Exception as error:
            traceback.print_exc()
            told.problem = f"{type(error).__name__}: {error}"[:300]
        partial = folder / f".{case}-{rank}"
        partial.write_text(json.dumps(dataclasses.asdict(told)))
        partial.rename(folder / f"{case}-{rank}.json")
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    distributed.destroy_process_group()
    return 0


# --- the loops ------------------------------------------------------------------------


@dataclasses.dataclass
class Scale:
    """Where, and how large."""

    device: Any
    big: bool

    def model(self) -> Any:
        """A GPT-NeoX: 220 million parameters, or a tiny one."""
        import torch
        from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

        torch.manual_seed(0)
        hidden, layers = (1024, 12) if self.big else (64, 3)
        config = GPTNeoXConfig(
            hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=4 * hidden,
            vocab_size=32_000 if self.big else 128, max_position_embeddings=512, bos_token_id=0, eos_token_id=0,
            use_cache=False,
        )  # fmt: skip
        return GPTNeoXForCausalLM(config)

    def rows(self) -> tuple[int, int]:
        """Rows of a micro-batch, and their tokens."""
        return (4, 512) if self.big else (2, 16)


Loop = Callable[[Scale], Any]
"""Trains, watched; returns the `watch`."""


def _loop(scale: Scale, model: Any, optimizer: Any, accumulation: int = 1, backward: Any = None) -> Any:
    import torch

    from gpumem_tui.watch import watch

    with watch(model, optimizer, every_step=True) as watching:
        for _ in range(TRAINS):
            for micro_batch in range(accumulation):
                ids = torch.randint(0, 128, scale.rows(), device=scale.device)
                idle = micro_batch < accumulation - 1 and hasattr(model, "no_sync")
                with model.no_sync() if idle else contextlib.nullcontext():
                    loss = model(input_ids=ids, labels=ids).loss / accumulation
                    backward(loss) if backward is not None else loss.backward()
                del ids, loss
            optimizer.step()
            optimizer.zero_grad()
    return watching


def _adam(model: Any) -> Any:
    import torch

    return torch.optim.AdamW(model.parameters(), 1e-4)


def ddp(scale: Scale, accumulation: int = 1, **how: Any) -> Any:
    """DistributedDataParallel."""
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(scale.model().to(scale.device), **how)
    return _loop(scale, model, _adam(model), accumulation)


def fsdp2(scale: Scale, mixed: bool = False, accumulation: int = 1, offload: bool = False, **how: Any) -> Any:
    """`fully_shard`."""
    import torch
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    if mixed:
        how["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=scale.device.type == "cuda")
    model = scale.model()
    for layer in model.gpt_neox.layers:
        fully_shard(layer, **how)
    fully_shard(model, **how)
    if not offload:
        model.to(scale.device)
    return _loop(scale, model, _adam(model), accumulation)


def fsdp1(scale: Scale, mixed: bool = False, **how: Any) -> Any:
    """FullyShardedDataParallel."""
    import torch
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer

    if mixed:
        how["mixed_precision"] = MixedPrecision(torch.bfloat16, torch.float32, torch.bfloat16)
    model = FullyShardedDataParallel(
        scale.model(), auto_wrap_policy=ModuleWrapPolicy({GPTNeoXLayer}), device_id=scale.device, **how
    )
    return _loop(scale, model, _adam(model))


def zero(scale: Scale, stage: int, overlap: bool = False) -> Any:
    """DeepSpeed."""
    import deepspeed
    import torch

    from gpumem_tui.watch import watch

    settings = {
        "train_micro_batch_size_per_gpu": scale.rows()[0],
        "zero_optimization": {
            "stage": stage, "overlap_comm": overlap, "reduce_bucket_size": 50_000_000 if scale.big else 20_000,
        },
        "bf16": {"enabled": True}, "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    model = scale.model()
    engine = deepspeed.initialize(model=model, optimizer=_adam(model), config=settings, dist_init_required=False)[0]
    with watch(engine, engine, every_step=True) as watching:
        for _ in range(TRAINS):
            ids = torch.randint(0, 128, scale.rows(), device=scale.device)
            loss = engine(input_ids=ids, labels=ids).loss
            engine.backward(loss)
            engine.step()
            del ids, loss
    engine.destroy()
    return watching


def accelerate(scale: Scale, sharded: bool = False) -> Any:
    """accelerate's `prepare`, under DDP or FSDP2."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    plugin = None
    if sharded:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["GPTNeoXLayer"]
        )
    accelerator = Accelerator(fsdp_plugin=plugin, cpu=scale.device.type == "cpu")
    model = scale.model()
    model, optimizer = accelerator.prepare(model, _adam(model))
    try:
        return _loop(scale, model, optimizer, backward=accelerator.backward)
    finally:
        type(accelerator.state)._reset_state(True)


def trainer(scale: Scale, **how: Any) -> Any:
    """transformers' Trainer with its callback."""
    import torch
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from transformers import Trainer, TrainingArguments

    from gpumem_tui.watch import MemoryCallback

    rows, tokens = scale.rows()
    ids = torch.randint(0, 128, (rows * TRAINS * int(os.environ["WORLD_SIZE"]), tokens))
    data = [{"input_ids": row, "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output, max_steps=TRAINS, per_device_train_batch_size=rows, report_to="none", save_strategy="no",
            logging_steps=2, use_cpu=scale.device.type == "cpu", disable_tqdm=True, **how,
        )  # fmt: skip
        callback = MemoryCallback(every_step=True)
        kept: list[Any] = []
        callback.on_step_begin = lambda *_, **__: kept.append(callback.watch)
        Trainer(scale.model(), arguments, train_dataset=data, callbacks=[callback]).train()
    AcceleratorState._reset_state()
    PartialState._reset_state()
    return kept[-1]


def deepspeed_trainer(scale: Scale) -> Any:
    """The Trainer with DeepSpeed's stage 2, sizes as it sets them."""
    import deepspeed  # noqa: F401

    settings = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}, "bf16": {"enabled": "auto"},
        "train_micro_batch_size_per_gpu": "auto", "train_batch_size": "auto", "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    return trainer(scale, deepspeed=settings, bf16=True)


FSDP_OF_TRAINER = {"transformer_layer_cls_to_wrap": ["GPTNeoXLayer"], "fsdp_version": 2}

CASES: dict[str, Loop] = {
    "ddp": ddp,
    "ddp-view": functools.partial(ddp, gradient_as_bucket_view=True),
    "ddp-accumulation": functools.partial(ddp, accumulation=2),
    "fsdp2": fsdp2,
    "fsdp2-mixed": functools.partial(fsdp2, mixed=True),
    "fsdp2-kept": functools.partial(fsdp2, reshard_after_forward=False),
    "fsdp2-offload": functools.partial(fsdp2, offload=True),
    "fsdp1": fsdp1,
    "fsdp1-mixed": functools.partial(fsdp1, mixed=True, use_orig_params=True),
    "accelerate-ddp": accelerate,
    "accelerate-fsdp2": functools.partial(accelerate, sharded=True),
    "trainer-ddp": trainer,
    "trainer-fsdp2": functools.partial(trainer, fsdp="full_shard auto_wrap", fsdp_config=FSDP_OF_TRAINER),
    "zero1": functools.partial(zero, stage=1),
    "zero2": functools.partial(zero, stage=2, overlap=True),
    "zero3": functools.partial(zero, stage=3),
    "trainer-zero2": deepspeed_trainer,
    "nccl": lambda _: None,
}


def _measure_nccl(told: Told, scale: Scale) -> None:
    """What is told of NCCL; of a second communicator, when kernels are loaded, against what the process holds more."""
    import torch
    from torch import distributed

    from gpumem_tui.engine import nccl
    from gpumem_tui.engine.device import Nvml

    if scale.device.type == "cpu":
        raise ImportError("NCCL needs GPUs")
    nvml, ranks = Nvml(scale.device), distributed.get_world_size()
    whole, part = torch.ones(ranks << 20, device=scale.device), torch.ones(1 << 20, device=scale.device)

    def held_after_collectives(group: Any) -> tuple[int, int]:
        distributed.all_reduce(whole, group=group)
        distributed.all_gather_into_tensor(whole, part, group=group)
        distributed.reduce_scatter_tensor(part, whole, group=group)
        distributed.broadcast(part, 0, group=group)
        torch.cuda.synchronize()
        process = nvml.process_bytes()
        beyond = (nvml.used_bytes() if process is None else process) - torch.cuda.memory_reserved()
        return nccl.held_bytes(scale.device) or 0, beyond

    told.nccl, before = held_after_collectives(None)
    of_two, after = held_after_collectives(distributed.new_group())
    told.nccl_off = of_two - told.nccl - (after - before)


def _run(told: Told, scale: Scale) -> None:
    """Run a case, and tell what was seen of it."""
    from gpumem_tui.engine.categories import Category
    from gpumem_tui.engine.ledger import Ledger

    source = CASES[told.case](scale).source
    refused = [event.text for event in source.events(0) if event.kind == "refused"]
    told.problem = refused[0] if refused else ""
    traces = source.run.traces() if source.run is not None else []
    ledgers = [Ledger(trace) for trace in traces if trace.is_complete and trace.step]

    def most(category: Category) -> int:
        return max((int(ledger.curve[category].max()) for ledger in ledgers), default=0)

    told.steps = len(ledgers)
    told.peak = max((ledger.peak.bytes for ledger in ledgers), default=0)
    told.mismatch = max((ledger.mismatch_bytes for ledger in ledgers), default=0)
    told.unknown, told.held = most(Category.UNKNOWN), most(Category.HELD_BY_SCRIPT)
    told.gathered, told.communication = most(Category.GATHERED), most(Category.COMMUNICATION)
    gauge = source.run.gauge if source.run is not None else None
    told.nccl = getattr(gauge, "nccl_bytes", None)


if __name__ == "__main__":
    sys.exit(main())
