"""The techniques of somebody else's script, and that the app's header says so."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import noop_context_fn

from gpumem_tui.engine import techniques
from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.techniques import label
from gpumem_tui.watch import watch

from .examples import strangers
from .watching import Seen, check_exact, small_model, train

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.usefixtures("frozen_heap", "runtime_folder"),
]


@pytest.mark.filterwarnings("ignore")  # of TRL's and of datasets' own there are many
def test_an_sft_trainer_with_its_defaults(seen: Seen) -> None:
    """TRL never makes the logits, checkpoints each layer and trains in bfloat16, unless it is told otherwise."""
    pytest.importorskip("trl")
    from .examples import sft_trainer

    sft_trainer.main(3)
    check_exact(seen, script_bytes_max=16_384)
    config = seen.sources[-1].run.config
    assert config is not None
    said = label(config)
    for setting in (
        "B8×S",
        "dtype=mixed",
        "loss=chunked",
        "checkpointing=layers",
        "optimizer=adamw-fused",
        "cache=off",
    ):
        assert setting in said
    assert seen.ledgers[-1].peak.by_category[Category.LOGITS_LOSS] > 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"use_reentrant": False}, {"checkpointing": "layers", "checkpointing.reentrant": False, "offload": "off"}),
        ({"use_reentrant": True}, {"checkpointing": "layers", "checkpointing.reentrant": True}),
        ({"use_reentrant": False, "context_fn": noop_context_fn}, {"checkpointing": "selective"}),
    ],
    ids=["layers", "reentrant", "selective"],
)
def test_how_a_model_checkpoints_itself(seen: Seen, arguments: dict[str, Any], expected: dict[str, Any]) -> None:
    model, optimizer = small_model()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(arguments)
    with watch(model, optimizer):
        train(model, optimizer, 2)
    config = seen.sources[-1].run.config
    assert config is not None and {name: config[name] for name in expected} == expected


def test_some_layers_that_checkpoint_themselves_are_not_taken_for_all() -> None:
    model, optimizer = small_model()
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:
        pytest.skip("transformers 5.18 brought it")
    model.gradient_checkpointing_disable()
    enable({"use_reentrant": False}, every_n_layers=2)
    assert "checkpointing" not in techniques.recognise(model, optimizer)
    enable({"use_reentrant": False})
    assert techniques.recognise(model, optimizer)["checkpointing"] == "layers"


@pytest.mark.parametrize(
    ("bits", "paged", "kind"),
    [(8, False, "adamw-8bit"), (8, True, "paged-adamw-8bit"), (32, True, "paged-adamw"), (32, False, "adamw-single")],
)
def test_an_optimizer_of_bitsandbytes_by_its_arguments(bits: int, paged: bool, kind: str) -> None:
    """transformers makes all of them of one class."""
    adamw = pytest.importorskip("bitsandbytes").optim.AdamW
    model, _ = small_model()
    optimizer = adamw(model.parameters(), optim_bits=bits, is_paged=paged)
    assert techniques.recognise(model, optimizer)["optimizer"] == kind


@pytest.mark.parametrize("keeps", [True, False])
def test_whether_a_loop_keeps_its_outputs(seen: Seen, keeps: bool) -> None:
    """Until the next forward has returned them anew, or only their loss, as a Trainer does."""
    model, optimizer = small_model()
    with watch(model, optimizer):
        for _ in range(3):
            outputs = model(input_ids=torch.randint(0, 64, (2, 16)), labels=torch.randint(0, 64, (2, 16)))
            loss = outputs.loss
            if not keeps:
                del outputs
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    config = seen.sources[-1].run.config
    assert config is not None and config["keep_outputs"] is keeps
    assert ("keep outputs" in label(config) or "keep_outputs" in label(config)) is not keeps


@pytest.mark.filterwarnings("ignore")  # of TRL's and of datasets' own there are many
@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_an_sft_trainer_is_what_its_preset_says(seen: Seen, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("trl")
    from .benchmarks.trl_sft import expected, otherwise
    from .examples import sft_trainer

    small_model()[0].save_pretrained(tmp_path)
    sft_trainer.from_folder(str(tmp_path), kind, 2, 16)
    check_exact(seen, script_bytes_max=16_384)
    config = expected("tiny", kind)
    told = otherwise(dataclasses.replace(config, seq_len=16), seen.sources[-1].run.config)
    same = {"attention": "sdpa for auto", "lora.targets": "query_key_value for profile"}  # by another name
    assert not {name: how for name, how in told.items() if same.get(name) != how and name != "quantization.compute"}


def test_a_loss_scaler_beside_the_optimizer(seen: Seen) -> None:
    model, optimizer = small_model()
    scaler = torch.amp.GradScaler("cpu")
    with watch(model, optimizer):
        for _ in range(3):
            ids = torch.randint(0, 64, (2, 16))
            with torch.autocast("cpu", torch.float16):
                loss = model(input_ids=ids, labels=ids).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    check_exact(seen, script_bytes_max=4096)
    config = seen.sources[-1].run.config
    assert config is not None
    assert "dtype=mixed-float16" in label(config) and "loss_scaling" in label(config)
    last = seen.ledgers[-1]
    names = last.by_name(len(last.trace.events) - 1, Category.OPTIMIZER_STATE)
    assert names["GradScaler.scale"] == names["GradScaler.growth_tracker"] == 4


def test_a_scaler_beside_bfloat16_is_no_loss_scaling(seen: Seen) -> None:
    """It is for float16: with it nothing of the run could be predicted."""
    model, optimizer = small_model()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    with watch(model, optimizer), torch.autocast("cpu", torch.bfloat16):
        model(input_ids=torch.randint(0, 64, (2, 16)))
        run = seen.sources[-1].run
    assert run is not None and "dtype=mixed" in label(run.config) and "loss_scaling" not in label(run.config)
    techniques.check(run.config)


def test_the_task_and_the_shape_of_what_is_no_text(seen: Seen) -> None:
    """A prediction would be of another model, or of other images, otherwise."""
    strangers.images(1, "cpu", False)
    run = seen.sources[-1].run
    assert run is not None and run.config.architecture is not None
    assert run.config.architecture.config["architectures"] == ["ResNetForImageClassification"]
    assert run.config.image_size == 32


def test_of_a_model_that_is_for_no_task_the_architecture_is_not_told(seen: Seen) -> None:
    """What transformers makes of its configuration would be another one."""
    model = small_model()[0].gpt_neox
    optimizer = torch.optim.SGD(model.parameters())
    with watch(model, optimizer):
        model(input_ids=torch.randint(0, 64, (2, 16)))
        run = seen.sources[-1].run
    assert run is not None and run.config.unknown_architecture


def test_a_loss_scaler_from_before_the_loop_is_known_with_the_first_pass(seen: Seen) -> None:
    model, optimizer = small_model()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.ones(1))
    with watch(model, optimizer), torch.autocast("cpu", torch.float16):
        model(input_ids=torch.randint(0, 64, (2, 16)))
        run = seen.sources[-1].run
    assert run is not None and run.config is not None and "loss_scaling" in label(run.config)


@pytest.mark.parametrize("kind", ["off", "padded", "packed"])
def test_rows_that_are_padded_or_packed(seen: Seen, kind: str) -> None:
    model, optimizer = small_model()
    ids = torch.randint(0, 64, (2, 16))
    named = {
        "off": {"attention_mask": torch.ones_like(ids)},
        "padded": {"attention_mask": (torch.arange(16) < torch.tensor([[16], [9]])).long()},
        "packed": {"position_ids": torch.arange(8).repeat(2, 2)},
    }[kind]
    with watch(model, optimizer):
        for _ in range(2):
            model(input_ids=ids, labels=ids, use_cache=False, **named).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    check_exact(seen, script_bytes_max=4096)
    config = seen.sources[-1].run.config
    assert config is not None and config["packing"] == kind
