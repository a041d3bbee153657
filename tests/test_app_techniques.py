"""The techniques screen: a key flips, changes are collected, and what cannot be had says why."""

from __future__ import annotations

import dataclasses
import re

import pytest

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.events import Environment
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.tui.changes import choices, offered

from .app_driver import SIZES, Oracle, shown, trained
from .fake_source import CPU, GPU, MIB


def down_to(name: str) -> list[str]:
    """Keys that select a setting."""
    return ["home", *["down"] * [option.name for _, _, option, _ in offered()].index(name)]


@pytest.mark.parametrize("name", [t.name for t in techniques.registry().values() if t.key])
async def test_a_techniques_key_flips_it_and_restarts(name: str) -> None:
    source = trained(1, **({"lora": True} if name == "quantization" else {}))
    source.feed.environment = source.run.environment = GPU
    option, key = techniques.registry()[name].switch, techniques.registry()[name].key
    before = source.run.config
    assert before is not None
    async with shown(source) as driver:
        await driver.press(key)
        values = choices(option, before[name])
        assert driver.last_start.config[name] == values[(values.index(before[name]) + 1) % len(values)]
        assert {n: v for n, v in driver.last_start.config.options.items() if n != name} == {
            n: v for n, v in before.options.items() if n != name
        }
        assert driver.lines[0].split()[1] == "restarting"
        source.obey()
        source.finish_step()
        await driver.tick()
        assert "restarting" not in driver.lines[0]
        await driver.press("z")
        assert driver.last_start.config == before


async def test_techniques_keys_clash_with_nothing() -> None:
    keys = [key for key, _, _, _ in offered() if key]
    assert len(set(keys)) == len(keys)
    assert not set(keys) & set("srxqz?<>p0123456789"), "f is the step screen's and the log's"


async def test_batch_size_goes_up_and_down() -> None:
    source = trained(1)
    async with shown(source) as driver:
        await driver.press("b")
        assert driver.last_start.config.batch_size == 16
        await driver.press("b")
        assert driver.last_start.config.batch_size == 32
        source.obey()
        await driver.press("B")
        assert driver.last_start.config.batch_size == 16


async def test_two_quick_flips_add_up() -> None:
    async with shown(trained(1)) as driver:
        await driver.press("l", "k")
        config = driver.last_start.config
        assert config["lora"] is True
        assert config["checkpointing"] == "layers"


async def test_changes_are_collected_undone_and_applied_as_one() -> None:
    source = trained(1)
    async with shown(source, (100, 48)) as driver:
        await driver.press("4", "l", "k", "b")
        assert source.commands == []
        for title, old, new in (("LoRA", "off", "on"), ("checkpointing", "off", "layers"), ("batch size", "8", "16")):
            line = next(text for text in driver.lines if f" {title} " in text)
            assert line.split(title)[1].split()[:3] == [old, "→", new]
        assert "enter applies 3 changes" in driver.text
        await driver.press("z")
        assert "enter applies 2 changes" in driver.text
        await driver.press("enter")
        assert len(source.commands) == 1
        config = driver.last_start.config
        assert (config["lora"], config["checkpointing"], config.batch_size) == (True, "layers", 8)
        assert "no changes collected" in driver.text
        await driver.press("enter")
        assert len(source.commands) == 1


@pytest.mark.parametrize("size", [(60, 20), *SIZES])
async def test_a_technique_that_another_overrules_says_what_it_comes_to_and_why(size: tuple[int, int]) -> None:
    async with shown(trained(1, checkpointing="layers"), size) as driver:
        await driver.press("4", *down_to("kv_cache"))
        assert driver.line("c + KV cache").split()[4:6] == ["off", "(checkpointing)"]
        heads, *cells = driver.app.page.table()
        (row,) = (row for row in cells if row[0] == "kv_cache")
        assert row[heads.index("now")] == "off (checkpointing)"
        await driver.press("c")
        assert "→ off" in driver.line("c + KV cache"), "it can be switched off all the same"


@pytest.mark.parametrize("size", [(60, 20), *SIZES])
async def test_what_is_predicted_of_a_gpu_and_measured_on_a_cpu_say_so(size: tuple[int, int]) -> None:
    for environment, head in ((CPU, "on a CPU"), (GPU, "measured")):
        source = trained(1)
        source.feed.environment = source.run.environment = environment
        async with shown(source, size) as driver:
            await driver.press("4")
            assert driver.line("now").rstrip().endswith(f"fits {head}" if size[0] == 60 else head)
            assert ("GPU" in driver.line("now")) == (environment is CPU)


