"""The tasks of transformers models: an Auto class each, and the rows that it is trained on.

Loads no torch. Adding a task is adding an entry to TASKS.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .config import RunConfig

AUTO = "auto"
"""The task that a model's `architectures` name, or else the first one that its type has a model for."""

IMAGE_SIZE = 224
"""Pixels of a side, where neither the settings nor the model say."""

BOXES = 8
"""Objects in each image of a detector's data set."""


class Row(NamedTuple):
    """One tensor of a row.

    Attributes:
        shape: Without the batch.
        low: Smallest whole number in it.
        high: One more than the largest; 0: it holds real numbers.
    """

    shape: tuple[int, ...]
    low: int = 0
    high: int = 0

    @property
    def elements(self) -> int:
        """Count of its numbers."""
        return math.prod(self.shape)


Rows = dict[str, Row]


@dataclass(frozen=True, slots=True)
class Task:
    """A task.

    Attributes:
        name: What `--task` calls it.
        auto_class: transformers' class that finds the model.
        rows: What a model of an architecture is given, in the order of its arguments.
        adapters: PEFT's task type; "": none, adapters are put in without one.
        scored: The tensor each of whose tokens has scores over the vocabulary; "": none has.
        tokens: The tensor whose elements count as tokens; "": rows are no tokens.
        packages: Modules that transformers' loss needs besides.
        extra: Of this project, that brings them.
    """

    name: str
    auto_class: str
    rows: Callable[[RunConfig, Any], Rows]
    adapters: str = ""
    scored: str = ""
    tokens: str = ""
    packages: tuple[str, ...] = ()
    extra: str = ""


def task_of(name: str, architectures: Iterable[str], has_model: Callable[[Task], bool]) -> Task | None:
    """The task of a model.

    Args:
        name: As set; AUTO: it is told from the rest.
        architectures: Names of the classes that the model's configuration says it was trained as.
        has_model: Whether there is a model of the configuration's type for a task.

    Returns:
        The task; None if there is no model for it, or for any.
    """
    if name != AUTO:
        return TASKS[name] if has_model(TASKS[name]) else None
    return next((task for task in (*_said(architectures), *TASKS.values()) if has_model(task)), None)


def of_tokens(config: RunConfig) -> bool:
    """True if the rows of a run are tokens, as far as is known without transformers; otherwise it has no sequence."""
    architectures = config.architecture.config.get("architectures") if config.architecture is not None else None
    tasks = [TASKS[config.task]] if config.task != AUTO else _said(architectures or ())
    return not tasks or bool(tasks[0].tokens)


def _said(architectures: Iterable[str]) -> list[Task]:
    """The tasks that the names of a model's classes say."""
    return [task for task in TASKS.values() if any(_is_for(task, each) for each in architectures)]


def named(class_name: str) -> bool:
    """True if the name of a class says that it does a task."""
    return any(_is_for(task, class_name) for task in TASKS.values())


def _is_for(task: Task, architecture: str) -> bool:
    """True if a class's name says so: `BertForMaskedLM`."""
    kind = task.auto_class.removeprefix("AutoModel")
    return architecture.endswith((kind, *_OTHER_ENDS.get(task.name, ())))


def _text(config: RunConfig, architecture: Any, length: int = 0) -> Row:
    """Token ids as the reference experiment draws them: 100 to 29,999, where there are so many."""
    vocabulary = int(getattr(architecture.get_text_config(), "vocab_size", 0) or 0)
    return Row((length or config.seq_len,), min(100, vocabulary // 2), min(30_000, vocabulary))


def _targets(config: RunConfig, architecture: Any) -> Row:
    return _text(config, architecture, config.target_len or config.seq_len)


def _classes(architecture: Any, *shape: int) -> Row:
    return Row(shape, 0, max(1, int(architecture.num_labels)))


def _image(config: RunConfig, architecture: Any) -> Row:
    size = config.image_size or getattr(architecture, "image_size", None) or IMAGE_SIZE
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return Row((int(getattr(architecture, "num_channels", 3)), int(height), int(width)))


def _sound(architecture: Any) -> Row:
    """Whisper's log-mel spectrogram: two frames for each of the encoder's positions."""
    return Row((int(architecture.num_mel_bins), 2 * int(architecture.max_source_positions)))


def _detected(config: RunConfig, architecture: Any) -> Rows:
    image = {"pixel_values": _image(config, architecture)}
    return image | {"class_labels": _classes(architecture, BOXES), "boxes": Row((BOXES, 4))}


def _answered(config: RunConfig, architecture: Any) -> Rows:
    place = Row((), 0, config.seq_len)
    return {"input_ids": _text(config, architecture), "start_positions": place, "end_positions": place}


_ALL = (
    Task(
        "causal-lm",
        "AutoModelForCausalLM",
        lambda c, a: {"input_ids": _text(c, a), "labels": _text(c, a)},
        "CAUSAL_LM",
        "labels",
        "input_ids",
    ),
    Task(
        "seq2seq-lm",
        "AutoModelForSeq2SeqLM",
        lambda c, a: {"input_ids": _text(c, a), "labels": _targets(c, a)},
        "SEQ_2_SEQ_LM",
        "labels",
        "input_ids",
    ),
    Task(
        "masked-lm",
        "AutoModelForMaskedLM",
        lambda c, a: {"input_ids": _text(c, a), "labels": _text(c, a)},
        scored="labels",
        tokens="input_ids",
    ),
    Task(
        "sequence-classification",
        "AutoModelForSequenceClassification",
        lambda c, a: {"input_ids": _text(c, a), "labels": _classes(a)},
        "SEQ_CLS",
        tokens="input_ids",
    ),
    Task(
        "token-classification",
        "AutoModelForTokenClassification",
        lambda c, a: {"input_ids": _text(c, a), "labels": _classes(a, c.seq_len)},
        "TOKEN_CLS",
        tokens="input_ids",
    ),
    Task("question-answering", "AutoModelForQuestionAnswering", _answered, "QUESTION_ANS", tokens="input_ids"),
    Task(
        "image-classification",
        "AutoModelForImageClassification",
        lambda c, a: {"pixel_values": _image(c, a), "labels": _classes(a)},
    ),
    Task("object-detection", "AutoModelForObjectDetection", _detected, packages=("scipy", "PIL"), extra="detection"),
    Task(
        "semantic-segmentation",
        "AutoModelForSemanticSegmentation",
        lambda c, a: {"pixel_values": _image(c, a), "labels": _classes(a, *_image(c, a).shape[1:])},
    ),
    Task(
        "speech-seq2seq",
        "AutoModelForSpeechSeq2Seq",
        lambda c, a: {"input_features": _sound(a), "labels": _targets(c, a)},
        scored="labels",
        tokens="labels",
    ),
)

TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _ALL})
"""Every task by name."""

_OTHER_ENDS = {
    "causal-lm": ("LMHeadModel",),
    "seq2seq-lm": ("ForConditionalGeneration",),
    "speech-seq2seq": ("ForConditionalGeneration",),
}
"""Other endings of the names of classes that do a task."""
