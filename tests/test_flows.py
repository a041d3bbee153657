"""What a person does on the screens, from the first key to what comes of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.events import Category
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.recording import Replay, write
from gpumem_tui.tui.__main__ import main
from gpumem_tui.tui.predictions import Prediction
from gpumem_tui.tui.run_summary import of_source
from gpumem_tui.tui.state import KEPT_RUNS, ViewState

from .app_driver import shown, trained
from .fake_source import GPU, MIB, FakeSource

RECORDINGS = Path(__file__).parent / "recordings"


async def restarted(driver: object, *keys: str, steps: int = 2) -> None:
    """Press, and let the engine obey and train."""
    await driver.press(*keys)  # type: ignore[attr-defined]
    driver.source.obey()  # type: ignore[attr-defined]
    for _ in range(steps):
        driver.source.finish_step()  # type: ignore[attr-defined]
        await driver.tick()  # type: ignore[attr-defined]


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


# --- compare ----------------------------------------------------------------------------------


async def test_runs_are_compared_by_category_phase_and_layer() -> None:
    source = trained(2)
    async with shown(source) as driver:
        await restarted(driver, "k")
        await driver.press("5")
        assert "run 1  B8" in driver.text
        assert "run 2, now  B8 checkpointing=layers" in driver.text
        first, second = driver.app.state.runs
        a, b = first.peak[Category.OPTIMIZER_STATE], second.peak[Category.OPTIMIZER_STATE]
        assert driver.line("O optimizer").split()[2:] == [f"{a / MIB:.1f}", f"{b / MIB:.1f}", "0.0"]
        await driver.press("tab")
        a, b = (run.by_phase[phase] for run in (first, second) for phase in run.by_phase if phase.title == "backward")
        assert driver.line("backward").split()[1:] == [f"{a / MIB:.1f}", f"{b / MIB:.1f}", f"{(b - a) / MIB:+.1f}"]
        await driver.press("tab")
        a, b = (run.by_layer["gpt_neox.layers.3"] for run in (first, second))
        row = next(line for line in driver.lines if "layers.3" in line).split()
        assert row[1:3] == [f"{a / MIB:.1f}", f"{b / MIB:.1f}"]


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 40)])
async def test_a_layer_is_one_row_whatever_wraps_the_model_or_caches_its_keys(size: tuple[int, int]) -> None:
    """A full run with a KV cache beside one of PEFT's: names have no prefix, and are not cut at the useful end."""
    async with shown(Replay(RECORDINGS / "h100-tiny.gpumem"), size) as driver:
        lora = of_source(Replay(RECORDINGS / "h100-tiny-lora.gpumem"), "lora")
        driver.app.state.finished = [lora]
        await driver.press("5", "tab", "tab")
        names = [line.split()[0] for line in driver.lines[5:-3] if line.strip()]
        assert len(names) == len(set(names))
        assert {"layers.0", "layers.5", "embed_in", "final_layer_norm"} <= set(names)
        held = driver.app.state.summary().by_layer["gpt_neox.layers.0"]
        assert driver.line("layers.0").split()[1:3] == [
            f"{size / MIB:.1f}" for size in (lora.by_layer["gpt_neox.layers.0"], held)
        ]


async def test_of_many_runs_the_legend_has_the_base_the_chosen_and_the_one_that_goes_on() -> None:
    source = trained(2)
    async with shown(source) as driver:
        for _ in range(8):
            await restarted(driver, "b")
        await driver.press("5")
        legend = [line.split()[0] for line in driver.lines[2:7]]
        assert (legend[0], legend[-1]) == ("A", "I")
        assert "run 9, now" in driver.lines[6]
        await driver.press("right", "right", "right", "right")
        assert {"A", "E", "I"} <= {line.split()[0] for line in driver.lines[2:7]}


