"""Settings of the caching allocator, as technique: a run has its own, and the environment's hold before and after."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from gpumem_tui.engine import allocator_settings
from gpumem_tui.engine.allocator_settings import AllocatorSettings, applied, in_force
from gpumem_tui.engine.prediction.gpus import gpu
from gpumem_tui.engine.prediction.predict import predict
from gpumem_tui.engine.tracing.block_layout import BlockLayout
from gpumem_tui.engine.workload import prepare

from .allocator_state import entries
from .conftest import small_run

H100 = gpu("H100 80GB")
KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("divisions", "size", "rounded"),
    [
        (0, 1, 512), (0, 513, 1024), (0, 1200 * KIB, 1200 * KIB),
        # PyTorch's example: 1200 with 4 divisions lies between 1024 and 2048, at 1024, 1280, 1536, 1792.
        (4, 1200 * KIB, 1280 * KIB), (4, 1280 * KIB, 1280 * KIB), (4, 1281 * KIB, 1536 * KIB), (4, MIB, MIB),
        (4, 2047 * KIB, 2 * MIB), (4, 1500, 1536), (16, 8 * KIB, 8 * KIB), (16, 9000, 9216),
    ],
)  # fmt: skip
def test_a_request_is_rounded_up_to_a_division_of_a_power_of_two(divisions: int, size: int, rounded: int) -> None:
    settings = AllocatorSettings(divisions=divisions)
    assert settings.rounded_bytes(size) == rounded
    assert settings.rounded_bytes(rounded) == rounded
    assert settings.rounded_sizes(np.array([size, rounded])).tolist() == [rounded, rounded]


@pytest.mark.parametrize(
    ("told", "settings"),
    [
        ("", AllocatorSettings()),
        ("expandable_segments:True", AllocatorSettings(True)),
        ("max_split_size_mb:64, roundup_power2_divisions: 8", AllocatorSettings(False, 8)),
        ("roundup_power2_divisions:[256:1,512:2,>:4]", AllocatorSettings()),
    ],
)
def test_the_environment_s_are_read_as_pytorch_reads_them(
    told: str, settings: AllocatorSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", told)
    assert in_force() == settings
    recipe = prepare(small_run(allocator="expandable-segments"), torch.device("cpu"), shapes_only=True).recipe
    assert recipe.allocator == AllocatorSettings(True, settings.divisions)


def test_a_run_s_own_hold_while_it_goes_on_and_no_process_is_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    process, wanted = os.getpid(), AllocatorSettings(True, 4)
    with pytest.raises(KeyError), applied(wanted, torch.device("cuda")):
        assert in_force() == wanted
        with applied(wanted, torch.device("cuda")):
            assert len(told) == 1, "there is nothing to change"
        seen = BlockLayout([]).follow(entries(("alloc", 1 << 40, 1200 * KIB)))
        assert seen.rows["slack"].tolist() == [80 * KIB], "the trace is followed as it is cut"
        raise KeyError
    assert in_force() == AllocatorSettings() and os.getpid() == process
    assert told == [
        "expandable_segments:True,roundup_power2_divisions:4", "expandable_segments:False,roundup_power2_divisions:1"
    ]  # fmt: skip
    with applied(wanted, torch.device("cpu")):
        assert not allocator_settings._in_force


def test_what_the_settings_do_is_predicted() -> None:
    plain = predict(small_run(batch_size=7, seq_len=200), H100)
    grown, rounded = (
        predict(small_run(batch_size=7, seq_len=200, **settings), H100)
        for settings in ({"allocator": "expandable-segments"}, {"allocator__rounding": 4})
    )
    assert grown.reserved_bytes - grown.peak_bytes < plain.reserved_bytes - plain.peak_bytes
    assert rounded.by_category["slack"] > plain.by_category["slack"] and rounded.peak_bytes > plain.peak_bytes
    for one in (grown, rounded):
        assert one.by_category["activations"] == plain.by_category["activations"]
        assert one.document.as_dict()["mismatch_bytes_max"] == 0
