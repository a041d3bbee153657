"""Every format is read back by somebody else's code, and says what the recording says, to the byte."""

from __future__ import annotations

import csv
import io
import json
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpumem_tui.engine import exports
from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.config import UserError
from gpumem_tui.engine.events import Ending, EndKind
from gpumem_tui.engine.exports.exported_run import ExportedRun
from gpumem_tui.engine.exports.number_text import text_rows
from gpumem_tui.engine.feed import Work
from gpumem_tui.engine.ledger import Ledger
from gpumem_tui.engine.recording import read, write
from gpumem_tui.tui.cli import main

from .conftest import small_run
from .serving import an_engine_served

RECORDINGS = Path(__file__).parent / "recordings"
ALL = ("full", "checkpointed", "lora", "h100-tiny", "h100-tiny-lora")


def recorded(name: str, step: int | None = None) -> ExportedRun:
    return ExportedRun(read(RECORDINGS / f"{name}.gpumem")[0], name, step)


def written(format_name: str, *runs: ExportedRun) -> bytes:
    out = io.BytesIO()
    exports.write(runs, exports.registry()[format_name], out)
    return out.getvalue()


@pytest.fixture(params=ALL)
def run(request: pytest.FixtureRequest) -> ExportedRun:
    return recorded(request.param)


# --- memory-viz: torch's own reader -------------------------------------------------


def replayed(entries: list[dict[str, Any]]) -> Iterator[tuple[int, Counter[str]]]:
    """What is held after each entry, in all and by category, as the viewer counts it."""
    alive: dict[int, tuple[int, str]] = {}
    held, total = Counter[str](), 0
    for entry in entries:
        if entry["action"] == "alloc":
            assert entry["addr"] not in alive
            alive[entry["addr"]] = entry["size"], entry["category"]
            held[entry["category"]] += entry["size"]
            total += entry["size"]
        elif entry["action"] == "free_completed":
            size, category = alive.pop(entry["addr"])
            assert size == entry["size"]
            held[category] -= size
            total -= size
        yield total, held


def test_memory_viz_is_replayed_to_the_recordings_figures(run: ExportedRun) -> None:
    snapshot = json.loads(written("memory-viz", run))
    (entries,) = snapshot["device_traces"]
    peak, at_peak, end = 0, Counter[str](), 0
    for total, held in replayed(entries):
        end = total
        if total > peak:
            peak, at_peak = total, held.copy()
    ledger = run.ledger
    expected = Counter[str]()
    for category, size in ledger.peak.by_category.items():
        expected[category.info.legend] += size
    assert (peak, end) == (ledger.peak.bytes, int(ledger.total[-1]))
    assert +at_peak == +expected
    assert len({e["category"] for e in entries if "category" in e}) <= 10, "the viewer has ten colours"
    assert any(e.get("category") == "unknown" for e in entries), "the viewer throws without one"


def test_memory_viz_is_read_by_torch(run: ExportedRun) -> None:
    from torch.cuda import _memory_viz

    snapshot = json.loads(written("memory-viz", run))
    end = sum(run.ledger.end.values()) - run.ledger.end[Category.SLACK]
    assert "total_allocated: " in _memory_viz.segsum(snapshot)  # and asserts that every segment adds up
    flame = _memory_viz.memory(snapshot, format_flamegraph=str).splitlines()
    active = [line for line in flame if ";active_allocated;" in line and ";<gaps>" not in line]
    assert sum(int(line.rsplit(" ", 1)[1]) for line in active) == end
    assert any("parameters, buffers:0:bytes;" in line for line in active), "a block's frames name its category"
    told = _memory_viz.trace(snapshot)
    assert f"{sum(len(t) for t in snapshot['device_traces'])} entries" in told
    assert "</html>" in _memory_viz.trace_plot(snapshot) or "<body>" in _memory_viz.trace_plot(snapshot)