@pytest.mark.parametrize(
    ("environment", "limit", "fits"), [(CPU, 120 * MIB, "–"), (CPU, 0, "no"), (GPU, 120 * MIB, "no")]
)
async def test_a_prediction_of_a_gpu_is_not_held_against_the_memory_limit_of_a_cpu(
    environment: Environment, limit: int, fits: str
) -> None:
    source = trained(1)
    source.feed.environment = source.run.environment = environment
    source.run.config = dataclasses.replace(source.run.config, memory_limit_bytes=limit)
    async with shown(source, predictions=Oracle(lambda config: 170 * MIB)) as driver:
        await driver.press("4")
        heads, *cells = driver.app.page.table()
        (rate,) = (row for row in cells if row[0] == "learning_rate")
        assert rate[heads.index("fits")] == fits and rate[heads.index("peak")] == "~170.0"


async def test_undo_says_before_it_restarts_when_nothing_is_collected_any_more() -> None:
    source = trained(1)
    before = source.run.config
    async with shown(source) as driver:
        await driver.press("k")
        source.obey()
        source.finish_step()
        await driver.press("4", "l", "b", "z", "z")
        assert driver.app.control.changes.pending == {}
        started = len(source.commands)
        await driver.press("z")
        assert "once more restarts with the configuration before: B8×S256" in driver.text
        await driver.press("escape", "z")
        assert len(source.commands) == started, "what is not to be seen any more is said again"
        await driver.press("z")
        assert driver.last_start.config == before
        source.obey()
        await driver.press("z")
        assert "nothing to go back to" in driver.text


@pytest.mark.parametrize("size", [(60, 20), *SIZES])
async def test_why_a_setting_cannot_be_had_is_said_in_full(size: tuple[int, int]) -> None:
    source = trained(1)
    source.feed.environment = source.run.environment = GPU
    async with shown(source, size) as driver:
        await driver.press("4")
        names = [line.option.name for line in driver.app.page.lines()]
        for keys in ((), ("b",)):
            await driver.press(*keys, "home", *["down"] * names.index("quantization"))
            reason = driver.app.control.changes.problem(
                driver.app.control.changes.wanted().with_({"quantization": "nf4"})
            )
            assert f"nf4: {reason}" in " ".join(driver.text.split())


@pytest.mark.parametrize("size", [(60, 20), *SIZES])
async def test_where_there_is_no_gpu_it_says_of_which_one_is_predicted_and_how_to_have_another(
    size: tuple[int, int],
) -> None:
    async with shown(trained(1), size, predictions=Oracle(lambda config: None, queue=2)) as driver:
        await driver.press("4")
        text = " ".join(driver.text.split())
        assert "~ is predicted for H100 80GB with its libraries' workspace; this run is on a CPU" in text
        assert "another GPU: gpumem-tui config set gpu=NAME" in text
        counts = re.findall(r"\d+ of \d+ changes|\d+ being worked out", text)
        assert len(counts) == 1, "what is still to come is counted once"


@pytest.mark.parametrize("width", [60, 75, 76, 77, 78, 79, 80, 81, 100])
async def test_the_columns_of_all_rows_end_at_one_edge(width: int) -> None:
    """Also where another setting decides, and the words for that take up two columns."""
    async with shown(trained(1, checkpointing="layers"), (width, 24)) as driver:
        await driver.press("4")
        await driver.press(*down_to("kv_cache"))
        table = driver.lines[1 : driver.lines.index(next(line for line in driver.lines if "───" in line))]
        figures = [line.rstrip() for line in table if line.rstrip().endswith(("measured", "–"))]
        assert len(figures) > 4 and {len(line) for line in figures} == {width - 1}


async def test_details_open_and_change() -> None:
    source = trained(1)
    async with shown(source, (80, 40)) as driver:
        await driver.press("4", "l", "tab", "down", "right")
        assert [driver.line(name).split()[:2] for name in ("r ", "dropout")] == [["r", "8"], ["dropout", "0.05"]]
        await driver.press("enter")
        assert driver.last_start.config["lora.r"] == 16
        assert driver.last_start.config["lora"] is True


