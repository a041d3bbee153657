"""The settings of a watched script whose model is none of transformers': what means nothing there is not offered."""

from __future__ import annotations

import pytest
import torch

from gpumem_tui.engine import techniques
from gpumem_tui.engine.advice import advice, script_lines
from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.feed import Start, ViewerRole
from gpumem_tui.engine.run import RunKind
from gpumem_tui.profiles import run_fields
from gpumem_tui.watch import watch

from .app_driver import Oracle, shown, trained
from .fake_source import FakeSource
from .watching import Seen

PLAIN = RunConfig(model="Net", seq_len=1, options=techniques.defaults())
OURS = RunConfig(**run_fields("tiny"), options=techniques.defaults())
TRANSFORMERS_ONLY = ("from_pretrained", "gradient_checkpointing_enable", "model.config", "TrainingArguments", "SFT")
MEANINGLESS = ["attention", "kv_cache", "packing", "seq_len"]


class Unpredictable(Oracle):
    def problem(self, config: RunConfig) -> str:
        return config.unknown_architecture


def watched(config: RunConfig) -> FakeSource:
    source = trained(2)
    source.run.config, source.run.kind, source.role = config, RunKind.WATCHED, ViewerRole.WATCHING
    return source


def test_of_a_plain_model_no_line_is_of_transformers() -> None:
    for name, technique in techniques.registry().items():
        for value in technique.switch.choices:
            lines = script_lines(name, PLAIN.with_({name: value}))
            assert name in MEANINGLESS or not any(word in lines for word in TRANSFORMERS_ONLY), lines


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"keep_outputs": True}, "no del: the outputs live until the next forward has returned"),
        ({"keep_outputs": False}, "del outputs after backward"),
        ({"checkpointing": "layers"}, "model.gradient_checkpointing_enable()"),
        ({"lora": False}, "without peft.get_peft_model(model, LoraConfig(...))"),
        ({"lora.r": 16}, "peft.get_peft_model(model, LoraConfig(...))"),
        ({"optimizer": "adamw-fused"}, "torch.optim.AdamW(..., fused=True)"),
    ],
)
def test_the_line_to_write_is_that_of_the_value(settings: dict[str, bool | int | str], expected: str) -> None:
    assert script_lines(next(iter(settings)), OURS.with_(settings)) == expected


@pytest.mark.parametrize("name", MEANINGLESS)
async def test_what_means_nothing_to_a_plain_model_is_not_listed_and_says_why(name: str) -> None:
    source = watched(PLAIN)
    async with shown(source, predictions=Unpredictable(lambda config: None)) as driver:
        await driver.press("4")
        assert name not in [row[0] for row in driver.app.page.table()]
        key = {"seq_len": "n"}.get(name) or techniques.registry()[name].key
        if key:
            await driver.press(key)
            said = " ".join(driver.text.split())
            assert "the rows of Net are no tokens" in said or "transformers' models; Net is none that is known" in said
            assert not driver.app.control.changes.pending
    value = {"seq_len": 8}.get(name) or next(v for v in techniques.all_options()[name].choices if v != PLAIN[name])
    assert "for your script to set" not in advice(Start(PLAIN.with_({name: value})), source.run)


async def test_a_model_of_transformers_has_all_settings_and_its_own_lines() -> None:
    async with shown(watched(OURS)) as driver:
        await driver.press("4", "k")
        assert set(MEANINGLESS) < {row[0] for row in driver.app.page.table()}
    assert "gradient_checkpointing_enable()" in advice(
        Start(OURS.with_({"checkpointing": "layers"})), watched(OURS).run
    )


async def test_where_nothing_is_predicted_no_change_is_said_to_be() -> None:
    async with shown(watched(PLAIN), predictions=Unpredictable(lambda config: None)) as driver:
        await driver.press("4")
        assert "nothing is predicted: Net is no transformers model" in " ".join(driver.text.split())
        await driver.press("k")
        assert "1 change collected; enter says where the script sets it" in driver.text


async def test_help_offers_a_viewer_of_a_script_nothing_that_only_the_script_can_do() -> None:
    async with shown(watched(PLAIN), (80, 100)) as driver:
        await driver.press("?")
        said = " ".join(driver.text.split())
        assert "A letter says where your script sets a technique." in said and "restart the run" not in said
        assert "hold the run" not in said and "stop the run and free" not in said and "take over" not in said
        assert "settings: a letter says where your script sets it" in said
        assert "checkpointing: next value" in said and "KV cache: next value" not in said
        await driver.press("?", "4", "?")
        assert "enter says where the script sets them" in driver.text


@pytest.mark.usefixtures("runtime_folder")
async def test_an_optimizer_that_is_no_value_of_ours_goes_by_its_own_name(seen: Seen) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.Adam(model.parameters())
    with watch(model, optimizer):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    config = seen.sources[-1].run.config
    assert config.foreign == {"optimizer": "Adam"}
    async with shown(watched(config), (80, 40)) as driver:
        await driver.press("4")
        rows = {row[0]: row for row in driver.app.page.table()}
        assert rows["optimizer"][1] == "Adam" and "kv_cache" not in rows
        await driver.press("o")
        assert "[adamw-fused]" in driver.text and driver.line("o   optimizer").split()[2:4] == ["Adam", "→"]
