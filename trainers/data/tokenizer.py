"""Tokenizers: loaded from a directory or the hub, or trained on the run's data."""

import json
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

from outlast.checkpointing.error_hints import first_line
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.regular_files import read_small_file
from outlast.trainers.config.adapter_directory import base_of, is_adapter_directory
from outlast.trainers.config.model import is_model_path

_CONNECT_TIMEOUT_S = 5.0
_MAX_HOLES = 2**20  #: token ids without a token
END_TOKEN = "<|endoftext|>"


class Tokenizer:
    """A fast tokenizer of transformers (`inner`) with a padding token and the encoding for packing."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        if inner.pad_token is None:
            inner.pad_token = inner.eos_token

    def __len__(self) -> int:
        return len(self.inner)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode documents. Returns the token ids of each text, ending with the end token.

        Raises:
            ConfigError: The tokenizer has no end-of-text token.
        """
        if self.inner.eos_token_id is None:
            raise ConfigError(
                "the tokenizer has no end-of-text token, which is put after each document",
                hint="set an eos_token in its tokenizer_config.json, or use another tokenizer: model.tokenizer",
            )
        encoded = self.inner(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [[*ids, self.inner.eos_token_id] for ids in encoded]


def load_tokenizer(path: str, added: Sequence[str] = ()) -> Tokenizer:
    """Load the tokenizer of a directory or hub id, and add tokens to it. An adapter may have that of its base model.

    Raises ConfigError if none can be loaded from there.
    """
    path = tokenizer_source(path)
    tokenizer = _load_tokenizer(path)
    tokenizer.inner.add_tokens(list(added))
    return tokenizer


def tokenizer_source(path: str) -> str:
    """Return the directory or hub id that has the tokenizer: that of an adapter's base model if it has none itself."""
    has_own = any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    return base_of(path) if is_adapter_directory(path) and not has_own else path


def has_chat_template(path: str) -> bool:
    """Return whether a directory's tokenizer has a chat template, by its files alone; True if they cannot be read."""
    folder = Path(tokenizer_source(path))
    names = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
    if any((folder / name).exists() for name in names):
        return True
    try:
        return bool(json.loads(read_small_file(folder / "tokenizer_config.json")).get("chat_template"))
    except (OSError, ValueError, AttributeError, ConfigError):
        return True  # loading the tokenizer reports it


def _load_tokenizer(path: str) -> Tokenizer:
    if is_model_path(path) and not Path(path).is_dir():
        raise ConfigError(f"model directory {path} does not exist", hint="set model.path to a directory or a hub id")
    _check_hub_connection(path)
    _check_own_files(Path(path))
    try:
        inner = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        vocabulary = inner.get_vocab()
        largest = max(vocabulary, key=vocabulary.__getitem__, default="")
        if vocabulary.get(largest, 0) > _MAX_HOLES + 16 * len(vocabulary):  # it could not be saved: that takes memory
            raise ValueError(f"token {largest!r} of {len(vocabulary):,} has the id {vocabulary[largest]:,}")
        if not isinstance(inner.model_max_length, int | float):  # transformers compares it with every text
            raise ValueError(f"model_max_length in tokenizer_config.json is {inner.model_max_length!r}, not a number")
        return Tokenizer(inner)
    except ImportError as error:  # a tokenizer that is not one of `tokenizers`
        raise ConfigError(
            f"the tokenizer of {path!r} cannot be loaded: {first_line(error)}", hint="install that package"
        ) from error
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of the Rust library
            raise
        hint = "name a directory that has tokenizer.json, or a hub id that can be reached: model.path, model.tokenizer"
        reason = first_line(error)
        if Path(path).is_dir() and not any(Path(path).glob("*token*")):
            reason = "it has no tokenizer.json and no other tokenizer file"
        raise ConfigError(f"no tokenizer can be loaded from {path!r}: {reason}", hint=hint) from error


def _check_own_files(folder: Path) -> None:
    """Raise ConfigError if a tokenizer's settings name a file by which transformers would read any file of the user."""
    for name, suffixes in (("tokenizer_config.json", ()), ("special_tokens_map.json", ("_file",))):
        try:
            entries = json.loads(read_small_file(folder / name))
        except (OSError, ValueError, RecursionError):
            continue  # transformers reports it
        for key, value in entries.items() if isinstance(entries, dict) else ():
            if isinstance(value, str) and (key in ("vocab", "merges") or key.endswith(suffixes)):
                raise ConfigError(
                    f"{folder / name}: {key} names the file {value!r}; it may be outside of that directory",
                    hint="remove that entry; a tokenizer's files are found by their names",
                )


def _check_hub_connection(path: str) -> None:
    """Go offline, using cached files only, if the hub is unreachable: its client would retry each file for a minute."""
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
    """Train a byte-level BPE tokenizer with `num_entries` entries.

    Args:
        num_entries: Size of the vocabulary, special tokens included.
        special_tokens: Special tokens besides the end token, by their names in transformers.
        template: Templates of `tokenizers` for one text and for a pair.
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
        token_ids = [(token, tokenizer.token_to_id(token)) for token in sorted(set(names.values()))]
        tokenizer.post_processor = processors.TemplateProcessing(*template, special_tokens=token_ids)
    return Tokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names))


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Return the contents of the tokenizer's files by name."""
    with tempfile.TemporaryDirectory() as folder:
        has_several = isinstance(tokenizer.inner.chat_template, dict)  # in a folder of their own, unless they are JSON
        tokenizer.inner.save_pretrained(folder, save_jinja_files=not has_several)
        return read_folder(folder)


def read_folder(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
