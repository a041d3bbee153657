"""The ranks screen in the app: recordings of jobs of two, four and 64 ranks, in one file and in several."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gpumem_tui.engine.config import RunConfig
from gpumem_tui.engine.recording import Recording, write
from gpumem_tui.engine.run import Run
from gpumem_tui.tui.cli import main
from gpumem_tui.tui.job_ranks import RankPeaks, of_job

from .app_driver import RECORDINGS, SIZES, Driver, Oracle, shown
from .fake_source import GPU, FakeSource
from .recordings.make import job, ran

JOB = RECORDINGS / "ranks.gpumem"


def of_ranks(where: Path, ranks: int) -> Recording:
    path = where / "job.gpumem"
    write(path, job(ranks))
    return Recording(path)


def words(driver: Driver) -> str:
    return " ".join(driver.text.split())


def bars(driver: Driver) -> list[str]:
    return [line[1:9].strip() for line in driver.lines if line[1:].startswith("rank ") and "." in line[-8:]]


async def test_a_job_of_two_is_two_bars_on_one_axis(tmp_path: Path) -> None:
    async with shown(of_ranks(tmp_path, 2)) as driver:
        await driver.press("8")
        assert driver.line("2 ranks  at the peak: highest rank 0 16.50, lowest rank 1 14.28 GiB")
        assert bars(driver) == ["rank 0", "rank 1"]
        assert "Rank 0 holds 2.22 GiB more than rank 1: optimizer +0.88" in words(driver)


@pytest.mark.parametrize("size", [(60, 20), *SIZES])
async def test_of_64_ranks_the_highest_the_lowest_and_the_one_looked_at_have_a_row(
    size: tuple[int, int], tmp_path: Path
) -> None:
    async with shown(of_ranks(tmp_path, 64), size) as driver:
        await driver.press("8")
        for _ in range(200):  # they are folded a few at a time
            if "to come" not in driver.text:
                break
            driver.app.tick()
        assert {"rank 0", "rank 1", "rank 62"} <= set(bars(driver)), "looked at, lowest, highest"
        hidden = [int(line.split("… ")[1].split()[0]) for line in driver.lines if " between, " in line]
        alone = sum("… rank " in line for line in driver.lines)
        assert len(bars(driver)) + sum(hidden) + alone == 64
        assert any(line.split()[:1] == ["allocated"] for line in driver.lines)
        await driver.press("end")
        assert driver.line("▸rank 63")
        await driver.press("up", "up", "up", "enter", "1")
        assert "rank 60" in driver.lines[0]
        assert driver.line("rank 60 of 64")


async def test_the_rank_selected_is_looked_at_on_all_screens() -> None:
    async with shown(Recording(JOB)) as driver:
        assert "rank 0 of 4 highest rank 2 16.50, lowest rank 1 14.28 GiB" in words(driver)
        await driver.press("8", "down", "down")
        assert driver.line("▸rank 2")
        await driver.press("enter", "1")
        assert driver.line("rank 2 of 4")
        assert driver.app.state.shown is not None and driver.app.state.shown.id.rank == 2
        assert driver.app.state.peak is not None and driver.app.state.peak.peak.bytes > 16 << 30


async def test_what_one_gpu_would_need_is_predicted_and_marked() -> None:
    def rule(config: RunConfig) -> int:
        assert config["parallel"] == "none" or config["parallel"] == "fsdp2"
        return 61 << 30

    oracle = Oracle(rule)
    async with shown(Recording(JOB), predictions=oracle) as driver:
        await driver.press("8")
        heads = next(line for line in driver.lines if "one GPU" in line)
        assert heads.split()[0] == "GiB"
        assert "~0.00" in driver.line("allocated"), "the oracle says of no category what it holds"


async def test_a_run_of_one_rank_has_no_ranks() -> None:
    async with shown(Recording(RECORDINGS / "full.gpumem")) as driver:
        assert "8 ranks" not in driver.lines[-1]
        await driver.press("8")
        assert "This run is of one rank." in driver.text
        assert "8 ranks" in driver.lines[-1]


async def test_single_rank_recordings_of_several_hosts_are_one_job(tmp_path: Path) -> None:
    paths = []
    for run in job(3):
        paths.append(tmp_path / f"host-{run.id.rank}.gpumem")
        write(paths[-1], [run])
    paths.append(RECORDINGS / "full.gpumem")
    async with shown(Recording(*paths)) as driver:
        await driver.press("8")
        assert bars(driver) == ["rank 0", "rank 1", "rank 2"]


async def test_ranks_by_host_are_a_bar_a_host_of_its_highest_rank(tmp_path: Path) -> None:
    paths = []
    for run in job(4):
        run.environment = replace(run.environment, host=f"node-{'ab'[run.id.rank // 2]}")
        paths.append(tmp_path / f"{run.id.rank}.gpumem")
        write(paths[-1], [run])
    async with shown(Recording(*paths)) as driver:
        await driver.press("8")
        assert driver.line("4 ranks, 2 hosts") and len(bars(driver)) == 4
        await driver.press("tab")
        assert [line[1:24].split() for line in driver.lines if line[1:].startswith("node-")] == [
            ["node-a", "rank", "0"], ["node-b", "rank", "2"],
        ]  # fmt: skip
        await driver.press("down", "enter", "1")
        assert driver.line("rank 2 of 4")


async def test_a_live_job_follows_rank_0_and_says_which_is_highest() -> None:
    source = FakeSource(GPU)
    source.start(parallel="fsdp2")
    for _ in range(2):
        source.finish_step()
    assert source.run is not None
    other = ran({"parallel": "fsdp2"}, rank=1)
    ranks = [other, source.run]
    source.runs = lambda: ranks  # type: ignore[method-assign,assignment]
    async with shown(source) as driver:
        assert "rank 0 of 2 highest rank 1" in words(driver)
        await driver.press("8", "down", "enter", "1")
        assert driver.line("rank 1 of 2")
        assert "training" in driver.lines[0] or "done" in driver.lines[0], "it is of the job that is under way"


def test_once_prints_the_ranks_of_a_job_and_json_tells_of_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["open", str(JOB), "--once"]) == 0
    printed = capsys.readouterr().out
    assert " 4 ranks  at the peak: highest rank 2 16.50, lowest rank 1 14.28 GiB" in printed
    assert main(["open", str(JOB), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["rank"] == 0
    assert [one["rank"] for one in document["ranks"]] == [0, 1, 2, 3]


def test_a_rank_told_of_twice_is_the_one_from_the_same_recording() -> None:
    here, there = job(2), job(2)
    for run in there:
        run.id = run.id._replace(engine="there")
    assert of_job(here[0], [*there, *here]) == [here[1], here[0]]
    assert of_job(there[0], [*here, *there]) == [there[1], there[0]]


def test_a_trace_is_folded_once_and_only_the_highest() -> None:
    runs, peaks = job(4), RankPeaks()
    assert len(peaks.of(runs, within_s=-1.0)) == 0
    found = peaks.of(runs, within_s=float("inf"))
    assert [one.rank for one in found.values()] == [3, 2, 1, 0]
    assert peaks.known == 4
    assert peaks.of(runs, within_s=-1.0) == found


@pytest.mark.parametrize("size", [(60, 20), (80, 24)])
async def test_a_screen_with_nothing_to_show_says_so_in_whole_sentences(size: tuple[int, int]) -> None:
    source = FakeSource(GPU)
    source.start()
    async with shown(source, size) as driver:
        await driver.press("8")
        assert "or open the recordings of a job." in words(driver)
        await driver.press("5")
        assert "every run stays here to compare." in words(driver)


async def test_every_screen_tells_of_the_same_peak_as_steps_pass() -> None:
    source = FakeSource(GPU)
    source.start(parallel="fsdp2")
    for _ in range(12):
        source.finish_step()
    run = source.run
    assert run is not None
    other = ran({"parallel": "fsdp2"}, rank=1)
    source.runs = lambda: [other, run]  # type: ignore[method-assign]
    async with shown(source, (120, 40)) as driver:
        for _ in range(2):
            assert "peak step 2, optimizer" in driver.text
            await driver.press("8")
            assert "The peak of rank 0 is in step 2, optimizer" in words(driver)
            await driver.press("1")
            source.finish_step()
        summary = driver.app.state.summary()
        assert summary is not None and summary.peak_where == "step 2, optimizer step"


async def test_ranks_that_are_equal_have_one_figure() -> None:
    source = FakeSource(GPU)
    source.start(parallel="fsdp2")
    source.finish_step()
    run = source.run
    assert run is not None
    twin = Run(run.id._replace(rank=1), run.config, run.environment)
    for event in run.events():
        twin.tell(event)
    source.runs = lambda: [twin, run]  # type: ignore[method-assign]
    async with shown(source) as driver:
        assert "rank 0 of 2 all ranks 265.0 MiB" in words(driver)