async def test_what_cannot_run_here_is_greyed_with_its_reason_and_skipped() -> None:
    source = trained(1)
    source.feed.environment = CPU
    async with shown(source) as driver:
        await driver.press("4", "o")
        assert "bitsandbytes is not installed" in driver.text
        seen = []
        for _ in range(8):
            await driver.press("right")
            seen.append(driver.app.control.changes.pending.get("optimizer", "adamw"))
        assert "adamw-8bit" not in seen
        assert "sgd" in seen


async def test_a_conflict_is_said_and_nothing_is_sent() -> None:
    source = trained(1)
    source.feed.environment = source.run.environment = GPU
    async with shown(source) as driver:
        await driver.press("u")
        assert source.commands == []
        assert "set lora=on" in driver.text
        await driver.press("escape")
        assert "set lora=on" not in driver.text
        await driver.press("4", "u", "enter")
        assert source.commands == []
        assert "set lora=on" in driver.text
        await driver.press("l", "enter")
        assert driver.last_start.config["quantization"] == "nf4"


async def test_a_refusal_of_the_source_is_said() -> None:
    source = trained(1)
    source.refuse = "the engine is busy saving"
    async with shown(source) as driver:
        for key in ("l", "h", "x", "s", "r"):
            await driver.press(key)
            assert "the engine is busy saving" in driver.text
        assert "restarting" not in driver.text


async def test_what_was_measured_is_remembered_and_nothing_else() -> None:
    source = trained(2)
    config = source.run.config
    assert config is not None
    peak = Ledger(source.run.traces()[-1]).peak.bytes
    async with shown(source) as driver:
        await driver.press("4", "l")
        assert "measured last time" not in driver.text
        await driver.press("enter")
        source.obey()
        source.finish_step()
        await driver.tick()
        await driver.press("l")
        assert f"measured last time: {peak / MIB:.1f} MiB" in driver.text


@pytest.mark.parametrize("size", [(80, 24), (100, 30)])
async def test_a_row_shows_the_value_that_saves_most_and_below_are_the_figures_of_all(size: tuple[int, int]) -> None:
    """The key goes to it before it steps on."""

    def rule(config: RunConfig) -> int:
        saved = {"layers": 20, "segments": 30, "input": 10}.get(config.text("checkpointing"), 0)
        return (100 - saved) * MIB

    async with shown(trained(2), size, predictions=Oracle(rule)) as driver:
        await driver.press("4")
        folded = (text for text in driver.lines if "memory for time checkpointing" in text)
        said = next(folded, "") or driver.line("k + checkpointing")
        assert "~-30.0" in said, "what a group would save is said where it is folded"
        await driver.press(*down_to("checkpointing"))
        row = driver.line("k + checkpointing").split()
        assert row[3:7] == ["off", "segments", "~70.0", "~-30.0"]
        while "[off]" not in driver.text or "segments ~-30.0" not in driver.text:
            await driver.press("down")
        said = " ".join(driver.text.split())
        assert all(figure in said for figure in ("[off]", "layers ~-20.0", "segments ~-30.0", "input ~-10.0"))


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 48)])
async def test_all_groups_are_in_sight_and_the_one_selected_is_open(size: tuple[int, int]) -> None:
    async with shown(trained(1, checkpointing="layers"), size) as driver:
        await driver.press("4")
        for line in driver.app.page.lines():
            for group in ("batch", "numbers", "model", "memory", "optimizer", "GPUs"):
                assert group in driver.text
            now = line.now(driver.app.page.changes.wanted())[:6]
            assert any(line.title[:10] in text and now in text for text in driver.lines), line.title
            await driver.press("down")
        await driver.press(*down_to("dtype"))
        said = {60: "memory 1", 80: "checkpointing layers", 120: "k + checkpointing"}
        assert said[size[0]] in driver.text, "what differs from the defaults is said of a folded group"


async def test_a_small_terminal_says_that_there_is_more_below() -> None:
    async with shown(trained(1), (60, 20)) as driver:
        await driver.press("4", *down_to("parallel"), "tab")
        assert "more below" in driver.text
        await driver.press("end", *["down"] * 40)
        assert "more below" not in driver.text


async def test_why_qlora_can_need_more_than_lora_is_said_where_quantization_is_selected() -> None:
    async with shown(trained(1, lora=True, quantization="nf4"), (100, 40)) as driver:
        await driver.press("4")
        while "dequantizes them where they are used" not in driver.text:
            await driver.press("down")
        assert "k-bit preparation makes embeddings, head and norms float32" in driver.text
