"""Readers of data files: rows in order, in constant memory, from text, JSON, CSV, Parquet and Arrow files.

A row that cannot be read is a fault of that row, and reading continues. A file that is not of the type its name states,
or that has a requested column in none of its rows, is an error.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from math import isnan
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.config.data import CsvSettings
from outlast.trainers.data.csv_reader import csv_names, read_csv
from outlast.trainers.data.json_reader import object_names, read_objects
from outlast.trainers.data.sources import (
    COLUMNAR,
    DEFAULT_CSV,
    FIRST_ROWS,
    IN_EVERY_FILE,
    DataFile,
    RawRow,
    find_data_files,
    missing_column_error,
)
from outlast.trainers.data.text_lines import read_lines

_BATCH_ROWS = 1024
_BUFFER_BYTES = 2**20
_NUM_NAMED = 3
_LOOKAHEAD_ROWS = 10_000
_IGNORED = -100
_COUNTED_ROWS = 100


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file."""

    values: tuple[Any, ...]  #: of the columns: text, numbers, lists, dicts or None; empty when the row cannot be read
    where: str  #: file and row, such as `train.jsonl, row 3`, and the line if its number differs
    fault: str | None = None  #: why the row cannot be read
    is_columnar: bool = False  #: from a file of columns, in which each item of a list has the keys of all


@dataclass(slots=True)
class BadRowCounter:
    """Counter of unusable rows: names the first three, and raises when there are more than the limit.

    Once there are, it sees at least the next 100 rows, to say how many of them are unusable.
    """

    limit: int  #: how many rows may be skipped: `data.max_bad_rows`
    count: int = 0  #: unusable rows so far
    first: list[str] = field(default_factory=list)  #: error texts of the first three
    hint: str = "fix them, or skip such rows: -s data.max_bad_rows=…"  #: advice of the error
    _num_seen: int = 0
    _over_at: int | None = None

    @property
    def are_too_many(self) -> bool:
        """Whether the limit is exceeded; later rows are read only to name the first three unusable ones."""
        return self._over_at is not None

    def see(self, num_rows: int, faults: Mapping[int, str]) -> None:
        """Add the next rows: their number, and the faults among them by index.

        Raises ConfigError once more than `limit` rows are unusable, and the look-ahead has ended.
        """
        for index in range(num_rows):
            if (fault := faults.get(index)) is not None:
                self.count += 1
                self.first += [fault] if len(self.first) < _NUM_NAMED else []
                if self.count > self.limit and self._over_at is None:
                    self._over_at = self._num_seen
            self._num_seen += 1
            if self._over_at is not None:
                num_ahead = self._num_seen - self._over_at
                if num_ahead >= (_COUNTED_ROWS if len(self.first) == _NUM_NAMED else _LOOKAHEAD_ROWS):
                    self.end()

    def end(self) -> None:
        """End the count after the last row. Raises as `see`."""
        if not self.are_too_many:
            return
        hint = self.hint
        if self.count == self._num_seen:  # skipping them would leave nothing
            hint = hint.partition(", or skip")[0]
        if self.count == 1:
            raise ConfigError(self.first[0], hint=hint.replace("fix them", "fix it").replace("such rows", "it"))
        amount = f"{self.count:,} of the first {self._num_seen:,} rows are unusable"
        message = f"{amount} (data.max_bad_rows is {self.limit:,}); the first ones:"
        raise ConfigError("\n  ".join([message, *self.first]), hint=hint)


def usable_rows(
    rows: Iterable[Row], bad: BadRowCounter, find_fault: Callable[[tuple[Any, ...]], str | None] = lambda values: None
) -> Iterator[Row]:
    """Iterate over the usable rows and count the others in `bad`. Raises as `BadRowCounter.see`.

    `find_fault` returns the error text for a row's values, or None. With too many unusable rows reading continues a
    little, to name the first three.
    """
    for row in rows:
        fault = row.fault or find_fault(row.values)
        bad.see(1, {0: f"{row.where}: {fault}"} if fault else {})
        if not fault and not bad.are_too_many:
            yield row
    bad.end()


