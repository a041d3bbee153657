"""The app over a source without an engine: rows say what the ledger says, keys do what the source gets."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from gpumem_tui.engine import techniques
from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.events import CATEGORIES, Category, Environment, Kind, Milestone, Phase
from gpumem_tui.engine.feed import Pause, Save, Stop
from gpumem_tui.engine.ledger import Ledger, numbered_layers
from gpumem_tui.engine.recording import Replay
from gpumem_tui.tui.app import GpumemApp
from gpumem_tui.tui.control import choices, free_name, offered
from gpumem_tui.tui.draw import Row
from gpumem_tui.tui.explain import explain
from gpumem_tui.tui.layer_table import GROUPS, layer_table
from gpumem_tui.tui.palette import Palette
from gpumem_tui.tui.run_state import RunState, config_key
from gpumem_tui.tui.screens.device_bar import shares
from gpumem_tui.tui.settings import Settings
from gpumem_tui.tui.state import KEPT_MILESTONES, Filter, ViewState
from gpumem_tui.tui.units import IN_GIB, IN_KIB, IN_MIB, clock, duration, percent, rate, shorten, tail, unit_for
from gpumem_tui.tui.widgets.area import area, columns
from gpumem_tui.tui.widgets.bars import Part, bar, stacked
from gpumem_tui.tui.writer import writing

from .app_driver import GPU_UNIT, SIZES, Oracle, shown, trained
from .fake_source import CPU, GPU, MIB, FakeSource

RECORDINGS = Path(__file__).parent / "recordings"

# --- the app as a whole ---------------------------------------------------------


def test_the_app_loads_no_torch() -> None:
    code = (
        "import sys; import gpumem_tui.tui.app; from gpumem_tui.tui.control import offered; assert offered();"
        "sys.exit(','.join(m for m in ('torch', 'transformers', 'peft', 'bitsandbytes') if m in sys.modules) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


async def test_the_palette_closes_where_it_has_no_room() -> None:
    async with shown(trained()) as driver:
        driver.app.open_palette()
        await driver.pilot.pause()
        assert len(driver.app.screen_stack) == 2
        await driver.pilot.resize_terminal(4, 58)
        await driver.pilot.pause()
        assert len(driver.app.screen_stack) == 1
        driver.app.open_palette()
        await driver.tick()
        assert len(driver.app.screen_stack) == 1


async def test_before_anything_is_known() -> None:
    source = FakeSource()
    source.feed.environment = None
    async with shown(source) as driver:
        assert "The engine is starting." in driver.text
        assert driver.line("P parameters").split()[-2:] == ["–", "–"]
        for key in "23456?":
            await driver.press(key)
        await driver.press("?", "1", "l", "z", "r", "s", "space", "x")
        assert source.commands == []


@pytest.mark.parametrize("size", [*SIZES, (60, 20), (200, 60)])
async def test_every_screen_fills_the_terminal_exactly(size: tuple[int, int]) -> None:
    source = trained(checkpointing="layers", accumulation=2)
    source.advance(9)
    async with shown(source, size) as driver:
        for key in "123456?":
            await driver.press(key)
            assert len(driver.lines) == size[1]
            assert {len(line) for line in driver.lines} == {size[0]}
            for y in range(size[1]):
                assert all(segment.style is not None for segment in driver.app.canvas.render_line(y))


@pytest.mark.parametrize("size", [(59, 24), (80, 19), (20, 5)])
async def test_a_tiny_terminal_gets_one_polite_line(size: tuple[int, int]) -> None:
    async with shown(trained(), size) as driver:
        assert driver.lines[0].startswith("gpumem-tui needs 60x20"[: size[0]])
        assert "".join(driver.lines[1:]).strip() == ""
        await driver.press("2", "4", "down")
        assert driver.app.is_running


async def test_growing_out_of_a_tiny_terminal() -> None:
    async with shown(trained(), (40, 10)) as driver:
        await driver.pilot.resize_terminal(80, 24)
        await driver.pilot.pause()
        await driver.tick()
        assert driver.line("P parameters")


async def test_nothing_is_sent_when_nothing_changed() -> None:
    async with shown(trained()) as driver:
        version = driver.app.state.version
        driver.app.tick()
        assert driver.app.state.version == version
        before = driver.app.canvas.lines
        driver.app.draw()
        assert driver.app.canvas.show([]) > 0
        driver.app.draw()
        assert driver.app.canvas.lines == before


async def test_ascii_means_ascii() -> None:
    source = trained(checkpointing="layers")
    source.advance(5)
    settings = Settings(Path("/proc/none/config.toml"))
    settings.values["ascii"] = True
    async with shown(source, settings=settings) as driver:
        for key in "123456?":
            await driver.press(key)
            assert driver.text.isascii(), [line for line in driver.lines if not line.isascii()]


async def test_without_colours_letters_say_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    source = trained()
    async with shown(source) as driver:
        await driver.press("2")
        assert "PPPPPPPP" in driver.text
        assert "OOOOOOOO" in driver.text
        for y in range(24):
            for segment in driver.app.canvas.render_line(y):
                assert segment.style is not None
                assert segment.style.color is None or segment.style.color.is_default
                assert segment.style.bgcolor is None or segment.style.bgcolor.is_default


async def test_q_quits_and_multiplexer_keys_are_free() -> None:
    async with shown(trained()) as driver:
        for key in ("ctrl+a", "ctrl+b", "ctrl+s", "ctrl+q"):
            await driver.press(key)
        assert driver.app.is_running
        assert driver.source.commands == []
        await driver.pilot.press("q")
        assert driver.app._exit


async def test_a_mistake_in_drawing_costs_the_screen_only(monkeypatch: pytest.MonkeyPatch) -> None:
    source = trained()
    async with shown(source) as driver:

        def broken(width: int, height: int) -> list[Row]:
            raise ZeroDivisionError("by nought")

        monkeypatch.setattr(driver.app.board.pages[2], "rows", broken)
        await driver.pilot.press("3")
        assert "cannot be drawn: ZeroDivisionError: by nought" in driver.text
        await driver.press("1")
        assert driver.line("P parameters")


async def test_a_tick_is_skipped_while_the_terminal_is_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    source = trained()
    async with shown(source) as driver:
        monkeypatch.setattr("gpumem_tui.tui.app.writing", lambda app: True)
        before = driver.text
        source.advance(4)
        await driver.tick()
        assert driver.text == before
        monkeypatch.setattr("gpumem_tui.tui.app.writing", lambda app: False)
        await driver.tick()
        assert driver.text != before


def test_the_writer_of_a_terminal_is_found_where_textual_keeps_it() -> None:
    """The one place with Textual's private names: fails when they move."""
    import io

    from textual.drivers._writer_thread import WriterThread

    class Terminal:
        _writer_thread = WriterThread(io.StringIO())

    app = GpumemApp(FakeSource(), refresh_hz=0)
    assert not writing(app)
    app._driver = Terminal()  # type: ignore[assignment]
    assert not writing(app)
    Terminal._writer_thread.write("x")
    assert writing(app)


