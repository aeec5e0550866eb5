"""Export of a checkpoint: a clean Hugging Face directory, or its parts at paths of the user's choice.

Every byte is verified while it is read, output appears completely or not at all, and nothing is overwritten. An export
has no training state and no manifest, so outlast never resumes from one.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from outlast.checkpointing.errors import ConfigError, DamagedError, StorageError
from outlast.checkpointing.format.layout import WEIGHTS, is_training_state
from outlast.checkpointing.format.safetensors import encode, tensor_bytes
from outlast.checkpointing.restore.reader import read_tensors, read_verified
from outlast.checkpointing.restore.verify import check_listing
from outlast.checkpointing.tools.query import ResolvedCheckpoint, damage_or_deletion

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
ADAPTER = "adapter_model"
ADAPTER_WEIGHTS = f"{ADAPTER}.safetensors"
_RUN_FILES = ("trainer_state.json",)  # describe the training rather than the model


class Dtype(Enum):
    """Floating-point types of exported weights."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def torch(self) -> torch.dtype:
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.value]


@dataclass(frozen=True, slots=True)
class Content:
    """The content of an export."""

    weights: Mapping[str, torch.Tensor]  #: the weights by name; tied ones once
    files: Mapping[str, bytes]  #: small files by name
    weights_name: str = WEIGHTS  #: name of the weights file: the model's, or an adapter's

    def file(self, name: str) -> bytes:
        """Return a small file. Raises ConfigError if the checkpoint lacks it."""
        if name not in self.files:
            raise ConfigError(f"the checkpoint has no {name}; it has: {', '.join(sorted(self.files))}")
        return self.files[name]


#: Writes the weights to a path that does not exist yet.
WriteWeights = Callable[[Content, Path], None]


def read_content(source: ResolvedCheckpoint) -> Content:
    """Read and verify the Hugging Face part of a checkpoint. Raises as `damage_or_deletion`, and StorageError."""
    files: dict[str, bytes] = {}
    weights_name = WEIGHTS
    with damage_or_deletion(source):
        listed = check_listing(source.store.storage, source.directory, source.manifest)
        if faults := [fault for fault in listed if "extra file" not in fault]:  # before memory is taken for its sizes
            raise DamagedError("; ".join(faults))
        weights = read_tensors(source.store.storage, source.directory, source.manifest, weights_only=True)
        for entry in source.manifest.files:
            if is_training_state(entry.path) or entry.path in _RUN_FILES:
                continue
            if entry.path.startswith(ADAPTER):
                weights_name = ADAPTER_WEIGHTS
            if not entry.path.endswith((".safetensors", ".safetensors.index.json")):
                files[entry.path] = bytes(tensor_bytes(read_verified(source.store.storage, source.directory, entry)))
    return Content(weights, files, weights_name)


def converted(content: Content, dtype: Dtype) -> Content:
    """Convert floating-point weights. Raises ConfigError if a value is too large for the type."""
    weights = {}
    for name, tensor in content.weights.items():
        weights[name] = tensor.to(dtype.torch) if tensor.is_floating_point() else tensor
        if bool((weights[name].isinf() & tensor.isfinite()).any()):
            raise ConfigError(f"{name} holds values too large for {dtype.value}", hint="export with --dtype bf16")
    config = {key: value for key, value in json.loads(content.file(CONFIG)).items() if key != "torch_dtype"}
    config["dtype"] = str(dtype.torch).removeprefix("torch.")
    text = json.dumps(config, indent=2, sort_keys=True).encode() + b"\n"
    return replace(content, weights=weights, files={**content.files, CONFIG: text})


def write_safetensors(content: Content, path: Path) -> None:
    with path.open("xb") as file:
        for chunk in encode(content.weights):
            file.write(chunk)


def check_free(paths: Sequence[Path]) -> None:
    """Raise ConfigError if a path exists; an empty directory is allowed."""
    for path in paths:
        if path.is_dir() and not any(path.iterdir()):
            continue
        if path.exists() or path.is_symlink():
            what = "a directory that is not empty" if path.is_dir() else "an existing file"
            raise ConfigError(f"{path} is {what}; nothing was written", hint="choose another path, or move it away")


