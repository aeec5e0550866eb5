"""Survey of the labels of sequence classification: the problem that they are for, and their classes."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from outlast.trainers.config.data import DataSettings
from outlast.trainers.tasks.labels import MISSING_TEXTS, class_name, is_multi_hot, parse_list

SINGLE, MULTI, REGRESSION = "single-label", "multi-label", "regression"


@dataclass(slots=True)
class LabelSurvey:
    """What the labels of the training rows are: their types, the classes among them, and the problem they are for."""

    kinds: set[type] = field(default_factory=set)
    names: set[str] = field(default_factory=set)  #: of labels that are not lists
    in_lists: set[str] = field(default_factory=set)  #: of items of lists
    widths: set[int] = field(default_factory=set)  #: lengths of lists
    are_multi_hot: bool = True  #: whether all lists are of 0 and 1
    are_whole: bool = True  #: whether all floats are whole numbers
    are_written_lists: bool = True  #: whether all labels are texts that write lists

    def add(self, label: Any) -> None:
        """Add the label of a row."""
        self.kinds.add(list if isinstance(label, list) else type(label))
        items = label if isinstance(label, list) else parse_list(label)
        if isinstance(items, list):
            self.widths.add(len(items))
            self.in_lists |= set(map(class_name, items))
            self.are_multi_hot = self.are_multi_hot and is_multi_hot(items)
        if isinstance(label, float):
            self.are_whole = self.are_whole and label.is_integer()
        elif not isinstance(label, list):
            self.names.add(str(label))
            self.are_written_lists = self.are_written_lists and items is not None
        if isinstance(label, float) and self.are_whole:
            self.names.add(class_name(label))

    @property
    def has_lists(self) -> bool:
        """Whether all labels are lists, or texts that write lists."""
        return self.kinds == {list} or (self.kinds == {str} and self.are_written_lists)

    @property
    def are_number_texts(self) -> bool:
        """Whether all texts are numbers, some of them fractions: values of a .csv file are all texts."""
        values = {name for name in self.names if name.lower() not in MISSING_TEXTS}
        are_fractions = any(not name.lstrip("+-").isdecimal() for name in values)
        return self.kinds == {str} and are_fractions and all(map(is_number, values))

    def guess(self, settings: DataSettings) -> str:
        """Return the problem that the labels are for."""
        if self.has_lists:
            return MULTI
        if self.are_number_texts:
            return REGRESSION if settings.labels is None else SINGLE
        has_numbers = float in self.kinds and str not in self.kinds
        return REGRESSION if has_numbers and not (self.are_whole and settings.labels is not None) else SINGLE

    def classes(self) -> set[str]:
        """Return the class names of labels that are not lists. Among numbers, texts such as `nan` are none."""
        named = {name for name in self.names if name.lower() not in MISSING_TEXTS}
        are_numbers = bool(named) and all(map(str.isdecimal, named))
        return named if are_numbers else self.names


def is_number(value: Any) -> bool:
    """Check whether a label is a finite number, or a text of one."""
    if isinstance(value, list):
        return False
    try:
        return bool(np.isfinite(float(value)))
    except ValueError:
        return False
