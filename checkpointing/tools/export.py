"""Copies of a checkpoint for use elsewhere: a clean Hugging Face directory, or its parts at paths of the user's choice.

Every byte is verified while it is read, and what is written appears whole or not at all. Nothing is replaced. An export
has no training state and no manifest: it is not a checkpoint, and outlast never reads one.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import torch

from outlast.checkpointing.errors import ConfigError, StorageError
from outlast.checkpointing.format.layout import STATE_DIR, WEIGHTS
from outlast.checkpointing.format.safetensors import encode, tensor_bytes
from outlast.checkpointing.restore.reader import read_tensors, read_verified
from outlast.checkpointing.tools.query import ResolvedCheckpoint, reading
from outlast.checkpointing.tools.slow_tokenizer_files import TOKENIZER, slow_tokenizer_files

CONFIG = "config.json"
ADAPTER = "adapter_model"
ADAPTER_WEIGHTS = f"{ADAPTER}.safetensors"
_OF_THE_RUN = ("trainer_state.json",)  # what tells of the training rather than of the model


class Dtype(Enum):
    """What floating-point weights can be exported as."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def torch(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.value]


@dataclass(frozen=True, slots=True)
class Content:
    """What an export is made from.

    Attributes:
        weights: The weights by name, tied ones once.
        files: The small files by name.
        weights_name: The file of the weights, when it is one: the model's, or an adapter's.
    """

    weights: Mapping[str, torch.Tensor]
    files: Mapping[str, bytes]
    weights_name: str = WEIGHTS

    def file(self, name: str) -> bytes:
        """One of the small files.

        Raises:
            ConfigError: The checkpoint has no such file.
        """
        if name not in self.files:
            raise ConfigError(f"the checkpoint holds no {name}; it holds: {', '.join(sorted(self.files))}")
        return self.files[name]


#: Writes the weights of a content to a path that is not there yet.
WriteWeights = Callable[[Content, Path], None]


def read_content(found: ResolvedCheckpoint) -> Content:
    """Reads a checkpoint's Hugging Face part, verified.

    Raises:
        DamagedError: The checkpoint is not whole.
        NoCheckpointError: It was deleted meanwhile.
        StorageError: The storage failed.
    """
    files: dict[str, bytes] = {}
    weights_name = WEIGHTS
    with reading(found):
        weights = read_tensors(found.store.storage, found.directory, found.manifest, weights_only=True)
        for entry in found.manifest.files:
            if entry.path.startswith(STATE_DIR) or entry.path in _OF_THE_RUN:
                continue
            # The weights go into one file.
            if entry.path.startswith(ADAPTER):
                weights_name = ADAPTER_WEIGHTS
            if not entry.path.endswith((".safetensors", ".safetensors.index.json")):
                files[entry.path] = bytes(tensor_bytes(read_verified(found.store.storage, found.directory, entry)))
    return Content(weights, files, weights_name)


def converted(content: Content, dtype: Dtype) -> Content:
    """The same with floating-point weights of another type. Raises ConfigError where one is too large for it."""
    weights = {}
    for name, tensor in content.weights.items():
        weights[name] = tensor.to(dtype.torch) if tensor.is_floating_point() else tensor
        if bool((weights[name].isinf() & tensor.isfinite()).any()):
            raise ConfigError(f"{name} holds values too large for {dtype.value}", hint="export with --dtype bf16")
    config = {key: value for key, value in json.loads(content.file(CONFIG)).items() if key != "torch_dtype"}
    config["dtype"] = str(dtype.torch).removeprefix("torch.")
    return replace(content, weights=weights, files={**content.files, CONFIG: _json(config)})


def _json(value: object) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True).encode() + b"\n"


def write_safetensors(content: Content, path: Path) -> None:
    """The weights as one safetensors file."""
    with path.open("xb") as file:
        for chunk in encode(content.weights):
            file.write(chunk)


def check_free(paths: Sequence[Path]) -> None:
    """Raises ConfigError where something is in the way; an empty directory is not."""
    for path in paths:
        if path.is_dir() and not any(path.iterdir()):
            continue
        if path.exists() or path.is_symlink():
            what = "a directory that is not empty" if path.is_dir() else "there already"
            raise ConfigError(f"{path} is {what}; nothing was written", hint="choose another place, or move it away")


def export_directory(
    content: Content,
    out: Path,
    *,
    weights_name: str | None = None,
    write_weights: WriteWeights = write_safetensors,
    old_vocab: bool = False,
) -> None:
    """Writes a Hugging Face directory; with `old_vocab` the old-style vocabulary files beside the rest.

    Raises:
        ConfigError: `out` is not free, or there are no such vocabulary files.
        StorageError: Writing failed; then `out` is as it was.
    """
    check_free([out])
    files = {**content.files, **(slow_tokenizer_files(content.file(TOKENIZER)) if old_vocab else {})}
    with _arriving(out) as staged:
        staged.mkdir()
        write_weights(content, staged / (weights_name or content.weights_name))
        for name, data in files.items():
            target = staged / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)


def export_parts(
    content: Content,
    *,
    weights: Path | None = None,
    config: Path | None = None,
    vocab: Path | None = None,
    write_weights: WriteWeights = write_safetensors,
) -> list[Path]:
    """Writes weights, configuration and old-style vocabulary each at a path of its own, as far as they are given.

    Args:
        content: What to write.
        weights: File of the weights.
        config: File of the configuration.
        vocab: Directory of the vocabulary files; or with a suffix, such as `words.txt`, the file itself, for a
            vocabulary that is a single file.
        write_weights: In which format.

    Returns:
        The files written.

    Raises:
        ConfigError: Something is in the way, or the vocabulary does not fit into one file.
        StorageError: Writing failed.
    """
    small = {} if config is None else {config: content.file(CONFIG)}
    if vocab is not None:
        small |= _vocabulary_at(vocab, slow_tokenizer_files(content.file(TOKENIZER)))
    targets = [*([] if weights is None else [weights]), *small]
    check_free(targets)
    if weights is not None:
        with _arriving(weights) as staged:
            write_weights(content, staged)
    for path, data in small.items():
        with _arriving(path) as staged:
            staged.write_bytes(data)
    return targets


def _vocabulary_at(path: Path, files: Mapping[str, bytes]) -> dict[Path, bytes]:
    if not path.suffix or path.is_dir():
        return {path / name: data for name, data in files.items()}
    if len(files) > 1:
        raise ConfigError(
            f"--vocab {path} is one file, and this vocabulary is {len(files)}: {', '.join(files)}",
            hint=f"name a directory: --vocab {path.with_suffix('')}",
        )
    [data] = files.values()
    return {path: data}


@contextmanager
def _arriving(target: Path) -> Iterator[Path]:
    """A path beside `target` to write to, which becomes `target` at the end, or goes."""
    staged = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield staged
        os.replace(staged, target)
    except OSError as error:
        raise StorageError(
            f"cannot write {target}: {error.strerror or error}", hint="check the place, then run the command again"
        ) from error
    finally:
        if staged.is_dir():
            shutil.rmtree(staged)
        else:
            staged.unlink(missing_ok=True)
