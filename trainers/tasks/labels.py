"""Labels of classification: the classes and their order, and how a row's label gives one of them.

The order comes from, in this order: `data.labels`, or the class names of a data set of `datasets`; the pretrained
model's head, where its names agree; the names themselves, whole numbers by value.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from outlast.checkpointing.error_hints import shorten_list
from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.columns import name_of

NAMES, INDEX, MULTI_HOT = "names", "index", "multi-hot"
#: How programs write that there is no value. Among numbers these are no classes.
MISSING_TEXTS = frozenset({"", "nan", "-nan", "na", "n/a", "#n/a", "<na>", "null", "none", "missing", "?", "-", "."})
_BOOLS = {"false": 0, "true": 1}
_NUM_SHOWN, _MAX_CLASSES = 8, 100_000


def listed(names: Collection[str]) -> str:
    """Return names of classes as text, the first ones of many."""
    return shorten_list(names, _NUM_SHOWN)


def with_notes(facts: Mapping[str, Any], notes: Sequence[str]) -> dict[str, Any]:
    """Return facts with these notes, and without any if there are none."""
    bare = {name: value for name, value in facts.items() if name != "notes"}
    return {**bare, "notes": list(notes)} if notes else bare


def class_name(value: Any) -> str:
    """Return the class that a value names. A whole number written as a fraction, as by pandas, is that number."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def is_multi_hot(items: Iterable[Any]) -> bool:
    """Check whether all items are 0, 1 or bools."""
    return all(isinstance(item, int | float) and item in (0, 1) for item in items)


def most_common_width(widths: Mapping[int, int]) -> int | None:
    """Return the length of most lists, given how many have each; None if there is no such length of at least 2."""
    ordered = sorted(widths.items(), key=lambda item: -item[1])
    is_tie = len(ordered) > 1 and ordered[0][1] == ordered[1][1]
    return None if not ordered or is_tie or ordered[0][0] < 2 else ordered[0][0]


def _class_order(name: str) -> tuple[int, str, str]:
    """Return the key of a class in the order of classes; that of a whole number for any count of digits."""
    digits = name.lstrip("0") if name.isdecimal() else ""
    return len(digits) + name.isdecimal(), digits, name


def _as_whole(name: str) -> str | None:
    """Return the whole number that a text such as 1.0 writes; None for other texts."""
    match = re.fullmatch(r"([+-]?\d+)\.0+", name)
    return match[1] if match else None


def sort_classes(settings: DataSettings, role: str, names: Iterable[str]) -> list[str]:
    """Order class names by their class index: whole numbers by value, all others by name.

    Raises ConfigError for fewer than two classes.
    """
    classes = sorted(set(names), key=_class_order)
    name = name_of(settings, role)
    if not classes:
        raise ConfigError(f"{settings.train} has no usable row, so no class of {name!r}", hint="add rows to it")
    if len(classes) < 2:
        raise ConfigError(
            f"{settings.train}: column {name!r} has only one class: {classes}; classification needs at least two",
            hint=f"add rows of another class, name all classes in data.labels, or name another column: -s "
            f"data.{role}=…",
        )
    return classes


def survey_classes(settings: DataSettings, role: str, found: Collection[str]) -> dict[str, Any]:
    """Return the facts about classes: their order, and whether a label is a name or an index.

    Args:
        settings: Its `labels` are the names in the order of their index, if they are known.
        role: Role of the column.
        found: The labels of all training rows, as texts.
    """
    if settings.labels is None:
        return {"classes": sort_classes(settings, role, found)}
    classes, column = list(settings.labels), name_of(settings, role)
    are_indexes = not set(classes) & set(found) and all(
        item.removeprefix("-").isdecimal() or item.lower() in _BOOLS for item in found
    )
    if are_indexes and (written := {whole for name in classes if (whole := _as_whole(name))} & set(found)):
        raise ConfigError(
            f"column {column!r} has the labels {listed(sorted(written))}, and data.labels writes them with a fraction",
            hint="write data.labels as the rows have them, such as 1 instead of 1.0",
        )
    facts: dict[str, Any] = {"classes": classes, "given": True, "form": INDEX if are_indexes and found else NAMES}
    if facts["form"] == INDEX:
        facts["names"] = classes
        seen = {classes[index] for item in found if (index := _index(item)) is not None and index < len(classes)}
        notes = [f"column {column!r} holds indexes of the classes {listed(classes)}"]
    else:
        seen, notes = set(classes) & set(found), []
    if absent := [name for name in classes if name not in seen]:
        notes.append(f"no training row has the class {listed(absent)}")
    return with_notes(facts, notes)


