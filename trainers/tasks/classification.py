"""Classification of texts and text pairs. Regression is sequence classification with one number as target."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.arrow_samples import Sample
from outlast.trainers.data.columns import Column, ColumnType, choose_columns, name_of
from outlast.trainers.data.csv_reader import has_decimal_comma
from outlast.trainers.data.readers import read_rows
from outlast.trainers.data.written_lists import parse_list
from outlast.trainers.tasks.base import Batch, Record, Sums, Task, ints
from outlast.trainers.tasks.class_scores import count_hits, count_multi_hits, macro_f1
from outlast.trainers.tasks.label_survey import MULTI, REGRESSION, SINGLE, LabelSurvey, is_number
from outlast.trainers.tasks.labels import (
    MULTI_HOT,
    LabelIndex,
    class_name,
    head_labels,
    is_multi_hot,
    listed,
    match_head,
    name_classes,
    note_classes,
    survey_classes,
    survey_multi_hot,
    with_notes,
)
from outlast.trainers.tasks.model_inputs import CLASSIFY_AT_END, text_config

_PROBLEM_TYPES = {
    SINGLE: "single_label_classification",
    MULTI: "multi_label_classification",
    REGRESSION: "regression",
}


_DECIMAL = "data.csv.decimal: ',' reads decimal commas in .csv files"


class SequenceClassification(Task):
    """Predict the class, the classes or the number of a text or text pair. A row is one sample, truncated."""

    auto_class = "AutoModelForSequenceClassification"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("text", ColumnType.TEXT),
        Column("label", ColumnType.VALUE, is_target=True, is_class=True),
        Column("text_pair", ColumnType.TEXT, is_optional=True),
    )
    options = ("problem", "labels", "label_form")
    template = ("$A", "$A <|endoftext|> $B")
    version = 2

    def __init__(self, settings: DataSettings, tokenizer: Any, facts: Mapping[str, Any]) -> None:
        super().__init__(settings, tokenizer, facts)
        self.problem, self.classes = facts["problem"], facts["classes"]
        self._labels = LabelIndex(facts)

    @classmethod
    def survey(cls, settings: DataSettings, records: Iterator[Record]) -> dict[str, Any]:
        labels, name = LabelSurvey(), name_of(settings, "label")
        for record in records:
            labels.add(record["label"])
        guess = labels.guess(settings)
        problem = settings.problem or guess
        kinds, notes = labels.kinds, list[str]()
        fitting = {
            SINGLE: kinds & {str, int, bool} or (kinds == {float} and labels.are_whole),
            MULTI: labels.has_lists or list in kinds,
            REGRESSION: kinds & {int, float, bool} or (str in kinds and any(map(is_number, labels.names))),
        }
        if kinds and not fitting[problem]:
            raise _no_such_labels(settings, problem, guess, labels)
        if problem == SINGLE and labels.have_decimal_commas:
            notes.append(f"the labels of column {name!r} look like numbers, and are used as classes; {_DECIMAL}")
        if problem == SINGLE and settings.problem is None and labels.mix_fractions_and_texts:
            notes.append(
                f"column {name!r} holds fractions and other texts, each a class; as numbers, with the others unusable: "
                "data.problem: regression"
            )
        if problem == SINGLE and labels.bracketed:
            notes.append(
                f"column {name!r} holds {labels.bracketed[0]!r}, which is no list in the notation of JSON or Python, "
                "as a class"
            )
        if settings.problem is None and problem != SINGLE:
            notes.append(f"column {name!r} is used for {problem} (data.problem)")
            if problem == REGRESSION and labels.are_whole and all(map(_is_whole, labels.classes())):
                numbers = [class_name(number) for number in sorted(map(float, labels.classes()))]
                notes[0] += (
                    f"; all its labels are whole ({listed(numbers)}): for classes set data.problem: single-label"
                )
        facts: dict[str, Any] = {"problem": problem, "classes": []}
        if problem == REGRESSION:
            if settings.labels is not None or settings.label_form == MULTI_HOT:
                raise ConfigError(
                    f"data.labels and data.label_form are for classes, and column {name!r} is used for regression",
                    hint="remove them, or set data.problem: single-label",
                )
            return with_notes(facts, notes)
        found = cls._survey_classes(settings, labels, problem)
        notes += found.pop("notes", [])
        return with_notes({**facts, **found}, notes)

    @classmethod
    def _survey_classes(cls, settings: DataSettings, labels: LabelSurvey, problem: str) -> dict[str, Any]:
        if problem == SINGLE:
            if settings.label_form == MULTI_HOT:
                raise ConfigError(
                    f"data.label_form is multi-hot, but column {name_of(settings, 'label')!r} does not hold lists",
                    hint="remove data.label_form, or name another column as data.label",
                )
            names = labels.classes()
            if not labels.are_number_texts or (settings.labels is not None and names & set(settings.labels)):
                return survey_classes(settings, "label", names)
            numbers = {class_name(float(name)) for name in names if is_number(name)}
            return {**survey_classes(settings, "label", numbers), "are_numbers": True}
        fits = settings.labels is None or set(labels.widths) == {len(settings.labels)}
        is_plain = labels.are_multi_hot and len(labels.widths) == 1 and max(labels.widths) >= 2 and fits
        is_hot = labels.have_repeats or is_plain
        written = {"are_written_lists": True} if str in labels.kinds else {}
        if settings.label_form == MULTI_HOT or (settings.label_form == "auto" and is_hot):
            return {**survey_multi_hot(settings, "label", labels.widths), **written}
        return {**survey_classes(settings, "label", labels.in_lists), **written}

    @classmethod
    def model_facts(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        facts = head_labels(config, "ForSequenceClassification")
        if facts.get("has_head") and (
            len(facts["labels"]) == 1 or config.get("problem_type") == _PROBLEM_TYPES[REGRESSION]
        ):
            facts["is_regression"] = True
        if config.get("model_type") in CLASSIFY_AT_END:
            facts["classifies_at_end"] = True
        return facts

    @classmethod
    def match_model(cls, settings: DataSettings, facts: dict[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
        found = facts
        if model.get("is_regression") and settings.problem is None and all(map(is_number, facts["classes"])):
            note = (
                f"column {name_of(settings, 'label')!r} is used for regression, as by the model's head (data.problem)"
            )
            found = {"problem": REGRESSION, "classes": [], "notes": [note]}
        elif facts["problem"] != REGRESSION:
            found = note_classes(match_head(settings, facts, model, "label"))
        return {**found, "classifies_at_end": True} if model.get("classifies_at_end") else found

    def fault(self, record: Record) -> str | None:
        label, name = self._value(record["label"]), name_of(self.settings, "label")
        if self.facts.get("classifies_at_end") and (fault := self._end_fault(record)) is not None:
            return fault
        if self.problem == REGRESSION:
            hint = f" ({_DECIMAL})" if isinstance(label, str) and has_decimal_comma(label) else ""
            return None if is_number(label) else f"column {name!r} holds {label!r}, not a number{hint}"
        if self.facts.get("form") == MULTI_HOT:
            if isinstance(label, list) and is_multi_hot(label) and len(label) == len(self.classes):
                return None
            return (
                f"column {name!r} holds {label!r}, not a list of {len(self.classes)} numbers, 0 or 1 (data.label_form)"
            )
        if isinstance(label, list) is not (self.problem == MULTI) or _is_fraction(label):
            return f"column {name!r} holds {label!r}, not {'a list of classes' if self.problem == MULTI else 'a class'}"
        items = label if isinstance(label, list) else [label]
        if (fault := self._labels.fault(items)) is None and len(set(map(self._labels.of, items))) < len(items):
            return f"column {name!r} holds {label!r}, which has a class more than once (data.label_form)"
        return fault

    def _end_fault(self, record: Record) -> str | None:
        """Return an error text for a text that contains the end token, of which such models expect a fixed number."""
        end = self.tokenizer.inner.eos_token
        columns = [role for role in ("text", "text_pair") if end and end in record.get(role, "")]
        return f"its {columns[0]} contains {end!r}, the token that the model classifies from" if columns else None

    def _value(self, label: Any) -> Any:
        """Return the label that a text of a .csv file writes."""
        if self.facts.get("are_written_lists"):
            items = parse_list(label)
            return label if items is None else items
        return float(label) if self.facts.get("are_numbers") and is_number(label) else label

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        texts = [[record["text"] for record in records]]
        if records and "text_pair" in records[0]:
            texts.append([record["text_pair"] for record in records])
        encoded = self.tokenizer.inner(*texts, truncation=True, max_length=self.settings.max_length)
        types = encoded.get("token_type_ids", ())
        self._check_end(encoded["input_ids"])
        for index, record in enumerate(records):
            sample = {"input_ids": ints(encoded["input_ids"][index] or [self.padding("input_ids")])}
            if types and (len(texts) > 1 or any(types[index])):  # XLNet's class token has a type of its own
                sample["token_type_ids"] = ints(types[index])
            if "label" in record:
                sample["labels"] = self._target(record["label"])
            yield sample

    def _check_end(self, ids: Sequence[Sequence[int]]) -> None:
        """Raise ConfigError if the tokenizer does not end texts with the token that the model classifies from."""
        end = self.tokenizer.inner.eos_token_id
        if self.facts.get("classifies_at_end") and any(end not in each for each in ids):
            raise ConfigError(
                "the model classifies from the end token of a text, and its tokenizer adds none",
                hint="use the tokenizer that the model was trained with, or set a post-processor in its tokenizer.json",
            )

    def _target(self, label: Any) -> Any:
        value = self._value(label)
        if self.problem == REGRESSION:
            return np.asarray([float(value)], dtype=np.float32)
        if self.problem == SINGLE:
            return ints([self._labels.index(value)])
        if self.facts.get("form") == MULTI_HOT:
            return np.asarray(value, dtype=np.float32)
        target = np.zeros(len(self.classes), dtype=np.float32)
        target[[self._labels.index(item) for item in value]] = 1
        return target

    def collate(self, samples: Sequence[Sample], keys: Sequence[int]) -> Batch:
        batch = super().collate(samples, keys)
        if "labels" in batch and self.problem != MULTI:
            batch["labels"] = batch["labels"][:, 0]
        return batch

    def configure(self, config: Any) -> None:
        super().configure(config)
        text = text_config(config)
        if getattr(text, "pad_token_id", None) in (None, -1):  # such as Gemma 3, which classifies by this one
            text.pad_token_id = self.tokenizer.inner.pad_token_id
        if config.model_type in ("mbart", "plbart") and config.pad_token_id == config.eos_token_id:
            raise ConfigError(
                f"{config.model_type} models find the end of a text by its padding, and pad_token_id is eos_token_id",
                hint="set another pad_token in the tokenizer, and pad_token_id in the model's config.json",
            )
        config.problem_type = _PROBLEM_TYPES[self.problem]
        if self.classes:
            name_classes(config, self.classes)
        else:
            config.num_labels = 1

    def count(self, batch: Batch) -> int:
        return batch["labels"].numel()

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        logits, labels = outputs.logits.float(), batch["labels"]
        if self.problem == REGRESSION:
            return functional.mse_loss(logits[:, 0], labels, reduction="sum")
        if self.problem == MULTI:
            return functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        return functional.cross_entropy(logits, labels, reduction="sum")

    @classmethod
    def score_names(cls, facts: Mapping[str, Any]) -> tuple[str, ...]:
        if facts["problem"] == REGRESSION:
            return "mse", "mae"
        return ("accuracy", "f1", "subset_accuracy") if facts["problem"] == MULTI else ("accuracy", "f1")

    def tally(self, outputs: Any, batch: Batch) -> Sums:
        logits, labels = outputs.logits.float(), batch["labels"]
        if self.problem == REGRESSION:
            error = (logits[:, 0] - labels).double()
            return {"squared": error.square().sum(), "absolute": error.abs().sum()}
        if self.problem == MULTI:
            predicted = (logits > 0).long()
            return {"hits": count_multi_hits(predicted, labels.long()), "exact": (predicted == labels).all(-1).sum()}
        return {"hits": count_hits(logits, labels)}

    def scores(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        count = sums["count"].item()
        if self.problem == REGRESSION:
            return {"mse": sums["squared"].item() / count, "mae": sums["absolute"].item() / count}
        right, wrong = sums["hits"][:, 0].sum().item(), sums["hits"][:, 1:].sum().item()
        # With one class per sample, count is the samples; with several, it is the classes of all samples.
        accuracy = right / count if self.problem == SINGLE else 1 - wrong / count
        scores = {"accuracy": accuracy, "f1": macro_f1(sums["hits"])}
        if self.problem == MULTI:
            scores["subset_accuracy"] = sums["exact"].item() / (count / len(self.classes))
        return scores

    def decode(self, outputs: Any, batch: Batch, records: Sequence[Record]) -> Iterator[dict[str, Any]]:
        for record, logits in zip(records, outputs.logits.float().cpu(), strict=True):
            if self.problem == REGRESSION:
                yield {**record, "value": logits[0].item()}
                continue
            probabilities = (logits.sigmoid() if self.problem == MULTI else logits.softmax(-1)).tolist()
            scores = dict(zip(self.classes, probabilities, strict=True))
            label: Any = max(scores, key=scores.__getitem__)
            if self.problem == MULTI:
                label = [name for name, probability in scores.items() if probability > 0.5]
            yield {**record, "label": label, "scores": scores}


def _no_such_labels(settings: DataSettings, problem: str, guess: str, labels: LabelSurvey) -> ConfigError:
    """Make the error for labels that the problem cannot have; it shows the first of them."""
    chosen = choose_columns(SequenceClassification.columns, settings)
    name = next(name for column, name in zip(chosen.columns, chosen.names, strict=True) if column.role == "label")
    message, hint = f"data.problem is {problem}, but column {name!r} has no such labels", f"set data.problem: {guess}"
    for row in read_rows(settings.train, [name], settings.csv):
        if row.values and row.values[0] is not None:
            message += f"; the first is {row.values[0]!r} ({row.where})"
            break
    if problem == REGRESSION and labels.have_decimal_commas:
        hint = "set data.csv.decimal: ',' if they have decimal commas, as it reads them in .csv files"
    return ConfigError(message, hint=f"{hint}, or name another column as data.label")


def _is_whole(name: str) -> bool:
    return is_number(name) and float(name).is_integer()


def _is_fraction(label: Any) -> bool:
    return any(
        isinstance(item, float) and not item.is_integer() for item in (label if isinstance(label, list) else [label])
    )
