"""The parts that several commands share: the flags that describe a run, and driving one to its end."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from ...engine.atomic_file import replacing
from ...engine.config import WORKLOAD_OPTIONS, Option, RunConfig, UserError, Value, parse_bytes
from .. import interrupt

if TYPE_CHECKING:
    from ...engine.feed import Work
    from ...engine.prediction.gpus import Gpu
    from ...engine.prediction.outcome import Prediction
    from ...engine.recording import Recording
    from ...engine.run import Run
    from ...engine.run_events import RunEvent
    from ...engine.session import Session

TELL_EVERY_S = 0.2
NARROW = 80
"""Columns of a terminal that does not say how wide it is."""
USER_MISTAKE = 2
"""Exit code of something that the user can put right."""
FAILED = 3
"""Exit code of a run that was started and did not finish."""


def failure_code(runs: Iterable[Run]) -> int:
    """The exit code of runs that failed: their configuration is for the user to put right, or something broke."""
    from ...engine.run_events import RunFailed

    failed = (event for run in runs for event in run.events() if isinstance(event, RunFailed))
    return USER_MISTAKE if any(event.mistake for event in failed) else FAILED


def without_keys(text: str) -> str:
    """The reason that an engine gives for its end, without the app's keys for going on."""
    return text.partition("; s saves")[0].partition("; r starts")[0].partition("; q quits")[0]


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that describe a run."""
    from ...profiles import preset_names

    what = parser.add_mutually_exclusive_group()
    what.add_argument("--profile", help="a model profile with random weights (see: gpumem-tui profiles)")
    what.add_argument("--model", help="a hub id or a local folder, loaded with from_pretrained")
    parser.add_argument("--preset", help=f"a named combination of settings: {', '.join(preset_names())}")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], dest="settings",
                        help="a technique's setting, repeatable (see: gpumem-tui techniques)")  # fmt: skip
    for option in WORKLOAD_OPTIONS:
        of_words = isinstance(option.default, str)
        values = f"; one of {option.allowed}" if of_words else ""
        metavar = option.name.upper() if of_words else "N"
        parser.add_argument(flag_of(option), metavar=metavar, help=f"{option.summary}{values}")
    parser.add_argument("--device", default="auto", help="to run on: auto, cpu, cuda or cuda:<i> (default: auto)")
    parser.add_argument(
        "--memory-limit", metavar="SIZE", help="have the device behave as one with so much memory: 24GiB"
    )
    parser.add_argument("--data", metavar="FILE", help="train on this text or JSONL file instead of random tokens")


def config_from(
    flags: argparse.Namespace, first: Mapping[str, Value] | None = None, profile: str = "tiny"
) -> RunConfig:
    """The configuration that the flags describe: preset, then --set, then the flags of their own.

    Args:
        flags: Parsed.
        first: Settings below all of these.
        profile: What is trained where the flags name nothing.

    Raises:
        UserError: Whatever in them cannot be.
    """
    from ...engine import techniques
    from ...profiles import preset, run_fields

    settings: dict[str, Value] = dict(first or {})
    model = flags.model or flags.profile
    if flags.preset:
        chosen = preset(flags.preset)
        settings |= techniques.parse(chosen.settings, chosen.where)
        model = model or chosen.model
    settings |= typed_settings(flags)
    base: dict[str, Any] = {
        "model": model or profile,
        "pretrained": flags.model is not None,
        "device": flags.device,
        "data": flags.data,
        "memory_limit_bytes": parse_bytes(flags.memory_limit, "--memory-limit") if flags.memory_limit else 0,
    }
    # What is plainly wrong is refused before anything is started.
    try:
        tempfile.gettempdir()
    except OSError:  # torch and what builds on it do not load without
        raise UserError("no folder for temporary files can be written; TMPDIR may name one") from None
    if not base["pretrained"]:
        base |= run_fields(base["model"])
    elif base["model"].startswith(("/", ".", "~")) and not os.path.isdir(base["model"]):  # noqa: PTH112 (no name is too long for it)
        raise UserError(f"--model {base['model']}: no such folder")
    if flags.data is not None and not os.path.isfile(flags.data):  # noqa: PTH113
        problem = "it is a folder" if os.path.isdir(flags.data) else "no such file"  # noqa: PTH112
        raise UserError(f"--data {flags.data}: {problem}")
    config = techniques.configure(base, settings)
    if "new_tokens" in settings and not config.generates:
        raise UserError(f"new_tokens={config.new_tokens} is for what is generated: set workload=generate")
    return config


def typed_flags(flags: argparse.Namespace) -> list[str]:
    """The flags among `add_run_flags` that were typed."""
    parser = argparse.ArgumentParser(add_help=False)
    add_run_flags(parser)
    return [each.option_strings[0] for each in parser._actions if getattr(flags, each.dest) != each.default]


def refuse_beside(flag: str, others: Sequence[str], why: str) -> None:
    """Refuse flags that could play no part beside another.

    Raises:
        UserError: There are some.
    """
    if others:
        raise UserError(f"{flag} does not go with {', '.join(others)}: {why}")


def typed_settings(flags: argparse.Namespace) -> dict[str, Value]:
    """The settings that were typed: --set, then the workload's flags of their own.

    Raises:
        UserError: An unknown setting, or a value that is not allowed.
    """
    from ...engine import techniques

    typed = {}
    for item in flags.settings:
        name, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"--set {item}: write it as key=value")
        typed[name.strip()] = value
    settings = techniques.parse(typed, "--set")
    for option in WORKLOAD_OPTIONS:
        value = getattr(flags, option.name)
        if value is not None:
            settings[option.name] = option.parse(value, flag_of(option))
    return settings


def seconds(typed: str, where: str) -> float:
    """A time as typed: `90`, `90s`, `10m`, `2h`.

    Raises:
        UserError: It is none.
    """
    number, unit = (typed[:-1], typed[-1]) if typed[-1:] in ("s", "m", "h") else (typed, "s")
    try:
        value = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(f"{where} {typed}: takes a time such as 90, 10m or 2h")
    return value


def parse_percent(typed: str, where: str) -> float:
    """A share as typed: `1%`, `0.5 %`.

    Raises:
        UserError: It is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", typed)
    if match is None:
        raise UserError(f"{where} {typed}: takes a share such as 1%")
    return float(match[1]) / 100


