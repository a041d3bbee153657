"""Whole layers of cuDNN's RNNs: what was measured on an H100, request by request, and layers within models."""

from __future__ import annotations

import dataclasses
from dataclasses import fields
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.prediction.cuda_kernels import kernels
from gpumem_tui.engine.prediction.cuda_patches import pytorch_paths
from gpumem_tui.engine.prediction.cudnn_rnn import GRU, LSTM, TANH, RecurrentLayers, dropout_state_bytes
from gpumem_tui.engine.prediction.fake_cuda import DEVICE, FakeCuda
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.op_cache import op_cache
from gpumem_tui.engine.prediction.public import Prediction, predict
from gpumem_tui.engine.tracing.owners import DROPOUT_STATE
from gpumem_tui.engine.watch.leftovers import libraries_blocks, name_leftovers

from .benchmarks.recurrent import Layer, fitted, predicted

H100 = gpu("H100 80GB")
MODES = {"LSTM": LSTM, "GRU": GRU, "RNN": TANH}
MEASURED = fitted()
ROWS, STEPS, WIDTH, WORDS = 32, 64, 256, 512


def layer_of(row: dict[str, Any]) -> Layer:
    return Layer(**{field.name: row[field.name] for field in fields(Layer) if field.name in row})


def test_what_cudnn_takes_is_as_measured_in_every_layer() -> None:
    for row in MEASURED:
        layer = layer_of(row)
        sizes = (layer.input_size, layer.hidden_size, layer.proj_size, layer.num_layers, 1 + layer.bidirectional)
        dtype = torch.float16 if layer.use == "autocast" else getattr(torch, layer.dtype)
        training = layer.use != "infer"
        called = (dtype, layer.steps, layer.rows, training and layer.dropout > 0, layer.use == "packed", training)
        found = RecurrentLayers(MODES[layer.kind], *sizes, *called)
        assert found.workspace_bytes(H100, True) == row["workspace"], layer
        assert found.unsure_bytes(H100, True) >= 0
        if training:
            taken = (found.reserve_bytes, found.workspace_bytes(H100, False))
            assert taken == (row["reserve"], row["workspace_of_backward"]), layer
    assert len(MEASURED) == 395


@pytest.mark.parametrize("use", ["train", "infer", "autocast", "packed"])
def test_a_layer_asks_for_memory_as_was_measured(use: str) -> None:
    """Copies of the input, gradients, the weights that bfloat16 does not flatten; in their order, and when they go."""
    for row in MEASURED:
        if row["use"] == use and "forward" in row:
            assert predicted(layer_of(row), H100) == (row["forward"], row["backward"]), layer_of(row)


# --- within models -----------------------------------------------------------------------


class Tagger(nn.Module):
    """Labels each word of a text by what is before it and behind it."""

    def __init__(self, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(WORDS, WIDTH), layer, nn.Linear(width, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(self.embedding(ids))[0])


class Translator(nn.Module):
    """The encoder's last state is the decoder's first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WORDS)
        self.encoder, self.decoder = (nn.GRU(WIDTH, WIDTH, 2, dropout=0.1, batch_first=True) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        _, state = self.encoder(self.embedding(ids))
        return self.head(self.decoder(self.embedding(ids), state)[0])


def ids() -> Tensor:
    return torch.randint(0, WORDS, (ROWS, STEPS), device="cuda")


def step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, autocast: bool = False) -> None:
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        scores = model(ids)
    functional.cross_entropy(scores.flatten(0, 1).float(), ids.flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()


def trained(
    model: nn.Module, dtype: torch.dtype = torch.float32, how: Any = step, gpu: str = "H100 80GB"
) -> Prediction:
    def adam(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters())

    found = predict(lambda: model.to("cuda", dtype), adam, ids, how, gpu=gpu)
    assert found.document.unknown_bytes_max == found.document.mismatch_bytes_max == 0
    return found


class Packed(nn.Module):
    """A layer that is not given what only fills rows up."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        lengths = torch.randint(1, STEPS, (ROWS,))
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True)


