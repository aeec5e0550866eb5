"""From a file to rows: .txt, .jsonl, .csv and .parquet, in order, in constant memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
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


def read_texts(source: str, column: str) -> Iterator[str]:
    """The documents of a file, in order. Raises as `read_rows`."""
    return (row[0] for row in read_rows(source, [column]))


def read_rows(source: str, columns: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The rows of a file, in order, in constant memory: a text, and perhaps a label, a number or a text, as text.

    Raises:
        ConfigError: The file or a column is missing, or a row holds something that is not text.
    """
    path = find_source(source)
    values = {".txt": _read_lines, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}[path.suffix]
    try:
        for number, row in enumerate(values(path, columns), 1):
            for place, value in enumerate(row):
                if not isinstance(value, str if place == 0 else (str, int)):
                    raise ConfigError(
                        f"{source}, row {number}: column {columns[place]!r} holds {value!r}, not text",
                        hint="mend that row, or name another column with data.text (or data.label)",
                    )
            yield tuple(map(str, row))
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


def _read_jsonl(path: Path, columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    """Line by line, because pyarrow guesses one type for a column and refuses rows of another."""
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                said = f"{path}, line {number} cannot be read as .jsonl: {error}"
                raise ConfigError(said, hint="write one JSON object a line") from error
            if not isinstance(row, dict):
                raise ConfigError(f"{path}, line {number} is not a JSON object", hint="write one JSON object a line")
            for column in columns:
                if column not in row:
                    there = {name: isinstance(row[name], str) for name in row}
                    raise _no_column(f"{path}, line {number}", column, there)
            yield tuple(row[column] for column in columns)


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
