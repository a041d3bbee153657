"""The weights screen: measured in a process of its own, drawn at every size, joined to the run."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import save_file

from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.weights.measurement import Measurement, Weights, weights_of
from gpumem_tui.engine.weights.schemes import registry
from gpumem_tui.tui.palette import Palette
from gpumem_tui.tui.screens.weights import PICTURES, WeightsPage
from gpumem_tui.tui.settings import Settings
from gpumem_tui.tui.themes import THEMES

from .app_driver import SIZES, Driver, Oracle, shown, trained
from .fake_source import GPU, MIB, FakeSource

LAYERS = 8
BAD = ("layers.2.down_proj", "layers.5.down_proj")


def wait(measurement: Measurement) -> Measurement:
    deadline = time.monotonic() + 100
    while measurement.running:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return measurement


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers of normal weights; two of them have an outlier in every block."""
    made = tmp_path_factory.mktemp("model")
    generator = torch.Generator().manual_seed(0)
    tensors = {f"layers.{i}.down_proj.weight": torch.randn(64, 256, generator=generator) / 50 for i in range(LAYERS)}
    for name in BAD:
        tensors[f"{name}.weight"] = tensors["layers.0.down_proj.weight"].clone()
        tensors[f"{name}.weight"][:, ::64] *= 60
    save_file(tensors, made / "model.safetensors")
    return made


@pytest.fixture(scope="module")
def measured(folder: Path) -> Iterator[Measurement]:
    measurement = Measurement(Weights(str(folder), None))
    measurement.start()
    yield wait(measurement)
    measurement.stop()


def source(folder: Path, **settings: object) -> FakeSource:
    made = trained(2, **settings)
    assert made.run.config is not None
    made.run.config = replace(made.run.config, model=str(folder), pretrained=True)
    made.feed.environment = made.run.environment = GPU
    return made


async def opened(driver: Driver, measured: Measurement, scheme: str = "nf4-double") -> WeightsPage:
    await driver.press("7")
    page = driver.app.page
    assert isinstance(page, WeightsPage)
    page.measurement = measured
    page.selected = [s.key for s in page.schemes.values()].index(scheme)
    await driver.tick()
    return page


def test_every_entry_arrives_and_the_process_ends(measured: Measurement) -> None:
    assert measured.head is not None and measured.end is not None
    assert not measured.failure
    assert measured._process is not None and measured._process.wait(10) == 0
    assert (measured.head.tensors, len(measured.reports), measured.head.random) == (LAYERS, LAYERS, False)
    usual = {key for key, scheme in registry().items() if scheme.usual}
    assert set(measured.reports[0].schemes) | set(measured.head.unavailable) == usual


def test_what_cannot_be_measured_is_one_line(tmp_path: Path) -> None:
    save_file({"a.weight": torch.full((8, 64), torch.nan)}, tmp_path / "model.safetensors")
    measurement = Measurement(Weights(str(tmp_path), None))
    measurement.start()
    assert wait(measurement).failure == "a.weight holds NaN at [0, 0]: its weights cannot be quantized"


def test_a_measurement_that_is_left_keeps_what_it_knows() -> None:
    config = trained(1).run.config
    assert config is not None
    weights = weights_of(config)
    assert weights is not None
    measurement = Measurement(weights, exact=True)
    measurement.start()
    measurement.stop()
    assert wait(measurement).failure
    assert weights_of(replace(config, architecture=None)) is None


@pytest.mark.parametrize("size", [(60, 20), *SIZES, (200, 60)])
@pytest.mark.parametrize("picture", PICTURES)
async def test_each_picture_at_each_size(
    folder: Path, measured: Measurement, size: tuple[int, int], picture: str
) -> None:
    async with shown(source(folder), size) as driver:
        page = await opened(driver, measured, "nf4")
        await driver.press(*["tab"] * PICTURES.index(picture))
        assert "8 tensors, 131,072 weights" in driver.text
        said = {
            "weights": "levels",
            "codes": "16 of 16 used",
            "bits": "bits a weight",
            "tensors": "SQNR in dB by scheme",
        }
        assert said[picture] in driver.text
        if picture != "tensors":
            assert "down_proj (the worst)  kurtosis" in driver.text
        assert "k keeps the 2 worst in 16 bit: +" in driver.text
        assert all(len(line) == size[0] for line in driver.lines)
        for palette in (Palette(ascii=True, mono=True), Palette(THEMES["ansi"])):
            driver.app.board.repaint(palette)
            await driver.tick()
        assert page.table() is not None


