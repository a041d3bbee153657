"""Tags of allocations from their stacks: what the loop was doing, in whose code, and at times what for.

A snapshot has no hooks' tags. The frames of PyTorch's own functions say which
phase an allocation belongs to; the innermost frame outside of PyTorch says
where it was made. Of what they do not tell nothing is made up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..categories import Category
from ..events import Phase
from ..module_names import LOSS
from .entries import Frame

Stack = tuple[Frame, ...]


class Tag(NamedTuple):
    """A reading of an allocation's stack.

    Attributes:
        phase: None: the frames do not tell.
        module: Where it was made.
        category: Where the stack tells it for certain; None: its lifetime has to.
        owner: Of the block, where somebody said so; empty: nobody.
    """

    phase: Phase | None
    module: str
    category: Category | None = None
    owner: str = ""


def _called(*names: str, file: str = "") -> Callable[[Stack], bool]:
    """True if one of these functions, of a file whose name ends so or has it in its path, is on the stack."""
    wanted = frozenset(names)

    def found(stack: Stack) -> bool:
        return any((not wanted or frame.name in wanted) and file in frame.filename for frame in stack)

    return found


def _either(*rules: Callable[[Stack], bool]) -> Callable[[Stack], bool]:
    return lambda stack: any(rule(stack) for rule in rules)


def _within(*parts: str) -> Callable[[Stack], bool]:
    """True if a C++ function with such a part in its name is on the stack."""
    return lambda stack: any(part in frame.name for frame in stack for part in parts)


PHASES: tuple[tuple[Phase, Callable[[Stack], bool]], ...] = (
    (Phase.ZERO_GRAD, _called("zero_grad")),
    (Phase.OPTIMIZER, _either(_called(file="torch/optim/"), _called(file="bitsandbytes/optim/"),
                              _called("step", file="optim"))),
    (Phase.RECOMPUTE, _called("unpack_hook", "recompute_fn", "backward", file="torch/utils/checkpoint.py")),
    (Phase.BACKWARD, _either(_called("backward", "grad", "_engine_run_backward", file="torch/autograd/"),
                             _called("backward", file="torch/_tensor.py"), _within("torch::autograd::Engine"))),
    (Phase.LOAD, _either(_called("from_pretrained", "load_state_dict", "_load_pretrained_model", "_init_weights"),
                         _called("_apply", "to", "cuda", "half", "bfloat16", file="torch/nn/modules/module.py"),
                         _called("__init__", file="torch/nn/modules/"))),
    (Phase.FORWARD, _either(_called("_call_impl", "__call__", file="torch/nn/modules/module.py"),
                            _called(file="torch/nn/functional.py"))),
    (Phase.DATA, _either(_called(file="torch/utils/data/"), _called("_prepare_inputs", "send_to_device"))),
)  # fmt: skip
"""The first that fits: a module called again by checkpointing is a recompute before it is a forward."""

CATEGORIES: tuple[tuple[Category, Callable[[Stack], bool]], ...] = (
    (Category.WORKSPACE, _within("CUDABlas", "cublas", "getWorkspace")),
    (Category.KV_CACHE, _called(file="transformers/cache_utils.py")),
)

_AT_LOSS = _called("cross_entropy", "nll_loss", "ForCausalLMLoss", "fixed_cross_entropy", "loss_function")

SAID = {category.key: category for category in Category} | {
    # What torch.profiler's memory profile calls them.
    "parameter": Category.PARAMETERS,
    "gradient": Category.GRADIENTS,
    "activation": Category.ACTIVATIONS,
    "autograd_detail": Category.ACTIVATIONS,
    "temporary": Category.TEMPORARIES,
    "input": Category.INPUTS,
}

SAID_PHASES = {phase.title: phase for phase in Phase}


def tag(stack: Stack, said: Mapping[str, str]) -> Tag:
    """Read an allocation's stack and the texts beside it.

    Args:
        stack: Innermost frame first.
        said: As `user_metadata`, the category where there is one.
    """
    category = SAID.get(said.get("category", ""))
    if "module" in said or "owner" in said:  # one of our own exports
        return Tag(SAID_PHASES.get(said.get("phase", "")), said.get("module", ""), category, said.get("owner", ""))
    if category is None:
        category = next((found for found, rule in CATEGORIES if rule(stack)), None)
    phase = next((found for found, rule in PHASES if rule(stack)), None)
    module = LOSS if _AT_LOSS(stack) and phase in (Phase.FORWARD, Phase.BACKWARD) else place(stack)
    return Tag(phase, module, category)


def place(stack: Stack) -> str:
    """The innermost function outside of PyTorch, or the innermost of all."""
    if not stack:
        return ""
    own = next((frame for frame in stack if _is_outside(frame.filename)), stack[0])
    return f"{own.filename.rsplit('/', 1)[-1]}:{own.line} {own.name}"


def _is_outside(filename: str) -> bool:
    return filename.endswith(".py") and "/torch/" not in filename
