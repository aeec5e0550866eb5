"""Multiple choice: which of several texts fits best; with a language-model head as well for GPT and GPT-2."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.arrow_samples import Sample
from outlast.trainers.data.columns import Column, ColumnType, name_of
from outlast.trainers.tasks.base import BERT_TEMPLATE, BERT_TOKENS, IGNORED, Batch, Record, Sums, Task, ints, mask, pad
from outlast.trainers.tasks.labels import with_notes


class MultipleChoice(Task):
    """Predict which of the choices fits the text. Every row has the same number of choices."""

    auto_class = "AutoModelForMultipleChoice"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("text", ColumnType.TEXT),
        Column("choices", ColumnType.TEXTS),
        Column("label", ColumnType.LABEL, is_target=True),
    )
    special_tokens = BERT_TOKENS
    template: ClassVar[tuple[str, str] | None] = BERT_TEMPLATE
    version: ClassVar[int] = 2

    @classmethod
    def survey(cls, settings: DataSettings, records: Iterator[Record]) -> dict[str, Any]:
        counts, fitting = Counter[int](), Counter(dict.fromkeys(_FORMS, 0))
        for record in records:
            counts[len(record["choices"])] += 1
            fitting.update(form for form in _FORMS if _right(record, form) is not None)
        [(num_choices, _)] = counts.most_common(1) or [(0, 0)]
        if num_choices < 2:
            name = name_of(settings, "choices")
            raise ConfigError(
                f"{settings.train}: column {name!r} has {num_choices} choices in most rows; at least two are needed",
                hint="give rows with two or more choices, or name another column: -s data.choices=…",
            )
        form = max(_FORMS, key=fitting.__getitem__)
        column = name_of(settings, "label")
        notes = [f"column {column!r} holds letters: A is the first choice"] if form == "letter" else []
        return with_notes({"num_choices": num_choices, "form": form}, notes)

    def fault(self, record: Record) -> str | None:
        choices, num_choices = record["choices"], self.facts["num_choices"]
        if len(choices) != num_choices:
            return f"it has {len(choices)} choices, not {num_choices}"
        if self._right(record) is not None:
            return None
        if choices.count(record["label"]) > 1:
            return f"label {record['label']!r} is more than one of the choices"
        return f"label {record['label']!r} is not one of the choices" + _WHERE[self.facts.get("form", "text")]

    def _right(self, record: Record) -> int | None:
        return _right(record, self.facts.get("form"))

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        """Encode the choices of a row one after the other, with the length of each."""
        for record in records:
            texts = [record["text"]] * len(record["choices"])
            encoded = self.tokenizer.inner(
                texts, list(record["choices"]), truncation=True, max_length=self.settings.max_length
            )
            yield self._sample(record, encoded["input_ids"], encoded.get("token_type_ids"))

    def _sample(self, record: Record, ids: list[list[int]], types: list[list[int]] | None) -> Sample:
        sample = {"input_ids": ints([*chain(*ids)]), "lengths": ints([len(choice) for choice in ids])}
        if types is not None:
            sample["token_type_ids"] = ints([*chain(*types)])
        if "label" in record and (right := self._right(record)) is not None:
            sample["labels"] = ints([right])
        return sample

    def collate(self, samples: Sequence[Sample], keys: Sequence[int]) -> Batch:
        lengths = [length for sample in samples for length in sample["lengths"].tolist()]
        shape = (len(samples), len(samples[0]["lengths"]), max(lengths))
        batch = {"attention_mask": mask(lengths).view(shape)}
        for name in ("input_ids", "token_type_ids"):
            if name in samples[0]:
                flat = np.concatenate([sample[name] for sample in samples])
                batch[name] = pad(np.split(flat, np.cumsum(lengths)[:-1]), self.padding(name)).view(shape)
        if "labels" in samples[0]:
            batch["labels"] = torch.tensor([int(sample["labels"][0]) for sample in samples])
        return batch

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        return functional.cross_entropy(self.choice_logits(outputs), batch["labels"], reduction="sum")

    def choice_logits(self, outputs: Any) -> torch.Tensor:
        """Return the logit of each choice, float32, shape [samples, choices]."""
        logits: torch.Tensor = outputs.logits.float()
        return logits

    @classmethod
    def score_names(cls, facts: Mapping[str, Any]) -> tuple[str, ...]:
        return ("accuracy",)

    def tally(self, outputs: Any, batch: Batch) -> Sums:
        return {"right": (self.choice_logits(outputs).argmax(-1) == batch["labels"]).sum()}

    def scores(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return {"accuracy": (sums["right"] / sums["count"]).item()}

    def decode(self, outputs: Any, batch: Batch, records: Sequence[Record]) -> Iterator[dict[str, Any]]:
        for record, logits in zip(records, self.choice_logits(outputs).cpu(), strict=True):
            probabilities = logits.softmax(-1).tolist()
            best = max(range(len(probabilities)), key=probabilities.__getitem__)
            yield {**record, "label": best, "choice": record["choices"][best], "scores": probabilities}


class DoubleHeads(MultipleChoice):
    """Multiple choice plus language modelling of the right choice: the double-heads models of GPT and GPT-2.

    The loss of a sample is the choice loss plus the mean language-model loss over the tokens of the right text. So it
    does not depend on the other samples of the batch; the model's own loss averages over the tokens of the batch.
    """

    auto_class = ""  # no Auto class maps these models
    exact_classes: ClassVar = {"gpt2": "GPT2DoubleHeadsModel", "openai-gpt": "OpenAIGPTDoubleHeadsModel"}
    special_tokens: ClassVar = {}
    template = None
    targets = ("labels", "words")

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        """Encode text, choice and end token; the choice is classified at the end token."""
        inner = self.tokenizer.inner
        end = inner.eos_token_id if inner.eos_token_id is not None else inner.pad_token_id
        if end is None:
            raise ConfigError(
                "the tokenizer has neither an end token nor a padding token, which double-heads needs after a choice",
                hint="set an eos_token in its tokenizer_config.json",
            )
        for record in records:
            texts = [f"{record['text']} {choice}" for choice in record["choices"]]
            length = self.settings.max_length - 1
            encoded = inner(texts, truncation=True, max_length=length, add_special_tokens=False)["input_ids"]
            yield self._sample(record, [[*ids, end] for ids in encoded], None)

    def collate(self, samples: Sequence[Sample], keys: Sequence[int]) -> Batch:
        batch = super().collate(samples, keys)
        batch["mc_token_ids"] = batch["attention_mask"].sum(-1) - 1
        if "labels" in batch:
            right = torch.arange(batch["input_ids"].shape[1]) == batch["labels"][:, None]
            is_word = right[:, :, None] & (batch["attention_mask"] == 1)
            batch["words"] = torch.where(is_word, batch["input_ids"], IGNORED)
        return batch

    def configure(self, config: Any) -> None:
        super().configure(config)
        config.num_labels = 1

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        flat = {**batch, "attention_mask": batch["attention_mask"].flatten(0, 1)}  # GPT expects one row for each text
        return super().forward(model, flat)

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        words = batch["words"][..., 1:]
        logits = outputs.logits[..., :-1, :].float()
        losses = functional.cross_entropy(logits.flatten(0, 2), words.flatten(), reduction="none", ignore_index=IGNORED)
        num_words = (words != IGNORED).sum((1, 2)).clamp(min=1)
        return super().loss(outputs, batch) + (losses.view(words.shape).sum((1, 2)) / num_words).sum()

    def choice_logits(self, outputs: Any) -> torch.Tensor:
        logits: torch.Tensor = outputs.mc_logits.float()
        return logits


#: What a label may be, the likeliest first: a column has one form, so that "1" is not a text here and an index there.
_FORMS = ("text", "index", "letter")
_WHERE = {"text": "", "index": ", which are counted from 0", "letter": ", which are A, B and so on"}


def _right(record: Record, form: str | None) -> int | None:
    """Return the index of the right choice; None if the label is not one of the choices."""
    label, choices = record["label"], record["choices"]
    if form is None:  # data of earlier releases
        return _right(record, "text") if label in choices else _right(record, "index")
    if form == "text":
        return list(choices).index(label) if choices.count(label) == 1 else None
    text = str(label)
    if form == "index":
        index = int(text) if text.isdecimal() else len(choices)
    else:
        index = ord(text.upper()) - ord("A") if len(text) == 1 and text.isascii() and text.isalpha() else len(choices)
    return index if index < len(choices) else None
