"""The tasks by name, and tasks of a user's own by dotted path. Imports nothing heavy: a run file is checked with it."""

from __future__ import annotations

import difflib
import re
from importlib import import_module
from typing import TYPE_CHECKING, Any

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.blame import told

if TYPE_CHECKING:
    from outlast.trainers.tasks.base import Task

TASKS = {
    "causal-lm": "outlast.trainers.tasks.base:CausalLM",
    "chat": "outlast.trainers.tasks.chat:Chat",
    "masked-lm": "outlast.trainers.tasks.masked_lm:MaskedLM",
    "sequence-classification": "outlast.trainers.tasks.classification:SequenceClassification",
    "token-classification": "outlast.trainers.tasks.classification:TokenClassification",
    "question-answering": "outlast.trainers.tasks.question_answering:QuestionAnswering",
    "seq2seq-lm": "outlast.trainers.tasks.seq2seq:Seq2SeqLM",
    "multiple-choice": "outlast.trainers.tasks.multiple_choice:MultipleChoice",
    "double-heads": "outlast.trainers.tasks.multiple_choice:DoubleHeads",
}
_DOTTED = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_HINT = "put it beside the run file, or install it on every worker; `outlast submit --code DIR` takes it along"


def is_dotted(place: str) -> bool:
    """Whether this is written as `package.module:Name`."""
    return _DOTTED.fullmatch(place) is not None


def imported(place: str, setting: str) -> Any:
    """What `package.module:Name` names; `setting` is where the user wrote it.

    Raises:
        ConfigError: The module cannot be imported, or has no such name.
    """
    module, _, name = place.partition(":")
    try:
        whole = import_module(module)
    except Exception as error:
        raise ConfigError(f"{setting} {place!r} cannot be imported: {told(error)}", hint=_HINT) from error
    if not hasattr(whole, name):
        near = difflib.get_close_matches(name, [key for key, item in vars(whole).items() if isinstance(item, type)], 1)
        raise ConfigError(
            f"{setting} {place!r} cannot be imported: {module} has no {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else ""),
            hint=_HINT,
        )
    return getattr(whole, name)


def check_task_name(name: str) -> str:
    """The name, if it is in the table or a dotted path. Raises ValueError with the nearest one."""
    if name in TASKS or is_dotted(name):
        return name
    near = difflib.get_close_matches(name, TASKS, n=1)
    known = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(TASKS)}"
    raise ValueError(f"no task is called {name!r}; {known} (a task of your own is package.module:Class)")


def find_task(name: str) -> type[Task]:
    """The class of a task.

    Raises:
        ConfigError: There is no such module or class, or it is no task.
    """
    from outlast.trainers.tasks.base import Task

    found = imported(TASKS.get(name, name), "model.task")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ConfigError(f"model.task {name!r} is no task", hint="derive the class from outlast.trainers.Task")
    needed = {attribute: hasattr(found, attribute) for attribute in ("auto_class", "columns")}
    needed |= {method: getattr(found, method) is not getattr(Task, method) for method in ("encode", "loss")}
    if missing := [part for part, is_there in needed.items() if not is_there]:
        raise ConfigError(f"model.task {name} does not say its {', '.join(missing)}", hint="see outlast.trainers.Task")
    return found
