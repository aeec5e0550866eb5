"""The tasks by name, and tasks of a user's own by dotted path. Imports nothing heavy: a run file is checked with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.task_names import TASKS
from outlast.trainers.user_code import import_object

if TYPE_CHECKING:
    from outlast.trainers.tasks.base import Task


def find_task(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        ConfigError: There is no such module or class, or it is no task.
    """
    from outlast.trainers.tasks.base import Task

    found = import_object(TASKS.get(name, name), "model.task")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"model.task {name!r} is no task", hint="derive the class from outlast.trainers.Task")
    needed = {attribute: hasattr(found, attribute) for attribute in ("auto_class", "columns")}
    needed |= {method: getattr(found, method) is not getattr(Task, method) for method in ("encode", "loss")}
    if missing := [part for part, is_there in needed.items() if not is_there]:
        raise ConfigError(f"model.task {name} does not say its {', '.join(missing)}", hint="see outlast.trainers.Task")
    return found