def flag_of(option: Option) -> str:
    """The flag of one of the workload's options."""
    return f"--{option.name.replace('_', '-')}"


def run_to_end(session: Session, config: RunConfig, say: Callable[[RunEvent], None] = lambda _: None) -> Run:
    """Start a run and return it when it has ended.

    Raises:
        UserError: It was refused.
    """
    from ...engine.feed import Start
    from ...engine.run_events import Refused

    seen = session.events()
    next_index, before = seen[-1].index + 1 if seen else 0, session.run
    session.command(Start(config))
    finished = False
    while not finished:
        finished = session.wait(0.1)
        for event in session.events(next_index):
            next_index = event.index + 1
            say(event)
            if isinstance(event, Refused):
                raise UserError(event.text)
    # If it failed at once, the engine may have gone back to the run before it.
    return next(run for run in session.runs() if before is None or run.id.number > before.id.number)


def opened(paths: Sequence[Path]) -> Recording:
    """Recordings and snapshots opened together; what an older one did not hold of a profile is as the profile is now.

    Raises:
        UserError: One is not there, or not a recording this version can read.
    """
    from ...engine.feed import Work
    from ...engine.recording import Recording
    from ...profiles import resolved

    work = Work()
    with telling_how_far("reading", work):
        found = Recording(*paths, work=work)
    for run in found.runs():
        run.config = resolved(run.config)
    return found


