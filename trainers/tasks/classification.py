"""Classification of texts, text pairs and tokens. Regression is sequence classification with one number as target."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn import functional

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.arrow_samples import Sample
from outlast.trainers.data.columns import Column, ColumnType, name_of
from outlast.trainers.tasks.base import BERT_TEMPLATE, BERT_TOKENS, IGNORED, Batch, Record, Sums, Task, TokenTask, ints

SINGLE, MULTI, REGRESSION = "single-label", "multi-label", "regression"
_PROBLEM_TYPES = {
    SINGLE: "single_label_classification",
    MULTI: "multi_label_classification",
    REGRESSION: "regression",
}


def sort_classes(settings: DataSettings, role: str, names: Iterable[str]) -> list[str]:
    """Order class names by their class index: whole numbers by value, all others by name.

    Raises ConfigError for fewer than two classes.
    """
    classes = sorted(set(names), key=lambda name: (int(name), "") if name.isdecimal() else (-1, name))
    name = name_of(settings, role)
    if not classes:
        raise ConfigError(f"{settings.train} has no usable row, so no class of {name!r}", hint="add rows to it")
    if len(classes) < 2:
        raise ConfigError(
            f"{settings.train}: column {name!r} has only one class: {classes}; classification needs at least two",
            hint=f"add rows of another class, or name another column: -s data.{role}=…",
        )
    return classes


def name_classes(config: Any, classes: Sequence[str]) -> None:
    """Set the class names in a model's configuration."""
    config.id2label = dict(enumerate(classes))
    config.label2id = {label: index for index, label in enumerate(classes)}


def macro_f1(hits: torch.Tensor) -> float:
    """Compute the macro F1 over the classes that occur, as scikit-learn and torchmetrics do.

    `hits` holds true positives, false positives and false negatives, shape [classes, 3].
    """
    right, wrong = hits[:, 0], hits[:, 1:].sum(1)
    occurs = right + wrong > 0
    return (2 * right / (2 * right + wrong))[occurs].mean().item()


