"""Settings of data."""

from __future__ import annotations

import re
from enum import Enum
from typing import Any, Literal

from pydantic import Field, field_validator

from outlast.trainers.config.base import Settings


class PrepareMode(Enum):
    """Where rows become samples."""

    AUTO = "auto"  #: on the cluster when the files are large
    HERE = "here"
    CLUSTER = "cluster"


class DataSettings(Settings):
    """Where the rows come from, which columns a task reads, and how texts are cut."""

    train: str | list[str] = Field(min_length=1)
    """A .txt (one document a line), .jsonl, .json, .csv, .tsv, .parquet or .arrow file, a directory of one kind of
    them, a pattern such as `s3://bucket/part-*.jsonl`, or a list of these. Rows count in this order, sorted by name
    within a directory or pattern."""
    eval: str | list[str] | None = None
    """Another such source, or a share of the training rows such as `2%`, chosen by a hash of (seed, row)."""
    text: str = "text"
    """The column that holds the text. A .txt file needs none."""
    label: str = "label"
    """The column that holds the class, the list of classes or the number to be predicted; for multiple choice, the
    number of the right one (from 0) or its text."""
    messages: str = "messages"
    """The column with the conversation, a list of {role, content}, for chat."""
    problem: Literal["single-label", "multi-label", "regression"] | None = None
    """What sequence-classification predicts. Default: lists are multi-label, fractions are regression."""
    text_pair: str = "text_pair"
    """The column with the second of two texts to be classified together; there need be none."""
    tokens: str = "tokens"
    """The column with the words of a text, a list, for token-classification."""
    tags: str = "tags"
    """The column with the words' tags, a list of the same length."""
    question: str = "question"
    """The column with the question, for question-answering."""
    context: str = "context"
    """The column with the text that answers it."""
    answers: str = "answers"
    """The column with the answer: a text, a list of texts, or SQuAD's {text: […], answer_start: […]}."""
    stride: int = Field(64, ge=0)
    """Tokens that two windows of a long context share, for question-answering."""
    source: str = "source"
    """The column with the text that is read, for seq2seq-lm."""
    target: str = "target"
    """The column with the text that is to be written."""
    max_target_length: int = Field(128, ge=2)
    """Tokens of a target; what is longer is cut off."""
    choices: str = "choices"
    """The column with the texts to choose from, a list, for multiple-choice and double-heads."""
    chat_template: str | None = None
    """A Jinja template for conversations, instead of the tokenizer's own (base models have none); saved with it."""
    mask_share: float = Field(0.15, gt=0, lt=1)
    """The share of tokens that masked-lm predicts."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of columns by role, for tasks of your own."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Whatever a task of your own needs to know."""
    max_bad_rows: int = Field(0, ge=0)
    """Rows that cannot be used are left out, up to so many; more are refused."""
    prepare: PrepareMode = PrepareMode.AUTO
    """Where rows become samples: in the process that starts the run (here), or on Ray Data over the cluster. The bytes
    are the same. auto takes the cluster from 256 MiB of files on, as they lie there."""
    max_length: int = Field(512, ge=2)
    """Tokens in a sample. For causal-lm, documents are joined with an end token and cut into pieces of this length;
    attention crosses their borders, and the last piece is dropped when it is short. For other tasks a text is a sample,
    and what is longer is cut off."""

    @property
    def eval_share(self) -> float | None:
        """The share of rows held out, 0 to 1, or None when `eval` is a file or not given."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", self.eval.strip() if isinstance(self.eval, str) else "")
        return float(match[1]) / 100 if match else None

    @property
    def places(self) -> dict[str, str]:
        """Every place that rows come from, by the key that names it."""
        sources = {"data.train": self.train, "data.eval": None if self.eval_share else self.eval}
        found = dict[str, str]()
        for key, source in sources.items():
            if isinstance(source, list):
                found |= {f"{key}[{number}]": place for number, place in enumerate(source)}
            elif source:
                found[key] = source
        return found

    @field_validator("eval")
    @classmethod
    def _share_is_sane(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, str) and value.strip().endswith("%"):
            match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", value.strip())
            if not match or not 0 < float(match[1]) < 100:
                raise ValueError(f"{value!r} is not a share: write 2%")
        return value
