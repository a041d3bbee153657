"""The layers screen: the ledger's figures, adding up to the peak, in a unit that shows them."""

from __future__ import annotations

import re

import pytest

from gpumem_tui.engine.feed import Stop
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.module_names import numbered_layers
from gpumem_tui.engine.recording import Recording
from gpumem_tui.engine.run_events import Recomputed
from gpumem_tui.tui.layer_table import GROUPS, layer_table
from gpumem_tui.tui.run_state import RunState
from gpumem_tui.tui.units import IN_GIB, unit_for

from .app_driver import RECORDINGS, SIZES, shown, trained
from .fake_source import GPU, MIB, FakeSource


@pytest.mark.parametrize("size", SIZES)
async def test_layers_have_the_ledgers_figures(size: tuple[int, int]) -> None:
    source = trained(2, checkpointing="layers")
    async with shown(source, size) as driver:
        await driver.press("3")
        row = next(line for line in driver.lines if "layers.3" in line).split()
        ledger = Ledger(source.run.traces()[-1])
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
    source = Recording(RECORDINGS / f"{name}.gpumem")
    peak = Ledger(source.run.traces()[-1]).peak.bytes
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
    async with shown(Recording(RECORDINGS / "h100-tiny.gpumem"), (120, 40)) as driver:
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
    means = []
    for step, ms in ((1, 70.0), (1, 30.0), (2, 2.0), (3, 4.0)):
        run.fold(Recomputed(text="", step=step, micro_batch=0, layers=("layers.0",), bytes=8, ms=ms, early_stop=True))
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
    peak = Ledger(source.run.traces()[-1]).peak.bytes
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


def test_layer_table_against_a_slow_count() -> None:
    source = trained(1, checkpointing="layers", accumulation=2)
    ledger = Ledger(source.run.traces()[-1])
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


async def test_layers_fold_open_to_their_modules() -> None:
    source = trained(2)
    async with shown(source) as driver:
        await driver.press("3", "down")
        row = next(line for line in driver.lines if "layers.0" in line)
        assert row.startswith("+")
        await driver.press("tab")
        inner = next(line for line in driver.lines if "mlp" in line)
        # The parameter and its gradient and moments; activations are made by the module too.
        assert inner.split()[2:5] == ["6.0", "6.0", "12.0"]
        await driver.press("tab")
        assert "mlp" not in driver.text


async def test_a_layers_tensors_are_listed_with_all_their_bytes() -> None:
    source = trained(2)
    ledger = Ledger(source.run.traces()[-1])
    async with shown(source, (100, 40)) as driver:
        await driver.press("3", "down", "enter")
        assert driver.lines[1].startswith(" gpt_neox.layers.0")
        held = sum(ledger.by_layer(ledger.peak.event)["gpt_neox.layers.0"].values())
        state = sum(  # optimizer state carries its own name behind the parameter's
            size for layer, sizes in ledger.by_layer(ledger.peak.event).items() for size in sizes.values()
            if layer.startswith("gpt_neox.layers.0")
        )  # fmt: skip
        assert f"{max(held, state) / MIB:.1f} MiB at the peak" in driver.lines[1]
        assert any("gpt_neox.layers.0.mlp.weight" in line for line in driver.lines)
        await driver.press("escape")
        assert "at peak" in driver.lines[3]


async def test_why_tensors_have_no_shape_is_said_where_operators_were_not_watched() -> None:
    said = "no shape: its operator was not watched"
    for source, is_said in ((trained(2), True), (Recording(RECORDINGS / "h100-tiny.gpumem"), False)):
        async with shown(source, (100, 40)) as driver:
            await driver.press("3", "down", "enter")
            assert (said in driver.text) is is_said
            await driver.press("escape", "2")
            assert (said in driver.text) is is_said


async def test_layers_are_found_by_name() -> None:
    source = FakeSource(layers=40)
    source.start()
    source.finish_step()
    async with shown(source) as driver:
        await driver.press("3", "/", *"layers.2q", "backspace")
        assert "/layers.2_" in driver.lines[1], "letters are text, and q does not quit"
        assert driver.app.is_running
        shown_layers = [line.split()[0].split(".")[-1] for line in driver.lines if "layers." in line][1:]
        assert shown_layers == ["2", *(str(20 + i) for i in range(10))]
        await driver.press("enter", "down")
        assert "/layers.2" in driver.lines[1]
        await driver.press("escape")
        assert "embed_in" in driver.text


async def test_modules_within_layers_are_found_too() -> None:
    async with shown(Recording(RECORDINGS / "h100-tiny.gpumem"), (120, 40)) as driver:
        await driver.press("3", "/", *"attention.d", "enter")
        names = [line[1:].split()[0] for line in driver.lines[4:-3] if line.strip()]
        wanted = (f"layers.{i}{name}" for i in range(6) for name in ("", ".attention", ".attention.dense"))
        assert names == list(wanted)
        assert [line[0] for line in driver.lines[4:7]] == ["-", "-", " "]


async def test_what_nothing_is_called_is_said() -> None:
    async with shown(trained(2)) as driver:
        await driver.press("3", "/", *"xyz")
        assert "nothing is called xyz" in driver.text
        await driver.press("enter", "down", "tab", "enter", "escape", "escape")
        assert "embed_in" in driver.text
