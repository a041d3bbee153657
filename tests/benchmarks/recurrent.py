"""cuDNN's recurrent layers, predicted against measured request by request: `python -m tests.benchmarks.recurrent`.

On one GPU, in a minute or two. Layers are drawn at random: with a seed of their
own they are held out from those that the formulas of `cudnn_rnn` were fitted to,
which are in `results/recurrent.json`. Of packed rows of unlike lengths only the bound
is to hold; they have not been measured before, nor persistent kernels in eval mode.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gpumem_tui.engine.prediction.cuda_kernels import kernels
from gpumem_tui.engine.prediction.cuda_patches import pytorch_paths
from gpumem_tui.engine.prediction.cudnn_rnn import dropout_state_bytes
from gpumem_tui.engine.prediction.fake_cuda import DEVICE, FakeCuda
from gpumem_tui.engine.prediction.gpu_here import gpu_here
from gpumem_tui.engine.prediction.gpus import Gpu
from gpumem_tui.engine.prediction.op_cache import op_cache

FITTED = Path(__file__).parent / "results" / "recurrent.json"
LAYERS = 150
Requests = list[int]
"""Bytes as they were asked for, in order; negative: given back."""


@dataclass(frozen=True)
class Layer:
    """One recurrent layer and the input that it is given.

    Attributes:
        kind: Class of `torch.nn`.
        use: `train`; `infer`: in eval mode, without gradients; `autocast`; `packed`, all rows of one length;
            `ragged`: packed, each row shorter than the one before, or as long.
    """

    kind: str
    input_size: int
    hidden_size: int
    num_layers: int
    rows: int
    steps: int
    bidirectional: bool
    dtype: str
    dropout: float = 0.0
    proj_size: int = 0
    batch_first: bool = True
    bias: bool = True
    use: str = "train"

    def passes(self, device: torch.device, drain: Callable[[], Requests]) -> tuple[Requests, Requests]:
        """Requests of a forward and a backward pass: what is made once was made in those before."""
        dtype = getattr(torch, self.dtype)
        named = (
            "num_layers",
            "bidirectional",
            "dropout",
            "batch_first",
            "bias",
            *(["proj_size"] * bool(self.proj_size)),
        )
        options = {name: getattr(self, name) for name in named}
        layer = getattr(nn, self.kind)(self.input_size, self.hidden_size, **options).to(device, dtype)
        layer.train(self.use != "infer")
        shape = (self.rows, self.steps) if self.batch_first else (self.steps, self.rows)
        x = torch.randn(*shape, self.input_size, device=device, dtype=dtype, requires_grad=True)
        for _ in range(2):
            x.grad = None
            layer.zero_grad()
            drain()
            cast = torch.autocast(device.type, torch.float16, enabled=self.use == "autocast")
            with torch.set_grad_enabled(self.use != "infer"), cast:
                if self.use in ("packed", "ragged"):
                    shorter = self.steps if self.use == "ragged" else 0
                    lengths = [max(1, self.steps - row * shorter // self.rows) for row in range(self.rows)]
                    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, self.batch_first)
                    y, states = nn.utils.rnn.pad_packed_sequence(layer(packed)[0], self.batch_first)
                    del packed
                else:
                    y, states = layer(x)
            forward, backward = drain(), []
            if self.use != "infer":
                y.sum().backward()
                backward = drain()
            del y, states
        return forward, backward


def predicted(layer: Layer, gpu: Gpu, bound: bool = False) -> tuple[Requests, Requests]:
    """Requests of its passes, on fake tensors; for the bound with what kernels may take beside them."""
    recorder = FakeCuda(kernels(gpu))

    def drain() -> Requests:
        seen = recorder.rows()[recorder.starts[-1] :]
        recorder.start()
        requests = []
        for size, slack in zip(seen["bytes"].tolist(), seen["slack"].tolist(), strict=True):
            if size:
                requests.append(size)
            elif bound and slack < 0:
                requests += [-slack, slack]
        return requests

    with pytorch_paths(gpu, recorder), op_cache().mode, recorder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        recorder.start()
        return layer.passes(DEVICE, drain)


def measured(layer: Layer) -> tuple[Requests, Requests]:
    """Requests of its passes, in the trace of CUDA's caching allocator."""

    def drain() -> Requests:
        torch.cuda.synchronize()
        entries = torch._C._cuda_memorySnapshot(None)["device_traces"][0]
        record()
        signs = {"alloc": 1, "free_requested": -1}
        return [signs[entry["action"]] * entry["size"] for entry in entries if entry["action"] in signs]

    def record() -> None:
        torch.cuda.memory._record_memory_history(
            "all", context=None, stacks="python", max_entries=100_000, clear_history=True
        )

    record()
    try:
        return layer.passes(torch.device("cuda"), drain)
    finally:
        torch.cuda.memory._record_memory_history(None)


