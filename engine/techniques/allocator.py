"""The CUDA caching allocator's settings: growing segments, and rounding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..allocator_settings import AllocatorSettings, in_force, of_environment
from ..categories import Category
from ..config import Option, RunConfig, Value
from ..events import Environment
from ..technique import Group, Technique

if TYPE_CHECKING:
    from ..recipe import Recipe


def apply(config: RunConfig, recipe: Recipe) -> None:
    """Have the run go on under these; as by default, under those of the environment."""
    there = of_environment()
    recipe.allocator = AllocatorSettings(
        there.expandable or config.text("allocator") == "expandable-segments",
        config.integer("allocator.rounding") or there.divisions,
    )


def unavailable(value: Value, environment: Environment) -> str | None:
    """Only CUDA's has segments."""
    why = "a CPU has no caching allocator; where its memory is limited, a GPU's is modelled, set as by default"
    return why if value != "default" and not environment.on_gpu else None


def recognise(model: Any, _optimizer: Any) -> Mapping[str, Value]:
    """Settings in force where the model is."""
    if not any(parameter.is_cuda for parameter in model.parameters()):
        return {}
    now = in_force()
    return {"allocator": "expandable-segments" if now.expandable else "default", "allocator.rounding": now.divisions}


TECHNIQUE = Technique(
    name="allocator",
    title="allocator",
    group=Group.MEMORY_FOR_TIME,
    summary="expandable segments grow instead of leaving gaps: what is reserved comes close to what is allocated",
    formula="reserved bytes; what is allocated stays. Rounding to 1/n of a power of two: fewer sizes, more slack",
    source="https://docs.pytorch.org/docs/stable/notes/cuda.html#optimizing-memory-usage-with-pytorch-alloc-conf",
    order=5,
    options=(
        Option(
            "allocator",
            "default",
            "expandable-segments: as with PYTORCH_ALLOC_CONF=expandable_segments:True",
            ("default", "expandable-segments"),
        ),
        Option(
            "allocator.rounding",
            0,
            "round up to so many sizes between powers of two, roundup_power2_divisions; 0: to 512 bytes",
            (0, 2, 4, 8, 16),
        ),
    ),
    in_script={"expandable-segments": "PYTORCH_ALLOC_CONF=expandable_segments:True python train.py"},
    acts_on=(Category.SLACK,),
    variants=({"allocator": "expandable-segments"}, {"allocator": "expandable-segments", "allocator.rounding": 4}),
    apply=apply,
    saves=(),
    unavailable=unavailable,
    recognise=recognise,
)
