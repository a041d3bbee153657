"""The live screen: rows say what the ledger says, the sentence about the peak adds up, savings are named."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from gpumem_tui.engine.categories import CATEGORIES, Category
from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.events import SEGMENT, AllocatorPool, CacheState, Phase
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.recording import Recording
from gpumem_tui.engine.techniques import label
from gpumem_tui.tui.draw import wrap
from gpumem_tui.tui.explain import explain, explanations
from gpumem_tui.tui.screens.device_bar import shares
from gpumem_tui.tui.units import IN_GIB, IN_MIB, percent

from .app_driver import GPU_UNIT, RECORDINGS, SIZES, Oracle, restarted, shown, trained
from .fake_source import GPU, MIB, FakeSource, Sim


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("advances", [0, 3, 8, 13])
async def test_live_says_what_the_ledger_says(size: tuple[int, int], advances: int) -> None:
    source = trained(3)
    source.advance(advances)
    async with shown(source, size) as driver:
        trace = source.run.latest
        assert trace is not None
        now = Ledger(trace).end
        peak = max((Ledger(t).peak for t in [*source.run.traces(), trace]), key=lambda p: p.bytes)
        # What only several ranks or a watched script hold has no row here.
        small = "UCH" if size[1] > 30 else "BIWsUCH"
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
    async with shown(Recording(RECORDINGS / f"{name}.gpumem"), (120, 40)) as driver:
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
    async with shown(Recording(RECORDINGS / "h100-tiny.gpumem")) as driver:
        assert "54 ms wall" in driver.line("step 3")
        await driver.press("2")
        assert "47 ms host" in driver.line("step 3")
    async with shown(Recording(RECORDINGS / "h100-tiny.gpumem"), (60, 20)) as driver:
        await driver.press("2", "+")
        assert driver.line("step 3").split()[2:7] == ["47", "ms", "host", "peak", "242.1"]
        assert driver.line("step 3").split()[-3:] == ["<", "2", "latest"]


@pytest.mark.parametrize("size", [(60, 20), (80, 24)])
async def test_what_is_small_is_in_one_row_that_says_what_it_is(size: tuple[int, int]) -> None:
    async with shown(Recording(RECORDINGS / "h100-tiny.gpumem"), size) as driver:
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
    source.feed.gauge = replace(gauge, step=9)
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
    so_far = r"saves most so far \(\d+ of \d+\), as another training: "
    assert re.fullmatch(rf"{so_far}l LoRA on, ~-3\.00 GiB", lines[2])
    assert re.fullmatch(rf"{so_far}o optimizer sgd, ~-5\.00 GiB", lines[3])
    assert lines[4] == "saves most: accumulation 4 with batch size 1, ~-6.00 GiB"


@pytest.mark.parametrize("size", SIZES)
async def test_what_keeps_the_mathematics_comes_first_and_the_larger_saving_is_seen(size: tuple[int, int]) -> None:
    """In a line of its own where there is no room beside the first."""
    source = FakeSource(GPU, unit=GPU_UNIT)
    source.start(batch_size=4)
    for _ in range(3):
        source.finish_step()

    def rule(config: RunConfig) -> int:
        saved = 2 * (config["checkpointing"] == "segments") + 9 * (config["optimizer"] == "sgd")
        return (12 - saved - 3 * (config["accumulation"] == 4 and config.batch_size == 1)) << 30

    async with shown(source, size, predictions=Oracle(rule)) as driver:
        assert "try first: k checkpointing segments, ~-2.00 GiB" in driver.text
        assert "saves more: " in driver.text and "saves most" not in driver.text
        assert "o optimizer sgd, ~-9.00 GiB (another training)" in driver.text
        await driver.press("4", "k")
        assert driver.app.control.changes.pending == {"checkpointing": "segments"}, "a key's first press is as named"
        await driver.press("k")
        assert driver.app.control.changes.pending == {"checkpointing": "input"}, "and steps on from there"
        await driver.press("z", "z", "1", "k")
        assert driver.last_start.config["checkpointing"] == "segments"


@pytest.mark.parametrize("size", [(60, 20), (80, 24)])
@pytest.mark.parametrize("live", [True, False])
async def test_where_nothing_can_be_predicted_the_reason_is_said_at_once(live: bool, size: tuple[int, int]) -> None:
    class Refusing(Oracle):
        def unanswered(self, configs: Sequence[RunConfig]) -> int:
            return 0

        def problem(self, config: RunConfig) -> str:
            return "Sequential is no transformers model whose architecture is known here"

    source = trained(2)
    source.live = live
    async with shown(source, size, predictions=Refusing(lambda _: None)) as driver:
        for page in ("1", "4"):
            await driver.press(page)
            assert "working out" not in driver.text
            said = " ".join(driver.text.split())
            assert "nothing is predicted: Sequential is no transformers model whose architecture is known here" in said
            assert "is predicted for" not in driver.text


async def test_a_saving_under_a_mebibyte_is_none() -> None:
    source = trained(2)
    oracle = Oracle(lambda config: (12 << 30) - 1000 * (config["checkpointing"] == "layers"))
    async with shown(source, predictions=oracle) as driver:
        assert "no single change is predicted to lower the peak" in driver.text


def test_explanations_say_what_is_in_the_ledger() -> None:
    source = FakeSource()
    source.start(lora=True)
    source.finish_step()
    source.finish_step()
    ledger = Ledger(source.run.traces()[-1])
    assert ledger.peak.phase in (Phase.FORWARD, Phase.BACKWARD)
    text = explain(ledger, IN_MIB)
    grown = ledger.peak.by_category[Category.ACTIVATIONS] - ledger.at(-1)[Category.ACTIVATIONS]
    assert f"activations {grown / MIB:.1f}" in text
    assert "~" not in text


def test_device_shares_when_nvml_sees_no_processes() -> None:
    source = FakeSource(GPU)
    source.start()
    gauge = source.gauge()
    assert gauge is not None
    hidden = replace(gauge, process_bytes=None, context_bytes=None)
    found = {share.title: share.bytes for share in shares(hidden, hidden.allocated_bytes, True)}
    assert found["context"] is None
    assert found["context and others"] == (hidden.device_used_bytes or 0) - (hidden.reserved_bytes or 0)
    blind = replace(hidden, device_used_bytes=None)
    assert {s.title: s.bytes for s in shares(blind, 0, True)}["free"] is None


async def test_a_configuration_is_described_alike_everywhere_and_undone_it_is_as_it_was() -> None:
    async with shown(trained(), (120, 40)) as driver:
        before = driver.lines[0]
        assert before.rstrip().endswith("B8×S256")
        await restarted(driver, "l")
        assert driver.lines[0].rstrip().endswith("B8×S256 lora")
        await restarted(driver, "k")
        said = driver.lines[0].strip().split("  ")[-1]
        assert said == label(driver.app.state.config) == "B8×S256 lora checkpointing=layers"
        assert driver.app.state.runs[-1].label == said
        await restarted(driver, "z")
        await restarted(driver, "z")
        assert driver.lines[0] == before


async def test_the_edge_is_the_largest_usable_block_and_gaps_are_shown_where_they_cost_something() -> None:
    source = trained()
    gauge = source.gauge()
    assert gauge is not None
    total = gauge.device_total_bytes
    small = CacheState(gauge.allocated_bytes + total // 50, gauge.allocated_bytes, total // 400, total // 200)
    held = small.reserved_bytes
    used = replace(gauge, reserved_bytes=held, process_bytes=held, device_used_bytes=total - total // 4, cache=small)
    source.feed.publish_gauge(used)
    async with shown(source, (100, 30), predictions=Oracle(lambda _: None)) as app:
        usable = used.usable_bytes
        assert usable is not None and f"usable {app.app.state.unit.show(usable)}" in app.text
        assert "in gaps" not in app.text, "half a per cent of the device"
        source.feed.publish_gauge(replace(used, cache=small._replace(gaps_bytes=total // 60)))
        await app.tick()
        line = app.line("in gaps")
        show = app.app.state.unit.show
        assert f"in gaps at the peak {show(total // 60)} of {show(small.reserved_bytes)} reserved" in line
        assert f"expandable segments: ~{show(100 * MIB - small.reserved_bytes)}" in line


async def test_what_is_cached_is_told_by_stream_where_there_is_more_than_one() -> None:
    source = trained()
    trace = source.run.traces()[-1]
    pools = AllocatorPool(0, "small"), AllocatorPool(0, "large"), AllocatorPool(139876, "large")
    held = np.array([(-1, 0, 2 * MIB), (-1, 1, 60 * MIB), (-1, 2, 20 * MIB)], SEGMENT)
    async with shown(source, (100, 30)) as app:
        assert "by stream" not in app.text
        source.feed.publish_trace(replace(trace, step=trace.step + 1, segments=held[:2], pools=pools[:2]))
        await app.tick()
        assert "by stream" not in app.text, "a small pool and a large one of one stream"
        source.feed.publish_trace(replace(trace, step=trace.step + 2, segments=held, pools=pools))
        await app.tick()
        show = app.app.state.unit.show
        stream, other = show(62 * MIB), show(20 * MIB)
        row = f"cached by stream at the peak  default {stream} of {stream}  stream 1 {other} of {other}"
        assert row in app.text


async def test_the_figures_of_the_device_are_of_one_instant() -> None:
    """A reading from the middle of a step, beside a trace that has gone on to its end."""
    source = trained()
    gauge = source.gauge()
    assert gauge is not None and gauge.reserved_bytes is None
    ended, total = gauge.allocated_bytes, gauge.device_total_bytes
    reserved = ended + 30 * MIB
    cache = CacheState(reserved, ended + 20 * MIB, MIB, total // 50)
    read = replace(
        gauge, allocated_bytes=ended + 20 * MIB, reserved_bytes=reserved, device_used_bytes=reserved, cache=cache
    )
    source.feed.publish_gauge(read)
    async with shown(source, (100, 30)) as app:
        show = app.app.state.unit.show
        words = app.line("tensors").split()
        assert (words[1], words[words.index("cached") + 1]) == (show(ended), show(30 * MIB))
        assert words[3] == show(replace(read, allocated_bytes=ended).usable_bytes)
        assert "in gaps at the peak" in app.text
    over = replace(read, allocated_bytes=0)
    assert over.usable_bytes == total, "where nothing is allocated there are no gaps, whatever the peak had"


async def test_a_reading_of_another_step_than_is_shown_says_of_which() -> None:
    source = trained(2)
    source.live = False
    gauge = source.gauge()
    assert gauge is not None
    source.run.publish_gauge(replace(gauge, step=7, phase=Phase.FORWARD))
    async with shown(source) as app:
        assert "used in step 7, forward" in app.lines[2] and "latest step 2, its end" in app.text


async def test_a_row_that_was_there_once_stays() -> None:
    """Buckets come and go with every layer: a row that did so too would move all rows beneath it."""
    source = trained(2)
    async with shown(source, (120, 40)) as driver:
        assert "C communication" not in driver.text
        assert source.model is not None
        bucket = source.model.sim.alloc(MIB)
        source.model.held["bucket"] = (bucket, Category.COMMUNICATION)
        source.advance()
        await driver.tick()
        assert driver.line("C communication").split()[2] == "1.0"
        source.model.held.pop("bucket")
        source.model.sim.drop(bucket)
        source.advance()
        await driver.tick()
        assert driver.line("C communication").split()[2] == "0.0"


GREW = {
    "one is left over": ({Category.ACTIVATIONS: 40, Category.LOGITS_LOSS: 48, Category.KV_CACHE: 6}, "KV cache 6.0"),
    "two are left over": (
        {Category.ACTIVATIONS: 80, Category.LOGITS_LOSS: 48, Category.KV_CACHE: 6, Category.GATHERED: 5},
        "others 11.0",
    ),
}


def grown(by_category: dict[Category, int], module: str = "lm_head") -> Ledger:
    """The fold of a step in which so many MiB of some categories come on top of 100 of parameters."""
    sim = Sim()
    sim.begin(0, 1)
    sim.own(sim.alloc(100 * MIB), Category.PARAMETERS, "weight")
    sim.begin(1, 1)
    sim.own(next(iter(sim.live)), Category.PARAMETERS, "weight")
    sim.enter(Phase.FORWARD, module=module)
    for category, size in by_category.items():
        sim.own(sim.alloc(size * MIB), category, category.key)
    sim.leave()
    return Ledger(sim.trace(open_=False))


@pytest.mark.parametrize("case", GREW)
def test_what_is_left_over_has_its_name_where_it_is_one(case: str) -> None:
    sizes, last = GREW[case]
    text = explain(grown(sizes), IN_MIB)
    assert text.endswith(f" + {last}.")
    assert ("others" in text) == last.startswith("others")


def test_the_sentence_about_the_peak_loses_whole_parts() -> None:
    sizes, _ = GREW["two are left over"]
    texts = explanations(grown(sizes, "model." * 9 + "mlp"), IN_MIB)
    assert [text.count(" + ") for text in texts] == [3, 3, 2, 2]
    for text in texts:
        figures = re.findall(r"[\d.]*\d(?= from| \+|\.$)", text)
        assert sum(map(float, figures)) == pytest.approx(239.0), text
    assert "mlp" not in texts[-1]
    assert len(wrap(texts[-1], 58)) <= 2


@pytest.mark.parametrize("size", [(60, 20), (80, 24)])
async def test_no_sentence_of_the_live_screen_ends_in_mid_word(size: tuple[int, int]) -> None:
    source = FakeSource(GPU, unit=GPU_UNIT)
    source.start(batch_size=4, checkpointing="layers")
    for _ in range(3):
        source.finish_step()

    def rule(config: RunConfig) -> int:
        saved = {"sgd": 9, "adamw-8bit": 5}.get(str(config["optimizer"]), 0)
        return (12 - saved - 3 * (config["accumulation"] == 4 and config.batch_size == 1)) << 30

    async with shown(source, size, predictions=Oracle(rule)) as driver:
        advice = [line.strip() for line in driver.lines if "~-" in line]
        assert advice, "and a second line where there is room"
        for line in advice:
            assert re.search(r"GiB( \(\w+ \w+\))?$", line), line
        assert "…" not in "".join(driver.lines[1:-2])


async def test_what_waits_on_the_host_has_a_bar_of_its_own_beneath_the_gpu_s() -> None:
    source = FakeSource(GPU, unit=GPU_UNIT)
    source.start()
    source.finish_step()
    gauge, held = source.gauge(), 8 << 30
    assert gauge is not None
    offloaded = replace(gauge, pinned_bytes=held)
    source.feed.publish_gauge(offloaded)
    async with shown(source, (80, 24)) as app:
        unit = app.app.state.unit
        assert f"{unit.show(held)} of {unit.full(4 * held)} page-locked" in app.line("host")
        axis = app.line("host").rpartition(" page-locked ")[2].strip()
        assert axis.startswith("h") and axis.count("·") == pytest.approx(0.75 * len(axis), abs=1)
        assert "host" not in app.line("allocated"), "it is no part of the device"
        source.feed.publish_gauge(replace(offloaded, pinned_bytes=1000))
        await app.tick()
        assert not [line for line in app.lines if line.startswith(" host ")]