def export_directory(
    content: Content,
    out: Path,
    *,
    weights_name: str | None = None,
    write_weights: WriteWeights = write_safetensors,
    old_vocab: bool = False,
) -> None:
    """Write a Hugging Face directory; with `old_vocab` also the vocabulary files of slow tokenizers.

    Raises ConfigError if `out` exists or the tokenizer has no such files, and StorageError; `out` is then unchanged.
    """
    check_free([out])
    files = {**content.files, **(slow_tokenizer_files(content.file(TOKENIZER)) if old_vocab else {})}
    with _renamed_into_place(out) as staged:
        staged.mkdir()
        write_weights(content, staged / (weights_name or content.weights_name))
        for name, data in files.items():
            target = staged / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:  # none replaces the weights
                file.write(data)


def export_parts(
    content: Content,
    *,
    weights: Path | None = None,
    config: Path | None = None,
    vocab: Path | None = None,
    write_weights: WriteWeights = write_safetensors,
) -> list[Path]:
    """Write weights, configuration and vocabulary files to separate paths, as far as given; return the files written.

    `vocab` is a directory, or with a suffix, such as `words.txt`, a single vocabulary file.
    Raises ConfigError if a path exists or the vocabulary does not fit into one file, and StorageError.
    """
    small = {} if config is None else {config: content.file(CONFIG)}
    if vocab is not None:
        small |= _vocabulary_paths(vocab, slow_tokenizer_files(content.file(TOKENIZER)))
    targets = [*([] if weights is None else [weights]), *small]
    check_free(targets)
    if weights is not None:
        with _renamed_into_place(weights) as staged:
            write_weights(content, staged)
    for path, data in small.items():
        with _renamed_into_place(path) as staged:
            staged.write_bytes(data)
    return targets


def _vocabulary_paths(path: Path, files: Mapping[str, bytes]) -> dict[Path, bytes]:
    if not path.suffix or path.is_dir():
        return {path / name: data for name, data in files.items()}
    if len(files) > 1:
        raise ConfigError(
            f"--vocab {path} is one file, but this vocabulary has {len(files)}: {', '.join(files)}",
            hint=f"name a directory: --vocab {path.with_suffix('')}",
        )
    [data] = files.values()
    return {path: data}


@contextmanager
def _renamed_into_place(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`, renamed to `target` on success and else deleted."""
    staged = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield staged
        os.replace(staged, target)
    except OSError as error:
        hint = "check the path, then run the command again"
        raise StorageError(f"cannot write {target}: {error.strerror or error}", hint=hint) from error
    finally:
        if staged.is_dir():
            shutil.rmtree(staged)
        else:
            staged.unlink(missing_ok=True)


# -- vocabulary files of slow tokenizers: entries only, without how text is normalized and split -----------------------


def slow_tokenizer_files(tokenizer: bytes) -> dict[str, bytes]:
    """Convert the content of tokenizer.json. Raises ConfigError for kinds of tokenizers without such files.

    Returns by name `vocab.txt` (WordPiece), or `vocab.json` and `merges.txt` (BPE); and `added_tokens.json` for tokens
    that these lack.
    """
    content = json.loads(tokenizer)
    model = content["model"]
    model_type = model.get("type") or ("BPE" if "merges" in model else "WordPiece")
    if model_type == "WordPiece":
        files = {"vocab.txt": _lines(_ordered_tokens(model["vocab"]))}
    elif model_type == "BPE":
        merges = [item if isinstance(item, str) else " ".join(item) for item in model["merges"]]
        vocab = {token: model["vocab"][token] for token in sorted(model["vocab"], key=model["vocab"].__getitem__)}
        files = {"vocab.json": _compact_json(vocab), "merges.txt": _lines(["#version: 0.2", *merges])}
    else:
        raise ConfigError(
            f"{TOKENIZER} has a {model_type} model, for which there are no old-style vocabulary files",
            hint=f"use {TOKENIZER} itself, with AutoTokenizer",
        )
    added = {item["content"]: item["id"] for item in content.get("added_tokens") or ()}
    if missing := {token: number for token, number in added.items() if token not in model["vocab"]}:
        files["added_tokens.json"] = _compact_json(missing)
    return files


def _ordered_tokens(vocab: Mapping[str, int]) -> list[str]:
    tokens = sorted(vocab, key=vocab.__getitem__)
    if [vocab[token] for token in tokens] != list(range(len(tokens))):
        raise ConfigError(f"the vocabulary of {TOKENIZER} skips numbers, which vocab.txt cannot express")
    return tokens


def _lines(lines: list[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()


def _compact_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