class SequenceClassification(Task):
    """Predict the class, the classes or the number of a text or text pair. A row is one sample, truncated."""

    auto_class = "AutoModelForSequenceClassification"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("text", ColumnType.TEXT),
        Column("label", ColumnType.VALUE, is_target=True),
        Column("text_pair", ColumnType.TEXT, is_optional=True),
    )
    options = ("problem",)
    template = ("$A", "$A <|endoftext|> $B")

    def __init__(self, settings: DataSettings, tokenizer: Any, facts: Mapping[str, Any]) -> None:
        super().__init__(settings, tokenizer, facts)
        self.problem, self.classes = facts["problem"], facts["classes"]
        self._indices = {name: index for index, name in enumerate(self.classes)}

    @classmethod
    def survey(cls, settings: DataSettings, records: Iterator[Record]) -> dict[str, Any]:
        kinds, labels = set(), set()
        for record in records:
            label = record["label"]
            kinds.add(list if isinstance(label, list) else type(label))
            if not isinstance(label, float):
                labels |= {str(item) for item in (label if isinstance(label, list) else [label])}
        guess = MULTI if kinds == {list} else REGRESSION if float in kinds and str not in kinds else SINGLE
        if guess is SINGLE and kinds == {str} and any("." in item for item in labels) and all(map(_is_number, labels)):
            guess = REGRESSION  # values of a .csv file are all texts
        problem = settings.problem or guess
        numbers = kinds & {int, float, bool} or (str in kinds and any(map(_is_number, labels)))
        if kinds and not {SINGLE: kinds & {str, int, bool}, MULTI: kinds & {list}, REGRESSION: numbers}[problem]:
            raise ConfigError(
                f"data.problem is {problem}, but column {name_of(settings, 'label')!r} has no such labels",
                hint=f"set data.problem: {guess}, or name another column as data.label",
            )
        facts: dict[str, Any] = {"problem": problem, "classes": []}
        if problem != REGRESSION:
            facts["classes"] = sort_classes(settings, "label", labels)
        if settings.problem is None and problem != SINGLE:
            facts["notes"] = [f"column {name_of(settings, 'label')!r} is used for {problem} (data.problem)"]
        return facts

    def fault(self, record: Record) -> str | None:
        label, name = record["label"], name_of(self.settings, "label")
        if self.problem == REGRESSION:
            return None if _is_number(label) else f"column {name!r} holds {label!r}, not a number"
        if isinstance(label, list) is not (self.problem == MULTI) or isinstance(label, float):
            return f"column {name!r} holds {label!r}, not {'a list of classes' if self.problem == MULTI else 'a class'}"
        labels = map(str, label if isinstance(label, list) else [label])
        unknown = [item for item in labels if item not in self._indices]
        return f"label {unknown[0]!r} is in the evaluation data but not in the training data" if unknown else None

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        texts = [[record["text"] for record in records]]
        if records and "text_pair" in records[0]:
            texts.append([record["text_pair"] for record in records])
        encoded = self.tokenizer.inner(*texts, truncation=True, max_length=self.settings.max_length)
        types = encoded.get("token_type_ids", ())
        for index, record in enumerate(records):
            sample = {"input_ids": ints(encoded["input_ids"][index] or [self.padding("input_ids")])}
            if types and (len(texts) > 1 or any(types[index])):  # XLNet's class token has a type of its own
                sample["token_type_ids"] = ints(types[index])
            if "label" in record:
                sample["labels"] = self._target(record["label"])
            yield sample

    def _target(self, label: Any) -> Any:
        if self.problem == REGRESSION:
            return np.asarray([float(label)], dtype=np.float32)
        if self.problem == SINGLE:
            return ints([self._indices[str(label)]])
        target = np.zeros(len(self.classes), dtype=np.float32)
        target[[self._indices[str(item)] for item in label]] = 1
        return target

    def collate(self, samples: Sequence[Sample], keys: Sequence[int]) -> Batch:
        batch = super().collate(samples, keys)
        if "labels" in batch and self.problem != MULTI:
            batch["labels"] = batch["labels"][:, 0]
        return batch

    def configure(self, config: Any) -> None:
        super().configure(config)
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
        return ("mse", "mae") if facts["problem"] == REGRESSION else ("accuracy", "f1")

    def tally(self, outputs: Any, batch: Batch) -> Sums:
        logits, labels = outputs.logits.float(), batch["labels"]
        if self.problem == REGRESSION:
            error = (logits[:, 0] - labels).double()
            return {"squared": error.square().sum(), "absolute": error.abs().sum()}
        from torchmetrics.functional.classification import multilabel_stat_scores

        if self.problem == MULTI:
            # torchmetrics would take logits that are all in [0, 1] for probabilities.
            predicted = (logits > 0).long()
            return {"hits": _hits(multilabel_stat_scores(predicted, labels.long(), len(self.classes), average=None))}
        return {"hits": count_hits(logits, labels)}

    def scores(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        count = sums["count"].item()
        if self.problem == REGRESSION:
            return {"mse": sums["squared"].item() / count, "mae": sums["absolute"].item() / count}
        right, wrong = sums["hits"][:, 0].sum().item(), sums["hits"][:, 1:].sum().item()
        # With one class per sample, count is the samples; with several, it is the classes of all samples.
        accuracy = right / count if self.problem == SINGLE else 1 - wrong / count
        return {"accuracy": accuracy, "f1": macro_f1(sums["hits"])}

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


class TokenClassification(TokenTask):
    """Predict the tag of every word. The first token of a word has the word's tag as label; the others have none."""

    auto_class = "AutoModelForTokenClassification"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("tokens", ColumnType.TEXTS),
        Column("tags", ColumnType.LABELS, is_target=True),
    )
    special_tokens = BERT_TOKENS
    template = BERT_TEMPLATE

    def __init__(self, settings: DataSettings, tokenizer: Any, facts: Mapping[str, Any]) -> None:
        super().__init__(settings, tokenizer, facts)
        self.classes = facts["classes"]
        self._indices = {name: index for index, name in enumerate(self.classes)}

    @classmethod
    def survey(cls, settings: DataSettings, records: Iterator[Record]) -> dict[str, Any]:
        return {"classes": sort_classes(settings, "tags", (str(tag) for record in records for tag in record["tags"]))}

    def fault(self, record: Record) -> str | None:
        words, tags = record["tokens"], record["tags"]
        if not words or len(words) != len(tags):
            return f"it has {len(words)} words but {len(tags)} tags"
        unknown = [tag for tag in map(str, tags) if tag not in self._indices]
        return f"tag {unknown[0]!r} is in the evaluation data but not in the training data" if unknown else None

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        for record, _, encoded in self._encoded(records):
            sample = {"input_ids": ints(encoded.ids)}
            if any(encoded.type_ids) and "token_type_ids" in self.tokenizer.inner.model_input_names:
                sample["token_type_ids"] = ints(encoded.type_ids)
            if "tags" in record:
                firsts, labels = _first_tokens(encoded.word_ids), ints([IGNORED] * len(encoded.ids))
                for word, position in firsts.items():
                    labels[position] = self._indices[str(record["tags"][word])]
                sample["labels"] = labels
            yield sample

    def _encoded(self, records: Sequence[Record]) -> Iterator[tuple[Record, list[str], Any]]:
        given = [record["tokens"] for record in records]
        words = [each.split() if isinstance(each, str) else each for each in given]
        encoded = self.tokenizer.inner(
            words, is_split_into_words=True, truncation=True, max_length=self.settings.max_length
        )
        yield from zip(records, words, encoded.encodings, strict=True)

    def configure(self, config: Any) -> None:
        super().configure(config)
        name_classes(config, self.classes)

    @classmethod
    def score_names(cls, facts: Mapping[str, Any]) -> tuple[str, ...]:
        return ("accuracy", "f1")

    def tally(self, outputs: Any, batch: Batch) -> Sums:
        return {"hits": count_hits(outputs.logits.flatten(0, 1), batch["labels"].flatten())}

    def scores(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return {"accuracy": (sums["hits"][:, 0].sum() / sums["count"]).item(), "f1": macro_f1(sums["hits"])}

    def decode(self, outputs: Any, batch: Batch, records: Sequence[Record]) -> Iterator[dict[str, Any]]:
        predicted = outputs.logits.argmax(-1).tolist()
        for (_, words, encoded), indices in zip(self._encoded(records), predicted, strict=True):
            tags = [None] * len(words)
            for word, position in _first_tokens(encoded.word_ids).items():
                tags[word] = self.classes[indices[position]]
            yield {"tokens": words, "tags": tags}


def count_hits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Count true positives, false positives and false negatives, shape [classes, 3]. Labels of -100 do not count."""
    from torchmetrics.functional.classification import multiclass_stat_scores

    num_classes = logits.shape[-1]
    stat_scores = multiclass_stat_scores(logits.argmax(-1), labels, num_classes, average=None, ignore_index=IGNORED)
    return _hits(stat_scores)


def _hits(stat_scores: torch.Tensor) -> torch.Tensor:
    return stat_scores[:, [0, 1, 3]]


def _first_tokens(word_ids: Sequence[int | None]) -> dict[int, int]:
    """Return the position of each word's first token, by the word's index."""
    firsts: dict[int, int] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            firsts.setdefault(word, position)
    return firsts


def _is_number(value: Any) -> bool:
    if isinstance(value, list):
        return False
    try:
        return bool(np.isfinite(float(value)))
    except ValueError:
        return False