def read_rows(
    source: str | Sequence[str],
    columns: Sequence[str],
    csv: CsvSettings = DEFAULT_CSV,
    sparse: Collection[str] = (),
) -> Iterator[Row]:
    """Read these columns of the rows of a source, in order, in constant memory; see `find_data_files`.

    A row that cannot be read becomes a row with a fault. A row may lack the columns named in `sparse`: their value is
    None then.

    Raises:
        ConfigError: A file is missing or not of the type its name states, or a column is in none of its rows.
        StorageError: Reading failed.
    """
    yield from read_files(find_data_files(source, csv), columns, sparse)


def read_files(
    sources: Iterable[DataFile], columns: Sequence[str], sparse: Collection[str] = (), named: Sequence[str] = ()
) -> Iterator[Row]:
    """Read the rows of these files, as `read_rows`.

    Numbers in the columns `named` become the names that a file's own `class_names` give them.
    """
    for item in sources:
        is_columnar = item.kind in COLUMNAR
        labels = class_names(item, named)
        convert = [partial(_class_name, labels[name]) if name in labels else _value for name in columns]
        with item.reading():
            for number, (values, line) in enumerate(_read(item, columns, sparse), 1):
                where = f"{item.name}, row {number}" + (f" (line {line})" if line not in (None, number) else "")
                if isinstance(values, str):
                    yield Row((), where, values)
                else:
                    found = tuple(each(value) for each, value in zip(convert, values, strict=True))
                    yield Row(found, where, is_columnar=is_columnar)


def value_at(value: Any, keys: Sequence[str]) -> Any:
    """Return a value within nested objects; None if there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _read(item: DataFile, columns: Sequence[str], sparse: Collection[str]) -> Iterator[RawRow]:
    """Read the rows of one file. A name such as `translation.en` is a key of the objects in a column."""
    names = _FORMATS[item.kind][0](item) if any("." in name for name in columns) else columns
    paths = [[name] if name in names else name.split(".") for name in columns]
    heads = [path[0] if path[0] in names else name for path, name in zip(paths, columns, strict=True)]
    if heads == list(columns):
        yield from _read_columns(item, columns, sparse)
        return
    sparse_heads = {head for head, name in zip(heads, columns, strict=True) if name in sparse}
    for values, line in _read_columns(item, heads, sparse_heads):
        if not isinstance(values, str):
            values = tuple(value_at(value, path[1:]) for value, path in zip(values, paths, strict=True))
        yield values, line


def _read_columns(item: DataFile, columns: Sequence[str], sparse: Collection[str]) -> Iterator[RawRow]:
    """Read the values of whole columns of one file."""
    read_names, read = _FORMATS[item.kind]
    if not sparse:
        yield from read(item, columns)
    elif read is read_objects:
        yield from read_objects(item, columns, sparse)
    else:
        names = read_names(item)
        present = [name for name in columns if name in names or name not in sparse]
        for values, line in read(item, present):
            known = {} if isinstance(values, str) else dict(zip(present, values, strict=True))
            yield values if isinstance(values, str) else tuple(known.get(name) for name in columns), line


def _value(value: Any) -> Any:
    """Return None for a number that is none, which some writers of Parquet put where there is no value."""
    return None if isinstance(value, float) and isnan(value) else value


def _class_name(names: Sequence[str], value: Any) -> Any:
    """Return the name of a class index, or of each of a list; None for -1, which is no class.

    -100 in a list stays: it marks words without a label.
    """
    if isinstance(value, list):
        return [item if item == _IGNORED else _class_name(names, item) for item in value]
    if not isinstance(value, int) or value >= len(names):
        return value
    return names[value] if value >= 0 else None


def class_names(source: DataFile, columns: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Return the class names of columns, by index, that the `datasets` library wrote into a file's schema."""
    if not columns or source.kind not in COLUMNAR:
        return {}
    with source.reading():
        metadata = _schema(source).metadata or {}
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    found = dict[str, tuple[str, ...]]()
    for column in columns:
        feature = features.get(column) if isinstance(features, dict) else None
        while isinstance(feature, dict) and isinstance(feature.get("feature"), dict):  # of a list
            feature = feature["feature"]
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names"):
            found[column] = tuple(map(str, feature["names"]))
    return found


