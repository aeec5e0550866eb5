"""Lookup of a task's class by name or dotted path. Importing this module must not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.task_table import TASKS
from outlast.trainers.user_code import import_object

if TYPE_CHECKING:
    from outlast.trainers.tasks.base import Task


def find_task(name: str) -> type[Task]:
    """Return the class of a task.

    Raises:
        ConfigError: The module or class does not exist, is not a subclass of Task, or lacks a required attribute.
    """
    from outlast.trainers.tasks.base import Task

    task = import_object(TASKS.get(name, name), "model.task")
    if not (isinstance(task, type) and issubclass(task, Task)):
        hint = "derive the class from outlast.trainers.Task"
        raise ConfigError(f"model.task {name!r} is not a subclass of Task", hint=hint)
    defined = {attribute: hasattr(task, attribute) for attribute in ("auto_class", "columns")}
    defined |= {method: getattr(task, method) is not getattr(Task, method) for method in ("encode", "loss")}
    if missing := [attribute for attribute, is_defined in defined.items() if not is_defined]:
        raise ConfigError(f"model.task {name} does not define {', '.join(missing)}", hint="see outlast.trainers.Task")
    return task
