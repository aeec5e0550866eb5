"""Base class of tasks: rows to samples, samples to a batch, logits to `(loss_sum, count)` and scores.

A task never uses the model's own `outputs.loss`: most heads average over the micro-batch, and an average of averages is
not the average over the global batch when counts differ.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.data import DataSettings
from outlast.trainers.config.task_table import TASKS
from outlast.trainers.data.arrow_samples import Sample, in_batches
from outlast.trainers.data.columns import Column, RowForm
from outlast.trainers.data.tokenizer import Tokenizer
from outlast.trainers.tasks.model_inputs import run_model
from outlast.trainers.user_code import import_object

#: A row of the data, keyed by role, such as {"text": "…", "label": 3}.
Record = Mapping[str, Any]
#: Tensors on the host; the first dimension is the sample.
Batch = dict[str, torch.Tensor]
#: Sums over samples. Integer sums are exact in any order; floating-point sums are added in a fixed order.
Sums = dict[str, torch.Tensor]

IGNORED = -100
PREDICT_BATCH = 16


class Task:
    """Base class of tasks. Derive a task of your own from it and set `model.task: package.module:Class`.

    A task defines at least `auto_class`, `columns`, `encode`, `count` and `loss`; `outlast try` also needs `decode`.

    Args:
        settings: The run's settings under `data:`.
        tokenizer: The run's tokenizer.
        facts: The result of `survey` on the training data.
    """

    #: Name of the transformers class with the task's head: an Auto class or a model class.
    auto_class: ClassVar[str]
    #: Model classes for types that no Auto class maps, by `model_type`.
    exact_classes: ClassVar[Mapping[str, str]] = {}
    #: Columns read from each row.
    columns: ClassVar[tuple[Column, ...]]
    #: Other forms of rows that the task reads.
    forms: ClassVar[tuple[RowForm, ...]] = ()
    #: Settings under `data:`, besides columns and `max_length`, that affect samples or batches.
    options: ClassVar[tuple[str, ...]] = ()
    #: Names in a batch that are not passed to the model.
    targets: ClassVar[tuple[str, ...]] = ("labels",)
    #: Whether the samples of all rows are joined and cut into pieces of `max_length`; they then have `input_ids` only.
    packs: bool = False
    #: Whether `encode` splits a long row into several samples, or leaves one out, instead of truncating it.
    splits: ClassVar[bool] = False
    #: Special tokens for a tokenizer trained on the data, by their names in transformers.
    special_tokens: ClassVar[Mapping[str, str]] = {}
    #: Templates of `tokenizers` for one text and for a pair, for such a tokenizer; None adds no special tokens.
    template: ClassVar[tuple[str, str] | None] = None
    #: Increase it when `encode` changes: only a run that was started with another version reuses its prepared data.
    version: ClassVar[int] = 1

    def __init__(self, settings: DataSettings, tokenizer: Tokenizer, facts: Mapping[str, Any]) -> None:
        self.settings, self.tokenizer, self.facts = settings, tokenizer, facts

    @classmethod
    def all_columns(cls) -> list[Column]:
        """Return the columns of all forms of rows."""
        return [*cls.columns, *(column for form in cls.forms for column in form.columns)]

    # -- rows and samples ----------------------------------------------------------------------------------------------

    @classmethod
    def survey(cls, settings: DataSettings, records: Iterator[Record]) -> dict[str, Any]:
        """Collect facts about all training rows that encoding needs, such as the classes. Returns plain JSON."""
        return {}

    @classmethod
    def data_version(cls, settings: DataSettings, load_tokenizer: Callable[[], Tokenizer | None]) -> int:
        """Return `version`, or another one if only these settings and this tokenizer get other samples than before.

        `load_tokenizer` returns None for a tokenizer that is trained on the data.
        """
        return cls.version

    @classmethod
    def model_facts(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return what encoding depends on in the pretrained model's `config.json`, as plain JSON."""
        return {}

    @classmethod
    def match_model(cls, settings: DataSettings, facts: dict[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
        """Match the result of `survey` with that of `model_facts`, such as the order of the classes."""
        return facts

    def fault(self, record: Record) -> str | None:
        """Return why a row is unusable although each of its columns has the right type; None if it is usable."""
        return None

    def encode(self, records: Sequence[Record]) -> Iterator[Sample]:
        """Encode rows to samples, in order. The samples of a row must depend on that row only.

        Rows for prediction have no targets.
        """
        raise NotImplementedError

    def collate(self, samples: Sequence[Sample], keys: Sequence[int]) -> Batch:
        """Collate samples to one batch, padded to the longest.

        Args:
            samples: Samples from `encode`.
            keys: 64 bits for each sample, a function of (seed, epoch, sample) only: the seed of its randomness.
        """
        batch = {name: pad([sample[name] for sample in samples], self.padding(name)) for name in samples[0]}
        batch["attention_mask"] = mask([len(sample["input_ids"]) for sample in samples])
        return batch

    def padding(self, name: str) -> int:
        """Return the padding value of the vectors of this name."""
        if name == "input_ids":
            token_id = self.tokenizer.inner.pad_token_id
            if token_id is None:
                hint = "set tokenizer.pad_token = …, then save_pretrained into model.path (or tokenizer.path)"
                raise ConfigError("the tokenizer has neither a padding token nor an end token", hint=hint)
            return int(token_id)
        return IGNORED if name == "labels" else 0

    # -- the head ------------------------------------------------------------------------------------------------------

    @classmethod
    def unsupported_reason(cls, config: Any) -> str | None:
        """Return why models of this transformers configuration cannot learn the task; None if they can."""
        return None

    def configure_generation(self, config: Any) -> None:
        """Set what the model needs in its generation configuration; nothing by default."""

    def configure(self, config: Any) -> None:
        """Set what the head needs in the model's configuration, such as the number of classes."""
        text = config if hasattr(config, "pad_token_id") else getattr(config, "text_config", config)
        given = getattr(text, "pad_token_id", None)
        # GPT-2 classifies from the last token that is not padding. A negative id is not in the embedding.
        if given is None or (given < 0 and not self.packs):
            text.pad_token_id = self.tokenizer.inner.pad_token_id

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model on the batch without its targets. Returns the model's outputs."""
        return run_model(model, {name: value for name, value in batch.items() if name not in self.targets})

    def count(self, batch: Batch) -> int:
        """Count the terms in the loss sum of this batch."""
        return len(batch["labels"])

    def num_tokens(self, batch: Batch) -> int:
        """Count the tokens of this batch without padding; 0 where there are none. For throughput figures only."""
        if (mask := batch.get("attention_mask")) is not None:
            return int(mask.sum())
        return batch["input_ids"].numel() if "input_ids" in batch else 0

    def loss(self, outputs: Any, batch: Batch) -> torch.Tensor:
        """Compute the sum (not the mean) of the loss over the batch, a float32 scalar."""
        raise NotImplementedError

    def loss_sum(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Run a forward pass and return its loss sum."""
        return self.loss(self.forward(model, batch), batch)

    # -- scores --------------------------------------------------------------------------------------------------------

    @classmethod
    def score_names(cls, facts: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the names of the metrics that `scores` computes besides the loss."""
        return ()

    def tally(self, outputs: Any, batch: Batch) -> Sums:
        """Compute the sums that the scores are made from; names and shapes are the same for every batch."""
        return {}

    def scores(self, sums: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """Compute the scores of a data set from the sums over it."""
        return {}

    def measure(self, model: nn.Module, batch: Batch) -> Sums:
        """Evaluate a batch. Returns the sums `loss`, `count` and those of `tally`."""
        outputs = self.forward(model, batch)
        return {
            "loss": self.loss(outputs, batch).double(),
            "count": torch.tensor(self.count(batch)),
            **self.tally(outputs, batch),
        }

    # -- prediction ----------------------------------------------------------------------------------------------------

    def predict(self, model: nn.Module, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
        """Predict rows without targets. Yields one plain JSON object for each row."""
        for rows in in_batches(records, PREDICT_BATCH):
            batch = self.collate(list(self.encode(rows)), [0] * len(rows))
            device = next(model.parameters()).device
            outputs = self.forward(model, {name: value.to(device) for name, value in batch.items()})
            yield from self.decode(outputs, batch, rows)

    def decode(self, outputs: Any, batch: Batch, records: Sequence[Record]) -> Iterator[dict[str, Any]]:
        """Decode the outputs of a batch, one prediction for each row. Raises ConfigError unless the task defines it."""
        raise ConfigError(
            f"task {type(self).__name__} cannot predict: it has no decode method",
            hint="define `decode`; see outlast.trainers.Task",
        )


def find_task(name: str) -> type[Task]:
    """Return the class of a task.

    Raises ConfigError if it does not exist, is not a subclass of Task, or lacks a required attribute.
    """
    task = import_object(TASKS.get(name, name), "model.task")
    if not (isinstance(task, type) and issubclass(task, Task)):
        hint = "derive the class from outlast.trainers.Task"
        raise ConfigError(f"model.task {name!r} is not a subclass of Task", hint=hint)
    defined = {attribute: hasattr(task, attribute) for attribute in ("auto_class", "columns")}
    defined |= {method: getattr(task, method) is not getattr(Task, method) for method in ("encode", "loss")}
    if missing := [attribute for attribute, is_defined in defined.items() if not is_defined]:
        raise ConfigError(f"model.task {name} does not define {', '.join(missing)}", hint="see outlast.trainers.Task")
    return task


def require_fast(tokenizer: Tokenizer, what: str) -> None:
    """Raise ConfigError unless the tokenizer gives the characters that each token stands for."""
    if not tokenizer.inner.is_fast:
        raise ConfigError(
            f"{what} needs a tokenizer of the library `tokenizers`, and {type(tokenizer.inner).__name__} is none",
            hint="name one that has a tokenizer.json: model.tokenizer.path",
        )


def begins_late(what: str, is_learned: Sequence[bool], settings: DataSettings) -> str:
    """Return the error text of a row whose learned tokens, marked as such, begin after `data.max_length`."""
    first = next((number for number, is_one in enumerate(is_learned[1:], 2) if is_one), None)
    if first is None:
        return f"its {what} has no token"
    return f"its {what} begins at token {first}: set data.max_length, which is {settings.max_length}, to more"


def pad(vectors: Sequence[npt.NDArray[Any]], value: float) -> torch.Tensor:
    """Pad vectors to a matrix of int64 or float32, shape [vectors, longest]."""
    longest = max(map(len, vectors))
    is_integer = np.issubdtype(vectors[0].dtype, np.integer)
    matrix = np.full((len(vectors), longest), value, dtype=np.int64 if is_integer else np.float32)
    for row, vector in zip(matrix, vectors, strict=True):
        row[: len(vector)] = vector
    return torch.from_numpy(matrix)


def mask(lengths: Sequence[int]) -> torch.Tensor:
    """Make an attention mask: row `i` has `lengths[i]` ones, then zeros; int64, shape [lengths, longest]."""
    return torch.from_numpy((np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64))


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the loss sum of predicting each next token.

    Args:
        logits: Shape [samples, length, vocabulary].
        labels: Shape [samples, length]; the first position is not predicted, and IGNORED labels do not count.
    """
    # Shift the labels, not the logits: slicing the logits would copy what is often the largest tensor of the step.
    targets = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=IGNORED
    )


def ints(values: Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """Convert values to an int32 vector of a sample."""
    return np.asarray(values, dtype=np.int32)


class TokenTask(Task):
    """Base class of tasks with one label per token (`IGNORED` where there is none), scored by accuracy."""

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


#: Templates of an encoder's tokenizer for one text and for a pair.
BERT_TEMPLATE = ("<|cls|> $A <|sep|>", "<|cls|> $A <|sep|> $B:1 <|sep|>:1")
BERT_TOKENS = {"pad_token": "<|pad|>", "cls_token": "<|cls|>", "sep_token": "<|sep|>", "mask_token": "<|mask|>"}