# --- live -----------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("advances", [0, 3, 8, 13])
async def test_live_says_what_the_ledger_says(size: tuple[int, int], advances: int) -> None:
    source = trained(3)
    source.advance(advances)
    async with shown(source, size) as driver:
        trace = source.trace()
        assert trace is not None
        now = Ledger(trace).end
        peak = max((Ledger(t).peak for t in [*source.traces(), trace]), key=lambda p: p.bytes)
        small = () if size[1] > 30 else "BIWs"
        for category, info in CATEGORIES.items():
            if info.letter in small:
                continue
            words = driver.line(f"{info.letter} {info.title}").removeprefix(f" {info.letter} {info.title}").split()
            assert words[0] == f"{now[category] / MIB:.1f}"
            assert f"{peak.by_category[category] / MIB:.1f}" in words
        totals = [word for word in driver.line("allocated").split() if word.replace(".", "").isdigit()]
        assert totals == [f"{sum(now.values()) / MIB:.1f}", f"{peak.bytes / MIB:.1f}"]


async def test_live_shows_the_step_and_the_state() -> None:
    source = trained(2)
    source.advance(2)
    async with shown(source) as driver:
        line = driver.line("step")
        assert line.split()[1:4] == ["2", "94", "ms"]
        assert "21.8k tok/s" in line
        assert "10.2900" in line
        assert "forward" in driver.lines[0]
        assert "polyglot-ko-1.3b" in driver.lines[0]
        assert "B8×S256" in driver.lines[0]


async def test_live_has_no_bar_for_what_reads_nought() -> None:
    """5 MiB of logits are 0.00 of a screen that counts in GiB, and a bar would belie that."""
    async with shown(trained(2), (120, 40)) as driver:
        assert "█" in driver.line("T temporaries")
        driver.app.state.run.peak_bytes = 1 << 60
        await driver.press("g", "g")
        assert driver.app.state.unit is IN_GIB
        for line in driver.lines:
            if re.match(r" [A-Z] [a-z]", line):
                assert ("█" in line or "▏" in line) == bool(set(re.findall(r"\d+\.\d+", line)) - {"0.00"}), line


@pytest.mark.parametrize(("width", "whole"), [(60, False), (76, True), (80, True)])
async def test_the_share_of_tracing_is_there_whole_or_not(width: int, whole: bool) -> None:
    async with shown(trained(2), (width, 24)) as driver:
        assert ("tracing 1.1 % of time" in driver.text) == whole
        assert whole or "trac" not in driver.line("step")


async def test_live_explains_the_peak() -> None:
    source = trained(3)
    async with shown(source) as driver:
        text = " ".join(driver.text.split())
        assert "The peak is inside AdamW.step(): " in text
        assert "+ temporaries 52.0 (1.0 x the gradients)" in text
        assert "peak step 2, optimizer" in driver.line("MiB")


async def test_the_sentence_about_the_peak_is_whole_where_there_is_room() -> None:
    source = FakeSource(GPU)
    source.start(accumulation=4, checkpointing="layers")
    for _ in range(3):
        source.finish_step()
    for size in ((60, 20), (80, 24)):
        async with shown(source, size) as driver:
            assert explain(driver.app.state.peak, driver.app.state.unit) in " ".join(driver.text.split())
            assert "recomputed; layer" in driver.text


@pytest.mark.parametrize("name", ["full", "checkpointed", "lora", "h100-tiny", "h100-tiny-lora"])
async def test_the_sentence_about_the_peak_is_a_sum_of_what_the_screen_shows(name: str) -> None:
    async with shown(Replay(RECORDINGS / f"{name}.gpumem"), (120, 40)) as driver:
        text = " ".join(driver.text.split())
        (sentence,) = re.findall(r"The peak is [^=]*: ([\d.]+) [MG]iB = (.*?)\.(?!\d)", text)
        total, terms = float(sentence[0]), sentence[1].split(" + ")
        assert sentence[0] in next(line for line in driver.lines if line.startswith("   allocated"))
        plain = [re.sub(r" \(.*\)", "", term) for term in terms]
        assert sum(float(re.findall(r"[\d.]+", term)[0]) for term in plain) == pytest.approx(total, abs=0.21)
        for term in terms[1:]:
            if found := re.search(r"^(.*) ([\d.]+) \(([\d.]+) - ([\d.]+)\)", term):
                title, added, held, before = found.groups()
                assert float(held) - float(before) == pytest.approx(float(added), abs=0.11)
                assert held in next(line for line in driver.lines if title.replace(" and", ",") in line)


async def test_times_say_which_they_are() -> None:
    """The wall's includes the wait for the loss; the host's ends when the last kernel has been asked for."""
    async with shown(Replay(RECORDINGS / "h100-tiny.gpumem")) as driver:
        assert "54 ms wall" in driver.line("step 3")
        await driver.press("2")
        assert "47 ms host" in driver.line("step 3")
    async with shown(Replay(RECORDINGS / "h100-tiny.gpumem"), (60, 20)) as driver:
        await driver.press("2", "+")
        assert driver.line("step 3").split()[2:7] == ["47", "ms", "host", "peak", "242.1"]
        assert driver.line("step 3").split()[-3:] == ["<", "2", "latest"]


