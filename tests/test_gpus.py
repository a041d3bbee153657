"""GPUs to predict for, by what people and drivers call them."""

from __future__ import annotations

import dataclasses

import pytest

from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.prediction.gpus import Gpu, gpu, gpus, understand
from gpumem_tui.engine.prediction.predict import predict

from .conftest import small_run

GIB = 2**30


def test_gpus_are_found_by_what_people_call_them() -> None:
    assert gpu("h100 80gb") is gpu("H100-80GB") is gpu("H10080GB") is gpu("H100") is gpu("H100 80GB")
    assert gpu("4090").capability == (8, 9)
    assert all(card.memory_bytes > 8 * GIB and card.multiprocessors > 20 for card in gpus().values())
    with pytest.raises(UserError, match="did you mean"):
        gpu("H1000")


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 80GB"),
        ("NVIDIA H100 PCIe", "H100 PCIe 80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090 24GB"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada 48GB"),
        ("Tesla T4", "T4 16GB"),
    ],
)
def test_gpus_are_found_by_what_their_driver_calls_them(reported: str, name: str) -> None:
    assert understand(reported) == (gpus()[name], "")


def test_a_driver_s_word_for_another_gpu_is_not_taken_for_noise() -> None:
    with pytest.raises(UserError, match="did you mean RTX 4090 24GB"):
        gpu("NVIDIA GeForce RTX 4090 Laptop GPU")


def test_of_several_gpus_it_is_the_smallest_and_that_is_said() -> None:
    assert understand("A100") == (
        gpus()["A100 40GB"],
        "A100: taken for the A100 40GB, the smallest of A100 80GB, A100 40GB",
    )
    assert understand("A100 80GB") == (gpus()["A100 80GB"], "")


def test_a_size_is_a_gpu_of_that_size_of_the_newest_generation_and_that_is_said() -> None:
    assert understand("24GB") == (
        gpus()["RTX 4090 24GB"],
        "24GB: taken for the RTX 4090 24GB, the newest generation of this size",
    )
    assert gpu("141 GB") is gpu("H200")
    between = understand("20GB")
    assert (between.gpu.memory_bytes, between.gpu.capability) == (20 * GIB, (8, 9))
    assert between.said == "20GB: taken for RTX 4090 24GB with 20 GiB"
    with pytest.raises(UserError, match="no GPU known here has this much memory"):
        gpu("500GB")
    with pytest.raises(UserError, match="--gpu 0GB: takes a size above 1 GiB"):
        gpu("0GB")


def test_a_gpu_s_memory_may_be_given_after_a_colon() -> None:
    some = gpu("RTX 4090:20GiB")
    assert some == dataclasses.replace(gpu("RTX 4090"), name="RTX 4090 24GB:20GiB", memory_bytes=20 * GIB)
    assert gpu(some.name) == some
    for wrong in ("A100:", "A100:20", "A100:nanGB", "A100:0GB"):
        with pytest.raises(UserError, match="after the colon comes how much memory there is"):
            gpu(wrong)


def test_a_gpu_is_plain_data() -> None:
    card = Gpu("mine", 24 << 30, (8, 9), 128, 1536)
    assert predict(small_run(), card).gpu == "mine"
