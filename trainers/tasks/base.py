"""Tasks: from a row to samples, from samples to a batch, and from logits to `(loss_sum, count)` and scores.

The model's own `outputs.loss` is not used: most heads average over the micro-batch, and an average of averages is not
the average over the global batch when counts differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.data.arrow_samples import Sample, in_batches
from outlast.trainers.data.columns import Column

if TYPE_CHECKING:
    from outlast.trainers.config.data import DataSettings
    from outlast.trainers.data.tokenizer import Tokenizer

#: A row of the data by role, such as {"text": "…", "label": 3}.
Record = Mapping[str, Any]
#: Tensors on the host, the first dimension counting samples.
Batch = dict[str, torch.Tensor]
#: Sums over samples. Those of whole numbers are exact in any order; floating-point ones are added in a fixed order.
Sums = dict[str, torch.Tensor]

IGNORED = -100
PREDICT_BATCH = 16


class Task:
    """What the model learns to do. Derive from it for a task of your own, and name that as `package.module:Class`.

    The least that a task says: `auto_class`, `columns`, `encode`, `count`, `loss`, and `decode` for `outlast try`.

    Args:
        settings: The run's settings under `data:`.
        tokenizer: The run's tokenizer.
        facts: What `survey` found in the training data.
    """

    #: Name of the class in transformers that carries the head: an Auto class, or that of a model.
    auto_class: ClassVar[str]
    #: Classes for model types that no Auto class maps, by `model_type`.
    exact_classes: ClassVar[Mapping[str, str]] = {}
    #: What is read of a row.
    columns: ClassVar[tuple[Column, ...]]
    #: Settings under `data:`, besides columns and `max_length`, that decide samples or batches.
    options: ClassVar[tuple[str, ...]] = ()
    #: What of a batch the model is not given.
    targets: ClassVar[tuple[str, ...]] = ("labels",)
    #: Whether the samples of all rows are joined and cut into pieces of `max_length`. They hold `input_ids` only.
    packs: ClassVar[bool] = False
    #: Special tokens of a tokenizer that is trained on the data, by their names in transformers.
    special_tokens: ClassVar[Mapping[str, str]] = {}
    #: How such a tokenizer frames one text and two, as `tokenizers` writes templates; none for bare text.
    template: ClassVar[tuple[str, str] | None] = None
    #: Raise it when `encode` changes: prepared data of another version is not taken.
    version: ClassVar[int] = 1

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> None:
        self.settings, self.tokenizer, self.facts = settings, tokenizer, facts

    # -- rows and samples ----------------------------------------------------------------------------------------------

    @classmethod
    def survey(cls, settings: DataSettings, records: Iterator[Record]) -> dict[str, Any]:
        """What must be known of all training rows before the first is encoded, such as the classes. Plain JSON."""
        return {}

    def fault(self, record: Record) -> str | None:
        """Why a row cannot be used though each of its columns holds what it should."""
        return None

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        """The samples of some rows, in order; those of a row follow from that row alone. Rows that are to be predicted
        lack their targets.
        """
        raise NotImplementedError

    def collate(self, samples: Sequence[Sample], keys: Sequence[int]) -> Batch:
        """Samples as one batch, padded to the longest.

        Args:
            samples: As `encode` made them.
            keys: For each sample 64 bits that follow from (seed, epoch, sample), and from nothing else.
        """
        batch = {name: pad([sample[name] for sample in samples], self.padding(name)) for name in samples[0]}
        batch["attention_mask"] = mask([len(sample["input_ids"]) for sample in samples])
        return batch

    def padding(self, name: str) -> int:
        """What the vectors of this name are padded with."""
        if name == "input_ids":
            number = self.tokenizer.inner.pad_token_id
            if number is None:
                hint = "give it one: tokenizer.pad_token = …, then save_pretrained into model.path (or tokenizer.path)"
                raise ConfigError("the tokenizer has neither a padding token nor an end token", hint=hint)
            return int(number)
        return IGNORED if name == "labels" else 0

    # -- the head ------------------------------------------------------------------------------------------------------

    def configure(self, config: Any) -> None:
        """Puts into the model's configuration what its head follows from, such as the number of classes."""
        if config.pad_token_id is None:  # GPT-2 reads the last token that is no padding
            config.pad_token_id = self.tokenizer.inner.pad_token_id

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """The model's outputs; it is given everything but the targets."""
        return model(**{name: value for name, value in batch.items() if name not in self.targets})

    def count(self, batch: Batch) -> int:
        """How many terms the loss of this batch sums over."""
        return len(batch["labels"])

    def num_tokens(self, batch: Batch) -> int:
        """How many tokens the model reads in this batch, without padding; 0 where that means nothing. For people."""
        if (mask := batch.get("attention_mask")) is not None:
            return int(mask.sum())
        return batch["input_ids"].numel() if "input_ids" in batch else 0

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """The sum (not the mean) of the loss over the batch, a float32 scalar."""
        raise NotImplementedError

    def loss_sum(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of a forward pass."""
        return self.loss(self.forward(model, batch), batch)

    # -- scores --------------------------------------------------------------------------------------------------------

    @classmethod
    def score_names(cls, facts: Mapping[str, Any]) -> tuple[str, ...]:
        """What `scores` finds besides the loss."""
        return ()

    def tally(self, outputs: Any, batch: Batch) -> Sums:
        """Sums that the scores follow from. Of the same names and shapes for every batch."""
        return {}

    def scores(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """The scores of a whole data set, from the sums over it."""
        return {}

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        """The sums of a batch: `loss`, `count` and the tally."""
        outputs = self.forward(model, batch)
        return {
            "loss": self.loss(outputs, batch).double(),
            "count": torch.tensor(self.count(batch)),
            **self.tally(outputs, batch),
        }

    # -- prediction ----------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
        """What the model makes of rows without targets, one answer each, as plain JSON."""
        for part in in_batches(records, PREDICT_BATCH):
            batch = self.collate(list(self.encode(part)), [0] * len(part))
            device = next(model.parameters()).device
            outputs = self.forward(model, {name: value.to(device) for name, value in batch.items()})
            yield from self.decode(outputs, batch, part)

    def decode(self, outputs: Any, batch: Batch, records: Sequence[Record]) -> Iterator[dict[str, Any]]:
        """The answers to a batch, one for each row. Raises ConfigError in a task that does not define it."""
        raise ConfigError(
            f"{type(self).__name__} cannot answer: it has no decode", hint="define `decode`; see outlast.trainers.Task"
        )


def pad(vectors: Sequence[npt.NDArray[Any]], value: float) -> torch.Tensor:
    """The vectors as rows of a matrix, of int64 or float32, shape [vectors, longest]."""
    longest = max(map(len, vectors))
    whole = np.issubdtype(vectors[0].dtype, np.integer)
    matrix = np.full((len(vectors), longest), value, dtype=np.int64 if whole else np.float32)
    for row, vector in zip(matrix, vectors, strict=True):
        row[: len(vector)] = vector
    return torch.from_numpy(matrix)


def mask(lengths: Sequence[int]) -> torch.Tensor:
    """1 for the first so many of each row, then 0; int64, shape [lengths, longest]."""
    return torch.from_numpy((np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64))


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The sum of the loss of each place's logits for the label in the next place.

    Args:
        logits: Shape [samples, length, vocabulary].
        labels: Shape [samples, length]; the first place is nobody's next, and IGNORED ones do not count.
    """
    # The labels move, not the logits: cutting off the last place would copy what is often the step's largest tensor.
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED
    )


def ints(values: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """The numbers as a column of a sample."""
    return np.asarray(values, dtype=np.int32)


class TokenTask(Task):
    """A task with a label for each token, `IGNORED` where there is none, scored by the share of labels that are met."""

    def count(self, batch: Batch) -> int:
        return int((batch["labels"] != IGNORED).sum())

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        logits = outputs.logits.float().flatten(0, 1)
        return functional.cross_entropy(logits, batch["labels"].flatten(), reduction="sum", ignore_index=IGNORED)

    @classmethod
    def score_names(cls, facts: Mapping[str, Any]) -> tuple[str, ...]:
        return ("accuracy",)

    def tally(self, outputs: Any, batch: Batch) -> Sums:
        return {"right": (outputs.logits.argmax(-1) == batch["labels"]).sum()}

    def scores(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        return {"accuracy": (sums["right"] / sums["count"]).item()}


#: What frames texts for an encoder: one, and two.
BERT_TEMPLATE = ("<|cls|> $A <|sep|>", "<|cls|> $A <|sep|> $B:1 <|sep|>:1")


BERT_TOKENS = {"pad_token": "<|pad|>", "cls_token": "<|cls|>", "sep_token": "<|sep|>", "mask_token": "<|mask|>"}
