"""Preparation on Ray Data: files are read and rows encoded all over the cluster, and come back in order.

Reading and encoding are two operators: a file is read by one task from its beginning to its end, but the rows of a
large one are encoded by many. An error for which the user must do something travels as a value, and is raised where it
stands in the order of the rows: it is the one that a single process would have met.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import tempfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data.exceptions import ExecutionTimeoutError

from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.fault_tolerance.failure_cause import RunFailed
from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.readers import read_files
from outlast.trainers.data.sources import DataFile
from outlast.trainers.data.tokenizer import load_tokenizer, tokenizer_files
from outlast.trainers.preparation.encode import Piece, Split, encode_rows, with_error
from outlast.trainers.tasks.base import Task
from outlast.trainers.tasks.find_task import find_task
from outlast.trainers.user_code import make_importable

#: Files of so many bytes together are read one after the other by one task.
PART_BYTES = 32 * 2**20
#: Rows of so many bytes are encoded by one task.
PIECE_BYTES = 2**20
NUM_READERS = 4


@dataclass(frozen=True, slots=True)
class EncodePart:
    """Files that one task reads, and the number of their first row."""

    sources: Sequence[DataFile]
    first: int = 0


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """What the tasks of Ray must know of a split. Plain values, because it is sent to every worker.

    Attributes:
        split: Whose rows.
        facts: What the task found in the training rows, as JSON.
        tokenizer: The tokenizer's files by name.
        code: Directory of the user's Python files, importable where it is there.
    """

    split: Split
    facts: str
    tokenizer: tuple[tuple[str, bytes], ...]
    code: str

    def task(self) -> Task:
        """The task, made once in each process."""
        make_importable(self.code)
        config = self.split.config
        return _task(config.model.task, config.data.model_dump_json(exclude_unset=True), self.facts, self.tokenizer)


@lru_cache(maxsize=1)
def _task(name: str, settings: str, facts: str, tokenizer: tuple[tuple[str, bytes], ...]) -> Task:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as many tasks run as there are CPUs
    with tempfile.TemporaryDirectory() as folder:
        for file, data in tokenizer:
            Path(folder, file).write_bytes(data)
        loaded = load_tokenizer(folder)
    return find_task(name)(DataSettings.model_validate_json(settings), loaded, json.loads(facts))


def encode_on_ray(task: Task, split: Split, *, code: str = "") -> Generator[Piece, None, None]:
    """Encodes a split on the Ray that is running, in constant memory. An `outlast.trainers.preparation.encode.Encoder`.

    Raises:
        RunFailed: Ray failed, or the same task of it again and again.
    """
    job = EncodeJob(split, json.dumps(task.facts), tuple(tokenizer_files(task.tokenizer).items()), code)
    parts = _parts(split.sources())
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        if split.is_share:  # the number of a row decides which split it is in
            counts = [row["count"] for row in _dataset(parts).map_batches(_count, **_reading(parts, job)).iter_rows()]
            firsts = accumulate(counts, initial=0)
            parts = [replace(part, first=first) for part, first in zip(parts, firsts, strict=False)]
        rows = _dataset(parts).map_batches(_read, **_reading(parts, job))
        # Other resources than those of reading keep Ray Data from making one operator of the two.
        encoded = rows.map_batches(_encode, batch_format="pyarrow", fn_args=[job], num_cpus=1)
        for row in encoded.iter_rows():
            yield from pickle.loads(row["pieces"])
    except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
        cause, *_ = str(error).split("\n\nThe above exception")  # the user's own, under Ray's
        said = (cause.strip().splitlines() or [type(error).__name__])[-1]
        hint = "run the same command again, or prepare in one process: -s data.prepare=here"
        raise RunFailed(f"preparing the data on Ray failed: {said}", hint=hint) from error


def _parts(sources: Sequence[DataFile]) -> list[EncodePart]:
    """The files, cut where about so many bytes are together."""
    parts: list[list[DataFile]] = []
    num_bytes = PART_BYTES
    for source in sources:
        if num_bytes >= PART_BYTES:
            parts.append([])
            num_bytes = 0
        parts[-1].append(source)
        num_bytes += source.num_bytes
    return [EncodePart(part) for part in parts]


def _dataset(parts: Sequence[EncodePart]) -> Any:
    """A data set with a block for each part, whose operators keep the order."""
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = PIECE_BYTES
    with ray.data.DataContext.current(context):
        return ray.data.from_items([{"part": pickle.dumps(part)} for part in parts], override_num_blocks=len(parts))


def _reading(parts: Sequence[EncodePart], job: EncodeJob) -> dict[str, Any]:
    """How tasks that read run. Local files are read where the driver is, because others may not have them."""
    is_local = any(isinstance(source.storage, LocalStorage) for part in parts for source in part.sources)
    return {
        "batch_size": 1,
        "batch_format": "pyarrow",
        "fn_args": [job],
        "num_cpus": 0,  # also where the driver's node has none to give
        "compute": ray.data.TaskPoolStrategy(min(NUM_READERS, len(parts))),
        "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()} if is_local else None,
    }


def _count(given: pa.Table, job: EncodeJob) -> pa.Table:
    """How many rows there are, up to an error, which is told when they are read."""
    part, count = pickle.loads(given["part"][0].as_py()), 0
    with suppress(OutlastError):
        for _ in read_files(part.sources, job.split.chosen.names):
            count += 1
    return pa.table({"count": [count]})


def _read(given: pa.Table, job: EncodeJob) -> Iterator[pa.Table]:
    part = pickle.loads(given["part"][0].as_py())
    rows, num_bytes = list[bytes](), 0
    for row in with_error(job.split.rows(part.sources, part.first)):
        rows.append(pickle.dumps(row))
        num_bytes += len(rows[-1])
        if num_bytes >= PIECE_BYTES:
            yield _table("row", rows)
            rows, num_bytes = [], 0
    yield _table("row", rows)


def _encode(given: pa.Table, job: EncodeJob) -> pa.Table:
    rows = [pickle.loads(row.as_py()) for row in given["row"]]
    return _table("pieces", [pickle.dumps(encode_rows(job.task(), job.split.chosen, rows))])


def _table(name: str, items: Sequence[bytes]) -> pa.Table:
    return pa.table({name: pa.array(items, pa.binary())})
