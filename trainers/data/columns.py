"""Columns of a data file that a task reads: their types, their names, and the guess when none was named."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

from outlast.checkpointing.error_hints import shorten_list
from outlast.checkpointing.errors import ConfigError, OutlastError
from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.csv_reader import csv_advice, csv_note
from outlast.trainers.data.readers import Row, class_names, first_row, read_rows, value_at
from outlast.trainers.data.sources import find_data_files, missing_column_error
from outlast.trainers.data.written_lists import parse_list

_NUM_SHOWN = 8
#: Usual names of columns with the answer to a prompt.
_ANSWERS = frozenset({"answer", "assistant", "chosen", "completion", "output", "reply", "response"})


class ColumnType(Enum):
    """Type of the values of a column."""

    TEXT = "text"
    TEXTS = "a list of texts"
    LABEL = "a text or a whole number"
    VALUE = "a class, a list of classes or a number"
    LABELS = "a list of texts or whole numbers"
    MESSAGES = "a list of {role, content}"
    TURNS = "a text or a list of {role, content}"
    TOOLS = "a list of tools, or its JSON text"
    ANSWERS = "an answer, a list of answers, or {text: […], answer_start: […]}"
    ANY = "anything"

    def fits(self, value: Any) -> bool:
        """Check whether a value has this type."""
        match self:
            case ColumnType.TEXT:
                return isinstance(value, str)
            case ColumnType.TEXTS:
                return _is_list_of(_as_list(value), (str,))
            case ColumnType.LABEL:
                return isinstance(value, (str, int))
            case ColumnType.VALUE:
                return isinstance(value, (str, int, float)) or _is_list_of(value, (str, int, float))
            case ColumnType.LABELS:
                return _is_list_of(_as_list(value), (str, int))
            case ColumnType.MESSAGES:
                return (_is_list_of(value, (dict,)) and bool(value)) or begins_as_objects(value)
            case ColumnType.TURNS:
                return isinstance(value, str) or (_is_list_of(value, (dict,)) and bool(value))
            case ColumnType.TOOLS:
                return isinstance(value, str) or _is_list_of(value, (dict, str))
            case ColumnType.ANSWERS:
                texts = value.get("text") if isinstance(value, dict) else value
                return isinstance(texts, str) or _is_list_of(texts, (str,))
            case ColumnType.ANY:
                return True


_LISTS = (ColumnType.TEXTS, ColumnType.LABELS)
_LABELS = (ColumnType.LABEL, ColumnType.VALUE, ColumnType.LABELS)
_NESTED = (ColumnType.MESSAGES, ColumnType.TURNS, ColumnType.TOOLS)


def without_nulls(value: Any) -> Any:
    """Return nested lists and dicts without the keys whose value is None, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def begins_as_objects(value: Any) -> bool:
    """Check whether a value is a text that begins as the JSON of a list of objects."""
    return isinstance(value, str) and re.match(r"\s*\[\s*\{", value) is not None


def _as_list(value: Any) -> Any:
    """Return the list that a text writes, as in a .csv file; any other value as it is."""
    items = parse_list(value)
    return value if items is None else items


def _is_blank(value: Any) -> bool:
    return isinstance(value, str) and not value.strip()


def _is_list_of(value: Any, types: tuple[type, ...]) -> bool:
    return isinstance(value, list) and all(isinstance(item, types) for item in value)


@dataclass(frozen=True, slots=True)
class Column:
    """A column that a task reads.

    Attributes:
        role: The column's role in the task; `data.<role>` (or `data.columns`) in the run file gives its name.
        kind: Type of its values.
        is_target: Whether the model learns to predict it; prediction does not need it.
        is_optional: Whether the task works without it, when it is neither named nor in the data.
        is_sparse: Whether a row, or all, may lack it: then its value is None.
        is_class: Whether its values are classes: where the file gives them names (ClassLabel of the `datasets`
            library), these replace the numbers.
    """

    role: str
    kind: ColumnType
    is_target: bool = False
    is_optional: bool = False
    is_sparse: bool = False
    is_class: bool = False

    @property
    def is_required(self) -> bool:
        """Whether each row of the data must have it."""
        return not (self.is_optional or self.is_sparse)


