"""Runs as a page: one file that loads nothing, to be sent to a colleague.

The page holds the document of `--format json`, cut to its latest steps and
events, and shows that and nothing else. Its policy forbids every request, and
every script and style but its own, which it knows by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from pathlib import Path
from string import Template

from ..categories import Category
from .exported_run import ExportedRun, Format, Sink
from .json import document, encoded

LATEST = 200
"""Steps, recomputes and events of a run that the page has room for."""
SOFTNESS = 0.72
"""Strength of a fill on light: 1 is the colour itself, 0 white."""
_HERE = Path(__file__).parent


def write(runs: Sequence[ExportedRun], sink: Sink) -> None:
    """One page for all runs; with several it compares them."""
    style = f":root{{{_colours()}}}\n{_text('page.css')}"
    script = _text("page.js")
    policy = f"default-src 'none'; style-src {_hash(style)}; script-src {_hash(script)}; base-uri 'none'"
    # A name with a tag in it must not end the script that holds the document.
    data = encoded(document(runs, LATEST)).replace(b"<", b"\\u003c").decode()
    page = Template(_text("page.html")).substitute(policy=policy, style=style, script=script, document=data)
    sink.write(page.encode(), sum(run.events for run in runs))


FORMAT = Format("html", ".html", "a page that any browser opens, whole in one file", write)


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _hash(content: str) -> str:
    """The hash of a script or style, as a content security policy names it."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _colours() -> str:
    """A category's fill, and the ink that is legible on it, on light and on dark."""
    rules = []
    for category in Category:
        fills = _softened(category.info.light), category.info.dark
        inks = map(_ink_on, fills)
        rules.append(
            f"--c-{category.key}:light-dark({','.join(fills)});--on-{category.key}:light-dark({','.join(inks)});"
        )
    return "".join(rules)


def _softened(colour: str) -> str:
    """A colour that is legible as text on light, as the fill of a large area."""
    return "#" + "".join(f"{round(255 - (255 - channel) * SOFTNESS):02x}" for channel in bytes.fromhex(colour[1:]))


def _ink_on(fill: str) -> str:
    """Black or white, whichever is legible (WCAG 2.1: the contrasts are equal at a luminance of 0.18)."""
    channels = (channel / 255 for channel in bytes.fromhex(fill[1:]))
    red, green, blue = (c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.18 else "#ffffff"
