"""Models and presets to train: one TOML file each.

Adding a model is adding a file to `models/`, adding a preset one to `presets/`;
nothing else has to be edited. Loads no torch, so that the app can list them.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..engine.config import DTYPES, Architecture, RunConfig, UserError
from .table import Table

MODELS = Path(__file__).parent / "models"
PRESETS = Path(__file__).parent / "presets"
MEASURES = ("leftover", "loaded", "after_step", "peak_first_step", "peak_all_steps", "reserved_after_first_step",
            "gradients", "optimizer", "logits")  # fmt: skip
"""The measures of a run in a preset's rows: sizes in GiB, 1024**3 bytes.

`leftover` was allocated before the run began, `after_step` is all that is
allocated when the first optimizer step has returned.
"""


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """A model's architecture, enough to build it with random weights.

    Attributes:
        name: What `--profile` calls it; the file is called the same.
        title: For people.
        summary: One line: what is particular about its memory.
        source: The model's page.
        dtype: The dtype its weights are published in: one of DTYPES.
        parameters: Published count, tied weights once, buffers not at all.
        lora_targets: The modules LoRA adapts by default, without their path.
        config: The fields of its config.json, `model_type` among them.
    """

    name: str
    title: str
    summary: str
    source: str
    dtype: str
    parameters: int
    lora_targets: tuple[str, ...]
    config: Mapping[str, Any]

    @property
    def architecture(self) -> Architecture:
        """The architecture that a run of the model carries."""
        _, _, hub_id = self.source.partition("https://huggingface.co/")
        return Architecture(self.config, self.dtype, self.lora_targets, hub_id if hub_id.count("/") == 1 else "")


@dataclass(frozen=True, slots=True)
class PresetRow:
    """One run of an experiment, and what others measured in it.

    Attributes:
        name: Of the row.
        settings: On top of the preset's, as read from the file.
        published: The source's figures by MEASURES name, in GiB.
        bare_h100: The same run in plain PyTorch on an H100, likewise.
    """

    name: str
    settings: Mapping[str, object]
    published: Mapping[str, float]
    bare_h100: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Preset:
    """A named combination of settings.

    Attributes:
        name: What `--preset` calls it; the file is called the same.
        title: For people.
        summary: One line: what it is for.
        source: Where the combination comes from.
        model: The profile it was written for, if for one.
        settings: By name, as read: `engine.techniques.parse(settings, where)` checks them.
        rows: Of an experiment; none: a single run.
        where: The file, for errors about its settings.
    """

    name: str
    title: str
    summary: str
    source: str
    model: str | None
    settings: Mapping[str, object]
    rows: tuple[PresetRow, ...]
    where: str


# Read afresh at each call, which takes milliseconds: transformers completes the
# nested tables of a configuration in place, and a shared copy would keep that.


def model_profiles() -> Mapping[str, ModelProfile]:
    """Every model profile, by name. Raises UserError as `read_model` does."""
    return MappingProxyType({path.stem: read_model(path) for path in _files(MODELS)})


def presets() -> Mapping[str, Preset]:
    """Every preset, by name. Raises UserError as `read_preset` does."""
    return MappingProxyType({path.stem: read_preset(path) for path in _files(PRESETS)})


def preset_names() -> list[str]:
    """The names of the presets; none is read."""
    return [path.stem for path in _files(PRESETS)]


def model_profile(name: str) -> ModelProfile:
    """One model profile. Raises UserError if there is none of this name, or as `read_model` does."""
    return read_model(_find("model profile", name, MODELS))


def run_fields(name: str) -> dict[str, Any]:
    """The fields of a RunConfig that a profile decides, for `engine.techniques.configure`.

    Raises:
        UserError: As `model_profile`.
    """
    return {"model": name, "architecture": model_profile(name).architecture}


def resolved(config: RunConfig) -> RunConfig:
    """A configuration with its profile's architecture, if it was written before runs carried theirs."""
    if config.pretrained or config.architecture is not None:
        return config
    try:
        return dataclasses.replace(config, architecture=model_profile(config.model).architecture)
    except UserError:  # no profile of ours, or one that no longer is
        return config


def preset(name: str) -> Preset:
    """One preset. Raises UserError if there is none of this name, or as `read_preset` does."""
    return read_preset(_find("preset", name, PRESETS))


def read_model(path: Path) -> ModelProfile:
    """Read a file of `models/`.

    Raises:
        UserError: It cannot be read, or a key is missing, unknown or wrong.
    """
    table = Table.read(path)
    lora, config = table.table("lora"), table.table("config")
    targets: list[Any] = lora.take("targets", list, "a list of module names", _are_names)
    config.text("model_type")  # the other fields are for transformers to judge
    profile = ModelProfile(
        name=table.text("name", (path.stem,)),  # by which it is looked up
        title=table.text("title"),
        summary=table.text("summary"),
        source=table.text("source"),
        dtype=table.text("dtype", DTYPES),
        parameters=table.take("parameters", int, "a whole number from 1", lambda count: count > 0),
        lora_targets=tuple(targets),
        config=config.values,
    )
    lora.end()
    table.end()
    return profile


def read_preset(path: Path) -> Preset:
    """Read a file of `presets/`. Its settings are the caller's to check, with `where`.

    Raises:
        UserError: It cannot be read, or a key is missing, unknown or wrong.
    """
    table = Table.read(path)
    found = Preset(
        name=table.text("name", (path.stem,)),  # by which it is looked up
        title=table.text("title"),
        summary=table.text("summary"),
        source=table.text("source"),
        model=table.text("model") if "model" in table.values else None,
        settings=_settings(table),
        rows=tuple(_row(row) for row in table.tables("rows")),
        where=str(path),
    )
    table.end("model", "rows")
    return found


def _row(table: Table) -> PresetRow:
    published, bare = table.numbers("published", MEASURES), table.numbers("bare_h100", MEASURES)
    row = PresetRow(table.text("name"), _settings(table), published, bare)
    table.end("published", "bare_h100")
    return row


def _settings(table: Table) -> Mapping[str, object]:
    settings = table.table("set")
    for name, value in settings.values.items():
        if isinstance(value, dict):  # which is what TOML makes of lora.r = 8
            meant = ", ".join(f'"{name}.{rest}"' for rest in value)
            raise settings.error(f"{settings.prefix}{name} is a table; write names with a dot in quotes: {meant}")
    return settings.values


def _are_names(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) and value for value in values)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.toml"))


def _find(what: str, name: str, folder: Path) -> Path:
    known = {path.stem: path for path in _files(folder)}
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UserError(f"there is no {what} {name!r}; {hint}there are: {', '.join(known)}")
