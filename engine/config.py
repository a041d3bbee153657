"""`RunConfig`: the single description of a run that every room agrees on.

Loads neither torch nor textual, so that the app can show and change a
configuration before the engine has imported anything heavy.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Self

from .tasks import AUTO, TASKS

Value = bool | int | float | str
"""One option's value. Lists (LoRA targets) are comma-separated strings."""


class UserError(Exception):
    """Something the user can put right. The message is one complete line, whatever it quotes."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message, 2000))


def one_line(error: BaseException) -> str:
    """An exception from another library as one line."""
    try:
        said = str(error)
    except Exception:  # an error of somebody else's need not be printable
        said = ""
    return printable(said) or type(error).__name__


def kind_and_line(error: BaseException) -> str:
    """An exception of somebody's code as one line that begins with its class, which is said once."""
    kind, said = type(error).__name__, one_line(error)
    return kind if said == kind else f"{kind}: {said}"


def printable(text: str, longest: int = 300) -> str:
    """Text from elsewhere as one line that moves no cursor and is not too long."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
    return text if len(text) <= longest else text[: longest - 3] + "..."


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", least: float = 0.6) -> str:
    """A question about the known name that is nearest to one that is not known.

    Args:
        name: As typed.
        known: What it may be.
        otherwise: Said where nothing is near.
        least: The likeness from which on a name is near, of 1.
    """
    close = difflib.get_close_matches(name, list(known), 1, least)
    return f"did you mean {close[0]}?" if close else otherwise


MEMORY_LIMIT_VARIABLE = "GPUMEM_MEMORY_LIMIT"
"""The environment variable with the memory limit of scripts that are watched."""


def parse_bytes(typed: str, where: str) -> int:
    """A size as typed: `24GiB`, `900 MiB`, `24GB`.

    Raises:
        UserError: It is none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B\s*", typed, re.IGNORECASE)
    if match is None:
        raise UserError(f"{where} {typed}: takes a size such as 24GiB or 900MiB")
    prefix = (match[2] or "").upper()
    base = 1024 if prefix.endswith("I") else 1000
    return int(float(match[1]) * base ** " KMGT".index(prefix[:1] or " "))


@dataclass(frozen=True, slots=True)
class Option:
    """One setting of a technique, with everything needed to check and show it.

    Attributes:
        name: What `--set` calls it: `lora`, `lora.r`. The first option of a
            technique carries the technique's own name and is its switch.
        default: Used when nothing is set. Its type is the option's type.
        summary: What it does, in half a sentence.
        choices: The values the app offers, in the order a key steps through.
        open_ended: Whether values outside `choices` are accepted as well.
        minimum: Smallest number accepted (inclusive), for numeric options.
        maximum: Largest number accepted (inclusive), for numeric options.
        affects_memory: Whether two runs that differ in it alone may hold
            different amounts on the device.
    """

    name: str
    default: Value
    summary: str
    choices: tuple[Value, ...] = ()
    open_ended: bool = False
    minimum: float | None = None
    maximum: float | None = None
    affects_memory: bool = True

    def parse(self, raw: object, where: str) -> Value:
        """Check a value, whether typed on the command line or read from a file.

        Args:
            raw: A string as typed, or a value already of the right type.
            where: Named in the error: `--set`, or a file.

        Raises:
            UserError: The value is of the wrong type or not allowed.
        """
        value = self._convert(raw)
        if value is None or not self.admits(value):
            raise UserError(f"{where}: {self.name}={excerpt(raw)} is not allowed; {self.name} takes {self.allowed}")
        return value

    @property
    def allowed(self) -> str:
        """The values accepted, for people."""
        if self.choices and not self.open_ended:
            return ", ".join(show(c) for c in self.choices)
        if isinstance(self.default, bool):
            return "on, off"
        if isinstance(self.default, str):
            return "one of " + ", ".join(map(show, self.choices)) + ", or your own" if self.choices else "text"
        kind = "a whole number" if isinstance(self.default, int) else "a number"
        low = "" if self.minimum is None else f" from {_digits(self.minimum)}"
        high = "" if self.maximum is None else f" to {_digits(self.maximum)}"
        return kind + low + high

    def _convert(self, raw: object) -> Value | None:
        if isinstance(self.default, bool):
            if isinstance(raw, bool):
                return raw
            return {"on": True, "true": True, "1": True, "yes": True, "off": False, "false": False,
                    "0": False, "no": False}.get(excerpt(raw).strip().lower())  # fmt: skip
        if isinstance(self.default, str):
            # TOML and the shell both let people write off/on for a switch with several values.
            if isinstance(raw, bool):
                raw = "on" if raw else "off"
            if isinstance(raw, list | tuple) and all(isinstance(item, str) for item in raw):
                raw = ",".join(raw)
            return raw.strip() if isinstance(raw, str) else None
        if isinstance(raw, bool) or not isinstance(raw, int | float | str):
            return None
        try:
            number = float(raw)
        except (ValueError, OverflowError):
            return None
        if not math.isfinite(number):
            return None
        if isinstance(self.default, int):
            return _whole(raw, number)
        return number

    def admits(self, value: Value) -> bool:
        """True if a value of the option's type is allowed."""
        if isinstance(value, bool):
            return True
        if isinstance(value, str):
            known = self.open_ended or not self.choices or value in self.choices
            return value == self.default or (bool(value) and value.isprintable() and known)
        if self.choices and not self.open_ended:
            return value in self.choices
        above = self.minimum is None or value >= self.minimum
        return above and (self.maximum is None or value <= self.maximum)


