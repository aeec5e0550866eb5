"""Predictions of a run's model by its task: `outlast try`. What is loaded is verified first, byte for byte."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError, NoCheckpointError
from outlast.checkpointing.run_store.retention import Retention
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.tools.export import ADAPTER_WEIGHTS, export_directory, read_content
from outlast.checkpointing.tools.query import ResolvedCheckpoint, resolve_checkpoint
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.columns import Column, choose_columns, name_of
from outlast.trainers.data.readers import BadRows, read_rows, usable
from outlast.trainers.data.tokenizer import load_tokenizer
from outlast.trainers.models.build import load_saved
from outlast.trainers.models.merge_lora import load_adapted
from outlast.trainers.tasks.base import Record, Task
from outlast.trainers.tasks.registry import find_task


def choose_checkpoint(store: RunStore, which: str | None, retention: Retention) -> ResolvedCheckpoint:
    """The checkpoint that `which` names; without it the finished model, else the newest checkpoint.

    Raises:
        ConfigError: There is no such run.
        NoCheckpointError: There is no such checkpoint.
    """
    if which is not None:
        return resolve_checkpoint(store, which, retention)
    try:
        return resolve_checkpoint(store, "model", retention)
    except NoCheckpointError:
        return resolve_checkpoint(store, "newest", retention)


def load(
    config: TrainingConfig, found: ResolvedCheckpoint, base: str | None = None, *, trusted: bool = False
) -> tuple[Task, nn.Module]:
    """The run's task and a model of it, ready to predict on the CPU.

    Args:
        config: The run's settings.
        found: The checkpoint.
        base: Of an adapter: where the model beneath lies; by default where it lay in training.
        trusted: Whether code that lies in the checkpoint may run.

    Raises:
        ConfigError: The model cannot be loaded.
        DamagedError: The checkpoint is not whole.
        StorageError: Reading failed.
    """
    declaration, kind = found.declaration or {}, find_task(config.model.task)
    with tempfile.TemporaryDirectory() as scratch:
        folder, content = Path(scratch) / "model", read_content(found)
        is_adapter = content.weights_name == ADAPTER_WEIGHTS
        if base is not None and not is_adapter:
            raise ConfigError("--base is for adapters, and this model stands alone", hint="leave --base out")
        export_directory(content, folder)
        task = kind(config.data, load_tokenizer(str(folder)), declaration.get("facts", {}))
        model: nn.Module = (
            load_adapted(folder, declaration, base, trusted=trusted)
            if is_adapter
            else load_saved(folder, kind, config.model.class_, trusted=trusted)
        )
    return task, model.eval()


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
            raise ConfigError(
                f"{column.role} is {value!r}, not {column.kind.value}", hint="write it so, or give a --file"
            )
    return record


def records_in(task: Task, config: TrainingConfig, source: str) -> Iterator[Record]:
    """The rows of a file, its columns named as the run's are. Raises as reading the run's data does."""
    settings = config.data.model_copy(update={"train": source})
    try:
        chosen = choose_columns(inputs_of(task), settings)
    except ConfigError as error:
        names = " and ".join(name_of(config.data, column.role) for column in inputs_of(task) if not column.is_optional)
        raise ConfigError(error.message, hint=f"give --file rows with {names}") from error
    for row in usable(read_rows(source, chosen.names), BadRows(0, hint=f"mend {source}"), chosen.fault):
        yield chosen.record(row.values)


def predict(task: Task, model: nn.Module, records: Sequence[Record] | Iterator[Record]) -> Iterator[dict[str, Any]]:
    """One answer for each row."""
    with torch.no_grad():
        yield from task.predict(model, records)