@pytest.mark.parametrize("size", [(60, 20), (80, 24)])
async def test_what_is_small_is_in_one_row_that_says_what_it_is(size: tuple[int, int]) -> None:
    async with shown(Replay(RECORDINGS / "h100-tiny.gpumem"), size) as driver:
        row = driver.line("all others").split()
        share = row.pop(3) if size[0] == 80 else ""
        assert row[2:5] == ["66.0", "workspace" if share else "W", "66.0"]
        for _ in range(14):
            await driver.press("down")
            if driver.app.page.focus == "all others":
                break
        assert "Buffers, inputs, workspace and slack" in driver.app.page.topic().text
        assert driver.line("▸  all others")


@pytest.mark.parametrize("size", SIZES)
async def test_each_category_has_its_percent_of_what_is_allocated(size: tuple[int, int]) -> None:
    source = FakeSource(GPU, unit=GPU_UNIT)
    source.start()
    source.finish_step()
    async with shown(source, size) as driver:
        state = driver.app.state
        for sizes, place in ((state.latest, 0), (state.peak and state.peak.peak.by_category, 1)):
            assert sizes
            largest = max(Category, key=lambda category: sizes[category])
            percents = re.findall(r"(?:<1|\d+)%", driver.line(f"{largest.info.letter} {largest.info.title}"))
            assert percents[place] == f"{round(100 * sizes[largest] / sum(sizes.values()))}%"
    assert (percent(None, 0), percent(0, 9), percent(1, 999), percent(9, 9)) == ("", "", "<1%", "100%")


async def test_live_counts_in_gib_on_a_large_run() -> None:
    source = FakeSource(GPU, unit=GPU_UNIT)
    source.start()
    source.finish_step()
    async with shown(source) as driver:
        gauge = source.gauge()
        assert gauge is not None
        assert driver.line("GiB")
        line = driver.line("cuda:0")
        assert f"{(gauge.device_used_bytes or 0) / (1 << 30):.2f} of 80.00 GiB used" in line
        figures = driver.line("allocated")
        assert f"cached {(gauge.cached_bytes or 0) / (1 << 30):.2f}".split() == figures.split()[5:7]


async def test_live_on_a_cpu_has_no_cache_and_says_who_counted() -> None:
    async with shown(trained()) as driver:
        assert "cached" not in driver.text
        assert "rest of process" in driver.text
        assert "counted op by op" in driver.text


async def test_recomputes_light_up_as_they_happen() -> None:
    source = trained(1, checkpointing="layers")
    async with shown(source) as driver:
        seen = []
        for _ in range(13):
            source.advance()
            await driver.tick()
            seen.append(next((line for line in driver.lines if "recomputed; layer" in line), ""))
        counts = [line.split("/6")[0].split()[-1] for line in seen if line]
        changes = [new for old, new in pairwise(counts) if new != old]
        assert changes[:6] == ["1", "2", "3", "4", "5", "6"]
        assert re.search(r"made 8.0 MiB in 1.[23] ms", seen[-1])


@pytest.mark.parametrize("size", [(60, 20), *SIZES])
async def test_what_a_recompute_made_is_whole(size: tuple[int, int]) -> None:
    source = FakeSource(layers=24)
    source.start(checkpointing="layers")
    source.finish_step()
    async with shown(source, size) as driver:
        assert re.search(r"24/24 recomputed; layer 0 .* 8.0 MiB in 1.[23] ms", driver.text)


async def test_an_untraced_step_is_not_called_now() -> None:
    source = trained(2)
    gauge = source.gauge()
    assert gauge is not None
    import dataclasses

    source.feed.gauge = dataclasses.replace(gauge, step=9)
    async with shown(source) as driver:
        assert driver.line("MiB").split()[1:6] == ["latest", "step", "2,", "its", "end"]


@pytest.mark.parametrize("size", [(60, 20), *SIZES])
async def test_an_instant_of_a_step_under_way_says_of_which_phase_it_is(size: tuple[int, int]) -> None:
    source = trained(2, accumulation=2)
    source.advance(9)
    async with shown(source, size) as driver:
        wanted = "now backward" if size[0] == 60 else "now step 3, backward 1/2"
        assert f"{wanted}  " in driver.line("MiB") + "  "
        assert driver.line("MiB").endswith(" ")


# --- step, layers, events, help ---------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
async def test_step_points_at_the_peak_and_moves(size: tuple[int, int]) -> None:
    source = trained(2)
    ledger = Ledger(source.traces()[-1])
    async with shown(source, size) as driver:
        await driver.press("2")
        assert f"peak {ledger.peak.bytes / MIB:.1f} MiB" in driver.line("step 2")
        at = next(line for line in driver.lines if "optimizer step  AdamW" in line)
        assert at.split()[0] == f"{ledger.peak.bytes / MIB:.1f}"
        largest = ledger.largest(ledger.peak.event, 1)[0]
        row = driver.lines[next(i for i, t in enumerate(driver.lines) if "largest now" in t) + 1]
        assert f"{largest.bytes / MIB:.1f}" in row
        assert largest.name in row
        await driver.press("home")
        assert f"{int(ledger.total[0]) / MIB:.1f} MiB" in driver.text
        await driver.press("right", "left", "end", "p")
        assert "optimizer step  AdamW" in driver.text


async def test_step_freezes_and_leafs_through_what_is_kept() -> None:
    source = trained(3)
    async with shown(source) as driver:
        await driver.press("2")
        assert driver.line("step 3")
        await driver.press("<")
        assert driver.line("step 2")
        source.finish_step()
        await driver.tick()
        assert driver.line("step 2")
        assert "frozen" in driver.text
        await driver.press("f")
        assert "latest" in driver.text
        assert driver.line("step 4")
        await driver.press("f")
        source.finish_step()
        await driver.tick()
        assert driver.line("step 4")
        await driver.press(">", ">")
        assert "latest" in driver.text
        assert driver.line("step 5")


