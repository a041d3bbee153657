"""The weights of a model that a run stores quantized: those that transformers and bitsandbytes convert."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def quantizable_modules(config: Mapping[str, Any]) -> frozenset[str] | None:
    """Names of the linear layers that are converted: all but the output layer and what is tied to the embedding.

    Args:
        config: Content of a config.json.

    Returns:
        Paths of modules; None if transformers does not know the architecture.
    """
    if "model_type" not in config:
        return None
    from ..prediction.libraries_loading import libraries_loading

    with libraries_loading():
        import transformers
        from transformers import AutoConfig

        from ..library_logs import quiet_libraries
        from ..model_shell import shell_of
        from ..quantized_modules import convertible_modules

        quiet_libraries()
        try:
            architecture = AutoConfig.for_model(**config)
            named = getattr(transformers, (config.get("architectures") or [""])[0], None)
            return convertible_modules(shell_of(architecture) if named is None else _shell(named, architecture))
        except Exception:  # whatever a configuration that nobody here wrote makes a model's constructor raise
            return None


def _shell(model_class: Any, architecture: Any) -> Any:
    import torch

    with torch.device("meta"):
        return model_class(architecture)


def among(modules: Collection[str] | None, names: Sequence[str]) -> frozenset[str] | None:
    """Parameters that are weights of these modules.

    A file may hold a part of the model, whose names lack the path to it.

    Args:
        modules: Paths in the model.
        names: Of parameters in a file.

    Returns:
        Some of the names; None if nothing is known, or the file is of another model.
    """
    if modules is None:
        return None
    paths = set(modules) | {path.partition(".")[2] for path in modules if "." in path}
    found = frozenset(name for name in names if name.removesuffix(".weight") in paths)
    return found or None