@pytest.mark.parametrize("name", ["h100-tiny", "h100-tiny-lora"])
def test_a_recording_is_a_twentieth_of_the_pickle_of_the_same_step(name: str, tmp_path: Path) -> None:
    run = recorded(name)
    run.run.keep([run.trace])
    write(tmp_path / "step.gpumem", [run.run])
    snapshot = json.loads(written("memory-viz", run))
    assert (tmp_path / "step.gpumem").stat().st_size <= len(pickle.dumps(snapshot, protocol=4)) / 20


def test_memory_viz_says_whose_a_block_is() -> None:
    (entries,) = json.loads(written("memory-viz", recorded("h100-tiny-lora")))["device_traces"]
    told = [e["user_metadata"] for e in entries if e["action"] == "alloc"]
    assert {
        "category": "logits_loss", "owner": "loss", "layer": "loss", "operator": "aten._log_softmax",
        "dtype": "float32", "shape": "[2048, 2048]", "phase": "forward", "module": "loss",
    } in told  # fmt: skip


def test_memory_viz_has_a_device_a_run() -> None:
    snapshot = json.loads(written("memory-viz", recorded("full"), recorded("lora")))
    assert len(snapshot["device_traces"]) == 2
    assert {segment["device"] for segment in snapshot["segments"]} == {0, 1}


# --- csv --------------------------------------------------------------------------------


def test_csv_sums_to_the_recordings_figures(run: ExportedRun) -> None:
    rows = list(csv.DictReader(io.StringIO(written("csv", run).decode())))
    held, at_peak, total, peak = Counter[str](), Counter[str](), 0, -1
    for row in rows:
        held[row["category"]] += int(row["bytes"])
        held["slack"] += int(row["slack_bytes"])
        total += int(row["bytes"]) + int(row["slack_bytes"])
        assert int(row["allocated_bytes"]) == total
        if total > peak:
            peak, at_peak = total, held.copy()
    ledger = run.ledger
    assert (peak, total) == (ledger.peak.bytes, int(ledger.total[-1]))
    assert +at_peak == +Counter({c.key: size for c, size in ledger.peak.by_category.items()})
    assert {(row["run"], row["step"]) for row in rows} == {(run.name, str(run.trace.step))}


def test_numbers_are_written_by_the_column() -> None:
    numbers = np.array([0, 1, -1, 9, 10, 9_999, 10_000, -10_001, 10**8, 2**62, -(2**62)])
    assert text_rows(b"<%>", numbers) == [f"<{n}>".encode() for n in numbers.tolist()]
    assert text_rows(b"%,%", numbers, numbers[::-1])[1] == f"1,{2**62}".encode()


# --- speedscope ---------------------------------------------------------------------------


def test_speedscope_sums_to_the_peak(run: ExportedRun) -> None:
    file = json.loads(written("speedscope", run))
    (profile,) = file["profiles"]
    names = [frame["name"] for frame in file["shared"]["frames"]]
    held = Counter[str]()
    for stack, weight in zip(profile["samples"], profile["weights"], strict=True):
        held[names[stack[0]]] += weight
    peak = run.ledger.peak
    assert +held == +Counter({c.info.title: size for c, size in peak.by_category.items()})
    assert (profile["unit"], profile["endValue"]) == ("bytes", peak.bytes)
    assert file["$schema"] == "https://www.speedscope.app/file-format-schema.json"


def test_speedscope_goes_from_category_to_tensor() -> None:
    file = json.loads(written("speedscope", recorded("h100-tiny")))
    names = [frame["name"] for frame in file["shared"]["frames"]]
    stacks = [[names[i] for i in stack] for stack in file["profiles"][0]["samples"]]
    assert [
        "activations", "gpt_neox.layers.0", "gpt_neox.layers.0.mlp.act", "aten.gelu float32 [8, 256, 512]",
    ] in stacks  # fmt: skip


# --- perfetto: a protobuf reader --------------------------------------------------------