@pytest.mark.parametrize("size", SIZES)
async def test_layers_have_the_ledgers_figures(size: tuple[int, int]) -> None:
    source = trained(2, checkpointing="layers")
    async with shown(source, size) as driver:
        await driver.press("3")
        row = next(line for line in driver.lines if "layers.3" in line).split()
        ledger = Ledger(source.traces()[-1])
        held = sum(ledger.by_layer(ledger.peak.event)["gpt_neox.layers.3"].values())
        # parameters, gradients, two moments; kept input and two recomputed; the layer's scratch
        most, made, times = ["6.0", "6.0", "12.0", "10.0", "9.0"], ["2×8.0"], ["12×"]
        if size[0] > 80:
            most, made, times = [*most, "0.0"], ["2", "8.0"], ["12"]
        assert row[1:] == [f"{held / MIB:.1f}", *most, *made, "1.25"]
        total = driver.line("all at once").split()[3:]
        expected = [int(ledger.curve[list(group)].sum(axis=0).max()) for _, group in GROUPS[: len(most)]]
        assert total == [*(f"{size / MIB:.1f}" for size in (ledger.peak.bytes, *expected)), *times, "1.25"]


@pytest.mark.parametrize("name", ["full", "checkpointed", "lora", "h100-tiny", "h100-tiny-lora"])
@pytest.mark.parametrize("size", [(60, 20), *SIZES])
async def test_what_layers_held_at_the_peak_adds_up_to_it(name: str, size: tuple[int, int]) -> None:
    """Nothing is missing: whatever belongs to no layer has a row of its own."""
    source = Replay(RECORDINGS / f"{name}.gpumem")
    peak = Ledger(source.traces()[-1]).peak.bytes
    async with shown(source, size) as driver:
        await driver.press("3")
        heads, *cells = driver.app.page.table()
        column = heads.index("at peak")
        assert sum(int(row[column]) for row in cells) == peak
        assert "at peak" in driver.line("layer ")
        assert unit_for(peak).show(peak) == driver.line("all at once").split()[3]
        seen = {line[1:].split()[0] for line in driver.lines if line.strip()}
        await driver.press("end")
        seen |= {line[1:].split()[0] for line in driver.lines if line.strip()}
        assert {"logits", "lm_head"} <= seen
        await driver.press("home", "right")
        sizes = [int(row[column]) for row in driver.app.page.table()[1:]]
        assert sizes == sorted(sizes, reverse=True)


async def test_a_kv_cache_is_the_layers_that_it_is_of() -> None:
    """The cache calls its layers `layers.0`, whatever the model calls them."""
    async with shown(Replay(RECORDINGS / "h100-tiny.gpumem"), (120, 40)) as driver:
        await driver.press("3")
        rows = [line for line in driver.lines if "layers.0 " in line]
        assert len(rows) == 1
        await driver.press("down", "enter")
        assert "gpt_neox.layers.0" in driver.lines[1]
        assert sum("KV cache" in line for line in driver.lines) == 2, "keys and values"


async def test_columns_of_recomputes_say_what_a_figure_is_of() -> None:
    source = trained(2, checkpointing="layers")
    async with shown(source, (120, 40)) as driver:
        await driver.press("3")
        assert driver.lines[2].rstrip().endswith("recomputed so far")
        assert driver.lines[3].split()[-5:] == ["times", "MiB", "each", "mean", "ms"]
        topic = driver.app.page.topic().text
        assert "freed in forward and made again in backward" in topic
        assert "mean time" in topic
    async with shown(source) as driver:
        await driver.press("3")
        assert driver.lines[3].split()[-3:] == ["n×MiB", "mean", "ms"], "at 80 columns one column says both"
        table = driver.app.page.table()
        layer = next(row for row in table if row[0].endswith("layers.0"))
        times, size = (int(layer[table[0].index(name)]) for name in ("times", "bytes each"))
        assert times > 0
        row = next(line for line in driver.lines if "layers.0" in line)
        assert row.split()[-2] == f"{times}×{size / MIB:.1f}"
    async with shown(trained(2)) as driver:
        await driver.press("3")
        assert "recomputed" not in driver.text


def test_the_first_steps_recomputes_are_not_in_the_mean_once_there_are_others() -> None:
    """They load kernels: 70 ms where the next ones take 2."""
    run = RunState()
    recompute = {"micro_batch": 0, "layers": ["layers.0"], "bytes": 8, "early_stop": True}
    means = []
    for step, ms in ((1, 70.0), (1, 30.0), (2, 2.0), (3, 4.0)):
        run.fold(Milestone(0, 0.0, Kind.RECOMPUTED, 1, "", recompute | {"step": step, "ms": ms}))
        means.append(run.recomputes["layers.0"].mean_ms)
    assert means == [70, 50, 2, 3]
    assert run.recomputes["layers.0"].count == 4


async def test_layers_are_marked_as_recomputed_only_while_something_goes_on() -> None:
    source = trained(2, checkpointing="layers")
    async with shown(source) as driver:
        await driver.press("3")
        assert [line[0] for line in driver.lines[4:12]].count("r") == 5
        source.command(Stop())
        source.obey()
        await driver.tick()
        assert not {"r", "R"} & {line[0] for line in driver.lines[4:12]}


async def test_a_list_of_tensors_has_the_unit_of_its_largest() -> None:
    """Beside a peak of 15 GiB a list in GiB would say 0.00 of every tensor of a small layer."""
    source = FakeSource(GPU, unit=MIB)
    source.start()
    source.finish_step()
    async with shown(source) as driver:
        driver.app.state.run.peak_bytes = 15 << 30
        await driver.press("3", "down", "enter")
        assert driver.app.state.unit is IN_GIB
        largest = driver.app.page.tensors()[0].bytes
        assert "MiB at the peak" in driver.lines[1] or "KiB at the peak" in driver.lines[1]
        unit = unit_for(largest)
        assert driver.lines[2].split()[0] == unit.show(largest)
        await driver.press("2")
        assert re.search(r"largest now, (MiB|KiB)", driver.text)


async def test_tables_of_a_small_model_count_in_a_unit_that_shows_it() -> None:
    source = FakeSource(GPU, unit=512)
    source.start(checkpointing="layers")
    for _ in range(2):
        source.finish_step()
    peak = Ledger(source.traces()[-1]).peak.bytes
    async with shown(source) as driver:
        await driver.press("3")
        assert driver.line("step 2").split()[2:5] == ["KiB", "peak", f"{peak / 1024:.1f}"]
        assert "n×KiB" in driver.lines[3]
        assert driver.line("lm_head").split()[1] != "0.0"
        await driver.press("g")
        assert driver.line("step 2").split()[2] == "KB"
        await driver.press("g", "5")
        assert driver.line("all").split()[1] == f"{peak / 1024:.1f}"


