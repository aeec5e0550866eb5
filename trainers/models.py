"""Models and tokenizers: transformers does the work, outlast decides what is asked of it."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.weights import named_weights
from outlast.trainers.config import ModelSettings
from outlast.trainers.tasks import Task
from outlast.trainers.world import seed_everything

END_TOKEN = "<|endoftext|>"


class Tokenizer:
    """A fast tokenizer of transformers, seen as what packing needs."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        if inner.pad_token is None:
            inner.pad_token = inner.eos_token

    def __len__(self) -> int:
        return len(self.inner)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token numbers of each text, its end token last, for packing.

        Raises:
            ConfigError: The tokenizer has no end-of-text token.
        """
        if self.inner.eos_token_id is None:
            raise ConfigError("the tokenizer has no end-of-text token, which packing needs between documents")
        encoded = self.inner(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [[*ids, self.inner.eos_token_id] for ids in encoded]


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a directory or hub id.

    Raises:
        ConfigError: There is none.
    """
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise ConfigError(f"model directory {path} is not there", hint="set model.path to a directory or a hub id")
    try:
        return Tokenizer(transformers.AutoTokenizer.from_pretrained(path))
    except (OSError, ValueError) as error:
        hint = "name a directory that holds tokenizer.json, or a hub id that can be reached"
        raise ConfigError(f"no tokenizer can be loaded from {path!r}: {_first_line(error)}", hint=hint) from error


def train_bpe(
    texts: Iterator[str],
    num_entries: int,
    special_tokens: Mapping[str, str] = MappingProxyType({}),
    template: tuple[str, str] | None = None,
) -> Tokenizer:
    """A byte-level BPE tokenizer with `num_entries` entries, trained on the texts.

    Args:
        texts: What it is trained on.
        num_entries: Size of the vocabulary, special tokens included.
        special_tokens: Special tokens besides that of the end of a text, by their names in transformers.
        template: How one text and two are framed with special tokens.
    """
    import tokenizers
    from tokenizers import decoders, pre_tokenizers, processors, trainers
    from tokenizers.models import BPE

    tokenizer = tokenizers.Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=num_entries,
        special_tokens=[END_TOKEN, *special_tokens.values()],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    names = {"bos_token": END_TOKEN, "eos_token": END_TOKEN, "pad_token": END_TOKEN, **special_tokens}
    if template is not None:
        numbers = [(token, tokenizer.token_to_id(token)) for token in sorted(set(names.values()))]
        tokenizer.post_processor = processors.TemplateProcessing(*template, special_tokens=numbers)
    return Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names))


def files_of(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The tokenizer's files by name."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.inner.save_pretrained(folder)
        return _read_all(folder)


def build_model(
    settings: ModelSettings, task: Task, tokenizer: Tokenizer, seed: int, *, fresh: bool
) -> tuple[nn.Module, dict[str, bytes]]:
    """The model, and the small files that make a checkpoint of it a Hugging Face directory.

    Args:
        settings: Which model.
        task: Names the class, and says what of the configuration its head follows from.
        tokenizer: Gives a new model its vocabulary size and special tokens.
        seed: New weights follow from it.
        fresh: False when the weights are about to be replaced by a checkpoint's, so that pretrained ones are not read.

    Raises:
        ConfigError: transformers knows no such model, or it cannot be saved under the names it is loaded by.
    """
    seed_everything(seed)
    try:
        config = _given_config(settings, tokenizer)
        task.configure(config)
        head = model_class(task, config)
        if settings.path is not None and fresh:
            model = head.from_pretrained(settings.path, config=config, dtype=torch.float32)
        elif hasattr(head, "from_config"):
            model = head.from_config(config, dtype=torch.float32)
        else:
            model = head._from_config(config, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the model cannot be built: {_first_line(error)}", hint="check `model:`") from error
    _check_names(model)
    if task.auto_class == "AutoModelForCausalLM":
        _check_looks_back(model)
    model.config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
        return model, {**_read_all(folder), **files_of(tokenizer)}


def model_class(task: Task, config: Any) -> Any:
    """The class of transformers that carries the task's head: an Auto class, or a model's own.

    Raises:
        ConfigError: No class of this model type does the task.
    """
    name = task.exact_classes.get(config.model_type, task.auto_class)
    if not name:
        known = ", ".join(task.exact_classes)
        raise ConfigError(f"no {config.model_type} model does this task; those that do: {known}", hint="check `model:`")
    return getattr(transformers, name)


def _given_config(settings: ModelSettings, tokenizer: Tokenizer) -> Any:
    if settings.path is not None:
        return transformers.AutoConfig.from_pretrained(settings.path)
    inner = tokenizer.inner
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": inner.bos_token_id,
        "eos_token_id": inner.eos_token_id,
        "pad_token_id": inner.pad_token_id,
    }
    given = dict(settings.config or {})
    kind = given.pop("model_type")
    kinds = list(transformers.CONFIG_MAPPING)
    if kind not in kinds:
        raise ConfigError(f"model.config.model_type {kind!r} is not known to transformers{_meant(kind, kinds)}")
    default = transformers.AutoConfig.for_model(kind)
    known = [*default.to_dict(), *default.attribute_map]
    for key in given:
        if key not in known:
            raise ConfigError(f"model.config.{key}: a {kind} model has no such setting{_meant(key, known)}")
    return transformers.AutoConfig.for_model(kind, **{**special, **given})


def _meant(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _check_looks_back(model: Any) -> None:
    """An encoder sees the token that it is to predict, and learns nothing."""
    if getattr(model.config, "is_decoder", None) is False and not model.can_generate():
        raise ConfigError(
            f"{type(model).__name__} is an encoder as configured: it sees the tokens it is to predict",
            hint="set model.config.is_decoder: true, or take a decoder such as gpt2 or llama",
        )


def _check_names(model: Any) -> None:
    """Some architectures hold their weights under other names than their files do; those cannot be saved yet."""
    from transformers.core_model_loading import revert_weight_conversion

    own = named_weights(model)
    changed = revert_weight_conversion(model, dict(own)).keys() - own.keys()
    if changed:
        raise ConfigError(
            f"{type(model).__name__} keeps weights under other names than its files do "
            f"({sorted(changed)[0]}, …); outlast cannot write such checkpoints yet"
        )


def _read_all(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
