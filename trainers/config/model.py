"""Settings under `model:`: the pretrained or new model, its adapter, its tokenizer and its task."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, field_validator, model_validator

from outlast.trainers.config.base import Settings
from outlast.trainers.config.task_table import check_task_name, is_dotted

_MAX_NAME_BYTES = 255  # of file systems


def _fits_a_path(value: str) -> str:
    if any(len(part.encode(errors="replace")) > _MAX_NAME_BYTES for part in value.split("/")):
        raise ValueError(f"is no directory and no hub id: a name has more than {_MAX_NAME_BYTES} bytes")
    return value


#: A directory or a hub id.
ModelPath = Annotated[str, AfterValidator(_fits_a_path)]


def is_model_path(model: str) -> bool:
    """Check whether the name of a model can only be a path; any other may be an id on the Hugging Face hub."""
    return model.startswith(("/", ".", "~"))


def is_hub_id(model: str) -> bool:
    """Check whether a `model.path` (absolute, if it is a directory) is an id on the Hugging Face hub."""
    return bool(model) and not is_model_path(model) and not Path(model).is_dir()


class TokenizerSettings(Settings):
    """The tokenizer of a model built from scratch: set one of the two."""

    train_bpe: int | None = Field(None, ge=257)
    """Train a byte-level BPE tokenizer with this many entries on the training text."""
    path: ModelPath | None = None
    """Use the tokenizer of this local directory or hub id."""

    @model_validator(mode="after")
    def _exactly_one(self) -> TokenizerSettings:
        if (self.train_bpe is None) == (self.path is None):
            raise ValueError("give either train_bpe or path")
        return self


class LoraSettings(Settings):
    """A LoRA adapter of peft: only low-rank matrices beside the frozen weights are trained and saved."""

    r: int = Field(8, ge=1)
    """Rank of the matrices."""
    alpha: float = Field(16, gt=0)
    """Scale of the update: alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the matrices' input in training."""
    target_modules: tuple[str, ...] | str | None = None
    """Names of the modules to adapt, a regular expression of their full names, or all-linear. Default: peft's choice
    for this architecture."""
    modules_to_save: tuple[str, ...] = ()
    """Names of modules that are trained in full and saved with the adapter, such as embed_tokens and lm_head. A new
    head is always among them."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Which biases are trained and saved: none, all of the model, or those of the adapted modules."""
    rslora: bool = False
    """Scale the update by alpha / sqrt(r) instead: rank-stabilized LoRA."""
    dora: bool = False
    """Train the magnitudes of the adapted weights too: weight-decomposed LoRA (DoRA)."""
    path: str | None = None
    """Directory of an adapter in peft's layout that goes on training, on the model in `model.path`. Its own files give
    rank, scale, modules and weights, so the settings above must be left out."""

    @field_validator("target_modules")
    @classmethod
    def _is_regular_expression(cls, value: tuple[str, ...] | str | None) -> tuple[str, ...] | str | None:
        try:
            re.compile(value if isinstance(value, str) else "")
        except re.error as error:
            raise ValueError(f"{value!r} is not a regular expression: {error}") from error
        return value

    @model_validator(mode="after")
    def _path_alone(self) -> LoraSettings:
        others = sorted(self.model_fields_set - {"path"})
        if self.path is not None and others:
            raise ValueError(f"the adapter in path has its own settings; leave out {', '.join(others)}")
        return self


class ModelSettings(Settings):
    """The model: a pretrained one (`path`), or a new one (`config` and `tokenizer`)."""

    model_config = ConfigDict(populate_by_name=True)

    path: ModelPath | None = None
    """A local directory in the Hugging Face layout, or a hub id. The directory of an adapter stands for its base model
    with `lora: {path: …}`: the adapter goes on training."""
    overrides: dict[str, Any] | None = None
    """Entries of the configuration in `path` to replace, such as `attention_dropout` or `rope_parameters`."""
    new_head: bool = False
    """Whether a head is made new where the files in `path` lack it or hold it with another size, such as for other
    classes. Without it such files are refused. A head that a model of their class never has is always made new."""
    add_tokens: tuple[str, ...] = ()
    """Tokens to add to the tokenizer, as its `add_tokens` does; implies `resize`."""
    resize: bool = False
    """Whether the embedding in `path` grows to the size of the tokenizer if it has fewer rows. transformers initializes
    the new rows from the mean and covariance of the others."""
    config: dict[str, Any] | None = None
    """Configuration of a new model, including `model_type`; vocabulary size and special tokens come from the tokenizer.
    """
    class_: str | None = Field(None, alias="class")
    """`package.module:Class`, a model class of your own; it must be importable on the workers too. Default: the
    transformers class for the task."""
    trust_remote_code: bool = False
    """Whether Python code beside the weights in `path` may run. Off by default, because such code can do anything."""
    lora: LoraSettings | None = None
    """Train an adapter instead of the model. Needs peft, and `path`: checkpoints hold the adapter only."""
    tokenizer: TokenizerSettings | None = None
    """Required with `config`; with `path` the model's own tokenizer is the default."""
    task: Annotated[str, AfterValidator(check_task_name)] = "causal-lm"
    """The training task. One of causal-lm, chat, masked-lm, sequence-classification, token-classification,
    question-answering, seq2seq-lm, multiple-choice, double-heads, or a class of your own, `package.module:Class`."""

    @field_validator("class_")
    @classmethod
    def _is_dotted(cls, value: str | None) -> str | None:
        if value is not None and not is_dotted(value):
            raise ValueError(f"{value!r} is not a class path: write package.module:Class, such as my_models:MyModel")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> ModelSettings:
        if (self.path is None) == (self.config is None):
            raise ValueError("give either path (a pretrained model) or config (a new one)")
        if self.lora is not None and self.path is None:
            raise ValueError("lora needs path: an adapter can only be used with the pretrained model it was trained on")
        only_pretrained = [name for name in ("overrides", "new_head", "add_tokens", "resize") if getattr(self, name)]
        if self.path is None and only_pretrained:
            raise ValueError(f"{only_pretrained[0]} needs path: it changes a pretrained model")
        if self.config is not None and "model_type" not in self.config and self.class_ is None:
            raise ValueError("config needs a model_type, such as gpt2 or llama")
        if self.config is not None and self.tokenizer is None:
            raise ValueError("a new model needs a tokenizer, such as tokenizer: {train_bpe: 4096}")
        return self
