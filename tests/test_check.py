"""`gpumem-tui check`: what a pull request may not do to memory, told to people, programs and CI servers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from gpumem_tui.engine.categories import Category
from gpumem_tui.tui.cli import main
from gpumem_tui.tui.commands import check_report
from gpumem_tui.tui.commands.check_report import Checked, Limits

TINY = ["--batch-size", "2", "--seq-len", "16", "--gpu", "A100 40GB"]
MIB = 1 << 20


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a check of the tiny profile writes for a later one."""
    path = tmp_path_factory.mktemp("check") / "base.json"
    assert main(["check", *TINY, "--budget", "1GiB", "--format", "json", "-o", str(path)]) == 0
    return path


@pytest.fixture
def report(base: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(base.read_text())["runs"][0]["report"]
    return found


def grown(report: dict[str, Any], size: int) -> dict[str, Any]:
    """The same run with one more activation of a layer at its peak."""
    more = copy.deepcopy(report)
    peak = more["peak"]
    peak["allocated_bytes"] += size
    peak["by_category"]["activations"] += size
    peak["by_owner"].setdefault("activations", {})["gpt_neox.layers.*.new"] = size
    layer = peak["by_layer"]["gpt_neox.layers.0"]
    layer["activations"] = layer.get("activations", 0) + size
    more["safe_bound_bytes"] += size
    return more


def test_a_run_like_its_base_within_its_budget_passes(base: Path, capsys: Any) -> None:
    assert main(["check", *TINY, "--budget", "200MiB", "--against", str(base)]) == 0
    out = capsys.readouterr().out
    assert out.endswith("1 run within limits\n")
    assert "OVER" not in out


def test_every_limit_exceeded_is_a_line(base: Path, capsys: Any) -> None:
    arguments = [*TINY, "--budget", "64MiB", "--against", str(base), "--max-growth", "1%"]
    assert main(["check", *arguments, "--batch-size", "64", "--format", "json"]) == 1
    said = capsys.readouterr()
    (run,) = json.loads(said.out)["runs"]
    assert said.err == "".join(f"gpumem-tui: {line}\n" for line in run["violations"])
    over, growth = run["violations"]
    assert "over the budget of 64.0 MiB" in over
    assert f"the peak grew by {run['growth_bytes']:,} bytes" in growth
    assert run["growth_bytes"] == run["report"]["peak"]["allocated_bytes"] - run["base_bytes"]


@pytest.mark.parametrize(
    ("size", "allowed", "violates"), [(0, 0.0, False), (1, 0.0, True), (MIB, 0.5, False), (-MIB, 0.0, False)]
)
def test_growth_is_a_share_of_the_base(report: dict[str, Any], size: int, allowed: float, violates: bool) -> None:
    one = Checked("tiny", grown(report, size), report, Limits(None, allowed))
    assert one.growth_bytes == size
    assert bool(one.violations) is violates


def test_the_budget_holds_for_what_a_measured_peak_stays_under(report: dict[str, Any]) -> None:
    bound = report["safe_bound_bytes"]
    assert bound > report["peak"]["allocated_bytes"]
    assert not Checked("tiny", report, None, Limits(bound, 0.0)).violations
    assert Checked("tiny", report, None, Limits(bound - 1, 0.0)).violations


def test_a_run_that_does_not_fit_on_the_gpu_that_is_named_is_over_whatever_its_budget(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `estimate` says of it; the budget is of allocated bytes alone."""
    small = ["--profile", "tiny", "--batch-size", "64", "--gpu", "RTX 4090:1.5GiB"]
    assert main(["estimate", *small, "--json", "-"]) == 0
    assert not json.loads(capsys.readouterr().out)["fits"]
    for limits in ([], ["--budget", "100GiB"]):
        assert main(["check", *small, *limits, "--format", "json"]) == 1
        said = capsys.readouterr()
        (run,) = json.loads(said.out)["runs"]
        assert run["must_fit_on"] == "RTX 4090 24GB:1.5GiB"
        assert "does not fit on RTX 4090 24GB:1.5GiB: up to " in said.err and len(run["violations"]) == 1
    unnamed = ["--profile", "tiny", "--batch-size", "64", "--budget", "100GiB"]
    assert main(["check", *unnamed]) == 0
    said_of_budgets = " ".join(capsys.readouterr().out.split())
    assert "A budget is of what is allocated at the peak. More is reserved" in said_of_budgets
    runs = tmp_path / "runs.toml"
    runs.write_text('gpu = "RTX 4090:1.5GiB"\n[[runs]]\nname = "a"\nset = { batch_size = 64 }\n')
    assert main(["check", str(runs)]) == 1


def test_a_report_is_within_the_terminals_width(report: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "tiny " + " ".join(f"lora.setting{n}=value-{n}" for n in range(12))
    limits = Limits(MIB, 0.0, "L4 24GB")
    one = Checked(name, grown(report, MIB), report, limits, why_not="up to 1.00 GiB more would be needed than it has")
    text = check_report.as_text([one, Checked("short", report, None, limits, is_new=True)])
    assert max(map(len, text.splitlines())) < 80
    assert set(name.split()) <= set(text.split()), "a setting is not broken"
    assert "short: new, not in the base" in text


def test_a_comment_tells_what_grew_by_category_and_layer(report: dict[str, Any]) -> None:
    more = grown(report, 5 * MIB)
    text = check_report.as_markdown([Checked("a <run> | x", more, report, Limits(None, 0.01))])
    assert text.startswith("### GPU memory: 1 of 1 run over a limit\n")
    title = Category.ACTIVATIONS.info.title
    before, now = (doc["peak"]["by_category"]["activations"] / MIB for doc in (report, more))
    assert f"| {title} | {before:.1f} | {now:.1f} | +5.0 |" in text
    assert "| gpt_neox.layers.0 |" in text
    assert "most of it is activations" in text
    assert "a &lt;run> \\| x" in text, "a name is neither a tag nor a cell's end"


def test_a_ci_server_reads_the_failures(report: dict[str, Any]) -> None:
    checked = [
        Checked("kept", report, report, Limits(None, 0.0)),
        Checked("grown", grown(report, MIB), report, Limits(None, 0.0)),
    ]
    top = ElementTree.fromstring(check_report.as_junit(checked))
    assert (top.attrib["tests"], top.attrib["failures"]) == ("2", "1")
    failed = {case.attrib["name"]: case.find("failure") for case in top.iter("testcase")}
    assert failed["kept"] is None
    assert failed["grown"] is not None
    assert "grew by 1,048,576 bytes" in failed["grown"].attrib["message"]


def test_a_file_of_runs(base: Path, tmp_path: Path, capsys: Any) -> None:
    """Each has its own limits; what is typed goes above what is written."""
    runs = tmp_path / "runs.toml"
    runs.write_text(
        """
        gpu = "A100 40GB"
        budget = "1GiB"
        [[runs]]
        name = "plain"
        profile = "tiny"
        set = { batch_size = 2, seq_len = 16 }
        [[runs]]
        name = "lora"
        profile = "tiny"
        preset = "lora"
        budget = "1MiB"
        set = { batch_size = 2, seq_len = 16, kv_cache = false }
        """
    )
    assert main(["check", str(runs), "--format", "json"]) == 1
    plain, lora = json.loads(capsys.readouterr().out)["runs"]
    assert (plain["violations"], plain["budget_bytes"], lora["budget_bytes"]) == ([], 1 << 30, 1 << 20)
    assert len(lora["violations"]) == 1
    assert lora["report"]["config"]["options"]["lora"] is True
    assert main(["check", str(runs), "--budget", "2GiB"]) == 0
    assert plain["report"]["peak"] == json.loads(base.read_text())["runs"][0]["report"]["peak"]


def test_documents_of_other_commands_are_a_base(report: dict[str, Any], base: Path, tmp_path: Path) -> None:
    single, exported = tmp_path / "run.json", tmp_path / "export.json"
    single.write_text(json.dumps(report))
    exported.write_text(json.dumps({"schema": "gpumem-export/1", "runs": [{"name": "any", "report": report}]}))
    for path in (base, single, exported):
        assert main(["check", *TINY, "--against", str(path)]) == 0


def test_unlike_runs_are_not_compared_in_silence(
    report: dict[str, Any], base: Path, tmp_path: Path, capsys: Any
) -> None:
    other = copy.deepcopy(report)
    other["environment"]["device_name"] = "a laptop"
    one = Checked("run", report, other, Limits(None, 0.0))
    for text in (check_report.as_text([one]), check_report.as_markdown([one])):
        assert "the figures before are of a laptop, these of A100 40GB" in text
    runs = tmp_path / "runs.toml"
    runs.write_text('gpu = "A100 40GB"\n' + "".join(f'[[runs]]\nname = "{n}"\nprofile = "tiny"\n' for n in "ab"))
    assert main(["check", str(runs), "--against", str(base), "--format", "markdown"]) == 0
    assert capsys.readouterr().out.count("| new, not in the base |") == 2
    nothing = tmp_path / "nothing.json"
    nothing.write_text('{"runs": []}')
    assert main(["check", str(runs), "--against", str(nothing)]) == 2
    assert capsys.readouterr().err == f"gpumem-tui: {nothing}: there are no runs in it to check against\n"


def test_what_cannot_be_checked_is_one_line(base: Path, tmp_path: Path, capsys: Any) -> None:
    def file(text: str) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.toml"
        path.write_text(text)
        return str(path)

    bad = tmp_path / "bad.json"
    bad.write_text('{"peak": {"by_category": []}}')
    huge = tmp_path / "huge.json"
    huge.write_text(base.read_text().replace('"allocated_bytes": ', '"allocated_bytes": 1' + "0" * 400))
    named = '[[runs]]\nname = "a"\n'
    for arguments, complaint in (
        (TINY[:4], "nothing to check against; give it --budget, --against or --gpu"),
        ([*TINY, "--budget", "lots"], "--budget lots: takes a size such as 24GiB"),
        ([*TINY, "--budget", "1GiB", "--max-growth", "1"], "--max-growth 1: takes a share such as 1%"),
        ([*TINY, "--against", str(tmp_path / "none")], "No such file or directory"),
        ([*TINY, "--against", str(bad)], "not the JSON of a check, an estimate, a run or an export"),
        ([*TINY, "--against", str(huge)], "not the JSON of a check, an estimate, a run or an export"),
        ([file("runs = 3")], "runs = 3 is not allowed; runs takes tables: [[runs]]"),
        ([file("")], "there are no runs in it"),
        ([file(named + 'presett = "lora"')], "there is no key 'presett'; did you mean preset?"),
        ([file(named + 'preset = "lorra"')], "runs 1: there is no preset 'lorra'; did you mean lora"),
        ([file(named + "set = { batch_size = -1 }")], "batch_size=-1 is not allowed"),
        ([file(named + 'budget = "x"')], "budget x: takes a size"),
        ([file('budget = "1GiB"\n' + named + named)], "two runs are called a"),
        ([file(named), "--batch-size", "4"], "does not go with --batch-size: its runs are as they are written there"),
    ):
        assert main(["check", *arguments]) == 2
        error = capsys.readouterr().err
        assert complaint in error
        assert error.count("\n") == 1