def _digits(limit: float) -> str:
    """A limit for people: a whole number with all of its digits."""
    return str(limit) if isinstance(limit, int) else f"{limit:.12g}"


def _whole(raw: float | str, number: float) -> int | None:
    """A whole number, exact where a float no longer is (`--seed 9007199254740993`); `1e3` is one as well."""
    if not number.is_integer():
        return None
    try:
        return int(raw)
    except ValueError:
        return int(number)


def excerpt(raw: object) -> str:
    """A value that is not allowed, as the line about it shows it."""
    if isinstance(raw, int) and raw.bit_length() > 200:  # Python writes no integer of more than 4,300 digits
        return f"(a number of {raw.bit_length()} bits)"
    return printable(str(raw), 60) if isinstance(raw, bool | int | float | str) else f"({type(raw).__name__})"


def show(value: Value) -> str:
    """A value as `--set` would take it back."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


WORKLOAD_OPTIONS: tuple[Option, ...] = (
    Option("batch_size", 8, "rows in one micro-batch", (1, 2, 4, 8, 16, 32, 64), True, 1, 65536),
    Option("seq_len", 256, "tokens in one row", (64, 128, 256, 512, 1024, 2048, 4096), True, 1, 1 << 20),
    Option("task", AUTO, "what the model is for; auto: what its architectures say", (AUTO, *TASKS)),
    Option("image_size", 0, "pixels of an image's side, 0: as the model was made for", (), False, 0, 16384),
    Option("target_len", 0, "tokens in one row of what a decoder is to say, 0: as seq_len", (), False, 0, 1 << 20),
    Option("workload", "train", "what is done with the model", ("train", "generate")),
    Option("new_tokens", 128, "tokens generated after each row, for workload=generate", (), False, 1, 1 << 20),
    Option("rows", 64, "rows in the data set before it repeats", (), False, 1, 1 << 30, affects_memory=False),
    Option(
        "steps",
        0,
        "optimizer steps, for workload=generate tokens; 0: until stopped",
        (),
        False,
        0,
        1 << 40,
        affects_memory=False,
    ),
    Option("learning_rate", 1e-3, "the optimizer's learning rate", (), False, 0.0, affects_memory=False),
    Option("seed", 0, "seed of the weights and of the token ids", (), False, 0, (1 << 63) - 1, affects_memory=False),
)
"""The settings of the workload itself: same shape as a technique's options."""

