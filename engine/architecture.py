"""The architecture of a run's model, and the task that it is trained for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .config import RunConfig, UserError, kind_and_line, one_line
from .run_limits import refuse_too_many_modules
from .tasks import AUTO, TASKS, Task, task_of


def architecture_of(config: RunConfig) -> tuple[Any, Task]:
    """The model's configuration as transformers has it, and the task.

    Raises:
        UserError: There is no such model, or it has none for the task.
    """
    import transformers
    from transformers import AutoConfig, PreTrainedConfig

    if config.unknown_architecture:
        raise UserError(config.unknown_architecture)
    with blamed_on_the_model(config):
        if config.architecture is not None:
            fields = config.architecture.fields()
            refuse_too_many_modules(fields)
            architecture = AutoConfig.for_model(**fields)
        else:
            refuse_too_many_modules(PreTrainedConfig.get_config_dict(config.model)[0])
            architecture = AutoConfig.from_pretrained(config.model)

    def has_model(task: Task) -> bool:
        return type(architecture) in getattr(transformers, task.auto_class)._model_mapping

    task = task_of(config.task, architecture.architectures or (), has_model)
    if task is None:
        kinds = [name for name, known in TASKS.items() if has_model(known)]
        what = f"{architecture.model_type} has no model for task={config.task}" if config.task != AUTO else (
            f"{architecture.model_type} is of no task that is known here"
        )  # fmt: skip
        raise UserError(f"{config.model}: {what}" + f"; it has for: {', '.join(kinds)}" * bool(kinds))
    _adapt(config, architecture, task)
    return architecture, task


def _adapt(config: RunConfig, architecture: Any, task: Task) -> None:
    """Make a model's configuration that of what is set."""
    made_for = getattr(architecture, "image_size", None)
    wanted = [config.image_size] * 2 if isinstance(made_for, list | tuple) else config.image_size
    if config.image_size and made_for is not None and made_for != wanted:
        if config.pretrained:
            raise UserError(f"{config.model} was made for images of {made_for}: leave image_size out")
        architecture.image_size = wanted
    if task.adapters == "SEQ_CLS" and architecture.pad_token_id is None:
        architecture.pad_token_id = 0  # by which a decoder finds the last token of a row


@contextmanager
def blamed_on_the_model(config: RunConfig) -> Iterator[None]:
    """A model that is not there, or whose configuration makes no sense, is the user's to put right."""
    try:
        yield
    except (OSError, ValueError, UserError) as error:  # meant to be read
        raise UserError(f"{config.model}: {one_line(error)}") from None
    except Exception as error:  # whatever breaks on what makes no sense
        raise UserError(f"{config.model}: its configuration makes no model: {kind_and_line(error)}") from None
