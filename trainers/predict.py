"""Predictions of a run's model by its task: `outlast try`. What is loaded is verified first, byte for byte."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from outlast.checkpointing.commands import Found, find
from outlast.checkpointing.errors import ConfigError, NoCheckpointError
from outlast.checkpointing.export import ADAPTER_WEIGHTS, CONFIG, Content, export_directory, read_content
from outlast.checkpointing.retention import Retention
from outlast.checkpointing.safetensors import Spec
from outlast.checkpointing.storage import Storage
from outlast.checkpointing.weights import check_weights, named_weights
from outlast.trainers.columns import Column, choose_columns
from outlast.trainers.config import ModelSettings, TrainingConfig
from outlast.trainers.custom import is_like_transformers, load_class
from outlast.trainers.merging import merge
from outlast.trainers.models import load_tokenizer, model_class
from outlast.trainers.registry import find_task
from outlast.trainers.rows import BadRows, read_rows, usable
from outlast.trainers.tasks import Record, Task


def choose_checkpoint(storage: Storage, run: str, which: str | None, retention: Retention) -> Found:
    """The checkpoint that `which` names; without it the finished model, else the newest checkpoint.

    Raises:
        ConfigError: There is no such run.
        NoCheckpointError: There is no such checkpoint.
    """
    if which is not None:
        return find(storage, run, which, retention)
    try:
        return find(storage, run, "model", retention)
    except NoCheckpointError:
        return find(storage, run, "newest", retention)


def load(config: TrainingConfig, found: Found) -> tuple[Task, nn.Module]:
    """The run's task and a model of it, ready to predict on the CPU. An adapter is merged with the model beneath.

    Raises:
        ConfigError: The run's own code, or the model beneath an adapter, is not there.
        DamagedError: The checkpoint is not whole.
        StorageError: Reading failed.
    """
    declaration, content = found.declaration, read_content(found)
    if content.weights_name == ADAPTER_WEIGHTS:
        content = merge(content, declaration)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        export_directory(content, directory)
        facts = (declaration or {}).get("facts", {})
        task = find_task(config.model.task)(config.data, load_tokenizer(str(directory)), facts)
        model = _load_model(config.model, task, content, str(directory))
    return task, model.eval()


def _load_model(settings: ModelSettings, task: Task, content: Content, directory: str) -> nn.Module:
    own = load_class(settings.class_) if settings.class_ else None
    if own is not None and not is_like_transformers(own):
        plain: nn.Module = own(**json.loads(content.file(CONFIG)))
        weights = named_weights(plain)  # tied ones once, as in the file
        check_weights(plain, {name: Spec.of(tensor) for name, tensor in content.weights.items()})
        for name, tensor in content.weights.items():
            weights[name].copy_(tensor)
        return plain
    trusted = {} if own else {"trust_remote_code": settings.trust_remote_code}
    head = own or model_class(task, transformers.AutoConfig.from_pretrained(directory, **trusted))
    model: nn.Module = head.from_pretrained(directory, dtype=torch.float32, **trusted)
    return model


def inputs_of(task: Task) -> list[Column]:
    """The columns that a prediction needs."""
    return [column for column in task.columns if not column.is_target]


def record_of(task: Task, given: Any) -> Record:
    """A row from what a user wrote: a text, or for a task with several inputs an object that names each.

    Raises:
        ConfigError: An input is missing, or is not what it should be.
    """
    columns = inputs_of(task)
    needed = [column for column in columns if not column.is_optional]
    if isinstance(given, str):
        given = {needed[0].role: given} if len(needed) == 1 else {}
    missing = [column.role for column in needed if column.role not in given]
    if missing:
        example = "{" + ", ".join(f'"{column.role}": …' for column in needed) + "}"
        raise ConfigError(f"the task needs {', '.join(missing)}", hint=f"write --text '{example}', or give a --file")
    record = {column.role: given[column.role] for column in columns if column.role in given}
    for column in columns:
        value = record.get(column.role)
        # A text is cut into words, or is the first message.
        text = column.role in ("tokens", "messages") and isinstance(value, str)
        if column.role in record and not text and not column.kind.fits(value):
            raise ConfigError(f"{column.role} is {value!r}, not {column.kind.value}")
    return record


def records_in(task: Task, config: TrainingConfig, source: str) -> Iterator[Record]:
    """The rows of a file, its columns named as the run's are. Raises as reading the run's data does."""
    settings = config.data.model_copy(update={"train": source})
    chosen = choose_columns(inputs_of(task), settings)
    for row in usable(read_rows(source, chosen.names), BadRows(settings.max_bad_rows), chosen.fault):
        yield chosen.record(row.values)


def predict(task: Task, model: nn.Module, records: Sequence[Record] | Iterator[Record]) -> Iterator[dict[str, Any]]:
    """One answer for each row."""
    with torch.no_grad():
        yield from task.predict(model, records)
