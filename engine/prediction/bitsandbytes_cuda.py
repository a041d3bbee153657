"""bitsandbytes as on a GPU: its own CUDA backend, run over fake tensors.

What the backend allocates is written in Python around calls into a compiled
library. So the backend's source is executed once more with a library whose
functions do nothing, and its functions stand in for the operators.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import UserError
from .gpus import Gpu
from .libraries_loading import libraries_loading

if TYPE_CHECKING:
    from .fake_cuda import FakeCuda

PACKAGE = "bitsandbytes"
BACKENDS = ("default", "cuda")  # the later one wins
KNOWN = ("0.50.",)
"""Versions whose backend is what is modelled here, by how they begin: its functions are taken by their names."""


def known() -> bool:
    """True if it is installed in a version that is modelled."""
    return importlib.util.find_spec(PACKAGE) is not None and metadata.version(PACKAGE).startswith(KNOWN)


def refuse_unknown() -> None:
    """Say of another version that it cannot be predicted.

    Raises:
        UserError: It is one.
    """
    if not known():
        version, modelled = metadata.version(PACKAGE), " and ".join(f"{start}x" for start in KNOWN)
        raise UserError(f"what bitsandbytes {version} allocates on a GPU cannot be predicted; that of {modelled} can")


@contextmanager
def cuda_backend(gpu: Gpu, tracker: FakeCuda) -> Iterator[None]:
    """Have bitsandbytes' operators and optimizers behave as on a GPU."""
    from bitsandbytes import functional

    with libraries_loading():
        table, namespaces = _functions()
    for namespace in namespaces:
        namespace["_gpu_dispatch_props"] = lambda _: (gpu.multiprocessors, *gpu.capability)
        if "_gemm_4bit_use_custom_cuda" in namespace:
            namespace["_gemm_4bit_use_custom_cuda"].cache_clear()
    kept_maps = dict(functional.name2qmap)
    with ExitStack() as undo:
        undo.callback(functional.name2qmap.update, kept_maps)
        undo.callback(functional.name2qmap.clear)
        functional.name2qmap.clear()
        for owner, name, value in _stand_ins():
            if name in vars(owner):
                undo.callback(setattr, owner, name, vars(owner)[name])
            else:
                undo.callback(delattr, owner, name)
            setattr(owner, name, value)
        tracker.libraries[PACKAGE] = table
        undo.callback(tracker.libraries.clear)
        yield


def _stand_ins() -> list[tuple[Any, str, Any]]:
    """Attributes of bitsandbytes and of torch that ask for a GPU: owner, name, and what stands in."""
    import bitsandbytes
    from bitsandbytes import functional
    from bitsandbytes.optim.optimizer import Optimizer8bit
    from torch._subclasses.fake_tensor import FakeTensor

    return [
        (bitsandbytes, "matmul", _matmul),
        (Optimizer8bit, "get_state_buffer", _state_buffer),
        (Optimizer8bit, "prefetch_state", lambda *_: None),
        (functional, "get_paged", _get_paged),
        (functional, "is_on_gpu", lambda _: True),
        (FakeTensor, "data_ptr", lambda _: 0),
        (torch.Tensor, "_make_subclass", staticmethod(_make_subclass)),
    ]


def _matmul(A: Any, B: Any, out: Any = None, state: Any = None, threshold: float = 0.0, bias: Any = None) -> Any:  # noqa: N803
    """The 8-bit product on a GPU, where one on a CPU takes another way."""
    from bitsandbytes.autograd._functions import MatMul8bitLt, MatmulLtState

    state = state or MatmulLtState()
    state.threshold = threshold or state.threshold
    return MatMul8bitLt.apply(A, B, out, bias, state)