def lstm(**options: Any) -> Tagger:
    return Tagger(nn.LSTM(WIDTH, WIDTH, **options), WIDTH * (1 + options.get("bidirectional", False)))


def activations(found: Prediction) -> int:
    return found.by_phase["forward"]["activations"]


def test_a_layer_keeps_a_reserve_for_backward() -> None:
    """Five hidden states of each step in a layer, in each direction; what a layer makes goes to the next in it."""
    one, both = trained(lstm()), trained(lstm(bidirectional=True))
    states = ROWS * STEPS * WIDTH * 4
    assert activations(one) == pytest.approx((5 + 2) * states, rel=0.03)  # and its input and its output
    assert activations(both) - activations(one) == pytest.approx((5 + 1) * states, rel=0.03)


def test_a_layer_holds_what_is_kept_for_its_parameters() -> None:
    layer, float32 = nn.LSTM(WIDTH, WIDTH, 2, bidirectional=True, proj_size=8), 4
    ledger = Ledger(trained(Tagger(layer, 16)).run.traces()[-1])
    held = ledger.by_layer(ledger.peak.event)
    moments = 2 * sum(p.numel() for p in layer.parameters())
    assert held["layer"][Category.OPTIMIZER_STATE] == moments * float32
    assert set(held) == {"embedding", "layer", "head", "logits", "loss", "batch", "cuBLAS"}


def test_states_lead_from_one_layer_to_another() -> None:
    found = trained(Translator())
    assert found.by_category["activations"] > 2 * 13 * ROWS * STEPS * WIDTH * 4


def test_weights_are_flattened_once_and_copied_where_they_are_not() -> None:
    """bfloat16 in each forward pass; under autocast, whatever its dtype, to float16. The copy is kept for backward."""
    weights = 8 * WIDTH * (WIDTH + 1)
    float16, bfloat16 = trained(lstm(), torch.float16), trained(lstm(), torch.bfloat16)
    assert activations(bfloat16) - activations(float16) == weights * 2
    cast = trained(lstm(), how=partial(step, autocast=True))
    assert weights * 2 < activations(cast) < activations(trained(lstm()))
    loading = trained(lstm()).by_phase["load"]
    assert loading["temporaries"] == weights * 4  # the parameters as they were made


