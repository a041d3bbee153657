"""The page in a real browser: its figures are the JSON's, nothing leaves it, and it can be read without a mouse."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpumem_tui.engine.categories import Category
from gpumem_tui.engine.exports.exported_run import ExportedRun
from gpumem_tui.engine.run import RunKind
from gpumem_tui.engine.run_events import StepEnded

from .benchmarks.fold import synthetic
from .browser import INSTALLED, Browser, browser
from .test_exports import recorded, written

needs_browser = pytest.mark.skipif(not INSTALLED, reason="needs chromium and chromedriver")
LEFT, END, HOME = "\ue012", "\ue010", "\ue011"


@pytest.fixture(scope="module")
def opened() -> Iterator[Browser]:
    with browser() as found:
        yield found


def show(opened: Browser, tmp_path: Path, *runs: ExportedRun) -> dict[str, Any]:
    """Open the page of some runs; the document that the page should show."""
    path = tmp_path / "page.html"
    path.write_bytes(written("html", *runs))
    opened.open(path.as_uri())
    document: dict[str, Any] = json.loads(written("json", *runs))
    return document


def table(opened: Browser, name: str) -> dict[str, list[int]]:
    """By the head of its rows, the figures of a table to the byte."""
    found: dict[str, list[int]] = opened.run(
        f"""return Object.fromEntries([...document.querySelectorAll("#{name}-table tbody tr")].map((row) =>
            [row.querySelector("th").lastChild.textContent,
             [...row.querySelectorAll("data")].map((figure) => Number(figure.value))]))"""
    )
    return found


@needs_browser
def test_the_figures_are_the_documents(opened: Browser, tmp_path: Path) -> None:
    (run,) = show(opened, tmp_path, recorded("h100-tiny-lora"))["runs"]
    now, peak = run["now"], run["peak"]
    titles = {c.key: c.info.title for c in Category}
    held = table(opened, "held")
    assert held.pop("allocated") == [now["allocated_bytes"], peak["allocated_bytes"]]
    assert held == {
        titles[key]: [now["by_category"][key], size]
        for key, size in peak["by_category"].items()
        if size or now["by_category"][key] or key == "unknown"
    }
    layers = {name or "(the model)": [sum(sizes.values())] for name, sizes in peak["by_layer"].items()}
    assert table(opened, "layers") == layers
    owned = opened.run("return [...document.querySelectorAll('#owners tbody data')].map((d) => Number(d.value))")
    assert owned == [size for kinds in peak["by_owner"].values() for size in kinds.values()]
    steps = {
        str(s["step"]): [s["allocated_bytes"], s["peak_bytes"], s["reserved_bytes"]] for s in run["report"]["steps"]
    }
    assert table(opened, "steps") == steps
    told = opened.run("return document.querySelectorAll('#log-table tbody tr').length")
    assert told == len(run["events"])


@needs_browser
def test_figures_are_shown_to_the_byte_on_request(opened: Browser, tmp_path: Path) -> None:
    show(opened, tmp_path, recorded("full"))
    cell = "return document.querySelector('#held-table tr.sum data:last-of-type').textContent"
    assert opened.run(cell) == "9.23"
    opened.click("#exact")
    assert opened.run(cell) == "9,915,334,656"


@needs_browser
def test_the_cursor_goes_by_keys_and_is_read_out(opened: Browser, tmp_path: Path) -> None:
    (run,) = show(opened, tmp_path, recorded("h100-tiny"))["runs"]
    line, titles = run["step"]["timeline"], {c.info.title: c.key for c in Category}

    def at_cursor() -> tuple[str, dict[str, int]]:
        text = opened.run("return document.getElementById('slider').getAttribute('aria-valuetext')")
        rows = opened.run(
            "return [...document.querySelectorAll('#at li')].map((li) => "
            "[li.childNodes[1].textContent, Number(li.querySelector('data').value)])"
        )
        return text, {titles[name]: size for name, size in rows}

    def said(point: int) -> dict[str, int]:
        return {key: sizes[point] for key, sizes in line["by_category"].items()}

    peak = line["allocated_bytes"].index(max(line["allocated_bytes"]))
    text, sizes = at_cursor()  # where the page opens
    assert sizes == said(peak)
    assert text == f"event {line['event'][peak]} of 1,260, 29.12 ms, backward · loss, 242.1 MiB allocated"
    opened.press("#slider", LEFT)
    assert at_cursor()[1] == said(peak - 1)
    opened.press("#slider", HOME)
    assert at_cursor()[0].startswith("before the first event")
    opened.press("#slider", END)
    assert at_cursor()[1] == said(len(line["event"]) - 1)
    opened.click("#to-peak")
    assert at_cursor()[1] == said(peak)
    opened.click("#scope .group button:nth-child(2)")  # by time
    assert at_cursor()[1] == said(peak)


@needs_browser
def test_runs_are_compared_and_each_can_be_looked_at(opened: Browser, tmp_path: Path) -> None:
    document = show(opened, tmp_path, recorded("full"), recorded("lora"))
    first, second = (run["peak"] for run in document["runs"])
    compared = table(opened, "compare")
    difference = second["allocated_bytes"] - first["allocated_bytes"]
    assert compared["allocated"] == [first["allocated_bytes"], second["allocated_bytes"], difference]
    for category in Category:
        one, other = first["by_category"][category.key], second["by_category"][category.key]
        assert compared.get(category.info.title, [0, 0, 0]) == [one, other, other - one]
    opened.click("#compare-bars tbody tr:nth-child(2) button")
    assert opened.run("return document.querySelector('h1').textContent") == "lora"
    assert table(opened, "held")["allocated"][1] == second["allocated_bytes"]


@needs_browser
def test_a_prediction_shows_no_times_and_no_reading_of_a_device(opened: Browser, tmp_path: Path) -> None:
    run = recorded("h100-tiny")
    run.run.kind, run.run.gauge, run.run.training_gauge = RunKind.PREDICTED, None, None
    show(opened, tmp_path, run)
    text = opened.run("return document.getElementById('slider').getAttribute('aria-valuetext')")
    assert text.startswith("event ") and " ms" not in text, text
    assert opened.run("return [...document.querySelectorAll('#scope button')].map((b) => b.textContent)") == [
        "to the peak"
    ]
    told = opened.run("return [...document.querySelectorAll('.legend li')].map((li) => li.firstChild.textContent)")
    assert told == ["at the peak ", "the rest "]


@needs_browser
def test_a_peak_above_the_capacity_leaves_no_rest(opened: Browser, tmp_path: Path) -> None:
    run = recorded("full")
    capacity = run.ledger.peak.bytes - (1 << 30)
    run.run.environment = dataclasses.replace(run.run.environment, device_total_bytes=capacity)
    run.run.kind, run.run.gauge, run.run.training_gauge = RunKind.PREDICTED, None, None
    show(opened, tmp_path, run)
    told = opened.run("return [...document.querySelectorAll('.legend li')].map((li) => li.textContent)")
    assert told[-1] == "more than it has 1.00 GiB"


@needs_browser
def test_nothing_is_loaded_and_nothing_is_logged(opened: Browser, tmp_path: Path) -> None:
    show(opened, tmp_path, recorded("full"), recorded("lora"))
    assert opened.run("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []
    assert opened.console() == []
    opened.run("return fetch('http://127.0.0.1:9/').catch(() => 0)")
    assert any("Content Security Policy" in message for message in opened.console()), "the policy forbids any request"


@needs_browser
def test_names_are_text_and_never_markup(opened: Browser, tmp_path: Path) -> None:
    name = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)>"
    show(opened, tmp_path, dataclasses.replace(recorded("full"), name=name))
    assert opened.run("return document.querySelector('h1').textContent") == name
    assert opened.run("return document.title") == f"{name}: GPU memory"
    assert opened.run("return document.images.length") == 0
    assert opened.console() == []


@needs_browser
def test_a_screen_reader_is_told_everything(opened: Browser, tmp_path: Path) -> None:
    show(opened, tmp_path, recorded("h100-tiny"), recorded("h100-tiny-lora"))
    told = opened.accessible()
    named = {(role, name) for role, name, _ in told}
    assert ("image", "Bytes held along step 2, stacked by category; highest 242.1 MiB at event 317") in named
    assert ("table", "Bytes by category, now and at the peak") in named
    assert ("heading", "What holds it") in named
    assert ("checkbox", "exact bytes") in named
    assert ("slider", "Cursor along the step") in named
    nameless = [
        role for role, name, _ in told if role in ("button", "table", "slider", "combobox", "image") and not name
    ]
    assert not nameless


@needs_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_legible_in_both_themes(opened: Browser, tmp_path: Path, theme: str) -> None:
    """4.5:1 (WCAG AA) for all text, letters on the categories' fills included."""
    show(opened, tmp_path, recorded("h100-tiny"))
    opened.run(f"document.documentElement.dataset.theme = '{theme}'")
    worst = opened.run(CONTRAST)
    assert worst[0] >= 4.5, worst


