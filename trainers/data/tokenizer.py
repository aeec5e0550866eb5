"""Tokenizers: loaded from a directory or the hub, or trained on the spot."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import transformers
from huggingface_hub import constants

from outlast.checkpointing.errors import ConfigError, first_line

_CONNECT_TIMEOUT_S = 5.0


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
            raise ConfigError(
                "the tokenizer has no end-of-text token, which packing needs between documents",
                hint="give it an eos_token in its tokenizer_config.json, or take another: model.tokenizer",
            )
        encoded = self.inner(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [[*ids, self.inner.eos_token_id] for ids in encoded]


def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a directory or hub id.

    Raises:
        ConfigError: There is none.
    """
    if path.startswith(("/", ".", "~")) and not Path(path).is_dir():
        raise ConfigError(f"model directory {path} is not there", hint="set model.path to a directory or a hub id")
    _check_hub_connection(path)
    try:
        return Tokenizer(transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False))
    except (OSError, ValueError) as error:
        hint = (
            "name a directory that holds tokenizer.json, or a hub id that can be reached: model.path, model.tokenizer"
        )
        said = first_line(error)
        if Path(path).is_dir() and not any(Path(path).glob("*token*")):
            said = "it holds no tokenizer.json, and no other file of a tokenizer"
        raise ConfigError(f"no tokenizer can be loaded from {path!r}: {said}", hint=hint) from error


def _check_hub_connection(path: str) -> None:
    """Where nobody answers, the hub's client would ask for a minute, file by file. What is cached is used at once."""
    hub = urlsplit(constants.ENDPOINT)
    if Path(path).is_dir() or constants.HF_HUB_OFFLINE or getproxies():
        return
    try:
        socket.create_connection(
            (hub.hostname, hub.port or (443 if hub.scheme == "https" else 80)), _CONNECT_TIMEOUT_S
        ).close()
    except OSError:
        constants.HF_HUB_OFFLINE = True


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


def _read_all(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