def survey_multi_hot(settings: DataSettings, role: str, widths: Mapping[int, int]) -> dict[str, Any]:
    """Return the facts about multi-hot labels: lists of as many numbers as there are classes.

    `widths` holds how many lists have each length. Rows of another length than most are unusable.

    Raises ConfigError if no length is that of most.
    """
    column = name_of(settings, role)
    num = len(settings.labels) if settings.labels is not None else most_common_width(widths)
    if num is None:
        raise ConfigError(
            f"{settings.train}: the labels of column {column!r} are not multi-hot: their lengths are "
            f"{', '.join(map(str, sorted(widths))) or 'none'}",
            hint="multi-hot labels are lists of as many 0 and 1 as there are classes: set data.label_form: names, or "
            "name the classes in data.labels",
        )
    classes = list(settings.labels) if settings.labels is not None else [str(index) for index in range(num)]
    note = f"column {column!r} holds multi-hot labels of the classes {listed(classes)} (data.label_form)"
    if settings.labels is None:
        return {"classes": classes, "form": MULTI_HOT, "notes": [f"{note}; data.labels names them"]}
    return {"classes": classes, "form": MULTI_HOT, "given": True, "notes": [note]}


def note_classes(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts with notes about classes found in the data that may be an oversight."""
    if facts.get("given") or facts.get("form", NAMES) != NAMES:
        return dict(facts)
    classes, notes = list(facts["classes"]), list(facts.get("notes", ()))
    are_numbers = all(re.fullmatch(r"[+-]?\d+", name) for name in classes)
    if are_numbers and classes != [str(index) for index in range(len(classes))]:
        notes.append(f"the labels {listed(classes)} get the indexes {listed(list(map(str, range(len(classes)))))}")
    alike = dict[str, list[str]]()
    for name in classes:
        alike.setdefault(name.strip().casefold(), []).append(name)
    notes += [
        f"the classes {listed(list(map(repr, names)))} differ only in case or surrounding space"
        for names in alike.values()
        if len(names) > 1
    ]
    if missing := [repr(name) for name in classes if name.strip().lower() in MISSING_TEXTS]:
        notes.append(
            f"{listed(missing)} is used as a class; data.csv.missing lists the fields of .csv files without a value"
        )
    return with_notes(facts, notes)


class LabelIndex:
    """The class index of each label.

    Args:
        facts: The result of the survey.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.classes: list[str] = facts["classes"]
        self.is_given = facts.get("given", False)
        self._form, self._names = facts.get("form", NAMES), facts.get("names", self.classes)
        self._indices = {name: index for index, name in enumerate(self.classes)}

    def index(self, label: Any) -> int:
        """Return the class index of a label, which must be a class."""
        index = self.of(label)
        assert index is not None, label
        return index

    def of(self, label: Any) -> int | None:
        """Return the class index of a label; None if it is no class."""
        if self._form != INDEX:
            return self._indices.get(class_name(label))
        number = _index(class_name(label))
        return self._indices[self._names[number]] if number is not None and number < len(self._names) else None

    def fault(self, labels: Iterable[Any], what: str = "label") -> str | None:
        """Return an error text for the first label that is no class; None if all are."""
        unknown = next((item for item in labels if self.of(item) is None), None)
        if unknown is None:
            return None
        if class_name(unknown).lower() in MISSING_TEXTS and all(map(str.isdecimal, self.classes)):
            return (
                f"{what} {unknown!r} is not a class as the others are (data.csv.missing lists fields without a value)"
            )
        if self._form == INDEX:
            return f"{what} {unknown!r} is not an index of the {len(self._names)} classes {listed(self._names)}"
        if self.is_given:
            return f"{what} {unknown!r} is not one of the classes {listed(self.classes)} (data.labels)"
        return f"{what} {unknown!r} is in the evaluation data but not in the training data"


def _index(item: str) -> int | None:
    return int(item) if item.isdecimal() else _BOOLS.get(item.lower())


# -- the classes of a pretrained model ---------------------------------------------------------------------------------


def head_labels(config: Mapping[str, Any], head: str) -> dict[str, Any]:
    """Return the classes of the head in a model's `config.json`: `labels` by index, and whether they `are_names`.

    Empty without a head of this kind (`ForSequenceClassification`) or names.
    """
    try:
        has_head = any(str(name).endswith(head) for name in config.get("architectures") or [])
        by_index = config.get("id2label") or {index: name for name, index in (config.get("label2id") or {}).items()}
        labels = [str(name) for _, name in sorted((int(index), name) for index, name in by_index.items())]
        if not labels and has_head:
            labels = [f"LABEL_{index}" for index in range(min(config.get("num_labels") or 2, _MAX_CLASSES))]
    except (TypeError, ValueError, AttributeError):  # loading the configuration reports it
        return {}
    are_names = not all(re.fullmatch(r"LABEL_\d+", name) for name in labels)
    if len(labels) != len(set(labels)) or not (has_head or are_names):
        return {}
    return {"labels": labels, "are_names": are_names, "has_head": has_head}


def match_head(settings: DataSettings, facts: dict[str, Any], head: Mapping[str, Any], role: str) -> dict[str, Any]:
    """Put the classes in the order of the model's head, where its names agree with them.

    Raises ConfigError if only some names agree.
    """
    theirs, classes = list(head.get("labels", ())), list(facts["classes"])
    if len(theirs) < 2 or len(classes) < 2:
        return facts
    by_name = {name.casefold(): name for name in theirs}
    if len(by_name) < len(theirs):
        by_name = {name: name for name in theirs}
    agreed = {
        by_name[key]: name for name in classes if (key := name if name in by_name else name.casefold()) in by_name
    }
    notes = list(facts.get("notes", ()))
    if len(agreed) == len(classes) and (head["has_head"] or len(agreed) == len(theirs)):
        ordered = [agreed.get(name, name) for name in theirs]
        if settings.labels is not None:
            if ordered != classes:
                notes.append(f"data.labels has the classes in another order than the model's head: {listed(theirs)}")
            return with_notes(facts, notes)
        if ordered != classes:
            notes.append(f"the classes have the order of the model's head: {listed(ordered)}")
        return with_notes({**facts, "classes": ordered}, notes)
    if not head["has_head"]:
        return facts
    if not agreed and not facts.get("given") and all(map(str.isdecimal, classes)):
        return _match_numbers(facts, head, name_of(settings, role))
    if agreed and not facts.get("given") and head["are_names"]:
        absent = [name for name in classes if name not in agreed.values()]
        raise ConfigError(
            f"{settings.train}: column {name_of(settings, role)!r} has the classes {listed(classes)}, the model's head "
            f"has {listed(theirs)}: {listed(absent)} is not among them",
            hint="name the classes in the order of their index: -s 'data.labels=[…]'",
        )
    if head["are_names"]:
        notes.append(f"the model's head has the classes {listed(theirs)}; it learns {listed(classes)} in their place")
    return with_notes(facts, notes)


def _match_numbers(facts: dict[str, Any], head: Mapping[str, Any], column: str) -> dict[str, Any]:
    """Take whole numbers for indexes of the head's classes, if they can be nothing else."""
    theirs, classes, notes = head["labels"], facts["classes"], list(facts.get("notes", ()))
    numbers = [int(name) for name in classes]
    is_multi_hot = facts.get("form") == MULTI_HOT
    are_indexes = len(theirs) == len(classes) if is_multi_hot else max(numbers) < len(theirs)
    if are_indexes and min(numbers) > 0 and head["are_names"]:
        raise ConfigError(
            f"column {column!r} has the labels {listed(classes)}, the model's head has the classes {listed(theirs)}: "
            "the labels may count from 0 or from 1",
            hint="name the classes in the order of their index: -s 'data.labels=[…]'",
        )
    if not are_indexes:
        if head["are_names"]:
            notes.append(
                f"the model's head has the classes {listed(theirs)}; it learns {listed(classes)} in their place"
            )
        return with_notes(facts, notes)
    names = theirs if head["are_names"] else [str(index) for index in range(len(theirs))]
    if names != classes:
        notes.append(f"the labels of column {column!r} are indexes of the classes of the model's head: {listed(names)}")
    form = {} if is_multi_hot else {"form": INDEX, "names": names}
    return with_notes({**facts, **form, "classes": names}, notes)


def name_classes(config: Any, classes: Sequence[str]) -> None:
    """Set the class names in a model's configuration."""
    config.id2label = dict(enumerate(classes))
    config.label2id = {label: index for index, label in enumerate(classes)}
