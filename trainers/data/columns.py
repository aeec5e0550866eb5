"""Which columns of a data file a task reads: what each must hold, and which is meant when none was named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.readers import first_row, no_column
from outlast.trainers.data.sources import find_sources


class ColumnType(Enum):
    """What a column holds."""

    TEXT = "text"
    TEXTS = "a list of texts"
    LABEL = "a text or a whole number"
    VALUE = "a class, a list of classes or a number"
    LABELS = "a list of texts or whole numbers"
    MESSAGES = "a list of {role, content}"
    ANSWERS = "an answer, a list of answers, or {text: […], answer_start: […]}"
    ANY = "anything"

    def fits(self, value: Any) -> bool:
        """Whether one value will do."""
        match self:
            case ColumnType.TEXT:
                return isinstance(value, str)
            case ColumnType.TEXTS:
                return _is_list_of(value, (str,))
            case ColumnType.LABEL:
                return isinstance(value, (str, int))
            case ColumnType.VALUE:
                return isinstance(value, (str, int, float)) or _is_list_of(value, (str, int))
            case ColumnType.LABELS:
                return _is_list_of(value, (str, int))
            case ColumnType.MESSAGES:
                return _is_list_of(value, (dict,)) and bool(value)
            case ColumnType.ANSWERS:
                texts = value.get("text") if isinstance(value, dict) else value
                return isinstance(texts, str) or _is_list_of(texts, (str,))
            case ColumnType.ANY:
                return True


def _is_list_of(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(item, kinds) for item in value)


@dataclass(frozen=True, slots=True)
class Column:
    """A column that a task reads.

    Attributes:
        role: What it is to the task; the run file names the column as `data.<role>` (or in `data.columns`).
        kind: What it holds.
        is_target: It is what the model learns to say: prediction does without.
        is_optional: The task does without, if it is neither named nor there.
    """

    role: str
    kind: ColumnType
    is_target: bool = False
    is_optional: bool = False


@dataclass(frozen=True, slots=True)
class ColumnMapping:
    """The columns of a data file that a task reads.

    Attributes:
        columns: The task's columns, without the optional ones that are not there.
        names: Their names in the file, in the same order.
        notes: What was guessed, to be told.
    """

    columns: tuple[Column, ...]
    names: tuple[str, ...]
    notes: tuple[str, ...]

    def record(self, values: Sequence[Any]) -> dict[str, Any]:
        """A row by role."""
        return {column.role: value for column, value in zip(self.columns, values, strict=True)}

    def fault(self, values: Sequence[Any]) -> str | None:
        """Why a row will not do, as far as its columns by themselves tell."""
        for column, name, value in zip(self.columns, self.names, values, strict=True):
            if not column.kind.fits(value):
                said = repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:100]}…"
                return f"column {name!r} holds {said}, not {column.kind.value}"
        return None


def name_of(settings: DataSettings, role: str) -> str:
    """The column's name as the run file has it; the role's own name by default."""
    return str(settings.columns.get(role) or getattr(settings, role, role))


def choose_columns(columns: Sequence[Column], settings: DataSettings) -> ColumnMapping:
    """Finds a task's columns in the training data; one that was not named, and is not there, is guessed if it can be.

    Raises:
        ConfigError: Columns are not there, and there is no single one that could be meant; all are named.
    """
    there = first_row(settings.train)
    needed = tuple(column for column in columns if not column.is_optional)
    only_lines = len(needed) == 1 and {item.kind for item in find_sources(settings.train)} == {".txt"}
    if only_lines or not there:  # where nothing is there, reading tells what is wrong
        return ColumnMapping(needed, tuple(name_of(settings, column.role) for column in needed), ())
    found = {column: name for column in columns if (name := name_of(settings, column.role)) in there}
    notes, missing = [], dict[Column, str]()
    for column in columns:
        is_named = column.role in settings.model_fields_set | settings.columns.keys()
        if column in found or (column.is_optional and not is_named):
            continue
        taken = {*found.values(), *missing.values()}
        free = [name for name, value in there.items() if name not in taken and column.kind.fits(value)]
        if is_named or len(free) != 1:
            missing[column] = next(iter(free), "NAME")
            continue
        found[column] = free[0]
        notes.append(f"no column {name_of(settings, column.role)!r}; taking {free[0]!r} as data.{column.role}")
    if missing:
        names = [name_of(settings, column.role) for column in missing]
        keys = " and ".join(f"data.{column.role}" for column in missing)
        example = " ".join(f"-s data.{column.role}={likely}" for column, likely in missing.items())
        raise no_column(str(settings.train), names, there, f"set {keys}, for example {example}")
    mine = tuple(column for column in columns if column in found)
    return ColumnMapping(mine, tuple(found[column] for column in mine), tuple(notes))


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a value, whatever it is nested in."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