async def test_layers_scroll_and_sort() -> None:
    source = FakeSource(layers=40)
    source.start()
    source.finish_step()
    async with shown(source) as driver:
        await driver.press("3")
        assert "layers.39" not in driver.text
        await driver.press("end", "up")
        assert "layers.39" in driver.text
        await driver.press("home", "right", "right")
        assert driver.lines[4].split()[0].endswith("embed_in")
        assert driver.lines[5].split()[0].endswith("lm_head")


async def test_events_scroll_and_filter() -> None:
    source = trained(30, checkpointing="layers")
    async with shown(source) as driver:
        await driver.press("6")
        assert "following" in driver.text
        assert "recomputed" not in "".join(driver.lines[2:-2])
        assert "step 30:" in driver.text
        await driver.press("home")
        assert "run started" in driver.lines[2]
        await driver.press("f")
        assert "step ended" not in driver.text
        await driver.press("f", "f")
        assert "everything" in driver.text
        assert "recomputed" in "".join(driver.lines[2:-2])


async def test_details_of_an_event_have_a_row_for_every_figure() -> None:
    source = trained(1)
    by_category = {"parameters": 2_663_620_608, "buffers": 256}
    source.feed.milestone(
        Kind.NOTE, "a note", memory={"loaded": {"allocated_bytes": 2_663_620_864, "by_category": by_category}},
        layers=["a", "b"], notes=[], other={},
    )  # fmt: skip
    async with shown(source, (60, 20)) as driver:
        await driver.press("6", "enter")
        rows = [line.rstrip() for line in driver.lines[4:12]]
        assert [row.split() for row in rows] == [
            ["memory"], ["loaded"], ["allocated_bytes", "2,663,620,864"], ["by_category"],
            ["parameters", "2,663,620,608"], ["buffers", "256"], ["layers", "a,", "b"], ["notes", "none"],
        ]  # fmt: skip
        assert [len(row) - len(row.lstrip()) for row in rows] == [1, 3, 5, 5, 7, 7, 1, 1]


async def test_help_defines_every_category() -> None:
    async with shown(trained(), (120, 60)) as driver:
        await driver.press("?")
        for info in CATEGORIES.values():
            assert info.title in driver.text
            assert info.meaning.split(",")[0][:30] in driver.text
        for key, title, _, _ in offered():
            assert title in driver.text or not key
        await driver.press("escape")
        assert driver.line("P parameters")


# --- techniques ---------------------------------------------------------------------


@pytest.mark.parametrize("name", list(techniques.registry()))
async def test_a_techniques_key_flips_it_and_restarts(name: str) -> None:
    source = trained(1, **({"lora": True} if name == "quantization" else {}))
    source.feed.environment = GPU
    option, key = techniques.registry()[name].switch, techniques.registry()[name].key
    before = source.config()
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
    assert not set(keys) & set("srxqzf?<>p0123456789")


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
    async with shown(source) as driver:
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
        await driver.press("4")
        assert driver.line("c   KV cache").split()[3:5] == ["off", "(checkpointing)"]
        heads, *cells = driver.app.page.table()
        (row,) = (row for row in cells if row[0] == "kv_cache")
        assert row[heads.index("now")] == "off (checkpointing)"
        await driver.press("c")
        assert "→ off" in driver.line("c   KV cache"), "it can be switched off all the same"


@pytest.mark.parametrize("size", [(60, 20), *SIZES])
async def test_what_is_predicted_of_a_gpu_and_measured_on_a_cpu_say_so(size: tuple[int, int]) -> None:
    for environment, head in ((CPU, "on a CPU"), (GPU, "measured")):
        source = trained(1)
        source.feed.environment = environment
        async with shown(source, size) as driver:
            await driver.press("4")
            assert driver.line("now").rstrip().endswith(f"fits {head}" if size[0] == 60 else head)
            assert ("GPU" in driver.line("now")) == (environment is CPU)


async def test_undo_says_before_it_restarts_when_nothing_is_collected_any_more() -> None:
    source = trained(1)
    before = source.config()
    async with shown(source) as driver:
        await driver.press("k")
        source.obey()
        source.finish_step()
        await driver.press("4", "l", "b", "z", "z")
        assert driver.app.control.pending == {}
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
    source.feed.environment = GPU
    async with shown(source, size) as driver:
        await driver.press("4")
        names = [line.option.name for line in driver.app.page.lines()]
        for keys in ((), ("b",)):
            await driver.press(*keys, "home", *["down"] * names.index("quantization"))
            reason = driver.app.control.problem(driver.app.control.wanted().with_({"quantization": "nf4"}))
            assert f"nf4: {reason}" in " ".join(driver.text.split())


@pytest.mark.parametrize("size", [(60, 20), *SIZES])
async def test_where_there_is_no_gpu_it_says_of_which_one_is_predicted_and_how_to_have_another(
    size: tuple[int, int],
) -> None:
    async with shown(trained(1), size, predictions=Oracle(lambda config: None, queue=2)) as driver:
        await driver.press("4")
        text = " ".join(driver.text.split())
        assert (
            "~ is predicted for H100 80GB with its libraries' workspace, 2 being worked out; this run is on a CPU"
            in text
        )
        assert "another GPU: gpumem-tui config set gpu=NAME" in text


@pytest.mark.parametrize("width", [60, 75, 76, 77, 78, 79, 80, 81, 100])
async def test_the_columns_of_all_rows_end_at_one_edge(width: int) -> None:
    """Also where another setting decides, and the words for that take up two columns."""
    async with shown(trained(1, checkpointing="layers"), (width, 24)) as driver:
        await driver.press("4")
        table = driver.lines[1 : driver.lines.index(next(line for line in driver.lines if "───" in line))]
        assert {len(line.rstrip()) for line in table if line.strip()} == {width - 1}


async def test_details_open_and_change() -> None:
    source = trained(1)
    async with shown(source) as driver:
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
            seen.append(driver.app.control.pending.get("optimizer", "adamw"))
        assert "adamw-8bit" not in seen
        assert "sgd" in seen


