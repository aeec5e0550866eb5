"""Preparation on Ray Data: files are read and rows encoded across the cluster, and returned in order.

Reading and encoding are two operators: one task reads a file from beginning to end, many encode the rows of a large
one. A user error travels as a value and is raised at its place in the order of the rows, so that it is the one that a
single process would raise.
"""

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
from outlast.trainers.tasks.base import Task, find_task
from outlast.trainers.user_code import make_importable

#: One task reads files of about this size in total.
PART_BYTES = 32 * 2**20
#: One task encodes rows of about this size in total.
PIECE_BYTES = 2**20
NUM_READERS = 4


@dataclass(frozen=True, slots=True)
class EncodePart:
    """Files that one task reads, and the index of their first row."""

    sources: Sequence[DataFile]
    first: int = 0


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """Input of the Ray tasks of a split. Plain values, because it is sent to every worker."""

    split: Split
    facts: str  #: the task's facts about the training rows, as JSON
    tokenizer: tuple[tuple[str, bytes], ...]  #: its files by name
    code: str  #: directory of the user's Python files, made importable if it exists

    def task(self) -> Task:
        """Return the task, made once in each process."""
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
    """Encode a split on the running Ray, in constant memory. An `outlast.trainers.preparation.encode.Encoder`.

    Raises RunFailed if Ray failed, or one of its tasks failed repeatedly.
    """
    job = EncodeJob(split, json.dumps(task.facts), tuple(tokenizer_files(task.tokenizer).items()), code)
    parts = _parts(split.sources())
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    try:
        if split.is_share:  # a row's index decides which split it is in
            counts = [row["count"] for row in _dataset(parts).map_batches(_count, **_reading(parts, job)).iter_rows()]
            firsts = accumulate(counts, initial=0)
            parts = [replace(part, first=first) for part, first in zip(parts, firsts, strict=False)]
        rows = _dataset(parts).map_batches(_read, **_reading(parts, job))
        # Resources unlike the reader's keep Ray Data from fusing the two operators.
        encoded = rows.map_batches(_encode, batch_format="pyarrow", fn_args=[job], num_cpus=1)
        for row in encoded.iter_rows():
            yield from pickle.loads(row["pieces"])
    except (ray.exceptions.RayError, ExecutionTimeoutError) as error:
        cause, *_ = str(error).split("\n\nThe above exception")  # the user's traceback, without Ray's
        reason = (cause.strip().splitlines() or [type(error).__name__])[-1]
        hint = "run the same command again, or prepare in one process: -s data.prepare=here"
        raise RunFailed(f"preparing the data on Ray failed: {reason}", hint=hint) from error


def _parts(sources: Sequence[DataFile]) -> list[EncodePart]:
    """Group the files into parts of about `PART_BYTES`."""
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
    """Return a data set with one block per part, whose operators keep the order."""
    context = ray.data.DataContext.get_current().copy()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.target_max_block_size = PIECE_BYTES
    with ray.data.DataContext.current(context):
        return ray.data.from_items([{"part": pickle.dumps(part)} for part in parts], override_num_blocks=len(parts))


def _reading(parts: Sequence[EncodePart], job: EncodeJob) -> dict[str, Any]:
    """Return the options of reading tasks. Local files are read on the driver's node: others may not have them."""
    is_local = any(isinstance(source.storage, LocalStorage) for part in parts for source in part.sources)
    return {
        "batch_size": 1,
        "batch_format": "pyarrow",
        "fn_args": [job],
        "num_cpus": 0,  # also where the driver's node offers none
        "compute": ray.data.TaskPoolStrategy(min(NUM_READERS, len(parts))),
        "label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()} if is_local else None,
    }


def _count(given: pa.Table, job: EncodeJob) -> pa.Table:
    """Count the rows up to an error, which reading them reports."""
    part, count = pickle.loads(given["part"][0].as_py()), 0
    with suppress(OutlastError):
        for _ in read_files(part.sources, job.split.chosen.names, job.split.chosen.sparse_names):
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