async def test_any_run_can_be_what_the_others_are_compared_with() -> None:
    source = trained(2)
    async with shown(source) as driver:
        await restarted(driver, "b")
        await driver.press("5")
        (forward,) = {driver.line("L logits").split()[-1]}
        assert forward.startswith("+")
        await driver.press("right", "enter")
        assert driver.line("L logits").split()[-1] == forward.replace("+", "-")


async def test_the_articles_table_from_ones_own_runs() -> None:
    source = trained(2)
    async with shown(source) as driver:
        await restarted(driver, "l")
        await driver.press("5", "tab", "tab", "tab")
        assert "after step" in driver.text
        ledger = {trace.step: Ledger(trace) for trace in source.traces()}
        loaded, peak = sum(ledger[0].end.values()), max(one.peak.bytes for one in ledger.values())
        row = driver.line("run 2 B8 lora").split()
        assert (row[4], row[-1]) == (f"{loaded / MIB:.1f}", f"{peak / MIB:.1f}")
        assert row[5] == "0.0", "LoRA has no gradients here"


async def test_a_run_that_has_ended_can_be_forgotten() -> None:
    source = trained(2)
    async with shown(source) as driver:
        await restarted(driver, "b")
        await driver.press("5", "-")
        assert "run 1" not in driver.text
        await driver.press("-")
        assert "run 2" in driver.text
        assert "still on" in driver.text


def test_finished_runs_are_kept_in_small_and_boundedly() -> None:
    source = FakeSource()
    state = ViewState()
    for i in range(KEPT_RUNS + 4):
        source.start(batch_size=1 + i)
        source.finish_step()
        state.update(source, float(i))
    assert len(state.finished) == KEPT_RUNS
    assert len(repr(state.finished[0])) < 5000, "figures, and no trace"


def test_a_recording_is_summed_up_as_the_run_was(tmp_path: Path) -> None:
    source = trained(3, checkpointing="layers")
    state = ViewState()
    state.update(source, 0.0)
    write(tmp_path / "x.gpumem", source)
    live, replayed = state.summary(), of_source(Replay(tmp_path / "x.gpumem"), "x")
    assert live is not None
    assert live._replace(origin="x") == replayed


# --- step --------------------------------------------------------------------------------------


async def test_zooming_shows_a_part_of_the_step_and_the_cursor_stays() -> None:
    source = trained(2)
    ledger = Ledger(source.traces()[-1])
    async with shown(source) as driver:
        await driver.press("2", "+", "+", "+")
        assert "12 % of it" in driver.lines[1]
        assert f"{ledger.peak.bytes / MIB:.1f}" in driver.text
        assert "peak" in next(line for line in driver.lines if "▲" in line)
        chart = driver.lines[2:8]
        await driver.press("home")
        assert driver.lines[2:8] != chart, "what is shown moves with the cursor"
        await driver.press("-", "-", "-")
        assert "% of it" not in driver.lines[1]
        await driver.press("+", "0")
        assert "% of it" not in driver.lines[1]


async def test_zoomed_in_far_the_cursor_goes_event_by_event() -> None:
    source = trained(2)
    ledger = Ledger(source.traces()[-1])
    async with shown(source) as driver:
        await driver.press("2", *"+" * 12, "home")
        page = driver.app.board.page
        seen = []
        for _ in range(len(ledger.total) + 3):
            seen.append(page.cursor)  # type: ignore[attr-defined]
            await driver.press("right")
        assert seen[: len(ledger.total)] == list(range(len(ledger.total)))
        await driver.press("left")
        assert page.cursor == len(ledger.total) - 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 40)])
@pytest.mark.parametrize("steps", [5, 123])
async def test_the_steps_before_and_after_are_never_cut(size: tuple[int, int], steps: int) -> None:
    async with shown(trained(steps), size) as driver:
        await driver.press("2", "+", "+", "<", "<")
        title = driver.lines[1]
        assert title.split()[:2] == ["step", str(steps - 2)]
        assert title.split()[-5:] == ["<", str(steps - 3), "frozen", str(steps - 1), ">"]
        assert "265.0 MiB" in title
        assert "25 % of it" in title


