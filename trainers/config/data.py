"""Settings under `data:`: sources, columns by role, and how rows become samples."""

import codecs
import re
from enum import Enum
from typing import Any, Literal

from pydantic import Field, field_validator

from outlast.checkpointing.storage.location import parse_location
from outlast.trainers.config.base import Settings


class PrepareMode(Enum):
    """Where rows are encoded to samples."""

    AUTO = "auto"  #: on the cluster when the files are large
    HERE = "here"
    CLUSTER = "cluster"


class Quote(Enum):
    """How a .csv or .tsv file encloses texts that contain a delimiter or a line break."""

    AUTO = "auto"  #: double, and an error for a file with tabs that looks unquoted
    DOUBLE = "double"  #: in double quotation marks
    NONE = "none"  #: not at all: a quotation mark is a character as any other


class CsvSettings(Settings):
    """The dialect of .csv and .tsv files."""

    delimiter: str | None = Field(None, min_length=1, max_length=1)
    """Character between fields. Default: a comma, in a .tsv file a tab; where the header has none, another of comma,
    tab, `;` and `|` that it has."""
    quote: Quote = Quote.AUTO
    """How texts are enclosed: in double quotation marks, or not at all (none), as in the files of GLUE. auto stops at a
    row of a file with tabs whose quotation marks join lines that each have all fields."""
    encoding: str = "utf-8"
    """Encoding of the text, such as cp1252. UTF-16 and UTF-32 with a byte order mark are recognized, in other text
    files too."""
    missing: tuple[str, ...] = ("",)
    """Fields that hold no value, such as `["", "NA"]`. A row without a value that the task needs is unusable."""

    decimal: Literal[".", ","] = "."
    """Decimal mark of numbers. With a comma, a field that is a whole number or a fraction in this notation, such as
    `1.234,5`, is read with a point and without those of thousands (1234.5)."""

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, value: str) -> str:
        try:
            return codecs.lookup(value).name
        except LookupError:
            raise ValueError(f"{value!r} is not an encoding that Python knows, such as utf-8 or cp1252") from None


