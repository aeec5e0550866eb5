"""Survey of the labels of sequence classification: the problem that they are for, and their classes."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.csv_reader import has_decimal_comma
from outlast.trainers.data.written_lists import parse_list
from outlast.trainers.tasks.labels import MISSING_TEXTS, class_name, is_multi_hot

_LARGEST = float(np.finfo(np.float32).max)
SINGLE, MULTI, REGRESSION = "single-label", "multi-label", "regression"


@dataclass(slots=True)
class LabelSurvey:
    """What the labels of the training rows are: their types, the classes among them, and the problem they are for."""

    kinds: set[type] = field(default_factory=set)
    names: set[str] = field(default_factory=set)  #: of labels that are not lists
    in_lists: set[str] = field(default_factory=set)  #: of items of lists
    widths: Counter[int] = field(default_factory=Counter)  #: how many lists have each length
    are_multi_hot: bool = True  #: whether all lists are of 0 and 1
    have_repeats: bool = False  #: whether a list of 0 and 1 has one of them twice, so that it cannot list classes
    are_whole: bool = True  #: whether all floats are whole numbers
    num_lists: int = 0  #: labels that are lists, or texts that write lists
    num_others: int = 0

    def add(self, label: Any) -> None:
        """Add the label of a row."""
        self.kinds.add(list if isinstance(label, list) else type(label))
        items = label if isinstance(label, list) else parse_list(label)
        if items is None:
            self.num_others += 1
        else:
            self.num_lists += 1
            self.widths[len(items)] += 1
            self.in_lists |= set(map(class_name, items))
            is_hot = is_multi_hot(items)
            self.are_multi_hot = self.are_multi_hot and is_hot
            self.have_repeats = self.have_repeats or (is_hot and len(set(items)) < len(items))
        if isinstance(label, float):
            self.are_whole = self.are_whole and label.is_integer()
        elif not isinstance(label, list):
            self.names.add(str(label))
        if isinstance(label, float) and self.are_whole:
            self.names.add(class_name(label))

    @property
    def has_lists(self) -> bool:
        """Whether most labels are lists, or texts that write lists; the others are then unusable."""
        return self.num_lists > self.num_others

    @property
    def are_number_texts(self) -> bool:
        """Whether texts are numbers as all other labels, some of them fractions: a .csv file has texts only."""
        are_fractions = float in self.kinds or any(not name.lstrip("+-").isdecimal() for name in self._values)
        return str in self.kinds and are_fractions and all(map(is_number, self._values))

    @property
    def bracketed(self) -> list[str]:
        """The texts in brackets that write no list."""
        return sorted(name for name in self.names if name.startswith("[") and name.endswith("]"))

    @property
    def mix_fractions_and_texts(self) -> bool:
        """Whether some texts are fractions, and others are no numbers."""
        numbers = {name for name in self._values if is_number(name)}
        return numbers != self._values and any(not name.lstrip("+-").isdecimal() for name in numbers)

    @property
    def _values(self) -> set[str]:
        """The names that hold a value, if they were numbers; an infinite one is none."""
        return {name for name in self.names if name.lower() not in MISSING_TEXTS and not _is_infinite(name)}

    @property
    def have_decimal_commas(self) -> bool:
        """Whether all texts are numbers, some of them with a decimal comma."""
        are_numbers = all(is_number(name) or has_decimal_comma(name) for name in self._values)
        return self.kinds == {str} and are_numbers and any(map(has_decimal_comma, self._values))

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
        named = self._values
        are_numbers = bool(named) and all(map(str.isdecimal, named))
        return named if are_numbers else self.names


def is_number(value: Any) -> bool:
    """Check whether a label is a number of float32, or a text of one; Python alone reads underscores in it."""
    if isinstance(value, list) or (isinstance(value, str) and "_" in value):
        return False
    try:
        return abs(float(value)) <= _LARGEST
    except (ValueError, OverflowError):
        return False


def _is_infinite(name: str) -> bool:
    return name.lower().lstrip("+-") in ("inf", "infinity")