CONTRAST = """
const channels = (text) => {
  const values = text.match(/[\\d.]+/g).map(Number);
  const scale = text.startsWith("color(srgb") ? 1 : 255;
  return [...values.slice(0, 3).map((v) => v / scale), values[3] ?? 1];
};
const luminance = (c) => {
  const [r, g, b] = c.map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let at = element; at; at = at.parentElement) {
    const found = channels(getComputedStyle(at).backgroundColor);
    if (found[3] > 0) return found;
  }
};
let worst = [99, ""];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
  if (!own || !element.checkVisibility() || element.matches("script, noscript *, .mark, option")) continue;
  const pair = [luminance(channels(getComputedStyle(element).color)), luminance(behind(element))];
  const [low, high] = pair.sort((a, b) => a - b);
  const contrast = (high + 0.05) / (low + 0.05);
  if (contrast < worst[0]) worst = [contrast, element.outerHTML.slice(0, 120)];
}
return worst;
"""


def test_the_page_of_a_large_step_is_small() -> None:
    """290 modules of 25 layers, 20,000 events and a run of a thousand steps: at most 1 MB."""
    base = recorded("full")
    run = base.run
    for i in range(1000):
        run.tell(StepEnded(text=f"step {i} of 1000", index=100 + i, step=i, loss=2.125, seconds=1.25, tokens=4096,
                           allocated_bytes=1 << 34, peak_bytes=1 << 35, reserved_bytes=1 << 35))  # fmt: skip
    run.keep([*base.traces, synthetic(20_000)])
    page = written("html", ExportedRun(run, "large"))
    assert b"step 999 of 1000" in page
    assert len(page) < 1_000_000