def first_row(source: str | Sequence[str], csv: CsvSettings = DEFAULT_CSV) -> dict[str, Any]:
    """Return the columns of the first file with rows, and the first value of each among its first rows, None if none.

    A row that lacks a value, or is damaged, thus does not change which columns are chosen. Raises ConfigError if no
    file has a row, and as `read_rows`.
    """
    for item in find_data_files(source, csv):
        with item.reading():
            names = _FORMATS[item.kind][0](item)
            row, num_rows = dict[str, Any].fromkeys(names), 0
            for values, _ in islice(_read(item, names, names), FIRST_ROWS):
                num_rows += 1
                for name, value in zip(names, () if isinstance(values, str) else values, strict=False):
                    row[name] = _value(value) if row[name] is None else row[name]
            if num_rows:
                return row
    shown = source if isinstance(source, str) else ", ".join(source)
    raise ConfigError(f"{shown} has no rows", hint="set data.train (and data.eval) to files with rows")


def _read_lines(source: DataFile, columns: Sequence[str]) -> Iterator[RawRow]:
    if len(columns) > 1:
        hint = "use a file with columns, such as .jsonl, .csv or .parquet"
        raise ConfigError(f"{source.name}: a .txt file has no column {columns[1]!r}", hint=hint)
    for number, text, fault in read_lines(source):
        if text.strip():
            yield fault or (text.rstrip("\r\n"),), number


def _read_parquet(source: DataFile, columns: Sequence[str]) -> Iterator[RawRow]:
    with source.open() as raw:
        file = parquet.ParquetFile(raw, buffer_size=_BUFFER_BYTES)
        _check_columns(source.name, columns, file.schema_arrow)
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(dict.fromkeys(columns))):
            yield from _rows_of(batch, columns)


@contextmanager
def _open_arrow(source: DataFile) -> Iterator[Any]:
    """Open an Arrow file or an Arrow stream; the `datasets` library writes streams."""
    local = source.storage.path(source.path) if isinstance(source.storage, LocalStorage) else None
    with pa.memory_map(str(local)) if local else source.open() as raw:
        is_file = raw.read(6) == b"ARROW1"
        raw.seek(0)
        yield pa.ipc.open_file(raw) if is_file else pa.ipc.open_stream(raw)


def _read_arrow(source: DataFile, columns: Sequence[str]) -> Iterator[RawRow]:
    with _open_arrow(source) as reader:
        _check_columns(source.name, columns, reader.schema)
        is_file = isinstance(reader, pa.ipc.RecordBatchFileReader)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            for begin in range(0, batch.num_rows, _BATCH_ROWS):
                yield from _rows_of(batch.slice(begin, _BATCH_ROWS), columns)


def _rows_of(batch: pa.RecordBatch, columns: Sequence[str]) -> Iterator[RawRow]:
    used = [batch.column(name) for name in columns]
    for column in used:
        column.validate(full=True)  # reading a damaged one would end the process
    return ((row, None) for row in zip(*(column.to_pylist() for column in used), strict=True))


def _check_columns(name: str, columns: Sequence[str], schema: pa.Schema) -> None:
    if missing := [column for column in columns if column not in schema.names]:
        raise missing_column_error(name, missing, schema.names, IN_EVERY_FILE)


def _schema(source: DataFile) -> pa.Schema:
    if source.kind == ".parquet":
        with source.open() as raw:
            return parquet.read_schema(raw)
    with _open_arrow(source) as reader:
        return reader.schema


def _schema_names(source: DataFile) -> list[str]:
    return list(_schema(source).names)


#: By file type: the function that reads the names of the columns, and the one that reads the rows.
_FORMATS: dict[str, tuple[Callable[[DataFile], list[str]], Callable[[DataFile, Sequence[str]], Iterator[RawRow]]]] = {
    ".txt": (lambda source: ["text"], _read_lines),
    **dict.fromkeys((".jsonl", ".json"), (object_names, read_objects)),
    **dict.fromkeys((".csv", ".tsv"), (csv_names, read_csv)),
    ".parquet": (_schema_names, _read_parquet),
    **dict.fromkeys((".arrow", ".feather"), (_schema_names, _read_arrow)),
}