def test_perfetto_counters_are_the_recordings_figures(run: ExportedRun) -> None:
    proto = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
    trace = proto.Trace()
    trace.ParseFromString(written("perfetto", run))
    tracks = {p.track_descriptor.uuid: p.track_descriptor for p in trace.packet if p.HasField("track_descriptor")}
    counters = {uuid: t.name for uuid, t in tracks.items() if t.HasField("counter")}
    assert {tracks[u].counter.unit for u in counters} == {proto.CounterDescriptor.UNIT_SIZE_BYTES}
    assert len({tracks[u].counter.y_axis_share_key for u in counters}) == 1, "all on one scale"
    now, at_peak, peak, last_ns = Counter[str](), Counter[str](), -1, 0
    for packet in trace.packet:
        event = packet.track_event
        if packet.HasField("track_event") and event.type == event.TYPE_COUNTER:
            assert packet.timestamp >= last_ns
            last_ns = packet.timestamp
            now[counters[event.track_uuid]] = event.counter_value
            if counters[event.track_uuid] == "allocated" and event.counter_value > peak:
                peak, at_peak = event.counter_value, now.copy()
    ledger = run.ledger
    expected = Counter({c.info.title: size for c, size in ledger.peak.by_category.items()})
    assert +at_peak == +(expected + Counter({"allocated": ledger.peak.bytes}))
    assert now["allocated"] == int(ledger.total[-1])


def test_perfetto_has_phases_recomputes_and_modules_as_slices() -> None:
    proto = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
    run = recorded("h100-tiny-lora")
    trace = proto.Trace()
    trace.ParseFromString(written("perfetto", run))
    names = {p.track_descriptor.uuid: p.track_descriptor.name for p in trace.packet if p.HasField("track_descriptor")}
    begun: dict[str, list[str]] = {}
    depth = Counter[int]()
    for packet in trace.packet:
        event = packet.track_event
        if packet.HasField("track_event") and event.type != event.TYPE_COUNTER:
            if event.type == event.TYPE_SLICE_BEGIN:
                begun.setdefault(names[event.track_uuid], []).append(event.name)
            depth[event.track_uuid] += 1 if event.type == event.TYPE_SLICE_BEGIN else -1
            assert depth[event.track_uuid] in (0, 1)
    assert begun["phases"] == ["batch", "forward", "backward", "optimizer step", "zero_grad"]
    assert begun["recomputes"] == ["recompute"] * 6
    assert "gpt_neox.layers.3.mlp.dense_4h_to_h" in begun["modules"]
    assert not +depth


# --- openmetrics ------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["openmetrics.parser", "parser"])
def test_openmetrics_is_read_by_prometheus(run: ExportedRun, reader: str) -> None:
    """By the reader of OpenMetrics, and by that of the older text that node_exporter takes."""
    parser = pytest.importorskip(f"prometheus_client.{reader}")
    text = written("openmetrics", run).decode()
    samples = {
        (sample.name, sample.labels.get("category")): sample.value
        for family in parser.text_string_to_metric_families(text)
        for sample in family.samples
    }
    last = Ledger(run.traces[-1])
    for category in Category:
        assert samples["gpumem_allocated_bytes", category.key] == last.end[category]
        assert samples["gpumem_peak_bytes", category.key] == run.ledger.peak.by_category[category]
    assert run.run.gauge is not None
    assert samples["gpumem_reserved_bytes", None] == run.run.gauge.reserved_bytes


# --- json -------------------------------------------------------------------------------