async def test_a_conflict_is_said_and_nothing_is_sent() -> None:
    source = trained(1)
    source.feed.environment = GPU
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
    config = source.config()
    assert config is not None
    peak = Ledger(source.traces()[-1]).peak.bytes
    async with shown(source) as driver:
        await driver.press("4", "l")
        assert "measured last time" not in driver.text
        await driver.press("enter")
        source.obey()
        source.finish_step()
        await driver.tick()
        await driver.press("l")
        assert f"measured last time: {peak / MIB:.1f} MiB" in driver.text


# --- commands, and what can go wrong ------------------------------------------------


async def test_pause_stop_restart() -> None:
    source = trained(1)
    async with shown(source) as driver:
        await driver.press("h")
        assert source.commands[-1] == Pause(True)
        assert "held" in driver.lines[0]
        assert driver.lines[-2].startswith(" h goes on")
        await driver.press("6")
        assert any(line.split()[1:] == ["held", "held"] for line in driver.lines)
        await driver.press("1")
        await driver.press("h")
        assert source.commands[-1] == Pause(False)
        await driver.press("x")
        assert source.commands[-1] == Stop()
        assert "stopping" in driver.lines[0]
        source.obey()
        await driver.tick()
        assert "stopped" in driver.lines[0]
        assert driver.line("P parameters")
        await driver.press("h")
        assert source.commands[-1] == Stop()
        await driver.press("r")
        assert driver.last_start.config == source.config()


@pytest.mark.parametrize("environment", [CPU, GPU])
async def test_once_a_run_is_over_the_live_screen_says_what_is_allocated_now(environment: Environment) -> None:
    source = FakeSource(environment)
    source.start(checkpointing="layers")
    for _ in range(2):
        source.finish_step()
    source.advance(9)
    async with shown(source) as driver:
        assert "recomputed; layer" in driver.text
        await driver.press("l", "x")
        assert "restarting" not in driver.text, "the message of what has been called off"
        assert "stopping" in driver.lines[-2]
        source.obey()
        await driver.tick()
        assert driver.line("MiB").split()[:3] == ["MiB", "now", "peak"]
        assert driver.line("P parameters").split()[2] == "0.0"
        assert driver.line("allocated").split()[1] == "0.0"
        assert "recomputed; layer" not in driver.text
        assert driver.lines[-2].startswith(" r starts it again")
        gauge = source.gauge()
        assert gauge is not None
        source.feed.gauge = replace(gauge, allocated_bytes=64 * MIB)
        await driver.tick()
        assert driver.line("P parameters").split()[2] == "–", "what it is nobody says"
        assert "64.0" in driver.text
        await driver.press("r")
        assert "starts it again" not in driver.text


async def test_save_makes_a_name_of_its_own_and_says_where(tmp_path: Path) -> None:
    source = trained(1)
    async with shown(source, save_dir=tmp_path) as driver:
        await driver.press("s", "s")
        paths = [command.path for command in source.commands if isinstance(command, Save)]
        assert len(set(paths)) == 2
        assert all(p.parent == tmp_path and p.name.startswith("gpumem-polyglot-ko-1.3b-") for p in paths)
        assert all(p.suffix == ".gpumem" for p in paths)
        said = "".join(line.strip() for line in driver.lines[-4:-1])
        assert f"saved{paths[-1]}" in said.replace(" ", "")


async def test_saving_shows_how_far_it_is_and_escape_cancels_it(tmp_path: Path) -> None:
    source = trained(1)
    source.saves_slowly = True
    async with shown(source, save_dir=tmp_path) as driver:
        await driver.press("s")
        (command,) = (c for c in source.commands if isinstance(c, Save))
        assert driver.lines[-2].startswith(f" saving {command.path.name}  0 %, esc cancels")
        command.work.share = 0.42
        await driver.tick()
        assert "  42 %, esc cancels" in driver.lines[-2]
        await driver.press("s")
        assert command is source.commands[-1], "one at a time"
        await driver.press("escape")
        assert command.work.cancelled
        command.work.over = True
        source.feed.milestone(Kind.NOTE, f"{command.path}: not saved: cancelled")
        await driver.tick()
        assert "esc cancels" not in driver.text
        assert "not saved: cancelled" in driver.text


def test_names_of_recordings_are_safe_and_free(tmp_path: Path) -> None:
    first = free_name(tmp_path, "../EleutherAI/a b:c", set(), lambda: 0.0)
    assert first.parent == tmp_path
    assert first.name.startswith("gpumem-a-b-c-19")
    first.touch()
    second = free_name(tmp_path, "../EleutherAI/a b:c", set(), lambda: 0.0)
    assert second != first
    assert free_name(tmp_path, "../EleutherAI/a b:c", {second}, lambda: 0.0) not in (first, second)


@pytest.mark.parametrize("kind", [Kind.OUT_OF_MEMORY, Kind.RUN_FAILED])
async def test_a_failure_is_shown_and_the_app_lives(kind: Kind) -> None:
    source = trained(1)
    source.advance(8)
    async with shown(source) as driver:
        source.fail(kind, "it needs 1 GiB more than there is")
        await driver.tick()
        assert "failed" in driver.lines[0]
        assert "it needs 1 GiB more" in driver.lines[-2]
        assert driver.line("P parameters")
        await driver.press("6", "f", "f", "up")
        assert "it needs 1 GiB more" in driver.text
        await driver.press("enter")
        assert ("Traceback" if kind is Kind.RUN_FAILED else "1,073,741,824") in driver.text
        await driver.press("escape", "escape", "1", "r")
        source.obey()
        source.finish_step()
        await driver.tick()
        assert driver.line("step").split()[1] == "1"


async def test_a_leak_is_a_problem() -> None:
    source = trained(1)
    async with shown(source) as driver:
        source.end("stopped", leaked=512)
        await driver.tick()
        assert "512 bytes leaked" in driver.lines[-2]
        assert [m.kind for m in driver.app.state.logs[Filter.PROBLEMS]] == [Kind.RUN_ENDED]


async def test_a_recording_is_looked_at_and_refuses_commands() -> None:
    source = trained(2)
    source.live = False
    async with shown(source) as driver:
        assert "recording" in driver.lines[0]
        for key in ("l", "x", "s", "r", "h", "!"):
            await driver.press("escape", key)
            assert "this is a recording: it can be looked at" in driver.text
        assert source.commands == []
        await driver.press("escape", "2")
        assert driver.line("step 2")