#: Arguments of a chat template that the task gives, and of the method that renders it.
_RESERVED_ARGUMENTS = (
    *("messages", "conversation", "tools", "add_generation_prompt", "continue_final_message", "chat_template"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs", "sanitize_control_tokens"),
)


class DataSettings(Settings):
    """Where the rows come from, which columns a task reads, and how texts become samples."""

    train: str | list[str] = Field(min_length=1)
    """A .txt (one document per line), .jsonl, .json, .csv, .tsv, .parquet or .arrow file, a directory of files of one
    type, a pattern such as `s3://bucket/part-*.jsonl`, or a list of these. Rows are read in this order, sorted by file
    name within a directory or pattern."""
    eval: str | list[str] | None = None
    """Another such source, or a share of the training rows such as `2%`, selected by a hash of (seed, row)."""
    text: str = "text"
    """Column with the text. A .txt file has no columns and needs none."""
    label: str = "label"
    """Column with the class, the list of classes or the number to predict; for multiple choice, the index of the right
    choice (from 0) or its text."""
    messages: str = "messages"
    """Column with the conversation, a list of {role, content}, for chat."""
    problem: Literal["single-label", "multi-label", "regression"] | None = None
    """What sequence-classification predicts. Default: lists are multi-label, fractions are regression."""
    labels: list[str] | None = Field(None, min_length=2)
    """Names of the classes in the order of their index, for sequence- and token-classification. The data's labels are
    these names, or numbers from 0. Default: the names of a ClassLabel column of the `datasets` library, or else the
    labels in the data, sorted; in the order of the pretrained model's head where its names agree."""
    label_form: Literal["auto", "names", "multi-hot"] = "auto"
    """Form of lists of labels: the names (or numbers from 0) of a row's classes, or multi-hot, with a 0 or 1 for each
    class. auto takes lists of 0 and 1 for multi-hot if all are of one length, or one has the same number
    twice."""
    text_pair: str = "text_pair"
    """Column with the second text of a pair to classify; optional."""
    tokens: str = "tokens"
    """Column with the words of a text, a list, for token-classification."""
    tags: str = "tags"
    """Column with the words' tags, a list of the same length."""
    question: str = "question"
    """Column with the question, for question-answering."""
    context: str = "context"
    """Column with the text that contains the answer."""
    answers: str = "answers"
    """Column with the answer: a text, a list of texts, or SQuAD's {text: […], answer_start: […]}."""
    stride: int = Field(64, ge=0)
    """Overlap of two windows of a long context, in tokens, for question-answering."""
    source: str = "source"
    """Column with the input text, for seq2seq-lm."""
    target: str = "target"
    """Column with the output text, for seq2seq-lm."""
    max_target_length: int = Field(128, ge=2)
    """Tokens of a target; longer targets are truncated."""
    choices: str = "choices"
    """Column with the texts to choose from, a list, for multiple-choice and double-heads."""
    chat_template: str | None = None
    """A Jinja template for conversations that replaces the tokenizer's own (base models have none); it is saved with
    the tokenizer."""
    tools: str | None = "tools"
    """Column with the tools that the chat template shows for a conversation, a list or its JSON text, for chat; a row
    may lack it. null: leave them out."""
    roles: dict[str, str] = Field(default_factory=dict)
    """Roles of messages by the names that the data has for them, such as `{bot: assistant}`, for chat. ShareGPT's names
    need none."""
    train_on: Literal["all", "last"] = "all"
    """Which of the assistant's messages chat learns: all, or the last one of a conversation. A message with `weight: 0`
    or `train: false` is not learned in any case."""
    template_arguments: dict[str, Any] = Field(default_factory=dict)
    """Arguments of the chat template, such as `{enable_thinking: false}`."""
    prompt: str = "prompt"
    """Column with the prompt of a completion, for chat and causal-lm: a text, or for chat a list of messages."""
    completion: str = "completion"
    """Column with the completion. Where the data has these two columns, only the completion is learned."""
    begin_token: bool | Literal["auto"] = "auto"
    """Whether each document begins with the tokenizer's token for the beginning of a text, for causal-lm. auto: as the
    tokenizer begins a text."""
    packing: bool = True
    """Whether causal-lm concatenates documents. false: a document is a sample, padded in its batch, and a longer one is
    truncated. Rows of prompt and completion are never packed."""
    source_language: str | None = None
    """Language of the sources, as the tokenizer names it (its `src_lang`), for seq2seq-lm with a multilingual model."""
    target_language: str | None = None
    """Language of the targets, as the tokenizer names it (its `tgt_lang`). The model is published with it: its
    `generate` writes in this language."""
    mask_share: float = Field(0.15, gt=0, lt=1)
    """Share of tokens that masked-lm predicts."""
    csv: CsvSettings = CsvSettings()
    """Dialect of .csv and .tsv files."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of columns by role, for tasks of your own, and for other forms of rows, such as `{instruction: question}`.
    """
    options: dict[str, Any] = Field(default_factory=dict)
    """Options of a task of your own."""
    max_bad_rows: int = Field(0, ge=0)
    """Unusable rows that may be skipped; with more of them preparation fails."""
    prepare: PrepareMode = PrepareMode.AUTO
    """Where rows are encoded to samples: in the process that starts the run (here), or by Ray Data on the cluster. The
    resulting bytes are the same. auto uses the cluster from 256 MiB of files on, measured as stored."""
    max_length: int = Field(512, ge=2)
    """Tokens per sample. For causal-lm with packing, documents are concatenated with an end token and cut into samples
    of this length; attention crosses document borders, and an incomplete last sample is dropped. Otherwise a text is a
    sample, and longer texts are truncated."""

    @property
    def eval_share(self) -> float | None:
        """Share of rows held out, 0 to 1; None when `eval` is a source or not set."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", self.eval.strip() if isinstance(self.eval, str) else "")
        return float(match[1]) / 100 if match else None

    @property
    def places(self) -> dict[str, str]:
        """All paths and URLs that rows come from, by the key that sets them."""
        sources = {"data.train": self.train, "data.eval": None if self.eval_share else self.eval}
        paths = dict[str, str]()
        for key, source in sources.items():
            if isinstance(source, list):
                paths |= {f"{key}[{number}]": path for number, path in enumerate(source)}
            elif source:
                paths[key] = source
        return paths

    @field_validator("train", "eval")
    @classmethod
    def _are_locations(cls, value: str | list[str] | None) -> str | list[str] | None:
        for place in value if isinstance(value, list) else filter(None, [value]):
            parse_location(place)
        return value

    @field_validator("labels", mode="before")
    @classmethod
    def _are_unique(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        names = [str(item) if isinstance(item, int | float) and not isinstance(item, bool) else item for item in value]
        if repeated := sorted({str(name) for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(repeated)} is there more than once")
        return names

    @field_validator("chat_template")
    @classmethod
    def _is_jinja(cls, value: str | None) -> str | None:
        if value is not None and "{" not in value:  # a constant, which shows no message
            raise ValueError(f"{value!r} is not a Jinja template: write its text, not a file or a template's name")
        return value

    @field_validator("template_arguments")
    @classmethod
    def _are_the_templates_own(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name in _RESERVED_ARGUMENTS:
                raise ValueError(f"{name} is set by the task; leave it out")
        return value

    @field_validator("eval")
    @classmethod
    def _is_share(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, str) and value.strip().endswith("%"):
            match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", value.strip())
            if not match or not 0 < float(match[1]) < 100:
                raise ValueError(f"{value!r} is not a share: write 2%")
        return value
