"""What a person does on the screens, from the first key to what comes of it."""

from __future__ import annotations

from gpumem_tui.engine.config import RunConfig

from .app_driver import Oracle, restarted, shown, trained
from .fake_source import GPU, MIB

GIB = 1 << 30


# --- pause ----------------------------------------------------------------------------


async def test_pause_freezes_the_view_while_data_goes_on() -> None:
    source = trained(2)
    async with shown(source) as driver:
        await driver.press("space")
        before = driver.lines
        assert "view paused" in before[0]
        for _ in range(3):
            source.finish_step()
            await driver.tick()
        assert driver.lines == before
        assert source.commands == [], "the run goes on"
        await driver.press("6")
        assert "step 3:" not in driver.text, "also other screens show what was there"
        await driver.press("space")
        assert "step 3:" in driver.text and "step 5:" in driver.text, "nothing that happened meanwhile is lost"


async def test_a_change_ends_the_pause() -> None:
    async with shown(trained(1)) as driver:
        await driver.press("space", "k")
        assert "restarting" in driver.lines[0]


# --- starting and restarting ----------------------------------------------------------------


async def test_every_stage_of_a_restart_is_seen() -> None:
    source = trained(2)
    async with shown(source) as driver:
        source.advance(2)
        await driver.press("4", "k", "enter", "escape")
        assert "▸ stopping" in driver.lines[-2]
        source.end("stopped")
        await driver.tick()
        assert "✓ freed, 0 bytes leaked" not in driver.lines[-2]
        assert "loading" in driver.lines[-2]
        source.start(checkpointing="layers")
        await driver.tick()
        assert "✓ freed, 0 bytes leaked" in driver.lines[-2]
        assert "✓ loaded" in driver.lines[-2]
        assert "▸ warm-up: " in driver.lines[-2]
        source.finish_step()
        await driver.tick()
        assert "warm-up" not in driver.text


# --- techniques ---------------------------------------------------------------------------------


def smaller_with_lora(config: RunConfig) -> int:
    return 100 * MIB + config.batch_size * MIB - 50 * MIB * bool(config["lora"])


async def test_predictions_stand_before_and_measurements_beside_them() -> None:
    source = trained(2)
    oracle = Oracle(smaller_with_lora, ready=False)
    async with shown(source, (120, 40), predictions=oracle) as driver:
        await driver.press("4")
        assert driver.line("b   batch size").split()[3:] == ["8", "16", "–", "–", "–", "–"]
        assert "~ is predicted for H100 80GB" in driver.text
        oracle.ready = True
        await driver.press("1")
        assert "try first on H100 80GB: accumulation 8 with batch size 1, ~-7.0 MiB" in driver.text
        assert "saves more: l LoRA on, ~-50.0 MiB (another training)" in driver.text
        await driver.press("4")
        await driver.press("down")
        assert driver.line("b   batch size").split()[3:] == ["8", "16", "~116.0", "~+8.0", "yes", "–"]
        assert driver.line("l + LoRA").split()[3:] == ["off", "on", "~58.0", "~-50.0", "yes", "–"]
        before = driver.app.state.peak
        await restarted(driver, "b", "enter")
        await restarted(driver, "B", "enter")
        after = driver.app.state.runs[-2].peak_bytes
        assert before is not None
        change = (after - before.peak.bytes) / MIB
        assert driver.line("b   batch size").split()[-1] == f"{change:+.1f}"


async def test_beside_what_is_collected_a_change_is_its_own_and_the_sum_stands_below() -> None:
    async with shown(trained(2), (120, 40), predictions=Oracle(smaller_with_lora)) as driver:
        await driver.press("4", "l")
        assert driver.line("b   batch size").split()[-4:] == ["~66.0", "~+8.0", "yes", "–"]
        assert driver.line("l + LoRA").split()[-4:] == ["~58.0", "~-50.0", "yes", "–"]
        await driver.press("b")
        assert driver.line("b   batch size").split()[-4:] == ["~66.0", "~+8.0", "yes", "–"]
        assert driver.line("l + LoRA").split()[-4:] == ["~66.0", "~-50.0", "yes", "–"]
        assert "enter applies 2 changes as one restart   peak ~66.0, ~-42.0" in driver.text


async def test_what_cannot_be_combined_says_why_before_it_is_chosen() -> None:
    source = trained(1)
    source.run.environment = GPU
    async with shown(source) as driver:
        await driver.press("4")
        while "quantization" not in driver.app.board.page.topic().title:
            await driver.press("down")
        assert "nf4: " in driver.text
        assert "lora=on" in driver.text
        assert source.commands == []
