"""The screen that comes up when a run runs out of memory, and what a recording of one shows."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
from contextlib import closing
from pathlib import Path

import pytest
from msgspec.structs import replace

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import RunConfig, UserError, Value
from gpumem_tui.engine.feed import Start, ViewerRole
from gpumem_tui.engine.out_of_memory.report import Fix, LargestTensor, OutOfMemoryReport, Pool, Verdict
from gpumem_tui.engine.prediction.gpus import Gpu
from gpumem_tui.engine.prediction.outcome import Prediction
from gpumem_tui.engine.recording import Recording, write
from gpumem_tui.engine.run import Run, RunId, RunKind
from gpumem_tui.engine.run_events import OutOfMemory, Saved
from gpumem_tui.tui import fix_finder
from gpumem_tui.tui.prediction_client import Background
from gpumem_tui.tui.predictions import FoundFixes

from .app_driver import Oracle, foretold, shown
from .fake_source import GPU, FakeSource

GIB, MIB = 1 << 30, 1 << 20

REPORT = OutOfMemoryReport(
    asked_bytes=512 * MIB, verdict=Verdict.FULL, phase="backward", step=2, module="gpt_neox.layers.3.mlp.dense_h_to_4h",
    reason="even without a gap the 0.96 GiB cached and 0.16 GiB free are less than was asked for.",
    operator="aten.mm", dtype="bfloat16", shape=(8192, 16384), micro_batch=1, rank=3, device="cuda:0",
    allocated_bytes=77 * GIB, cached_bytes=GIB, free_bytes=164 * MIB, largest_free_block_bytes=317 * MIB,
    total_bytes=80 * GIB, context_bytes=480 * MIB, others_bytes=0,
    by_category={Category.PARAMETERS.key: 15 * GIB, Category.GRADIENTS.key: 10 * GIB,
                 Category.ACTIVATIONS.key: 51 * GIB,
                 Category.LOGITS_LOSS.key: GIB},
    largest=tuple(LargestTensor(bytes=(20 - n) * 50 * MIB, category="activations", module=f"layers.{n}.mlp",
                                description="aten.mm [8192, 16384] bfloat16") for n in range(10)),
    pools=(Pool(stream=0, pool="large", cached_bytes=GIB, largest_free_block_bytes=317 * MIB),),
)  # fmt: skip


def fix(settings: dict[str, Value], peak_bytes: int, keeps: bool, text: str) -> Fix:
    return Fix(set=settings, peak_bytes=peak_bytes, fits=True, keeps_mathematics=keeps, text=text)


FIXES = (
    fix({"accumulation": 2, "batch_size": 4}, 52 * GIB, True, "as many passes as micro-batches, each less well filled"),
    fix({"checkpointing": "selective"}, 61 * GIB, True, "a third more"),
    fix({"batch_size": 5}, 70 * GIB, False, "more steps for as many rows"),
    fix({"seq_len": 128}, 70 * GIB, False, "longer rows are cut"),
)


def refused(report: OutOfMemoryReport = REPORT) -> FakeSource:
    """A run whose second step ran out of memory."""
    source = FakeSource(GPU, unit=48 * MIB)
    source.start(accumulation=2)
    source.finish_step()
    source.advance(9)
    source.run_out_of_memory(report)
    return source


def oracle(found: FoundFixes) -> Oracle:
    predicts = Oracle(lambda _: None)
    predicts.found = found
    return predicts


ALL = FoundFixes(FIXES, over=True)


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 40)])
async def test_it_comes_up_by_itself_and_says_why_and_what_would_fit(size: tuple[int, int]) -> None:
    source = FakeSource(GPU, unit=48 * MIB)
    source.start(accumulation=2)
    source.finish_step()
    async with shown(source, size, predictions=oracle(ALL)) as app:
        assert "OUT OF MEMORY" not in app.text
        source.advance(9)
        source.run_out_of_memory(REPORT)
        await app.tick()
        assert app.line("OUT OF MEMORY").split("OUT OF MEMORY")[1].startswith("  step 2, backward 2/2  ")
        assert "asked for 0.50 GiB (aten.mm" in app.text and "rank 3" in app.text
        assert app.line("A activations").split()[2] == "51.00"
        assert app.line("allocated").split()[1] == "77.00"
        assert "full: even without a gap" in app.text
        assert [line.split()[1] for line in app.lines if line.startswith((" 1 ", " 2 ", " 3 "))] == [
            "accumulation=2", "checkpointing=selective", "batch_size=5",
        ]  # fmt: skip
        assert ("another training" in app.text) == (size[0] >= 76)
        assert "out of memory" in app.lines[0]


async def test_what_was_held_adds_up_to_what_was_allocated_however_little_room_there_is() -> None:
    sizes = {category.key: (20 - n) * GIB for n, category in enumerate(Category) if category is not Category.UNKNOWN}
    report = replace(REPORT, by_category=sizes, allocated_bytes=sum(sizes.values()))
    async with shown(refused(report), (60, 20), predictions=oracle(ALL)) as app:
        rows = app.lines[app.lines.index(app.line("GiB")) + 1 : app.lines.index(app.line("allocated"))]
        assert sum(float(row[16:27]) for row in rows if row.strip()) * GIB == report.allocated_bytes


async def test_a_digit_restarts_with_a_fix_and_leads_to_the_live_screen() -> None:
    source = refused()
    async with shown(source, predictions=oracle(ALL)) as app:
        await app.press("3")
        assert app.last_start.config["batch_size"] == 5
        assert app.app.page.title == "live" and "batch_size=5, restarting" in app.text
        source.obey()
        await app.tick()
        await app.press("z")
        assert app.last_start.config["batch_size"] == 8


async def test_a_fix_is_of_the_run_that_died_also_when_the_engine_has_gone_back_to_the_run_before() -> None:
    source = refused()
    source.start(batch_size=1)  # as an engine does whose new run did not get through a step
    async with shown(source, predictions=oracle(ALL)) as app:
        assert "OUT OF MEMORY" in app.text and app.app.state.config["batch_size"] == 1
        await app.press("1")
        config = app.last_start.config
        assert (config["batch_size"], config["accumulation"]) == (4, 2)


async def test_only_what_fits_can_be_restarted_with() -> None:
    nearest = FoundFixes((replace(FIXES[0], fits=False),), over=True, unfit_by_bytes=2 * GIB)
    source = refused()
    async with shown(source, predictions=oracle(nearest)) as app:
        assert "nothing fits; what comes nearest" in app.text
        await app.press("1")
        assert not any(isinstance(command, Start) for command in source.commands)
        assert "no change 1 that is known to fit" in app.text


async def test_while_they_are_looked_for_it_says_so() -> None:
    predicts = oracle(FoundFixes())
    async with shown(refused(), predictions=predicts) as app:
        assert "what would fit: is being predicted" in app.text
        predicts.found = FoundFixes(FIXES[:1])
        await app.tick()
        await app.press("g", "g")
        assert "more is looked for" in app.text
    async with shown(refused()) as app:
        assert "what would fit: nobody predicts here" in app.text


async def test_a_script_is_told_what_to_write_and_nothing_is_restarted() -> None:
    source = refused()
    source.role = ViewerRole.WATCHING
    async with shown(source, predictions=oracle(ALL)) as app:
        await app.press("2")
        assert not source.commands and "for your script to set: a third more" in app.text


HOW = (
    "accumulation=2 (smaller micro-batches: optimizer.step() after every other), batch_size=4 (the loader's batch size)"
)


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (120, 40)])
async def test_the_line_that_a_script_is_to_write_is_seen_whole(size: tuple[int, int]) -> None:
    source = refused(replace(REPORT, device="cpu"))
    source.run.kind = RunKind.WATCHED
    found = FoundFixes((replace(FIXES[0], text=HOW), *FIXES[1:]), over=True)
    async with shown(source, size, predictions=oracle(found)) as app:
        assert HOW in " ".join(app.text.split())
        assert "~ is predicted with a GPU's kernels; this run was on a CPU" in app.text
        assert "A activations" in app.text and app.line("allocated").split()[1] == "77.00"


async def test_it_leads_to_the_step_and_the_layers_and_back() -> None:
    async with shown(refused(), predictions=oracle(ALL)) as app:
        await app.press("enter")
        assert app.app.page.title == "step" and "ended by an error" in app.lines[1]
        last = app.app.page.ledger.trace.events
        await app.press("end")
        assert app.app.page._instant(app.app.page.ledger) == len(last)
        await app.press("M")
        assert "OUT OF MEMORY" in app.text
        await app.press("l")
        assert app.app.page.title == "layers"
        await app.press("M", "escape")
        assert app.app.page.title == "layers"


async def test_the_largest_tensors_and_the_pools_are_behind_a_key() -> None:
    async with shown(refused(), predictions=oracle(ALL)) as app:
        assert "layers.0.mlp" not in app.text
        await app.press("tab")
        assert "layers.0.mlp" in app.text and "stream 0, large, largest piece 0.31" in app.text
        await app.press("tab")
        assert "A activations" in app.text
    async with shown(refused(), (120, 50), predictions=oracle(ALL)) as app:
        assert "layers.9.mlp" in app.text and "stream 0, large" in app.text and "A activations" in app.text


async def test_it_says_where_the_run_is_kept() -> None:
    source = refused()
    source.feed.tell(Saved(text="kept in /state/oom-1.gpumem; gpumem-tui why shows it", path="/state/oom-1.gpumem"))
    async with shown(source, predictions=oracle(ALL)) as app:
        assert "kept in /state/oom-1.gpumem" in app.text and "OUT OF MEMORY" in app.text


async def test_a_loop_that_catches_the_error_and_goes_on_is_not_disturbed() -> None:
    source = FakeSource(GPU)
    source.start()
    source.finish_step()
    async with shown(source) as app:
        source.feed.tell(OutOfMemory(text="refused", step=2, phase="backward", report=REPORT))
        await app.tick()
        assert "out of memory" in app.lines[0] and app.app.page.title == "live"
        source.finish_step()
        await app.tick()
        assert "out of memory" not in app.lines[0]
        await app.press("6")
        assert "out of memory" in app.text


async def test_without_one_the_key_says_so() -> None:
    source = FakeSource(GPU)
    source.start()
    async with shown(source) as app:
        await app.press("M")
        assert "no run has run out of memory here" in app.text


async def test_a_recording_of_it_shows_it_on_every_screen(tmp_path: Path) -> None:
    path = tmp_path / "oom.gpumem"
    write(path, refused().runs())
    async with shown(Recording(path), predictions=oracle(ALL)) as app:
        assert "OUT OF MEMORY" in app.text
        await app.press("escape")
        for digit in "1234567":
            await app.press(digit)
            assert "out of memory" in app.lines[0]
        await app.press("2")
        assert "ended by an error" in app.text
        await app.press("M", "1")
        assert "this is a recording" in app.text


async def test_of_several_recordings_each_comes_up_once(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.gpumem" for name in "ab"]
    for path in paths:
        write(path, refused().runs())
    async with shown(Recording(*paths), predictions=oracle(ALL)) as app:
        for _ in paths:
            assert app.app.page.title == "out of memory"
            await app.press("4", "j")
        assert app.app.page.title == "techniques", "the first again"
        await app.press("M")
        assert app.app.page.title == "out of memory"


async def test_fixes_are_looked_for_on_a_thread_and_shown_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real search, predicted by a rule: a peak that goes by the rows of a micro-batch."""
    go_on = threading.Event()

    class Ruled:
        def __init__(self) -> None:
            self.killed = False

        def known_or_predicted(self, config: RunConfig, card: Gpu) -> Prediction:
            if config.batch_size < 8:
                assert go_on.wait(30)
            if self.killed:
                raise UserError("killed")
            peak = config.batch_size * 12 * GIB
            run = Run(RunId("predicted", 1), config, GPU, RunKind.PREDICTED)
            held = {"backward": {Category.ACTIVATIONS.key: peak}}
            return dataclasses.replace(foretold(config, peak, run, peak < card.available_bytes), by_phase=held)

        def kill(self) -> None:
            self.killed = True
            go_on.set()

        def close(self) -> None:
            pass

    monkeypatch.setattr(fix_finder, "PredictingProcess", Ruled)
    source = refused()
    with closing(Background(source)) as predictions:
        async with shown(source, predictions=predictions) as app:
            assert "what would fit: is being predicted" in app.text
            go_on.set()
            (run,) = source.runs()
            while not predictions.fixes(run, REPORT).over:
                await asyncio.sleep(0.01)
            await app.tick()
            assert [line.split()[1] for line in app.lines if line.startswith((" 1 ", " 2 "))] == [
                "accumulation=4", "batch_size=6",
            ]  # fmt: skip