async def test_leafing_through_steps_leaves_the_cursor_where_it_is_in_the_step() -> None:
    async with shown(trained(4)) as driver:
        await driver.press("2", "home", *["right"] * 9)
        where = driver.app.board.page.cursor  # type: ignore[attr-defined]
        await driver.press("<", "<")
        assert driver.lines[1].split()[1] == "2"
        assert driver.app.board.page.cursor == where > 0  # type: ignore[attr-defined]
        await driver.press("p", "<")
        assert " peak" in next(line for line in driver.lines if "▲" in line)


async def test_a_phase_that_is_narrow_has_a_short_name() -> None:
    async with shown(trained(2), (60, 20)) as driver:
        await driver.press("2")
        phases = next(line for line in driver.lines if "│forward" in line)
        assert "│opt" in phases


async def test_the_largest_tensors_follow_the_cursor() -> None:
    source = trained(2)
    ledger = Ledger(source.traces()[-1])
    async with shown(source, (120, 40)) as driver:
        await driver.press("2")
        for event, key in ((ledger.peak.event, "p"), (-1, "home"), (len(ledger.trace.events) - 1, "end")):
            await driver.press(key)
            at = next(i for i, line in enumerate(driver.lines) if "largest now" in line)
            for block, line in zip(ledger.largest(event), driver.lines[at + 1 : at + 11], strict=False):
                assert line.split()[0] == f"{block.bytes / MIB:.1f}"
                assert block.name in line


# --- layers ------------------------------------------------------------------------------------


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
    ledger = Ledger(source.traces()[-1])
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
    async with shown(Replay(RECORDINGS / "h100-tiny.gpumem"), (120, 40)) as driver:
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


# --- techniques ---------------------------------------------------------------------------------


class Oracle:
    """Predicts by a rule of its own."""

    gpu_name = "H100 80GB"

    def __init__(self) -> None:
        self.ready = False

    def waiting(self) -> int:
        return 0

    def unanswered(self, configs: Sequence[RunConfig]) -> int:
        return 0 if self.ready else len(configs)

    def answers(self) -> int:
        return int(self.ready)

    def of(self, config: RunConfig, hurry: bool = True) -> Prediction | None:
        if not self.ready:
            return None
        size = 100 * MIB + config.batch_size * MIB - 50 * MIB * bool(config["lora"])
        return Prediction(size, size < 120 * MIB, {})

    def of_run(self, config: RunConfig) -> str:
        return ""


async def test_predictions_stand_before_and_measurements_beside_them() -> None:
    source = trained(2)
    oracle = Oracle()
    async with shown(source, predictions=oracle) as driver:
        await driver.press("4")
        assert driver.line("b   batch size").split()[3:] == ["8", "16", "–", "–", "–", "–"]
        assert "~ is predicted for H100 80GB" in driver.text
        oracle.ready = True
        await driver.press("1")
        assert "saves most: l LoRA on, ~-50.0 MiB" in driver.text
        await driver.press("4")
        await driver.press("down")
        assert driver.line("b   batch size").split()[3:] == ["8", "16", "~116.0", "~+8.0", "yes", "–"]
        assert driver.line("l + LoRA").split()[3:] == ["off", "on", "~58.0", "~-50.0", "yes", "–"]
        before = driver.app.state.peak
        await restarted(driver, "b", "enter")
        await restarted(driver, "B", "enter")
        after = driver.app.state.finished[-1].peak_bytes
        assert before is not None
        change = (after - before.peak.bytes) / MIB
        assert driver.line("b   batch size").split()[-1] == f"{change:+.1f}"