def test_only_what_is_trained_has_a_reserve() -> None:
    def evaluate(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
        with torch.no_grad():
            model.eval()(ids)
        step(model.head, optimizer, torch.zeros(ROWS, STEPS, WIDTH, device="cuda"))

    def step(head: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> None:
        head(x).sum().backward()
        optimizer.step()

    assert trained(lstm(), how=evaluate).by_phase["forward"]["activations"] < ROWS * STEPS * WIDTH * 4


def test_the_random_numbers_of_dropout_are_kept_once() -> None:
    found = trained(Translator())
    states = {category: owners.get(DROPOUT_STATE) for category, owners in found.document.peak.by_owner.items()}
    assert states.pop("workspace") == 132 * 2048 * 24 and not any(states.values())
    assert DROPOUT_STATE not in trained(lstm(num_layers=2)).document.peak.by_owner["workspace"]
    first, *later = (Ledger(trace).end for trace in found.run.traces() if trace.step)
    assert first[Category.WORKSPACE] == later[-1][Category.WORKSPACE]
    assert first[Category.HELD_BY_SCRIPT] == later[-1][Category.HELD_BY_SCRIPT] == 0


def test_what_a_library_keeps_of_a_watched_run_is_told_by_its_size() -> None:
    """cuDNN's state has no owner that could be asked: of a trace without the prediction's knowledge it is found."""
    trace = next(trace for trace in trained(Translator()).run.traces() if trace.step == 2)
    known = trace.owners["name"] == trace.names.index(DROPOUT_STATE)
    unknown = dataclasses.replace(trace, owners=trace.owners[~known])
    named = name_leftovers(unknown, libraries={dropout_state_bytes(132, 2048): DROPOUT_STATE})
    assert Ledger(named).end == Ledger(trace).end != Ledger(name_leftovers(unknown)).end
    assert libraries_blocks(named, [DROPOUT_STATE]) == {int(trace.owners["address"][known][0]): DROPOUT_STATE}


def test_persistent_kernels_take_more() -> None:
    """PyTorch asks for them for one layer in float16, of suitable sizes, on large GPUs: 16 states more of each step."""
    taken = {
        name: trained(lstm(), torch.float16, gpu=name).by_phase["forward"]["temporaries"]
        for name in ("H100 80GB", "T4")
    }
    assert taken["H100 80GB"] - taken["T4"] == pytest.approx(16 * ROWS * STEPS * WIDTH * 2, rel=0.01)


def test_more_steps_at_once_than_were_measured_are_in_the_bound_alone() -> None:
    """Of one direction cuDNN computes the gates of 256 steps at once."""
    long = RecurrentLayers(LSTM, WIDTH, WIDTH, 0, 1, 1, torch.float32, 1024, ROWS, training=False)
    assert long.unsure_bytes(H100, True) == 4 * (1024 - 256) * ROWS * WIDTH * 4
    assert dataclasses.replace(long, steps=256).unsure_bytes(H100, True) == 0
    found = trained(lstm(num_layers=2), torch.bfloat16)
    assert found.safe_bound_bytes >= found.peak_bytes + found.unsure_bytes > found.peak_bytes


def test_a_layer_on_the_host_is_the_hosts() -> None:
    host = nn.LSTM(WIDTH, WIDTH)
    alone = trained(lstm())
    beside = trained(lstm(), how=lambda *a: (host(torch.zeros(2, 3, WIDTH)), step(*a)))
    assert beside.peak_bytes == alone.peak_bytes


def test_packed_rows_are_taken_to_be_whole() -> None:
    """As much is kept, the packed input instead of the padded one; what more blocks take is in the bound alone."""
    packed, whole = trained(Tagger(Packed(), WIDTH)), trained(lstm(batch_first=True))
    assert [note.partition(": ")[2] for note in packed.notes] == [
        "rows that are packed are taken to be as long as the longest."
    ]
    assert packed.notes[0].startswith("tests/test_recurrent_layers.py:")
    assert activations(packed) == pytest.approx(activations(whole), abs=1024)
    assert packed.unsure_bytes > whole.unsure_bytes == 0


@pytest.mark.parametrize(
    "lengths",
    [[STEPS - row // 2 for row in range(ROWS)], [STEPS] * (ROWS - 1) + [1], [STEPS, *[1] * (ROWS - 1)]],
    ids=["shorter and shorter", "one short", "one long"],
)
def test_the_bound_holds_where_packed_rows_have_unlike_lengths(lengths: list[int]) -> None:
    """Blocks of rows are copied in forward, their gradients are summed up in backward: here as the CPU does it."""

    def packed(x: Tensor) -> None:
        sequence = nn.utils.rnn.pack_padded_sequence(x, lengths)
        nn.utils.rnn.pad_packed_sequence(sequence)[0].sum().backward()

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        packed(torch.zeros(STEPS, ROWS, WIDTH, requires_grad=True))
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    seen = np.cumsum([event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())])

    recorder = FakeCuda(kernels(H100))
    with pytorch_paths(H100, recorder), op_cache().mode, recorder:
        packed(torch.zeros(STEPS, ROWS, WIDTH, device=DEVICE, requires_grad=True))
    rows = recorder.rows()
    expected = np.cumsum(rows["bytes"])
    assert (seen.max() > expected.max()) == (lengths[1] > 1)
    assert seen.max() <= (expected - rows["slack"]).max()


def test_a_sequence_packed_by_hand_is_refused() -> None:
    def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
        sizes = torch.full((STEPS,), ROWS)
        model.layer(nn.utils.rnn.PackedSequence(model.embedding(ids).flatten(0, 1), sizes))

    with pytest.raises(UserError, match=r"^tests/test_recurrent_layers\.py:\d+: .*packed"):
        trained(lstm(), how=by_hand)