def drawn(seed: int) -> list[Layer]:
    """Layers of all kinds, most of them trained; every tenth as PyTorch would choose cuDNN's persistent kernels."""
    draw = random.Random(seed)
    layers = []
    for n in range(LAYERS):
        kind, input_size = draw.choice(("LSTM", "GRU", "RNN")), draw.choice((32, 50, 80, 128, 256, 300, 512))
        hidden_size = draw.choice((32, 64, 100, 128, 160, 200, 256, 320, 384, 512, 650, 1024))
        rows, steps = (
            draw.choice((1, 2, 8, 16, 20, 32, 48, 64, 96, 100, 128, 200)),
            draw.choice((1, 5, 20, 64, 128, 180, 300)),
        )
        one = Layer(
            kind, input_size, hidden_size, draw.choice((1, 1, 2, 3, 4)), rows, steps, draw.random() < 0.5,
            draw.choice(("float32", "float16", "bfloat16")), draw.choice((0.0, 0.0, 0.2)),
            hidden_size // 4 if kind == "LSTM" and draw.random() < 0.15 else 0,
            draw.random() < 0.5, draw.random() < 0.9,
            draw.choice(("train", "train", "infer", "autocast", "packed", "ragged")),
        )  # fmt: skip
        layers.append(one)
        if n % 10 == 0:
            sizes = (
                draw.choice((128, 256)),
                draw.choice((256, 512, 1024)),
                1,
                draw.choice((16, 64)),
                draw.choice((20, 64)),
            )
            use = draw.choice(("train", "infer"))
            layers.append(Layer(draw.choice(("LSTM", "RNN")), *sizes, False, "float16", use=use))
    return layers


def fitted() -> list[dict[str, Any]]:
    """The layers that were measured, each with its reserve and workspaces; of many all requests of both passes."""
    table = json.loads(FITTED.read_text(encoding="utf-8"))
    return [dict(zip(table["columns"], row, strict=False)) for row in table["rows"]]


def largest_difference(found: Requests, seen: Requests) -> int:
    """Bytes by which the most that a pass holds is off."""
    tops = []
    for requests in (found, seen):
        held, top = 0, 0
        for size in requests:
            held += size
            top = max(top, held)
        tops.append(top)
    return tops[0] - tops[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=3, help="of the layers drawn (default: 3)")
    parser.add_argument("--json", metavar="FILE", default="recurrent.json", help="where all requests go")
    options = parser.parse_args()
    card = gpu_here()
    if card is None:
        sys.exit("this needs a GPU: it measures what it predicts")
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        nn.LSTM(8, 8, 2, dropout=0.5, device="cuda")(torch.zeros(1, 1, 8, device="cuda"))
    state, expected = torch.cuda.memory_allocated() - before, dropout_state_bytes(card.multiprocessors, card.threads)
    print(f"state of dropout: {state:,} bytes and at most 512 more, predicted {expected:,}")
    rows, exact, too_low = [], 0, 0
    for layer in drawn(options.seed):
        found, seen = predicted(layer, card), measured(layer)
        rows.append(asdict(layer) | {"predicted": found, "measured": seen})
        exact += found == seen
        too_low += any(
            largest_difference(*passes) < 0 for passes in zip(predicted(layer, card, True), seen, strict=True)
        )
        if found != seen:
            off = [largest_difference(*passes) for passes in zip(found, seen, strict=True)]
            print(f"{layer}: forward {off[0]:+,}, backward {off[1]:+,} bytes")
    Path(options.json).write_text(json.dumps({"gpu": card.name, "state": state, "rows": rows}), encoding="utf-8")
    print(f"{exact} of {len(rows)} request by request the same, the bound of {too_low} too low")


if __name__ == "__main__":
    main()