@dataclass(frozen=True, slots=True)
class RowForm:
    """Another form of rows that a task reads; the names of its columns show it."""

    name: str
    columns: tuple[Column, ...]


@dataclass(frozen=True, slots=True)
class ColumnMapping:
    """The columns of a data file that a task reads."""

    columns: tuple[Column, ...]  #: the task's, without optional ones that the data does not have
    names: tuple[str, ...]  #: their names in the file, in the same order
    notes: tuple[str, ...]  #: guesses to report to the user
    named: tuple[str, ...] = ()  #: names of columns whose numbers become the class names that the files give them
    labels: tuple[str, ...] | None = None  #: these class names, in the order of their index
    available: tuple[str, ...] = ()  #: names of all columns of the data

    @property
    def used(self) -> dict[str, str]:
        """Names of the columns that the data has, by role."""
        pairs = zip(self.columns, self.names, strict=True)
        return {column.role: name for column, name in pairs if name in self.available or not column.is_sparse}

    @property
    def unused(self) -> list[str]:
        """Names of the columns that the task does not read."""
        heads = {name.partition(".")[0] for name in self.names if name not in self.available}
        return [name for name in self.available if name not in self.names and name not in heads]

    @property
    def sparse_names(self) -> frozenset[str]:
        """Names of the columns that a row may lack."""
        return frozenset(name for column, name in zip(self.columns, self.names, strict=True) if column.is_sparse)

    def record(self, row: Row) -> dict[str, Any]:
        """Map the values of a row to roles. A list that is written as a text becomes a list.

        In messages and tools of a columnar file a key without a value is absent: every item of a column has all keys.
        """
        record = dict[str, Any]()
        for column, value in zip(self.columns, row.values, strict=True):
            if row.is_columnar and column.kind in _NESTED:
                record[column.role] = without_nulls(value)
            else:
                record[column.role] = _as_list(value) if column.kind in _LISTS else value
        return record

    def fault(self, values: Sequence[Any]) -> str | None:
        """Return the first value of the wrong type as an error text; None if all types are right."""
        for column, name, value in zip(self.columns, self.names, values, strict=True):
            if value is None and column.is_sparse:
                continue
            is_label = column.is_target and column.kind in _LABELS
            if (value is None and column.kind is not ColumnType.ANY) or (is_label and _is_blank(value)):
                return f"column {name!r} holds no value"
            if not column.kind.fits(value):
                shown = repr(value) if len(repr(value)) <= 100 else f"{repr(value)[:100]}…"
                return f"column {name!r} holds {shown}, not {column.kind.value}"
            items = _as_list(value) if is_label else None
            if isinstance(items, list) and (empty := next(filter(_is_blank, items), None)) is not None:
                return (
                    f"column {name!r} holds a list in which item {items.index(empty)} is {empty!r}, which is no value"
                )
        return None


def name_of(settings: DataSettings, role: str) -> str:
    """Return the column's name for a role from the run file; the role's own name by default."""
    return str(settings.columns.get(role) or getattr(settings, role, role))


def choose_columns(columns: Sequence[Column], settings: DataSettings, forms: Sequence[RowForm] = ()) -> ColumnMapping:
    """Find a task's columns in the training data.

    A column that is neither named in the settings nor in the data under its role's name is guessed, if exactly one
    column of the data has the right type. If no column of the task is in the data, and all those of another form of
    rows are, or one of them is named in the settings, that form is chosen.

    Raises:
        ConfigError: Columns are missing and cannot be guessed; the message names all of them.
    """
    available = first_row(settings.train, settings.csv)
    names = tuple(available)
    every = [*columns, *(column for form in forms for column in form.columns)]
    available |= _named_keys([name_of(settings, column.role) for column in every], available)
    form = _find_form(columns, settings, forms, available)
    columns = [
        column
        for column in (form.columns if form else columns)
        if not (column.is_sparse and getattr(settings, column.role, column.role) is None)
    ]
    required = tuple(column for column in columns if column.is_required)
    only_lines = len(required) == 1 and {item.kind for item in find_data_files(settings.train)} == {".txt"}
    if only_lines or not available:  # without any column, reading the rows reports the error
        return ColumnMapping(
            required, tuple(name_of(settings, column.role) for column in required), (), available=names
        )
    notes = list[str]()
    if form:
        shown = ", ".join(name_of(settings, column.role) for column in required)
        notes.append(f"rows are read in the form of {form.name}: columns {shown}")
    found = _find_names(columns, settings, available, notes, () if form else forms)
    notes += [] if form else _unlearned_answers(columns, found, available, forms)
    csv_files = [item for item in find_data_files(settings.train, settings.csv) if item.kind in (".csv", ".tsv")]
    notes += [note for item in csv_files[:1] if (note := csv_note(item))]
    used = tuple(column for column in columns if column in found)
    labels = _labels_of_files([found[column] for column in used if column.is_class], settings, notes)
    named = tuple(labels)
    return ColumnMapping(
        used,
        tuple(found[column] for column in used),
        tuple(notes),
        named,
        labels[named[0]] if named else None,
        names,
    )