async def test_a_recording_offers_nothing_that_takes_an_engine() -> None:
    """Neither in the row of keys, nor in the help, nor by name; what can be foreseen can still be asked."""
    source = trained(2)
    async with shown(source) as driver:
        assert "restarts" in driver.lines[-2]
    source.live = False
    async with shown(source, (80, 100)) as driver:
        assert "restarts" not in driver.lines[-2]
        named = {command.title for command in driver.app.get_system_commands(driver.app.screen)}
        assert not named & {"Restart the run", "Stop the run", "Save a recording", "LoRA: next value", "Take over"}
        assert {"Save the screen", "Copy this table", "Up"} <= named
        await driver.press("?")
        assert "restart" not in driver.text
        await driver.press("4")
        assert "apply" not in driver.lines[-2]
        assert "change" in driver.lines[-2]
        await driver.press("k")
        assert "a recording runs nothing" in driver.text
        await driver.press("enter")
        assert source.commands == []
        assert "this is a recording" in driver.text


@pytest.mark.parametrize("size", [(60, 20), *SIZES])
@pytest.mark.parametrize("settings", [{}, {"checkpointing": "layers"}])
async def test_a_recording_says_what_would_lower_its_peak_most(size: tuple[int, int], settings: dict[str, str]) -> None:
    source = FakeSource(GPU, unit=GPU_UNIT)
    source.start(**settings)
    for _ in range(3):
        source.finish_step()
    source.live = False

    oracle = Oracle(lambda config: (12 << 30) - (3 << 30) * bool(config["lora"]))
    async with shown(source, size, predictions=oracle) as driver:
        assert driver.line("The peak is inside AdamW.step(): ")
        assert "saves most: LoRA on, ~-3.00 GiB" in driver.text
        assert ("recomputed; layer" in driver.text) == bool(settings)
    assert oracle.hurried == {True}, "there is no training to give way to"
    oracle = Oracle(lambda config: 12 << 30)
    async with shown(source, size, predictions=oracle) as driver:
        assert "no single change is predicted to lower the peak" in driver.text


async def test_what_saves_most_is_the_best_of_all_values_and_says_how_many_are_tried() -> None:
    """Not of the next ones, which a key steps to: sgd is the seventh optimizer."""
    source = FakeSource(GPU, unit=GPU_UNIT)
    source.start(batch_size=4)
    for _ in range(3):
        source.finish_step()
    saved = {"lora": 3, "sgd": 5, "accumulation": 6}
    order = ["base", "lora", "sgd", "accumulation"]
    known: list[str] = []

    def named(config: RunConfig) -> str:
        if config["accumulation"] == 4 and config.batch_size == 1:
            return "accumulation"
        return "lora" if config["lora"] else "sgd" if config["optimizer"] == "sgd" else "base"

    def rule(config: RunConfig) -> int | None:
        return (12 - saved.get(named(config), 0)) << 30 if named(config) in known else None

    lines = []
    async with shown(source, (120, 40), predictions=Oracle(rule)) as driver:
        for name in (*order, ""):
            lines.append(next(line.strip() for line in driver.lines if "saves most" in line))
            known.append(name)
            await driver.tick()
    assert re.fullmatch(r"working out what saves most: 0 of \d+ changes", lines[0])
    assert re.fullmatch(r"working out what saves most: \d+ of \d+ changes", lines[1])
    assert re.fullmatch(r"saves most so far \(\d+ of \d+\): l LoRA on, ~-3\.00 GiB", lines[2])
    assert re.fullmatch(r"saves most so far \(\d+ of \d+\): o optimizer sgd, ~-5\.00 GiB", lines[3])
    assert lines[4] == "saves most: o optimizer sgd, ~-5.00 GiB; a accumulation 4 with b batch size 1, ~-6.00 GiB"
    async with shown(source, predictions=Oracle(rule)) as driver:
        assert "saves most: o optimizer sgd, ~-5.00 GiB " in driver.text, "of one setting, where there is no room"


# --- state, without a terminal ----------------------------------------------------------


def folded(source: FakeSource) -> ViewState:
    state = ViewState()
    state.update(source, 0.0)
    return state


def test_state_folds_only_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    source = trained(2)
    state = folded(source)
    folds: list[int] = []
    monkeypatch.setattr("gpumem_tui.tui.state.Ledger", lambda trace: folds.append(trace.step) or Ledger(trace))
    assert not state.update(source, 1.0)
    source.advance()
    assert state.update(source, 2.0)
    assert not state.update(source, 3.0)
    assert folds == [3]


def test_state_never_misses_the_peak_of_a_step_it_did_not_see() -> None:
    source = trained(1)
    state = folded(source)
    source.finish_step()
    highest = Ledger(source.traces()[-1]).peak.bytes
    source.finish_step()
    source.advance()
    state.update(source, 1.0)
    assert state.peak is not None
    assert state.peak.peak.bytes == highest
    assert not state.peak.trace.partial


def test_a_partial_trace_can_hold_the_peak_and_gives_way_to_its_step() -> None:
    source = trained(1)
    state = folded(source)
    source.advance(13)
    state.update(source, 1.0)
    while source.trace() is not None and source.trace().partial:  # type: ignore[union-attr]
        source.finish_step()
        state.update(source, 2.0)
    assert state.peak is not None
    assert not state.peak.trace.partial


def test_a_new_run_starts_from_nothing() -> None:
    source = trained(2, checkpointing="layers")
    state = folded(source)
    assert state.run.recomputes
    source.start(batch_size=1)
    state.update(source, 1.0)
    assert state.run.number == 2
    assert not state.run.recomputes
    assert state.peak is not None
    assert state.peak.trace.step == 0
    assert [t.step for t in state.kept] == [0]


def test_milestones_are_read_once_and_bounded() -> None:
    source = trained(1)
    state = folded(source)
    for i in range(KEPT_MILESTONES + 10):
        source.feed.milestone(Kind.NOTE, f"note {i}")
    state.update(source, 1.0)
    assert len(state.logs[Filter.ALL]) == KEPT_MILESTONES
    seen: list[int] = []
    original: Callable[[int], object] = source.milestones
    source.milestones = lambda since: (seen.append(since), original(since))[1]  # type: ignore[assignment]
    state.update(source, 2.0)
    assert seen == [state.logs[Filter.ALL][-1].index + 1]


