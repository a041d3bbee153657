"""CUDA's autocast on tensors that are a CPU's: other operators run in float32.

The lists are those of `aten/src/ATen/autocast_mode.h` (AT_FORALL_FP32 and
AT_FORALL_FP32_SET_OPT_DTYPE). What a CPU's autocast alone casts is left as it
is: cross entropy, so that its softmax stays in 16 bit and the loss alone is
in float32.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch

FLOAT32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "group_norm", "cosine_similarity", "nll_loss_nd", "l1_loss", "smooth_l1_loss", "kl_div", "dist", "cdist", "renorm",
    "logsumexp", "binary_cross_entropy_with_logits",
)  # fmt: skip
FLOAT32_BY_DTYPE = (
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "sum", "sum.dim_IntList",
    "linalg_vector_norm",
)  # fmt: skip

_OURS = {*FLOAT32, *FLOAT32_BY_DTYPE}
_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


def register(library: torch.library.Library) -> None:
    """Put kernels for these operators under the CPU's autocast."""
    for name in FLOAT32:
        _implement(library, name, _with_arguments_cast)
    for name in FLOAT32_BY_DTYPE:
        _implement(library, name, _with_dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced
        for name in _cast_by_a_cpu_alone():
            library.impl(name, torch.library.fallthrough_kernel, "AutocastCPU")


@cache
def _cast_by_a_cpu_alone() -> tuple[str, ...]:
    """Operators of aten that have a kernel under a CPU's autocast and none under CUDA's."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::")]
    return tuple(
        name.removeprefix("aten::")
        for name in sorted(names)
        if has(name, "AutocastCPU") and not has(name, "AutocastCUDA") and name.removeprefix("aten::") not in _OURS
    )


def _implement(library: torch.library.Library, name: str, how: Any) -> None:
    packet, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
    if operator is None or torch._C._dispatch_has_kernel_for_dispatch_key(operator.name(), "AutocastCPU"):
        return
    library.impl(name, how(operator), "AutocastCPU")


def _with_arguments_cast(operator: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            return operator(*map(_float, args), **{name: _float(value) for name, value in kwargs.items()})

    return call


def _with_dtype(operator: Any) -> Any:
    def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_KEYS):
            if tensor.is_floating_point() and tensor.dtype is not torch.float64 and kwargs.get("dtype") is None:
                given = {a.name for a, _ in zip(operator._schema.arguments[1:], args, strict=False)}
                if "dtype" in given:
                    return operator(tensor, *args, **kwargs)
                kwargs["dtype"] = torch.float32
            return operator(tensor, *args, **kwargs)

    return call


def _float(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype is not torch.float64:
        return value.float()
    return value
