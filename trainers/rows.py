"""From a file to rows: .txt, .jsonl, .csv and .parquet, in order, in constant memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import csv, parquet

from outlast.checkpointing.errors import ConfigError

_SUFFIXES = (".txt", ".jsonl", ".csv", ".parquet")
_CSV_BLOCK_BYTES = 64 * 2**20  # the longest row that can be read


def find_source(name: str) -> Path:
    """The file of this name.

    Raises:
        ConfigError: It is not there, is empty, or is of no known kind.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"data file {name} is not there", hint="set data.train (and data.eval) to existing files")
    if path.suffix not in _SUFFIXES:
        raise ConfigError(
            f"data file {name}: outlast reads .txt, .jsonl, .csv and .parquet, not {path.suffix!r}",
            hint="convert it, or rename it if it is one of these",
        )
    if not path.stat().st_size:
        raise ConfigError(f"data file {name} is empty", hint="set data.train (and data.eval) to files with text")
    return path


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it lies in its file.

    Attributes:
        values: What the columns hold: text, numbers, lists, dicts or None. Empty when the row cannot be read.
        where: File and row, such as `train.jsonl, row 3`.
        fault: Why the row cannot be read.
    """

    values: tuple[Any, ...]
    where: str
    fault: str | None = None


def read_rows(source: str, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a file, in order, in constant memory. A row that cannot be read is a fault, and the rest is read.

    Raises:
        ConfigError: The file is missing, is not what its name says, or a column is in none of its rows.
    """
    path = find_source(source)
    rows = {".txt": _read_lines, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}[path.suffix]
    try:
        for number, values in enumerate(rows(path, columns), 1):
            where = f"{source}, row {number}"
            yield Row((), where, values) if isinstance(values, str) else Row(values, where)
    except UnicodeDecodeError as error:
        hint = "convert it, for example with iconv -f LATIN1 -t UTF-8"
        raise ConfigError(f"{source} is not UTF-8 text: {error}", hint=hint) from error
    except pa.ArrowInvalid as error:
        said = str(error).splitlines()[0][:300]
        raise ConfigError(f"{source} cannot be read as {path.suffix}: {said}", hint="check that file") from error


def _read_lines(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    if len(columns) > 1:
        raise ConfigError(f"{path}: a .txt file holds no column {columns[1]!r}", hint="give a .jsonl, .csv or .parquet")
    with path.open(encoding="utf-8-sig") as file:
        yield from ((line.rstrip("\n"),) for line in file if line.strip())


def _read_jsonl(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...] | str]:
    """Line by line, because pyarrow guesses one type for a column and refuses rows of another."""
    _check_jsonl_columns(path, columns)
    for item in _json_lines(path):
        if isinstance(item, str):
            yield item
        elif missing := [name for name in columns if name not in item]:
            yield f"has no column {missing[0]!r}"
        else:
            yield tuple(item[name] for name in columns)


def _json_lines(path: Path) -> Iterator[dict[str, Any] | str]:
    """The object of each line that is not empty, or what is wrong with the line."""
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except ValueError as error:
                yield f"cannot be read as .jsonl: {error}"
            else:
                yield item if isinstance(item, dict) else "cannot be read as .jsonl: not a JSON object"


def _check_jsonl_columns(path: Path, columns: Sequence[str]) -> None:
    """Reads until each column was seen once, which is one line of a good file."""
    missing, there = set(columns), dict[str, bool]()
    for item in _json_lines(path):
        if isinstance(item, dict):
            missing -= item.keys()
            there |= {name: isinstance(value, str) for name, value in item.items() if name not in there}
        if not missing:
            return
    if there:
        raise _no_column(str(path), next(name for name in columns if name in missing), there)


def _read_csv(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    reading, parsing = csv.ReadOptions(block_size=_CSV_BLOCK_BYTES), csv.ParseOptions(newlines_in_values=True)
    with csv.open_csv(path, reading, parsing) as head:
        _check_columns(path, columns, head.schema)
    converting = csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.string()))
    with csv.open_csv(path, reading, parsing, converting) as rows:
        for batch in rows:
            yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def _read_parquet(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    file = parquet.ParquetFile(path)
    _check_columns(path, columns, file.schema_arrow)
    for batch in file.iter_batches(columns=list(columns)):
        yield from zip(*(batch.column(name).to_pylist() for name in columns), strict=True)


def _check_columns(path: Path, columns: Sequence[str], schema: pa.Schema) -> None:
    kinds = {field.name: pa.types.is_string(field.type) or pa.types.is_large_string(field.type) for field in schema}
    for column in columns:
        if column not in kinds:
            raise _no_column(str(path), column, kinds)


def _no_column(where: str, column: str, there: Mapping[str, bool]) -> ConfigError:
    """The error for a missing column. `there` says of each column that there is whether it holds text."""
    likely = next((name for name, is_text in there.items() if is_text), next(iter(there), "NAME"))
    return ConfigError(
        f"{where} has no column {column!r}; it has {', '.join(there)}",
        hint=f"set data.text, for example -s data.text={likely}",
    )