TRACES = ("auto", "every")
"""The steps traced: as many as the governor's time budget allows, or each."""


DTYPES = ("float32", "float16", "bfloat16")
"""Those that a model's weights are published in."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model's architecture, enough to build it with random weights. Immutable: copies go in and out.

    Args:
        config: The fields of its config.json, `model_type` among them. Plain
            values, lists and tables; private fields (`_name_or_path`), code
            (`auto_map`) and kernels (`attn_implementation`) are no architecture.
        dtype: In which its weights are published: one of DTYPES.
        lora_targets: The modules LoRA adapts by default, without their path; empty: PEFT's own.
        tokenizer: Hub id of its tokenizer; "": none is known.

    Raises:
        UserError: It is no such thing.
    """

    config: Mapping[str, Any]
    dtype: str
    lora_targets: tuple[str, ...] = ()
    tokenizer: str = ""

    def __post_init__(self) -> None:
        wrong = next((name for name, fits in self._fits().items() if not fits), None)
        if wrong:
            raise UserError(f"architecture.{wrong}={excerpt(getattr(self, wrong))} is not allowed")
        object.__setattr__(self, "config", MappingProxyType(copy.deepcopy(dict(self.config))))
        object.__setattr__(self, "lora_targets", tuple(self.lora_targets))

    def _fits(self) -> dict[str, bool]:
        return {
            "config": isinstance(self.config, Mapping)
            and isinstance(self.config.get("model_type"), str)
            and all(map(_describes_a_model, self.config))
            and _is_plain(dict(self.config)),
            "dtype": self.dtype in DTYPES,
            "lora_targets": isinstance(self.lora_targets, list | tuple) and all(map(_is_line, self.lora_targets)),
            "tokenizer": self.tokenizer == "" or _is_line(self.tokenizer),
        }

    def fields(self) -> dict[str, Any]:
        """A copy of `config`: transformers completes the tables in it in place."""
        return copy.deepcopy(dict(self.config))

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON."""
        return {
            "config": self.fields(),
            "dtype": self.dtype,
            "lora_targets": list(self.lora_targets),
            "tokenizer": self.tokenizer,
        }

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """The inverse of `as_dict`.

        Raises:
            UserError: It is no such thing.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := [excerpt(name) for name in plain if name not in names]:
            raise UserError(f"architecture has unknown keys: {excerpt(', '.join(unknown))}")
        if missing := [name for name in ("config", "dtype") if name not in plain]:
            raise UserError(f"architecture.{missing[0]} is missing")
        return cls(**plain)


def _is_line(value: object) -> bool:
    return isinstance(value, str) and bool(value) and value.isprintable()


def _describes_a_model(key: object) -> bool:
    return _is_line(key) and not str(key).startswith("_") and key not in ("auto_map", "attn_implementation")