def _find_names(
    columns: Sequence[Column],
    settings: DataSettings,
    available: Mapping[str, Any],
    notes: list[str],
    forms: Sequence[RowForm],
) -> dict[Column, str]:
    """Return the names of the columns in the data, guessed ones too, which are added to `notes`.

    Args:
        columns: The task's columns.
        settings: Its names of columns.
        available: The columns of the data, each with its first value.
        notes: Guesses to report to the user.
        forms: Other forms of rows, to suggest.

    Raises:
        ConfigError: Columns are missing and cannot be guessed.
    """
    names = {column: name_of(settings, column.role) for column in columns}
    found = {
        column: name
        for column, name in names.items()
        if name in available or (column.is_sparse and not _is_named(settings, column))
    }
    missing = dict[Column, str]()
    for column in columns:
        is_named = _is_named(settings, column)
        if column in found or (column.is_optional and not is_named):
            continue
        if column.is_sparse:  # a later row may have it; reading raises if none has
            next(read_rows(settings.train, [names[column]], settings.csv), None)
            found[column] = names[column]
            continue
        taken = {*found.values(), *missing.values()}
        free = [name for name, value in available.items() if name not in taken and column.kind.fits(value)]
        if is_named or len(free) != 1:
            inner = [name for name, value in _keys(available) if name not in taken and column.kind.fits(value)]
            missing[column] = next(iter([*free, *inner]), "NAME")
            continue
        found[column] = free[0]
        notes.append(f"no column {names[column]!r}; using {free[0]!r} as data.{column.role}")
    if missing:
        absent = [names[column] for column in missing]
        advice = _advice({column.role: likely for column, likely in missing.items()}, settings, available, forms)
        raise missing_column_error(str(settings.train), absent, available, advice)
    return found


def _takes_answers(forms: Sequence[RowForm]) -> bool:
    return any(column.role == "completion" for form in forms for column in form.columns)


def _unlearned_answers(
    columns: Sequence[Column], found: Mapping[Column, str], available: Mapping[str, Any], forms: Sequence[RowForm]
) -> Iterator[str]:
    """Yield a note if one column of a table of prompts and answers is learned as the text, and the answers are not."""
    text = next((found[column] for column in columns if column.role == "text" and column in found), "text")
    others = [name for name, value in available.items() if name != text and isinstance(value, str)]
    answer = next((name for name in others if name.casefold() in _ANSWERS), None)
    if _takes_answers(forms) and text != "text" and answer is not None:
        pair = _options({"prompt": text, "completion": answer})
        yield f"column {answer!r} is not read: only {text!r} is learned; for prompts with answers: {pair}, no data.text"


