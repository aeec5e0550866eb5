"""Predictions with a run's model for `outlast try`. A checkpoint is verified byte for byte before it is loaded."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError, NoCheckpointError
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.tools.export import ADAPTER_WEIGHTS, export_directory, read_content
from outlast.checkpointing.tools.query import ResolvedCheckpoint, resolve_checkpoint
from outlast.trainers.config.adapter_directory import ADAPTER_CONFIG
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.config.trust import NO_TRUST, Trust, named_code
from outlast.trainers.data.columns import Column, RowForm, choose_columns, name_of
from outlast.trainers.data.readers import BadRowCounter, read_rows, usable_rows
from outlast.trainers.data.tokenizer import load_tokenizer
from outlast.trainers.models.build import load_saved
from outlast.trainers.models.merge_lora import load_adapted
from outlast.trainers.tasks.base import Record, Task, find_task

#: Settings whose code a prediction runs; that of the checkpoint's own files is refused where it is found.
_USED = ("model.class", "model.task")


def choose_checkpoint(store: RunStore, which: str | None, retention: Retention) -> ResolvedCheckpoint:
    """Resolve the checkpoint that `which` names; by default the finished model, or else the newest checkpoint.

    Raises:
        ConfigError: The run does not exist.
        NoCheckpointError: The checkpoint does not exist.
    """
    if which is not None:
        return resolve_checkpoint(store, which, retention)
    try:
        return resolve_checkpoint(store, "model", retention)
    except NoCheckpointError:
        return resolve_checkpoint(store, "newest", retention)


def load(
    config: TrainingConfig, found: ResolvedCheckpoint, base: str | None = None, trust: Trust = NO_TRUST
) -> tuple[Task, nn.Module]:
    """Load the run's task and model, ready to predict on the CPU.

    Args:
        config: The run's settings.
        found: The checkpoint.
        base: Directory or hub id of an adapter's base model; by default that of training.
        trust: Whether code that the run names, or that is in the checkpoint, may run.

    Raises:
        ConfigError: The model cannot be loaded, or needs code that is not trusted.
        DamagedError: The checkpoint is damaged.
        StorageError: Reading failed.
    """
    trust.check_code({key: name for key, name in named_code(config).items() if key in _USED}, "the run")
    declaration, task_class = found.declaration or {}, find_task(config.model.task)
    with tempfile.TemporaryDirectory() as scratch:
        folder, content = Path(scratch) / "model", read_content(found)
        is_adapter = content.weights_name == ADAPTER_WEIGHTS or ADAPTER_CONFIG in content.files
        if base is not None and not is_adapter:
            raise ConfigError("--base is for adapters, and this model is not one", hint="leave --base out")
        export_directory(content, folder)
        facts = declaration.get("facts")
        task = task_class(config.data, load_tokenizer(str(folder)), facts if isinstance(facts, dict) else {})
        model: nn.Module = (
            load_adapted(folder, declaration, base, trust)
            if is_adapter
            else load_saved(folder, task_class, config.model.class_, trusted=trust.everything)
        )
    return task, model.eval()


def input_columns(task: Task) -> list[Column]:
    """Return the columns that a prediction needs."""
    return [column for column in task.columns if not column.is_target]


def parse_record(task: Task, given: Any) -> Record:
    """Make a row from the user's input: a text, or for a task with several inputs an object with one key for each.

    Raises:
        ConfigError: An input is missing or has the wrong type.
    """
    columns = input_columns(task)
    needed = [column for column in columns if column.is_required]
    if isinstance(given, str):
        given = {needed[0].role: given} if len(needed) == 1 else {}
    missing = [column.role for column in needed if column.role not in given]
    if missing:
        example = "{" + ", ".join(f'"{column.role}": …' for column in needed) + "}"
        raise ConfigError(f"the task needs {', '.join(missing)}", hint=f"write --text '{example}', or use --file")
    record = {column.role: given[column.role] for column in columns if column.role in given}
    for column in columns:
        value = record.get(column.role)
        # The task splits a text into words, or uses it as the first message.
        is_plain_text = column.role in ("tokens", "messages") and isinstance(value, str)
        if column.role in record and not is_plain_text and not column.kind.fits(value):
            hint = f"write {column.kind.value}, or use --file"
            raise ConfigError(f"{column.role} is {value!r}, not {column.kind.value}", hint=hint)
    return record


def read_records(task: Task, config: TrainingConfig, source: str) -> Iterator[Record]:
    """Read the rows of a file that has the run's column names. Raises as reading the run's data does."""
    settings = config.data.model_copy(update={"train": source})
    try:
        forms = [
            RowForm(form.name, tuple(column for column in form.columns if not column.is_target)) for form in task.forms
        ]
        chosen = choose_columns(input_columns(task), settings, forms)
    except ConfigError as error:
        names = " and ".join(name_of(config.data, column.role) for column in input_columns(task) if column.is_required)
        raise ConfigError(error.message, hint=f"give --file rows with {names}") from error
    for row in usable_rows(
        read_rows(source, chosen.names, settings.csv, chosen.sparse_names),
        BadRowCounter(0, hint=f"fix {source}"),
        chosen.fault,
    ):
        yield FileRecord(chosen.record(row), row.where)


class FileRecord(dict[str, Any]):
    """A row of a file, and its place there."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self.where = where


def predict(task: Task, model: nn.Module, records: Iterable[Record]) -> Iterator[dict[str, Any]]:
    """Predict rows, one result for each row. An error names the row of the file, or the rows that are one batch."""
    places = list[str]()  # of the rows without a result

    def watched() -> Iterator[Record]:
        try:
            for record in records:
                places.append(getattr(record, "where", ""))
                yield record
        except ConfigError:  # of reading: it names its row
            places.clear()
            raise

    try:
        with torch.no_grad():
            for answer in task.predict(model, watched()):
                del places[:1]
                yield answer
    except ConfigError as error:
        if not (places and places[0]):
            raise
        rows = places[0] if len(places) == 1 else f"{places[0]} and the {len(places) - 1} rows after it"
        raise ConfigError(f"{rows}: {error.message}", hint=error.hint) from error