def reported_run(
    session_of: Callable[[Callable[[Any], None]], Session],
    config: RunConfig,
    say: Callable[[RunEvent], None] = lambda _: None,
) -> tuple[dict[str, Any], Session]:
    """Run on a new session with a report listening."""
    from ...engine.report import Report

    report = Report()
    session = session_of(report.add)
    run = run_to_end(session, config, say)
    return report.document(run).as_dict(), session


def progress(event: RunEvent) -> None:
    """Tell a person at a terminal how far it is; standard output stays clean."""
    from ...engine.run_events import Loaded, Note, RunStarted, StepEnded

    if isinstance(event, RunStarted | Loaded | StepEnded | Note):
        tell(event.text)


def tell(text: str) -> None:
    """Write over the line that says how far it is, where somebody sees it; what the terminal has no room for is cut."""
    if sys.stderr.isatty():
        try:
            columns = os.get_terminal_size(sys.stderr.fileno()).columns or NARROW
        except (OSError, ValueError):
            columns = NARROW
        line = textwrap.shorten(f"{time.strftime('%H:%M:%S')} {text}", columns - 1, placeholder=" ...")
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()


def telling(predict: Callable[[RunConfig, Gpu], Prediction], gpu: Gpu) -> Callable[[RunConfig], Prediction]:
    """Predictions for one GPU, each of them told of."""
    from ...engine.techniques import describe

    def predicted(config: RunConfig) -> Prediction:
        tell(f"predicting {describe(config)}")
        return predict(config, gpu)

    return predicted


@contextmanager
def telling_how_far(what: str, work: Work) -> Iterator[None]:
    """A line that says how far work on another thread, or on this one, is; for as long as the block lasts."""
    over = threading.Event()

    def say() -> None:
        while not over.wait(TELL_EVERY_S):
            tell(f"{what} {100 * work.share:.0f} %")

    teller = threading.Thread(target=say, name="progress", daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()
        end_progress()


def end_progress() -> None:
    """Clear the line that `tell` wrote."""
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")


def refuse_unwritable(name: str, target: str | None) -> None:
    """Find out before a run, not after it, that its result has nowhere to go.

    Raises:
        UserError: Nothing can be written there.
    """
    if not target or target == "-":
        return
    path = Path(target)
    try:
        if path.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--{name} {target}: cannot write there: {error.strerror}") from None


def write_document(document: dict[str, Any], target: str) -> None:
    """A document as JSON, to a file or, for `-`, to standard output.

    Raises:
        UserError: It cannot be written; no part of it is there.
    """
    write_output(json_text(document) + "\n", target)


def json_line(document: dict[str, Any]) -> str:
    """A document as JSON in a line; a number that is none, as a loss may become, is null."""
    return msgspec.json.encode(document).decode()


def json_text(document: dict[str, Any]) -> str:
    """The same over several lines."""
    return msgspec.json.format(msgspec.json.encode(document), indent=1).decode()


def write_output(text: str, target: str | None) -> None:
    """A text to a file or, for `-` and where none is named, to standard output.

    Raises:
        UserError: It cannot be written; no part of it is there.
    """
    if target is None or target == "-":
        sys.stdout.write(text)
    else:
        write_text(Path(target), text)


def write_text(path: Path, text: str) -> None:
    """A file, whole or not at all.

    Raises:
        UserError: It cannot be written.
    """
    with _named(path), replacing(path) as file:
        file.write(text.encode())


def save_runs(runs: Sequence[Run], path: Path) -> None:
    """Runs as a recording.

    Raises:
        UserError: It cannot be written; no part of it is there.
    """
    from ...engine.recording import write

    with _named(path):
        write(path, runs)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors name the file, and Ctrl-C leaves no part of it."""
    try:
        with interrupt.answered_by(interrupt.raise_interrupt):
            yield
    except OSError as error:
        raise UserError(f"{path}: not written: {error.strerror or error}") from None