def _named_keys(names: Sequence[str], available: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the names that are keys of objects in a column, such as `translation.en`, with their values."""
    found = dict[str, Any]()
    for name in names:
        head, *keys = name.split(".")
        if keys and name not in available and isinstance(available.get(head), dict):
            found[name] = value_at(available[head], keys)
    return found


def _keys(available: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Iterate over the keys of objects in columns, and their values."""
    for name, value in available.items():
        for key, item in value.items() if isinstance(value, dict) else ():
            yield f"{name}.{key}", item


def _advice(
    missing: Mapping[str, str], settings: DataSettings, available: Mapping[str, Any], forms: Sequence[RowForm]
) -> str:
    """Return what to do about missing columns: `missing` has likely names by role."""
    parts = list[str]()
    if {"chosen", "rejected"} <= available.keys():
        parts.append("preference data (chosen, rejected) is no task yet")
        if ColumnType.MESSAGES.fits(available["chosen"]) and "messages" in missing:
            parts.append("to learn the chosen conversations: -s data.messages=chosen")
        elif "prompt" in available and forms:
            parts.append("to learn the chosen answers: -s data.completion=chosen")
        return "; ".join(parts)
    keys = " and ".join(f"data.{role}" for role in missing)
    parts.append(f"set {keys}, for example {_options(missing)}")
    texts = [name for name, value in available.items() if isinstance(value, str)]
    if len(texts) > 1 and _takes_answers(forms):
        answer = next((name for name in texts[1:] if name.casefold() in _ANSWERS), texts[-1])
        pair = f"for prompts with answers: {_options({'prompt': texts[0], 'completion': answer})}"
        if {"instruction", "input", "output"} <= available.keys():
            pair += " (without the input; model.task: chat reads all three)"
        parts = [pair, f"for texts: {_options(missing)}"] if answer.casefold() in _ANSWERS else [*parts, f"or, {pair}"]
    [first] = find_data_files(settings.train, settings.csv)[:1]
    return "; ".join([*parts, *(csv_advice(first) if first.kind in (".csv", ".tsv") else ())])


def _options(names: Mapping[str, str]) -> str:
    return " ".join(f"-s {shlex.quote(f'data.{role}={name}')}" for role, name in names.items())


def _labels_of_files(columns: Sequence[str], settings: DataSettings, notes: list[str]) -> dict[str, tuple[str, ...]]:
    """Return the class names that files give columns, unless `data.labels` has others.

    Of the files in one directory, the first one is read: they have one schema.

    Raises ConfigError if the names are those of `data.labels` in part.
    """
    if not columns:
        return {}
    files = find_data_files(settings.train, settings.csv)
    if settings.eval and not settings.eval_share:
        with suppress(OutlastError):  # preparation reports it; predictions do not need it
            files += find_data_files(settings.eval, settings.csv)
    firsts = {(file.kind, file.name.rpartition("/")[0]): file for file in reversed(files)}
    labels = dict[str, tuple[str, ...]]()
    for file in reversed(firsts.values()):
        for column, names in class_names(file, columns).items():
            labels.setdefault(column, names)
    wanted = settings.labels
    for column, names in list(labels.items()):
        if wanted is None or set(names) <= set(wanted):
            notes.append(f"column {column!r} has the class names of its data set: {shorten_list(names, _NUM_SHOWN)}")
            continue
        if {name.casefold() for name in names} & {name.casefold() for name in wanted}:
            raise ConfigError(
                f"{settings.train}: column {column!r} has the class names {shorten_list(names, _NUM_SHOWN)} of its "
                f"data set, and data.labels has {shorten_list(wanted, _NUM_SHOWN)}: they agree in part",
                hint="write all names of the data set in data.labels, in the order of their index",
            )
        del labels[column]  # the numbers are indexes of data.labels
    return labels


def _is_named(settings: DataSettings, column: Column) -> bool:
    return column.role in settings.model_fields_set | settings.columns.keys()


def _find_form(
    columns: Sequence[Column], settings: DataSettings, forms: Sequence[RowForm], available: Mapping[str, Any]
) -> RowForm | None:
    """Return the form of the rows; None for the task's own columns."""
    own = [column for column in columns if column.is_required]
    if any(_is_named(settings, column) or name_of(settings, column.role) in available for column in own):
        return None
    for form in forms:
        required = [column for column in form.columns if column.is_required]
        are_there = all(name_of(settings, column.role) in available for column in required)
        if are_there or any(_is_named(settings, column) for column in required):
            return form
    return None


def texts_in(value: Any) -> Iterator[str]:
    """Iterate over all texts in a value of nested lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