def _is_plain(value: object, deepest: int = 32) -> bool:
    if isinstance(value, dict | list):
        below = value.values() if isinstance(value, dict) else value
        names = value if isinstance(value, dict) else ()
        return deepest > 0 and all(isinstance(n, str) for n in names) and all(_is_plain(v, deepest - 1) for v in below)
    return value is None or isinstance(value, bool | int | float | str)


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Everything that decides what a run does. Frozen; change it with `with_`.

    Values are checked where they enter: what is typed by
    `engine.techniques.configure`, what is read by `engine.techniques.parse_config`.
    A RunConfig in hand is a valid one.

    Attributes:
        model: Name of the model, or a hub id or folder if `pretrained`.
        pretrained: Load real weights with `from_pretrained` instead of
            building `architecture` with random ones.
        device: `auto`, `cpu`, `cuda` or `cuda:<i>`.
        data: Text or JSONL file to train on; None: random token ids.
        task: What the model is for: one of `tasks.TASKS`, or `auto`.
        image_size: Pixels of an image's side; 0: as the model was made for.
        target_len: Tokens per row of what an encoder-decoder is to say; 0: as `seq_len`.
        workload: `train`, or `generate`: a row is a prompt, and a step one more token after each.
        new_tokens: Generated after each row.
        batch_size: Rows per micro-batch.
        seq_len: Tokens per row.
        rows: Rows in the data set; it repeats.
        steps: Optimizer steps, or tokens generated; 0 runs until stopped.
        learning_rate: The optimizer's learning rate.
        seed: Seeds weights and token ids.
        trace: Which steps are traced: one of TRACES.
        architecture: Of the model; never of one that is `pretrained`: its own is
            read where its weights are. None otherwise: it is not known
            (somebody's own model, a recording of an older version), and the
            model cannot be built.
        options: Value of every technique option, by name.
        memory_limit_bytes: Have the device behave as one with so much memory; 0: it is as it is.
        foreign: Settings of a watched script that no value of their option says, by the option's name:
            `{"optimizer": "Adam"}`. The option itself is as by default.
    """

    model: str = "tiny"
    pretrained: bool = False
    device: str = "auto"
    data: str | None = None
    task: str = AUTO
    image_size: int = 0
    target_len: int = 0
    workload: str = "train"
    new_tokens: int = 128
    batch_size: int = 8
    seq_len: int = 256
    rows: int = 64
    steps: int = 0
    learning_rate: float = 1e-3
    seed: int = 0
    trace: str = "auto"
    architecture: Architecture | None = None
    options: Mapping[str, Value] = field(default_factory=dict)
    memory_limit_bytes: int = 0
    foreign: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        object.__setattr__(self, "foreign", MappingProxyType(dict(self.foreign)))
        if self.pretrained:
            object.__setattr__(self, "architecture", None)

    def __getitem__(self, name: str) -> Value:
        """Value of a technique option or workload setting by name."""
        if name in self.options:
            return self.options[name]
        if name in _WORKLOAD_NAMES:
            value: Value = getattr(self, name)
            return value
        raise KeyError(name)

    def shown(self, name: str) -> str:
        """A setting's value for people."""
        return self.foreign.get(name) or show(self[name])

    def text(self, name: str) -> str:
        """A text option's value."""
        return str(self[name])

    def integer(self, name: str) -> int:
        """A whole-number option's value."""
        return int(self[name])

    def number(self, name: str) -> float:
        """A numeric option's value."""
        return float(self[name])

    def flag(self, name: str) -> bool:
        """An on/off option's value."""
        return bool(self[name])

    @property
    def unknown_architecture(self) -> str:
        """The reason why the model can be built nowhere but where it is: its architecture is not known; "": it is."""
        if self.pretrained or self.architecture is not None:
            return ""
        return f"{self.model} is no transformers model whose architecture is known here"

    @property
    def generates(self) -> bool:
        """True if the model is used and not trained."""
        return self.workload == "generate"

    @property
    def row_tokens(self) -> int:
        """Tokens in a row at its longest, with those that are generated."""
        return self.seq_len + self.new_tokens * self.generates

    def with_(self, changes: Mapping[str, Value]) -> Self:
        """A copy with some workload settings or technique options changed.

        Values are taken as they are: check them first (`configure`).

        Raises:
            KeyError: A name is neither.
        """
        fields: dict[str, Any] = {}
        options = dict(self.options)
        for name, value in changes.items():
            if name in _WORKLOAD_NAMES:
                fields[name] = value
            elif name in options:
                options[name] = value
            else:
                raise KeyError(name)
        foreign = {name: value for name, value in self.foreign.items() if name not in changes}
        return dataclasses.replace(self, options=options, foreign=foreign, **fields)

    def as_dict(self) -> dict[str, Any]:
        """Plain containers, ready for JSON; `engine.techniques.parse_config` reads them back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        architecture = self.architecture.as_dict() if self.architecture is not None else None
        return fields | {"architecture": architecture, "options": dict(self.options), "foreign": dict(self.foreign)}


_WORKLOAD_NAMES = frozenset(option.name for option in WORKLOAD_OPTIONS)
