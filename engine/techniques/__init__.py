"""The registry: every module of this folder that exports a TECHNIQUE is one.

Adding a technique is adding a file here; nothing else has to be edited.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
from collections.abc import Iterable, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from ..config import (
    TRACES,
    WORKLOAD_OPTIONS,
    Architecture,
    Option,
    RunConfig,
    UserError,
    Value,
    did_you_mean,
    excerpt,
    show,
)
from ..events import Environment
from ..tasks import of_tokens
from ..technique import Effect, Group, Technique

ROUTINE = ("rows", "steps", "seed")
"""Settings that decide neither memory nor which training it is: in no label."""


@cache
def registry() -> Mapping[str, Technique]:
    """Every technique by name, in the order they apply. Loads no torch."""
    modules = [importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)]
    found: list[Technique] = sorted((module.TECHNIQUE for module in modules), key=lambda t: (t.order, t.name))
    return MappingProxyType({technique.name: technique for technique in found})


def by_group() -> Iterable[Technique]:
    """Every technique, those of one group together: as they are listed for people."""
    return (technique for group in Group for technique in registry().values() if technique.group is group)


@cache
def all_options() -> Mapping[str, Option]:
    """Every setting that `--set` and a preset may name: the workload's and the techniques'."""
    options = {option.name: option for option in WORKLOAD_OPTIONS}
    for technique in registry().values():
        options |= {option.name: option for option in technique.options}
    return MappingProxyType(options)


def of_option(name: str) -> Technique | None:
    """The technique whose switch or detail an option is; None: a workload setting."""
    return next((t for t in registry().values() if any(option.name == name for option in t.options)), None)


def defaults() -> dict[str, Value]:
    """The default of every technique option."""
    return {option.name: option.default for technique in registry().values() for option in technique.options}


def parse(settings: Mapping[str, object], where: str) -> dict[str, Value]:
    """Check settings by name.

    Args:
        settings: Values as typed or as read from a file.
        where: Named in errors.

    Raises:
        UserError: An unknown name, or a value that is not allowed.
    """
    known = all_options()
    values: dict[str, Value] = {}
    for name, raw in settings.items():
        if name not in known:
            hint = did_you_mean(str(name), known, "gpumem-tui techniques lists them")
            raise UserError(f"{where}: there is no setting {excerpt(name)!r}; {hint}")
        values[name] = known[name].parse(raw, where)
    return values


def configure(base: Mapping[str, Any], settings: Mapping[str, Value]) -> RunConfig:
    """A checked configuration: defaults, then `settings` on top.

    Args:
        base: RunConfig fields that are no settings: model, device, data, ...
        settings: Parsed values by name.

    Raises:
        UserError: Settings that cannot be combined.
    """
    config = RunConfig(**base, options=defaults()).with_(settings)
    check(config)
    return config


def parse_config(plain: object, where: str) -> RunConfig:
    """Read a configuration that comes from elsewhere: a recording, a viewer, another process, a file.

    What it lacks (an older version has fewer options) is as by default. Whether it
    can run on a machine is not asked: `check` does that where the machine is known.

    Args:
        plain: What `RunConfig.as_dict` gave, as read.
        where: Named in errors.

    Raises:
        UserError: It is no such mapping, or has unknown keys or values that are not allowed. One line.
    """
    fields = dict(_mapping(plain, f"{where}: a run configuration"))
    options = _mapping(fields.pop("options", {}), f"{where}: options")
    architecture = fields.pop("architecture", None)
    foreign = _mapping(fields.pop("foreign", {}), f"{where}: foreign")
    if wrong := [excerpt(n) for n, value in foreign.items() if n not in all_options() or not _is_line(value)]:
        raise UserError(f"{where}: foreign.{wrong[0]} is not allowed")
    unknown = [excerpt(name) for name in fields if name not in _FIELDS]
    if unknown:
        raise UserError(f"{where}: run configuration has unknown keys: {excerpt(', '.join(sorted(unknown)))}")
    known = all_options()
    for name, raw in fields.items():
        if name in known:
            fields[name] = known[name].parse(raw, where)
        elif not _is_field(name, raw):
            raise UserError(f"{where}: {name}={excerpt(raw)} is not allowed")
    fields["architecture"] = None if architecture is None else _architecture(architecture, where)
    config = RunConfig(**fields, options=defaults()).with_(parse(options, where))
    return dataclasses.replace(config, foreign=foreign)


_FIELDS = frozenset(field.name for field in dataclasses.fields(RunConfig))


def _architecture(plain: object, where: str) -> Architecture:
    try:
        return Architecture.from_dict(_mapping(plain, "architecture"))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _mapping(plain: object, what: str) -> Mapping[str, Any]:
    if not isinstance(plain, Mapping):
        raise UserError(f"{what} is a mapping, not {excerpt(plain)}")
    return plain


def _is_field(name: str, raw: object) -> bool:
    """True if a RunConfig's field that is no setting can have this value."""
    if name == "pretrained":
        return isinstance(raw, bool)
    if name == "memory_limit_bytes":
        return isinstance(raw, int) and not isinstance(raw, bool) and 0 <= raw < 1 << 60
    if name == "data" and raw is None:
        return True
    return _is_line(raw) and (name != "trace" or raw in TRACES)


