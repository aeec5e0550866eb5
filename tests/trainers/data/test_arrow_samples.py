"""A file that holds no samples is damage, not a failure within a step: it may have fitting digests all the same."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from outlast.checkpointing.errors import DamagedError
from outlast.trainers.data.arrow_samples import Samples

IDS = pa.array([[1, 2], [3]], pa.list_(pa.int32()))
BEYOND = pa.ListArray.from_arrays(pa.array([0, 2**30, 3], pa.int32()), pa.array([1, 2, 3], pa.int32()))


def write(path: Path, columns: dict[str, pa.Array], sizes: list[int]) -> Path:
    batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        for size in sizes:
            writer.write_batch(batch.slice(0, size))
    return path


@pytest.mark.parametrize(
    ("columns", "sizes", "fault"),
    [
        ({"labels": IDS}, [2], "its columns are"),
        ({"input_ids": pa.array([1, 2])}, [2], "of type int64"),
        ({"input_ids": pa.array([[1], [2]], pa.list_(pa.int64()))}, [2], "of type list<item: int64>"),
        ({"input_ids": pa.array([[1], None], pa.list_(pa.int32()))}, [2], "missing values"),
        ({"input_ids": pa.array([[1], [None]], pa.list_(pa.int32()))}, [2], "missing values"),
        ({"input_ids": IDS, "labels": pa.array(["a", "b"])}, [2], "column labels is of type string"),
        ({"input_ids": IDS}, [1, 1], "batch 1 begins at sample 1"),
        ({"input_ids": BEYOND}, [2], ""),
    ],
    ids=range(8),
)
def test_other_content(columns: dict[str, pa.Array], sizes: list[int], fault: str, tmp_path: Path) -> None:
    path = write(tmp_path / "train.arrow", columns, sizes)
    with pytest.raises(DamagedError, match=f"{path}: not a file of samples: .*{fault}"):
        Samples(path)


@pytest.mark.parametrize("data", [b"", b"ARROW1", b"x" * 5000])
def test_no_arrow_file(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "train.arrow").write_bytes(data)
    with pytest.raises(DamagedError, match="not a file of samples"):
        Samples(tmp_path / "train.arrow")
