"""Checks of a pretrained model's files before any worker is started: names and sizes of weights, tokens, positions.

The weights are not read, only their names and sizes; but an outlast checkpoint is verified byte by byte.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import nn

from outlast.checkpointing.error_hints import shorten_list
from outlast.checkpointing.errors import ConfigError, OutlastError
from outlast.checkpointing.format.layout import MANIFEST
from outlast.checkpointing.format.manifest import Manifest, ManifestError
from outlast.checkpointing.restore.verify import verify
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.storage.regular_files import read_small_file
from outlast.trainers.config.adapter_directory import with_base
from outlast.trainers.config.model import ModelSettings, is_hub_id
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.tokenizer import Tokenizer
from outlast.trainers.models.build import load_report
from outlast.trainers.models.embedding import num_rows
from outlast.trainers.preparation.prepare import Prepared
from outlast.trainers.tasks.base import find_task
from outlast.trainers.tasks.model_inputs import base_model

#: Names of samples' vectors that hold token ids of the input embedding.
_TOKEN_VECTORS = ("input_ids", "decoder_input_ids")
_MAX_SHOWN = 5


def check_pretrained(config: TrainingConfig, prepared: Prepared, storage: Storage, meta: nn.Module) -> list[str]:
    """Check a model's files against the run, and its embedding against the tokenizer. Returns notes for the user.

    Args:
        config: The settings.
        prepared: The prepared data.
        storage: Holds it.
        meta: The model without memory, from `check_model`.

    Raises:
        ConfigError: The files are damaged, lack weights or hold them in other sizes; or a token has no embedding.
    """
    inner = base_model(meta)
    settings, tokenizer, notes = with_base(config.model), prepared.tokenizer(storage), list[str]()
    for key, path in (("model.path", settings.path), ("model.lora.path", settings.lora and settings.lora.path)):
        if path and not is_hub_id(path):
            _verify(key, path)
    if settings is not config.model:
        notes.append(f"model.path is an adapter: it goes on training on its base model, {settings.path}")
    if settings.path and not is_hub_id(settings.path) and not settings.class_ and not settings.trust_remote_code:
        task = find_task(settings.task)(config.data, tokenizer, prepared.facts)
        notes += load_report(settings, task, tokenizer).notes
    notes += _check_tokens(settings, tokenizer, prepared, storage, inner)
    notes += _special_tokens(inner, tokenizer)
    notes += _long_samples(inner, max(prepared.longest.values(), default=0))
    return notes


def _verify(key: str, path: str) -> None:
    """Raise ConfigError if a directory is a checkpoint or model of outlast, and not as it was committed."""
    hint = "use another checkpoint; or, if it was changed on purpose, a copy of the directory without manifest.json"
    try:
        manifest = Manifest.parse(read_small_file(Path(path) / MANIFEST))
    except FileNotFoundError:
        return
    except (ManifestError, OSError) as error:
        raise ConfigError(f"{key} {path}: manifest.json is damaged: {error}", hint=hint) from error
    try:
        folder = Path(path).resolve()
        faults = [item for item in verify(LocalStorage(folder.parent), folder.name, manifest) if ": extra" not in item]
    except OutlastError as error:
        raise ConfigError(f"{key} {path} cannot be verified: {error.message}", hint=hint) from error
    if faults:
        raise ConfigError(f"{key} {path} is damaged: {'; '.join(faults[:_MAX_SHOWN])}", hint=hint)


def _check_tokens(
    settings: ModelSettings, tokenizer: Tokenizer, prepared: Prepared, storage: Storage, meta: nn.Module
) -> Iterator[str]:
    """Yield a note on tokens that the embedding lacks. Raises ConfigError if the data or the padding has them."""
    rows = num_rows(meta)
    if rows is None or len(tokenizer) <= rows:
        return
    inner = tokenizer.inner
    names = [str(inner.convert_ids_to_tokens(number)) for number in range(rows, len(tokenizer))]
    shown = shorten_list(names, _MAX_SHOWN, "tokens")
    text = f"the tokenizer has {len(tokenizer)} tokens, and the embedding of {type(meta).__name__} has {rows} rows"
    last = max((prepared.split(storage, name).largest(_TOKEN_VECTORS) for name in prepared.num_tokens), default=-1)
    if max(last, inner.pad_token_id if inner.pad_token_id is not None else -1) < rows:
        yield f"{text}; the data has none of the others: {shown}"
        return
    hint = "use the tokenizer that belongs to the model: model.path, model.tokenizer"
    if settings.path:
        hint = f"set model.resize: true to add the rows, which are new; or {hint}"
    else:
        hint = "leave vocab_size out of model.config: it comes from the tokenizer"
    raise ConfigError(f"{text}; it lacks {shown}, which this run needs", hint=hint)


def _special_tokens(meta: nn.Module, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield a note for each special token on which the tokenizer and the model's configurations disagree."""
    if not isinstance(meta, transformers.PreTrainedModel):
        return
    generation = getattr(meta, "generation_config", None)
    files = {"config.json": meta.config.get_text_config(), "generation_config.json": generation}
    for name in ("bos_token", "eos_token", "pad_token"):
        own = getattr(tokenizer.inner, f"{name}_id")
        for file, known in files.items():
            found = getattr(known, f"{name}_id", None) if known is not None else None
            numbers = found if isinstance(found, list) else [found]
            if own is not None and found is not None and own not in numbers:
                token = getattr(tokenizer.inner, name)
                yield f"{name}_id is {found} in {file} of the model, and {own} ({token}) in the tokenizer"


def _long_samples(meta: nn.Module, longest: int) -> Iterator[str]:
    """Yield a note if samples are longer than the texts that a model with rotary positions was trained on."""
    config: Any = getattr(meta, "config", None)
    if not isinstance(meta, transformers.PreTrainedModel):
        return
    text = config.get_text_config()
    limit, rotary = getattr(text, "max_position_embeddings", None), getattr(text, "rope_parameters", None)
    if isinstance(limit, int) and isinstance(rotary, Mapping) and longest > limit:
        yield (
            f"the longest sample has {longest} tokens, and {type(meta).__name__} is made for {limit} positions "
            "(data.max_length; model.overrides: {rope_parameters: …})"
        )