def _state_buffer(self: Any, p: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The optimizer's state of a parameter; from 100,000 elements on in managed memory, if it is paged."""
    if not self.is_paged or p.numel() < 1e5:
        return torch.zeros_like(p, dtype=dtype, device=p.device)
    buffer = _get_paged(*p.shape, dtype=dtype, device=p.device)
    self.page_mng.paged_tensors.append(buffer)
    return buffer


def _get_paged(*shape: int, dtype: torch.dtype = torch.float32, device: Any = None) -> Any:
    """Managed memory: no caching allocator counts it."""
    buffer: Any = torch.empty(shape, dtype=dtype, device="cpu")
    buffer.is_paged, buffer.page_deviceid = True, 0
    return buffer


_original_make_subclass = torch.Tensor._make_subclass


def _make_subclass(cls: Any, data: Any, requires_grad: bool = False, **kwargs: Any) -> Any:
    """Parameters of bitsandbytes' own classes, of fake tensors too."""
    from torch._subclasses.fake_tensor import FakeTensor

    if not isinstance(data, FakeTensor) or issubclass(cls, FakeTensor):
        return _original_make_subclass(cls, data, requires_grad, **kwargs)
    tensor: Any = data.detach().requires_grad_(requires_grad)
    tensor.__class__ = _fake_class(cls)
    tensor._is_param = True
    return tensor


@cache
def _fake_class(cls: Any) -> Any:
    from torch._subclasses.fake_tensor import FakeTensor

    def detach(self: Any) -> Any:
        """One of its class, as a Parameter has to have it."""
        tensor = FakeTensor.detach(self)
        tensor.__class__ = type(self)
        return tensor

    def deepcopy(self: Any, memo: dict[int, Any]) -> Any:
        """A copy with what it was quantized with, as DoRA makes of a layer."""
        made = _make_subclass(cls, FakeTensor.detach(self).clone(), self.requires_grad)
        for name, value in vars(self).items():
            if name not in vars(made):
                setattr(made, name, copy.deepcopy(value, memo))
        memo[id(self)] = made
        return made

    return type(cls)(cls.__name__, (FakeTensor, cls), {"detach": detach, "__deepcopy__": deepcopy})


class _Mute:
    """A compiled library none of whose functions does anything."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        function = _Function()
        setattr(self, name, function)
        return function


class _Function:
    """Takes the types it is declared with, and says that all went well."""

    argtypes: Any = None
    restype: Any = None

    def __call__(self, *_args: Any) -> int:
        return 0


@cache
def _functions() -> tuple[dict[str, Callable[..., Any]], list[dict[str, Any]]]:
    """The backends' functions by operator, and the modules they live in."""
    from bitsandbytes import _ops, cextension

    found: dict[str, Callable[..., Any]] = {}

    def register(name: str, _device: str) -> Any:
        def take(function: Any) -> Any:
            found[name.removesuffix(".default")] = function
            return function

        return take

    folder = Path(_ops.__file__).parent / "backends"
    namespaces: list[dict[str, Any]] = []
    register_kernel, library = _ops.register_kernel, getattr(cextension, "lib", None)
    core: Any = torch._C
    raw_stream = getattr(core, "_cuda_getCurrentRawStream", None)
    _ops.register_kernel, cextension.lib = register, _Mute()
    core._cuda_getCurrentRawStream = lambda _: 0
    try:
        for backend in BACKENDS:
            name = f"bitsandbytes.backends.{backend}.ops"
            namespace: dict[str, Any] = {"__name__": name, "__package__": f"bitsandbytes.backends.{backend}"}
            source = folder / backend / "ops.py"
            exec(compile(source.read_text(encoding="utf-8"), str(source), "exec"), namespace)
            namespace["_cuda_device_of"] = lambda _: nullcontext()
            namespace["CUBLAS_Context"] = _Context
            namespaces.append(namespace)
    finally:
        _ops.register_kernel, cextension.lib = register_kernel, library
        if raw_stream is None:
            del core._cuda_getCurrentRawStream
        else:
            core._cuda_getCurrentRawStream = raw_stream
    return found, namespaces


class _Context:
    """Stands in for bitsandbytes' handle of cuBLAS."""

    @classmethod
    def get_instance(cls) -> _Context:
        return cls()

    def get_context(self, _device: Any) -> int:
        return 0
