"""The categories of bytes, each with all that is shown of it: its letter, its words, its colours, its columns.

Loads neither torch nor textual.
"""

from __future__ import annotations

import enum
from typing import NamedTuple


class Category(enum.IntEnum):
    """The use of a byte. The order is the order of the stacked bars."""

    PARAMETERS = 0
    BUFFERS = 1
    GRADIENTS = 2
    OPTIMIZER_STATE = 3
    GATHERED = 4
    ACTIVATIONS = 5
    RECOMPUTED = 6
    KV_CACHE = 7
    LOGITS_LOSS = 8
    INPUTS = 9
    TEMPORARIES = 10
    COMMUNICATION = 11
    WORKSPACE = 12
    HELD_BY_SCRIPT = 13
    SLACK = 14
    UNKNOWN = 15

    @property
    def info(self) -> CategoryInfo:
        """Letter, name and definition, the same everywhere."""
        return CATEGORIES[self]

    @property
    def key(self) -> str:
        """The name in JSON and CSV: `optimizer_state`."""
        return self.name.lower()


class CategoryInfo(NamedTuple):
    """A category as it is shown.

    The colours were searched for so that neighbours stay apart for readers with protanopia and
    deuteranopia too, and legible on every background (tests/test_themes.py).

    Attributes:
        letter: Of its own.
        title: For people.
        meaning: What it is, in a sentence.
        dark: Colour on a dark background, in the terminal and on a page.
        light: On a light one.
        ansi: Name of one of the terminal's own sixteen.
        texture: Fills its area between its letters: told apart without colours, and a byte a cell.
        column: Of the table of layers; empty: in none.
        legend: Its entry in PyTorch's memory viewer, which has ten colours: one of its own, or shared.
        note: Beyond the meaning, for the help: what it follows, and what lowers it.
    """

    letter: str
    title: str
    meaning: str
    dark: str
    light: str
    ansi: str
    texture: str
    column: str = "other"
    legend: str = "workspace and others"
    note: str = ""


CATEGORIES: dict[Category, CategoryInfo] = {
    Category.PARAMETERS: CategoryInfo(
        "P", "parameters", "The model's weights, quantized ones with their scales.",
        "#7199fe", "#3e4ffe", "blue", " ",
        column="par", legend="parameters, buffers",
        note="Quantization shrinks them where LoRA has frozen them.",
    ),
    Category.BUFFERS: CategoryInfo(
        "B", "buffers", "Tensors registered with the model that are not trained.",
        "#bbe8fb", "#416698", "bright_blue", ".",
        column="par", legend="parameters, buffers",
    ),
    Category.GRADIENTS: CategoryInfo(
        "G", "gradients", "The .grad of trainable parameters.",
        "#fec965", "#9e5712", "yellow", "/",
        column="grad", legend="gradients",
        note="As large as the trainable parameters; LoRA has next to none.",
    ),
    Category.OPTIMIZER_STATE: CategoryInfo(
        "O", "optimizer", "The optimizer's own tensors: AdamW's two moments.",
        "#cdc4fe", "#7306ad", "magenta", "-",
        column="opt", legend="optimizer state",
        note="Twice the trainable parameters; 8-bit or LoRA shrink it.",
    ),
    Category.GATHERED: CategoryInfo(
        "U", "gathered", "Parameters of all ranks, unsharded while their layer computes.",
        "#ffff33", "#593e49", "bright_black", "%",
        column="par", legend="parameters, buffers",
        note="A layer's at a time under FSDP and ZeRO-3; without resharding all layers'.",
    ),
    Category.ACTIVATIONS: CategoryInfo(
        "A", "activations", "Made in forward and kept until backward has used them.",
        "#bffee6", "#0d7677", "green", "\\",
        column="act", legend="activations",
        note="They grow with batch and sequence; checkpointing keeps only each layer's input.",
    ),
    Category.RECOMPUTED: CategoryInfo(
        "R", "recomputed", "Activations made again in backward by checkpointing.",
        "#a3951d", "#734d0c", "bright_yellow", "x",
        column="act", legend="recomputed",
        note="One segment's at a time: the price of checkpointing, beside the time.",
    ),
    Category.KV_CACHE: CategoryInfo(
        "K", "KV cache", "Keys and values kept for generation; useless in training.",
        "#3d9bd4", "#073c60", "cyan", "|",
        legend="KV cache",
        note="Switch it off; c.",
    ),
    Category.LOGITS_LOSS: CategoryInfo(
        "L", "logits, loss", "Scores over the vocabulary, the loss, their gradients.",
        "#ec968d", "#200000", "red", "=",
        legend="logits, loss",
        note="Batch x sequence x vocabulary; the loss holds it several times for a moment.",
    ),
    Category.INPUTS: CategoryInfo(
        "I", "inputs", "Token ids and labels of the batch.",
        "#aaf2b3", "#130099", "bright_green", ":",
    ),
    Category.TEMPORARIES: CategoryInfo(
        "T", "temporaries", "Made and freed within one phase.",
        "#ec60c7", "#50073d", "bright_magenta", "+",
        column="tmp", legend="temporaries",
        note="AdamW's foreach holds a copy of all gradients for a moment; fused AdamW does not.",
    ),
    Category.COMMUNICATION: CategoryInfo(
        "C", "communication", "Buckets and buffers that ranks send and reduce.",
        "#d4ff8c", "#2b2bd9", "bright_white", "^",
        note="DDP's buckets are one more copy of the gradients, but for gradient_as_bucket_view.",
    ),
    Category.WORKSPACE: CategoryInfo(
        "W", "workspace", "Kept by cuBLAS and other libraries.",
        "#d6c5a1", "#553f01", "bright_cyan", "'",
    ),
    Category.HELD_BY_SCRIPT: CategoryInfo(
        "H", "held by script", "Variables of a watched script: of no model.",
        "#9cbc00", "#000079", "white", "*",
    ),
    Category.SLACK: CategoryInfo(
        "s", "slack", "Rounding: what the allocator hands out beyond what was asked.",
        "#989292", "#1e191b", "black", "~",
        column="",
    ),
    Category.UNKNOWN: CategoryInfo(
        "?", "unknown", "What no rule could name. The goal is 0 bytes.",
        "#fa5cf8", "#ca1779", "bright_red", "?",
        legend="unknown",
    ),
}  # fmt: skip

N_CATEGORIES = len(Category)