async def test_what_cannot_be_combined_says_why_before_it_is_chosen() -> None:
    source = trained(1)
    source.feed.environment = GPU
    async with shown(source) as driver:
        await driver.press("4")
        while "quantization" not in driver.app.board.page.topic().title:
            await driver.press("down")
        assert "nf4: " in driver.text
        assert "lora=on" in driver.text
        assert source.commands == []


# --- copy and save ---------------------------------------------------------------------------------


@pytest.mark.parametrize("screen", "12345 6".replace(" ", ""))
async def test_a_screens_table_is_copied_whole(screen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = trained(40)
    copied: list[str] = []
    async with shown(source) as driver:
        monkeypatch.setattr(driver.app, "copy_to_clipboard", copied.append)
        await driver.press(screen, "y")
        table = driver.app.board.page.table()
        lines = copied[0].splitlines()
        if table is None:
            assert len(lines) == 24
        else:
            assert lines == ["\t".join(cells) for cells in table]
            assert len({len(cells) for cells in table}) == 1
        if screen == "6":
            assert len(lines) > 40
        assert f"copied {len(lines)} lines" in driver.text


async def test_a_layers_tensors_are_copied_too() -> None:
    async with shown(trained(2)) as driver:
        await driver.press("3", "down", "enter")
        table = driver.app.board.page.table()
        assert table is not None
        assert table[0] == ["bytes", "category", "name", "shape", "made"]
        assert sum(int(cells[0]) for cells in table[1:]) == 24 * MIB


async def test_the_screen_is_saved_as_a_picture_and_as_text(tmp_path: Path) -> None:
    async with shown(trained(2), save_dir=tmp_path) as driver:
        await driver.press("i")
        (svg,), (text,) = tmp_path.glob("*.svg"), tmp_path.glob("*.txt")
        assert "optimizer" in svg.read_text()
        assert "P parameters" in text.read_text()
        assert svg.stem in driver.text.replace("\n", "").replace(" ", "")


async def test_a_picture_that_cannot_be_saved_is_said() -> None:
    async with shown(trained(2), save_dir=Path("/proc/none")) as driver:
        await driver.press("i")
        assert "No such file" in driver.text


# --- without a terminal ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recordings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("recordings")
    paths = []
    for name, settings in (("plain", {}), ("checkpointed", {"checkpointing": "layers"})):
        write(folder / f"{name}.gpumem", trained(3, **settings))
        paths.append(str(folder / f"{name}.gpumem"))
    return paths


def test_once_prints_the_live_screen_as_plain_text(recordings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["open", recordings[0], "--once"]) == 0
    out = capsys.readouterr().out
    assert "P parameters" in out
    assert "The peak is inside AdamW.step()" in out
    assert "\x1b" not in out


def test_json_says_what_the_screen_shows(recordings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["open", recordings[0], "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    ledger = max((Ledger(trace) for trace in Replay(Path(recordings[0])).traces()), key=lambda one: one.peak.bytes)
    assert document["schema"] == "gpumem-live/1"
    assert document["peak"]["allocated_bytes"] == ledger.peak.bytes
    assert sum(document["peak"]["by_category"].values()) == ledger.peak.bytes
    assert document["step"] == 3


def test_jsonl_is_a_line_each(recordings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["open", recordings[0], "--jsonl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["status"] for line in lines] == ["recording"]


def test_where_there_is_no_terminal_it_is_plain_text(recordings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["open", recordings[0]]) == 0
    out = capsys.readouterr().out
    assert "step ended     step 3" in out
    assert "P parameters" in out
    assert "\x1b" not in out


async def test_several_recordings_are_set_side_by_side(recordings: list[str]) -> None:
    first, second = (Replay(Path(path)) for path in recordings)
    async with shown(first) as driver:
        driver.app.state.finished = [of_source(second, "checkpointed")]
        driver.app.state.origin = "plain"
        await driver.press("5")
        assert "checkpointed  B8 checkpointing=layers" in driver.text
        assert "plain  B8" in driver.text
