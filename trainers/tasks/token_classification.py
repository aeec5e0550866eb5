"""Classification of tokens: the tag of every word of a text."""

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.arrow_samples import Sample
from outlast.trainers.data.columns import Column, ColumnType
from outlast.trainers.tasks.base import BERT_TEMPLATE, BERT_TOKENS, IGNORED, Batch, Record, Sums, TokenTask, ints
from outlast.trainers.tasks.class_scores import count_entities, count_hits, entity_scores, has_entities, macro_f1
from outlast.trainers.tasks.labels import (
    LabelIndex,
    head_labels,
    match_head,
    name_classes,
    note_classes,
    survey_classes,
)


class TokenClassification(TokenTask):
    """Predict the tag of every word. The first token of a word has the word's tag as label; the others have none.

    A word with the tag -100 has no label.
    """

    auto_class = "AutoModelForTokenClassification"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("tokens", ColumnType.TEXTS),
        Column("tags", ColumnType.LABELS, is_target=True, is_class=True),
    )
    special_tokens = BERT_TOKENS
    template = BERT_TEMPLATE
    options = ("labels",)
    version = 2

    def __init__(self, settings: DataSettings, tokenizer: Any, facts: Mapping[str, Any]) -> None:
        super().__init__(settings, tokenizer, facts)
        self.classes = facts["classes"]
        self._labels = LabelIndex(facts)
        self._has_entities = has_entities(self.classes)
        self._prefix = " " if needs_prefix_space(tokenizer.inner) else ""

    @classmethod
    def survey(cls, settings: DataSettings, records: Iterator[Record]) -> dict[str, Any]:
        return survey_classes(
            settings, "tags", {str(tag) for record in records for tag in record["tags"] if not _is_ignored(tag)}
        )

    @classmethod
    def model_facts(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        return head_labels(config, "ForTokenClassification")

    @classmethod
    def match_model(cls, settings: DataSettings, facts: dict[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
        return note_classes(match_head(settings, facts, model, "tags"))

    def fault(self, record: Record) -> str | None:
        words, tags = record["tokens"], record["tags"]
        if not words or len(words) != len(tags):
            return f"it has {len(words)} words but {len(tags)} tags"
        for index, word in enumerate(words):
            # Only marks, controls and separators may have no token; looking at the others would take long.
            if all(unicodedata.category(char)[0] in "MCZ" for char in word) and not self._has_tokens(word):
                return f"word {index} of it, {word!r}, has no token in this tokenizer, so its tag cannot be learned"
        labelled = [tag for tag in tags if not _is_ignored(tag)]
        return self._labels.fault(labelled, "tag") if labelled else "it has no tag to learn: all are -100"

    def _has_tokens(self, word: str) -> bool:
        given = [self._prefixed(word)]
        return bool(self.tokenizer.inner(given, is_split_into_words=True, add_special_tokens=False)["input_ids"])

    def _prefixed(self, word: str) -> str:
        return f"{self._prefix}{word}" if word and not word.startswith(" ") else word

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        for record, _, encoded in self._encoded(records):
            sample = {"input_ids": ints(encoded.ids)}
            if any(encoded.type_ids) and "token_type_ids" in self.tokenizer.inner.model_input_names:
                sample["token_type_ids"] = ints(encoded.type_ids)
            if "tags" in record:
                firsts, labels = _first_tokens(encoded.word_ids), ints([IGNORED] * len(encoded.ids))
                for word, position in firsts.items():
                    if not _is_ignored(tag := record["tags"][word]):
                        labels[position] = self._labels.index(tag)
                sample["labels"] = labels
            yield sample

    def _encoded(self, records: Sequence[Record]) -> Iterator[tuple[Record, list[str], Any]]:
        given = [record["tokens"] for record in records]
        words = [each.split() if isinstance(each, str) else each for each in given]
        encoded = self.tokenizer.inner(
            [[self._prefixed(word) for word in each] for each in words],
            is_split_into_words=True,
            truncation=True,
            max_length=self.settings.max_length,
        )
        yield from zip(records, words, encoded.encodings, strict=True)

    def configure(self, config: Any) -> None:
        super().configure(config)
        name_classes(config, self.classes)

    @classmethod
    def score_names(cls, facts: Mapping[str, Any]) -> tuple[str, ...]:
        classes = facts.get("classes")  # unknown before the rows are read
        entities = (
            ("entity_precision", "entity_recall", "entity_f1") if classes is None or has_entities(classes) else ()
        )
        return ("accuracy", "f1", *entities)

    def tally(self, outputs: Any, batch: Batch) -> Sums:
        sums = {"hits": count_hits(outputs.logits.flatten(0, 1), batch["labels"].flatten())}
        if self._has_entities:
            sums["entities"] = count_entities(outputs.logits.argmax(-1), batch["labels"], self.classes)
        return sums

    def scores(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        scores = {"accuracy": (sums["hits"][:, 0].sum() / sums["count"]).item(), "f1": macro_f1(sums["hits"])}
        return scores | (entity_scores(sums["entities"]) if self._has_entities else {})

    def decode(self, outputs: Any, batch: Batch, records: Sequence[Record]) -> Iterator[dict[str, Any]]:
        predicted = outputs.logits.argmax(-1).tolist()
        for (_, words, encoded), indices in zip(self._encoded(records), predicted, strict=True):
            tags = [None] * len(words)
            for word, position in _first_tokens(encoded.word_ids).items():
                tags[word] = self.classes[indices[position]]
            yield {"tokens": words, "tags": tags}


def needs_prefix_space(inner: Any) -> bool:
    """Check whether a tokenizer takes a single word for the inside of one unless a space precedes it.

    Such are byte-level BPEs, as of GPT-2, RoBERTa and Llama 3, without `add_prefix_space`. A space before each word
    does the same, also for those that have no such option.
    """
    if '"ByteLevel"' not in json.dumps(json.loads(inner.backend_tokenizer.to_str())["pre_tokenizer"]):
        return False
    words = ["the", "of", "a", "I", "1"]
    plain, spaced = (
        [inner([f"{space}{word}"], is_split_into_words=True, add_special_tokens=False)["input_ids"] for word in words]
        for space in ("", " ")
    )
    return plain != spaced


def _is_ignored(tag: Any) -> bool:
    return str(tag).strip() == str(IGNORED)


def _first_tokens(word_ids: Sequence[int | None]) -> dict[int, int]:
    """Return the position of each word's first token, by the word's index."""
    firsts: dict[int, int] = {}
    for position, word in enumerate(word_ids):
        if word is not None:
            firsts.setdefault(word, position)
    return firsts