def test_messages_go_by_the_clock() -> None:
    source = trained(1)
    state = folded(source)
    state.say("hello")
    state.update(source, 1.0)
    assert state.message is not None
    state.update(source, 100.0)
    assert state.message is None


def test_runs_that_differ_in_steps_only_hold_the_same() -> None:
    one = techniques.configure({"model": "tiny"}, {"steps": 1})
    two = techniques.configure({"model": "tiny"}, {"steps": 2, "seed": 3})
    assert config_key(one) == config_key(two)
    assert config_key(one) != config_key(one.with_({"lora": True}))


# --- small things ---------------------------------------------------------------------


def test_layer_table_against_a_slow_count() -> None:
    source = trained(1, checkpointing="layers", accumulation=2)
    ledger = Ledger(source.traces()[-1])
    table = layer_table(ledger)
    most: dict[str, list[int]] = {}
    for event in range(-1, len(ledger.trace.events)):
        for layer, sizes in ledger.by_layer(event).items():
            row = most.setdefault(layer, [0] * len(GROUPS))
            for i, (_, group) in enumerate(GROUPS):
                row[i] = max(row[i], sum(sizes.get(category, 0) for category in group))
    for row in table.rows:
        assert list(row.sizes) == most[row.name], row.name
        assert row.peak_bytes == sum(ledger.by_layer(ledger.peak.event).get(row.name, {}).values())
    assert {row.name for row in table.rows} == {name for name, sizes in most.items() if any(sizes)}


def test_numbered_layers_are_in_order() -> None:
    names = ("a.embed.weight", *(f"a.layers.{i}.w" for i in (2, 0, 10, 1)), "a.heads.0.w")
    assert numbered_layers(names) == ["a.layers.0", "a.layers.1", "a.layers.2", "a.layers.10"]
    assert numbered_layers(()) == []


@pytest.mark.parametrize("width", [1, 7, 72, 5000])
def test_resampling_keeps_the_peak(width: int) -> None:
    ledger = Ledger(trained(2).traces()[-1])
    shown_instants = columns(ledger.total, width)
    assert len(shown_instants) == width
    assert ledger.total[shown_instants].max() == ledger.peak.bytes
    assert (np.diff(shown_instants) >= 0).all()


@pytest.mark.parametrize("palette", [Palette(), Palette(ascii=True), Palette(mono=True)])
def test_area_is_as_high_as_its_sum(palette: Palette) -> None:
    curve = np.zeros((len(Category), 3), np.int64)
    curve[Category.PARAMETERS] = (8, 4, 0)
    curve[Category.ACTIVATIONS] = (8, 4, 0)
    rows = [row.text for row in area(curve, 16, 4, palette)]
    assert [len(row) for row in rows] == [3] * 4
    filled = [sum(row[x] != " " or palette == Palette() for row in rows) for x in range(3)]
    if palette != Palette():
        assert filled == [4, 2, 0]
        assert [row[0] for row in rows] == ["A", "A", "P", "P"]


@pytest.mark.parametrize("ascii", [False, True])
def test_bars_have_their_width_and_share(ascii: bool) -> None:
    palette = Palette(ascii=ascii)
    assert bar(50, 100, 10, palette.plain, palette).text == ("#####" if ascii else "█████") + "     "
    assert bar(0, 100, 10, palette.plain, palette).text.strip() == ""
    assert bar(5, 0, 10, palette.plain, palette).width == 10
    if not ascii:
        assert bar(1, 10**9, 10, palette.plain, palette).text[0] == "▏"
    parts = [Part("P", 25, palette.plain), Part("G", 50, palette.plain)]
    row = stacked(parts, 100, 8, palette)
    assert row.width == 8
    assert [len(text) for text, _ in row.spans] == [2, 4, 2]
    assert stacked([Part("P", 1, palette.plain)], 10**9, 8, palette).text[0] == "P"


def test_explanations_say_what_is_in_the_ledger() -> None:
    source = FakeSource()
    source.start(lora=True)
    source.finish_step()
    source.finish_step()
    ledger = Ledger(source.traces()[-1])
    assert ledger.peak.phase in (Phase.FORWARD, Phase.BACKWARD)
    text = explain(ledger, IN_MIB)
    grown = ledger.peak.by_category[Category.ACTIVATIONS] - ledger.at(-1)[Category.ACTIVATIONS]
    assert f"activations {grown / MIB:.1f}" in text
    assert "~" not in text


def test_device_shares_when_nvml_sees_no_processes() -> None:
    import dataclasses

    source = FakeSource(GPU)
    source.start()
    gauge = source.gauge()
    assert gauge is not None
    hidden = dataclasses.replace(gauge, process_bytes=None, context_bytes=None)
    found = {share.title: share.bytes for share in shares(hidden, hidden.allocated_bytes, True)}
    assert found["context"] is None
    assert found["context and others"] == (hidden.device_used_bytes or 0) - (hidden.reserved_bytes or 0)
    blind = dataclasses.replace(hidden, device_used_bytes=None)
    assert {s.title: s.bytes for s in shares(blind, 0, True)}["free"] is None


def test_units_and_figures() -> None:
    assert unit_for(5 << 30) is IN_GIB
    assert unit_for(1 << 30) is IN_MIB
    assert unit_for(1 << 20) is IN_KIB
    assert [unit_for(size, "GB").name for size in (10**6, 10**9, 10**10)] == ["KB", "MB", "GB"]
    assert (IN_MIB.show(None), IN_MIB.show(0), IN_GIB.full(3 << 29)) == ("–", "0.0", "1.50 GiB")
    assert [rate(v) for v in (None, 987.0, 21_800.0, 1.3e6)] == ["–", "987", "21.8k", "1.3M"]
    assert [duration(v) for v in (None, 0.0004, 0.094, 3.118)] == ["–", "0.4 ms", "94 ms", "3.12 s"]
    assert [clock(v) for v in (7, 751, 3729)] == ["0:07", "12:31", "1:02:09"]
    assert shorten("abcdef", 4) == "abc…"
    assert tail("gpt_neox.layers.10.mlp", 12) == "…10.mlp"
    assert len(tail("averyveryverylongname", 8)) == 8