def _is_line(raw: object) -> bool:
    return isinstance(raw, str) and bool(raw) and raw.isprintable()


def check(config: RunConfig, environment: Environment | None = None) -> None:
    """Refuse what cannot be combined, and what a machine cannot run.

    Args:
        config: Its values are valid, each by itself.
        environment: Of the machine; None: it is not known yet.

    Raises:
        UserError: One line that names the settings and the reason.
    """
    for technique in registry().values():
        problem = technique.conflict(config)
        if problem:
            raise UserError(problem)
        value = config[technique.name]
        problem = technique.unavailable(value, environment) if environment else None
        if problem:
            raise UserError(f"{technique.name}={show(value)} cannot run here: {problem}")


def memory_key(config: RunConfig) -> str:
    """A key of all that decides a run's memory: two runs with equal keys hold the same on a device."""
    plain = config.as_dict()
    everything = plain | plain.pop("options")
    without = {"device", "trace"} | {option.name for option in all_options().values() if not option.affects_memory}
    return json.dumps({name: value for name, value in everything.items() if name not in without}, sort_keys=True)


def effect(old: RunConfig, new: RunConfig) -> Effect:
    """The effect of a configuration's change on the training, beside its memory."""
    same = (old.seq_len, old.learning_rate) == (new.seq_len, new.learning_rate)
    of_workload = Effect.NONE if same else Effect.TRAINING
    return max(of_workload, *(t.mathematics(old).effect(t.mathematics(new)) for t in registry().values()))


def unsound(config: RunConfig) -> list[str]:
    """Reasons why a run may not train at all, a line each; mostly there are none."""
    return [reason for technique in registry().values() if (reason := technique.mathematics(config).unsound)]


def cautions(config: RunConfig) -> list[str]:
    """Surprises in a configuration's memory, a line each."""
    return [line for technique in registry().values() if (line := technique.caution(config))]


def costs(settings: Mapping[str, Value]) -> list[str]:
    """The costs of changes in half a sentence each; without those that are nothing to speak of."""
    known = registry()
    words = (known[name].cost_of(value) for name, value in settings.items() if name in known)
    return [word for word in words if word]


def recognise(model: Any, optimizer: Any) -> dict[str, Value]:
    """The settings that a model and its optimizer show, by name, as found: no option need take them."""
    found: dict[str, Value] = {}
    for technique in registry().values():
        found |= technique.recognise(model, optimizer)
    return found


def changed(config: RunConfig) -> Iterable[tuple[str, Value]]:
    """The settings that differ from the defaults, for one-line descriptions."""
    for name, option in all_options().items():
        if config[name] != option.default:
            yield name, config[name]


def notable(config: RunConfig) -> Iterable[tuple[str, Value]]:
    """Those of `changed` that say what is trained and how: not how many rows and steps there are, nor the seed."""
    return ((name, value) for name, value in changed(config) if name not in ROUTINE)


def label(config: RunConfig) -> str:
    """A configuration in a few words, the same everywhere: `B8×S256 lora checkpointing=layers`.

    Rows and tokens of a batch, then every setting that is not the default. Rows of
    one token are as a rule no tokens: a watched script's images.
    """
    words = [f"B{config.batch_size}" + f"×S{config.seq_len}" * (config.seq_len > 1)]
    for name, value in notable(config):
        if name not in ("batch_size", "seq_len"):
            words.append(name if value is True else f"{name}={show(value)}")
    return " ".join(words)


def describe(config: RunConfig) -> str:
    """A run in one line: the model, batch and sequence, and what else differs from the defaults."""
    said = {name: config[name] for name in ("batch_size", "seq_len")} | dict(changed(config))
    if config.seq_len == 1 or not of_tokens(config):
        del said["seq_len"]
    return f"{config.model} {' '.join(f'{name}={show(value)}' for name, value in said.items())}"