def test_json_holds_to_its_schema(run: ExportedRun, capsys: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    assert main(["export", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(json.loads(written("json", run, run)))


def test_json_timeline_misses_no_peak(run: ExportedRun) -> None:
    (told,) = json.loads(written("json", run))["runs"]
    line, peak = told["step"]["timeline"], run.ledger.peak
    at = line["allocated_bytes"].index(max(line["allocated_bytes"]))
    assert line["allocated_bytes"][at] == told["report"]["peak"]["allocated_bytes"] == peak.bytes
    assert {key: sizes[at] for key, sizes in line["by_category"].items() if sizes[at]} == {
        c.key: size for c, size in peak.by_category.items() if size
    }
    assert line["allocated_bytes"][-1] == int(run.ledger.total[-1])
    points = zip(*line["by_category"].values(), strict=True)
    assert [sum(sizes) for sizes in points] == line["allocated_bytes"]


# --- every format ------------------------------------------------------------------------


def test_no_format_writes_over_another_ones_file() -> None:
    suffixes = [made.suffix for made in exports.registry().values()]
    assert len(set(suffixes)) == len(suffixes)


@pytest.mark.parametrize("name", sorted(exports.registry()))
def test_a_step_without_events_or_ended_by_an_error_is_exported_like_any_other(name: str) -> None:
    run = recorded("h100-tiny")
    last = run.traces[-1]
    empty = replace(last, events=last.events[:0], owners=last.owners[:0], phases=(), counted=None)
    nothing = replace(empty, begin=last.begin[:0])
    aborted = replace(last, events=last.events[:400], phases=last.phases[:2], counted=None,
                      ending=Ending(EndKind.ABORTED, "out of memory", 1 << 30))  # fmt: skip
    for trace in (empty, nothing, aborted):
        run.run.keep([trace])
        one = ExportedRun(run.run, "one")
        assert written(name, one)
        (told,) = json.loads(written("json", one))["runs"]
        assert told["peak"]["allocated_bytes"] == Ledger(trace).peak.bytes
        assert told["step"]["ending"] == str(trace.ending.kind)


# --- the recording itself ---------------------------------------------------------------


def test_the_documented_program_reads_a_recording(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """That of engine/README.md, which knows nothing of us."""
    run = recorded("h100-tiny")
    monkeypatch.chdir(tmp_path)
    write(Path("run.gpumem"), [run.run])
    readme = (Path(__file__).parent.parent / "engine" / "README.md").read_text()
    program = readme.split("```python\n")[1].split("```")[0]
    exec(compile(program, "README.md", "exec"), {})
    assert capsys.readouterr().out == f"peak of the step: {Ledger(run.traces[-1]).peak.bytes:,} bytes\n"


# --- the command ------------------------------------------------------------------------


def test_a_file_named_after_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(RECORDINGS / "full.gpumem"), "--format", "speedscope"]) == 0
    assert capsys.readouterr().out == "full.speedscope.json\n"
    assert [path.name for path in tmp_path.iterdir()] == ["full.speedscope.json"]


def test_a_file_that_is_there_is_written_over_only_where_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [str(RECORDINGS / f"{name}.gpumem") for name in ("full", "lora")]
    Path("full.json").write_text("mine")
    assert main(["export", *runs, "-f", "json"]) == 2
    complaint = "full.json: it is there already; -o full.json writes over it, or name another file with -o"
    assert capsys.readouterr().err == f"gpumem-tui: {complaint}\n"
    assert Path("full.json").read_text() == "mine"
    assert main(["export", *runs, "-f", "json", "-o", "full.json"]) == 0
    assert capsys.readouterr().out == "full.json (2 runs)\n"


def test_a_prediction_is_exported_like_any_run(tmp_path: Path) -> None:
    recording, estimate, exported = (tmp_path / name for name in ("run.gpumem", "estimate.json", "export.json"))
    quick = ["--profile", "tiny", "--batch-size", "2", "--seq-len", "16", "--gpu", "A100 40GB"]
    assert main(["estimate", *quick, "--save", str(recording), "--json", str(estimate)]) == 0
    assert main(["export", str(recording), "-f", "json", "-o", str(exported)]) == 0
    (run,) = json.loads(exported.read_text())["runs"]
    assert run["kind"] == "predicted"
    assert run["peak"] == json.loads(estimate.read_text())["peak"]


def test_a_running_engine_is_exported_by_its_name_or_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with an_engine_served(small_run(steps=2)) as (engine_dir, engine):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(engine_dir.folder.parent.parent))
        info, run = engine_dir.info(), engine.session.run
        assert info is not None and run is not None
        for wanted in ("tiny", str(info.pid)):
            assert main(["export", wanted, "-f", "json"]) == 0
            assert capsys.readouterr().out == "tiny.json\n"
            (told,) = json.loads(Path("tiny.json").read_text())["runs"]
            assert told == json.loads(written("json", ExportedRun(run, "tiny")))["runs"][0]
            Path("tiny.json").unlink()

        write(Path("tiny.gpumem"), [run])
        assert main(["export", "tiny", "tiny.gpumem", "-f", "json", "-o", "both.json"]) == 0
        both = json.loads(Path("both.json").read_text())["runs"]
        assert [run["name"] for run in both] == ["tiny", "tiny (running)"]
        assert both[0]["peak"] == both[1]["peak"]

        assert main(["export", "tini", "-f", "json", "-o", "none.json"]) == 2
        assert capsys.readouterr().err == "gpumem-tui: tini: neither a file nor a running engine; running: tiny\n"
        assert not Path("none.json").exists()


@pytest.mark.parametrize("name", sorted(exports.registry()))
def test_a_full_disk_is_one_line(name: str, capsys: Any) -> None:
    assert main(["export", str(RECORDINGS / "full.gpumem"), "-f", name, "-o", "/dev/full"]) == 2
    assert capsys.readouterr().err == "gpumem-tui: /dev/full: not written: No space left on device\n"
    assert not Path("/dev/full").is_file(), "a device is written to, not replaced"


def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(tmp_path: Path, capsys: Any) -> None:
    good, cut = str(RECORDINGS / "full.gpumem"), tmp_path / "cut.gpumem"
    cut.write_bytes(Path(good).read_bytes()[:5000])
    (tmp_path / "file").write_text("")
    for arguments, complaint in (
        ([good, "-f", "perfeto"], "--format perfeto: there is no such format; did you mean perfetto?"),
        ([good], f"--format: say which: {', '.join(exports.registry())}"),
        (["-f", "csv"], "name a recording or a running engine to export"),
        ([str(cut), "-f", "csv"], f"{cut}: a gpumem recording that is cut off or damaged"),
        ([str(tmp_path / "none"), "-f", "csv"], f"{tmp_path / 'none'}: neither a file nor a running engine"),
        ([good, "-f", "csv", "--step", "9"], "full: step 9 is not in it; it has 0, 1, 2, 3"),
        ([good, "-f", "csv", "-o", str(tmp_path)], f"{tmp_path}: not written: it is a folder"),
        ([good, "-f", "csv", "-o", str(tmp_path / "file" / "x")], f"{tmp_path / 'file' / 'x'}: not written: "),
    ):
        assert main(["export", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"gpumem-tui: {complaint}"), error
        assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.gpumem", "file"]


def test_a_step_can_be_chosen() -> None:
    rows = csv.DictReader(io.StringIO(written("csv", recorded("full", step=3)).decode()))
    assert {row["step"] for row in rows} == {"3"}


def test_a_cancelled_export_leaves_the_old_file(tmp_path: Path) -> None:
    path, work = tmp_path / "run.csv", Work(cancelled=True)
    path.write_text("old")
    with pytest.raises(UserError, match="cancelled"):
        exports.export([recorded("full")], exports.registry()["csv"], path, work)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_export_tells_how_far_it_is(tmp_path: Path) -> None:
    work = Work()
    exports.export([recorded("full")], exports.registry()["memory-viz"], tmp_path / "run.json", work)
    assert work.share == 1


def test_formats_load_no_torch() -> None:
    code = (
        "import sys; from gpumem_tui.engine.exports import registry; registry();"
        "assert not {'torch', 'textual', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