async def test_a_scheme_says_what_becomes_of_one_tensor(folder: Path, measured: Measurement) -> None:
    async with shown(source(folder)) as driver:
        page = await opened(driver, measured, "int8-absmax-tensor")
        row = driver.line("a int8 absmax, tensor")
        await driver.press("right")
        worst = page.quantized()[0]
        assert worst.name.removesuffix(".weight") in BAD
        assert f"{worst.name.removesuffix('.weight')}  kurtosis {worst.kurtosis:.1f}" in driver.text
        found = worst.schemes.get("int8-absmax-tensor")
        if found is not None:
            assert driver.line("a int8 absmax, tensor") != row
            assert f"{found.levels_used} of 255" in driver.line("a int8 absmax, tensor")
        assert re.search(r"error [\d.]+ % of the weights \(root mean square\), at most [\d.]+", driver.text)
        assert "No run stores its weights like this" in driver.text
        await driver.press("?")
        assert "255 even levels, symmetric about 0" in driver.text


async def test_a_key_keeps_the_worst_in_16_bit(folder: Path, measured: Measurement) -> None:
    async with shown(source(folder, lora=True), (120, 40), predictions=Oracle(more_when_kept)) as driver:
        page = await opened(driver, measured)
        proposal = page.proposal()
        assert proposal is not None and set(proposal.skip.split(",")) == set(BAD)
        assert "+11.0" in driver.line("k keeps the 2 worst")  # predicted
        await driver.press("k")
        config = driver.last_start.config
        assert (config["quantization"], config["quantization.double"]) == ("nf4", True)
        assert config["quantization.skip"] == proposal.skip
        driver.source.obey()
        await driver.tick()
        assert "the run keeps the 2 worst in 16 bit" in driver.text
        started = len(driver.source.commands)
        await driver.press("k")
        assert len(driver.source.commands) == started
        assert "has these settings already" in driver.text


def more_when_kept(config: RunConfig) -> int:
    return (40 + 11 * (config["quantization.skip"] != "none")) * MIB


async def test_without_adapters_it_says_what_a_run_needs(folder: Path, measured: Measurement) -> None:
    async with shown(source(folder), predictions=Oracle(more_when_kept)) as driver:
        await opened(driver, measured)
        assert "set lora=on to train adapters" in " ".join(driver.text.split())
        await driver.press("k")
        assert not driver.source.commands
        assert "set lora=on" in driver.text


async def test_random_weights_are_told_apart_and_another_model_is_not_shown(
    folder: Path, measured: Measurement
) -> None:
    async with shown(trained(2)) as driver:
        page = await opened(driver, measured)
        assert page.measurement is None  # of another model
        assert "measures a sample of" in driver.text
        config = driver.app.control.changes.base()
        weights = weights_of(config)
        assert weights is not None and measured.head is not None
        page.measurement = replace(measured, weights=weights, head=msgspec.structs.replace(measured.head, random=True))
        await driver.tick()
        assert "These weights are random, so they are normal" in driver.text


async def test_a_scripts_own_model_says_what_to_do(tmp_path: Path) -> None:
    made = trained(1)
    assert made.run.config is not None
    made.run.config = replace(made.run.config, architecture=None)
    async with shown(made, settings=Settings(tmp_path / "config.toml")) as driver:
        await driver.press("7", "enter")
        assert "gpumem-tui weights FILE measures a file" in " ".join(driver.text.split())


async def test_a_scheme_whose_package_is_missing_says_so(folder: Path, measured: Measurement) -> None:
    key, hint = "gguf-q4_0", "the package gguf is not installed: pip install 'gpumem-tui[weights]'"
    assert measured.head is not None
    reports = [
        msgspec.structs.replace(one, schemes={name: it for name, it in one.schemes.items() if name != key})
        for one in measured.reports
    ]
    head = msgspec.structs.replace(measured.head, unavailable={key: hint})
    async with shown(source(folder), (80, 24)) as driver:
        await opened(driver, replace(measured, head=head, reports=reports), key)
        assert re.search(r"GGUF Q4_0 +– not installed +$", driver.text, re.M)
        assert hint in driver.text
        assert "suits no tensor" not in driver.text
