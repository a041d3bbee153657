"""The memory calculator's table, every figure from a prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..config import RunConfig, Value
from ..workload import build
from .alloc_requests import AllocRequests
from .allocator_replay import Replay
from .caching_allocator import CachingAllocator
from .cuda_kernels import kernels, take_workspaces
from .cuda_patches import cuda_paths
from .fake_cuda import FakeCuda
from .gpus import Gpu
from .op_cache import op_cache
from .outcome import Prediction
from .rehearsal import planned

_GIVEN = ("input_ids", "pixel_values", "input_features")
"""Arguments of a model that is used and not trained."""


class _Row(NamedTuple):
    """One of the calculator's rows.

    Attributes:
        name: Of the data type.
        loaded: How the weights are loaded.
        trained: What training sets besides.
    """

    name: str
    loaded: dict[str, Value]
    trained: dict[str, Value]


CALCULATOR = (
    _Row("float32", {"dtype": "float32"}, {}),
    _Row("float16/bfloat16", {"dtype": "bfloat16"}, {}),
    _Row("int8", {"dtype": "bfloat16", "quantization": "int8"}, {"dtype": "mixed"}),
    _Row("int4", {"dtype": "bfloat16", "quantization": "nf4"}, {"dtype": "mixed"}),
)
"""Beside quantized weights all activations are 16 bit as well, by autocast: rows differ by the weights alone."""

_PLAIN: dict[str, Value] = {"lora": False, "quantization": "none", "optimizer": "adamw", "loss_scaling": False}
SETS = ("dtype", *_PLAIN)
"""Settings of which the table has all values that it is about."""


def calculator(config: RunConfig, predicted: Callable[[RunConfig], Prediction], gpu: Gpu) -> list[dict[str, Any]]:
    """The memory calculator's table: bytes by data type of the weights and by what is done with them.

    Weights: what is allocated once they are loaded. Inference: the peak of one
    forward pass without gradients. The others: the peak of training, where
    quantized weights can only be trained beside (QLoRA). Batch, sequence and
    whatever else is set are those of the configuration.

    Args:
        config: The run.
        predicted: Predicts runs on the GPU.
        gpu: Which one.
    """
    rows: list[dict[str, Any]] = []
    for name, how_loaded, how_trained in CALCULATOR:
        as_loaded = config.with_(_PLAIN | how_loaded)
        full = as_loaded.with_(how_trained)
        adapters = full.with_({"lora": True})
        quantized = full["quantization"] != "none"
        loaded, inference = _inference(as_loaded, gpu)
        rows.append(
            {
                "dtype": name,
                "weights_bytes": loaded,
                "inference_bytes": inference,
                "training_adam_bytes": None if quantized else predicted(full).peak_bytes,
                "lora_bytes": None if quantized else predicted(adapters).peak_bytes,
                "qlora_bytes": predicted(adapters).peak_bytes if quantized else None,
            }
        )
    return rows


def _inference(config: RunConfig, gpu: Gpu) -> tuple[int, int]:
    """Bytes loaded, and the peak of a forward pass over one batch without gradients."""
    plan = planned(config)
    plan.recipe.transforms.clear()  # what prepares for training
    recorder = FakeCuda(kernels(gpu))
    with cuda_paths(gpu, recorder, plan.recipe.libraries), op_cache().mode, recorder:
        take_workspaces(gpu, recorder)
        before = len(recorder.rows())
        model = build(plan).model.eval()
        loaded = len(recorder.rows())
        with torch.no_grad():
            batch = plan.batches.next()
            # A decoder is given what it is to say; of the others nobody asks for the loss.
            model(**{name: x for name, x in batch.items() if name in _GIVEN or plan.architecture.is_encoder_decoder})
        recorder.close()
    allocated = Replay(AllocRequests(recorder.rows(), [], [], []), CachingAllocator()).replayed().allocated
    return int(allocated[loaded - 1] - allocated[before - 1]), int(allocated[loaded - 1 :].max())
