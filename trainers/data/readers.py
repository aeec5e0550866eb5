"""From files to rows, in order, in constant memory: text, JSON, tables; plain, compressed, here or on an object store.

A row that cannot be read is a fault of that row, and the rest is read; a file that is not what its name says, or a
column that is in none of a file's rows, is an error.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.data.sources import Source, find_sources

_BATCH_ROWS = 1024
_BUFFER_BYTES = 2**20
_FIELD_BYTES = 64 * 2**20  # the longest field of a .csv that is one, and not a quotation mark too many
_NUM_NAMED = 3
_MARK = b"\xef\xbb\xbf"  # some editors begin UTF-8 with it
_LOOK_ON_ROWS = 10_000
_IN_EVERY_FILE = "every file needs it: rename the column that is meant, or leave this file out"

#: The values of a row, or what is wrong with it; and the line on which it ends, where the file has lines.
_Found = tuple[tuple[Any, ...] | str, int | None]


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it lies in its file.

    Attributes:
        values: What the columns hold: text, numbers, lists, dicts or None. Empty when the row cannot be read.
        where: File and row, such as `train.jsonl, row 3`, and the line where that is another number.
        fault: Why the row cannot be read.
    """

    values: tuple[Any, ...]
    where: str
    fault: str | None = None


@dataclass(slots=True)
class BadRows:
    """Counts the rows that cannot be used, names the first ones, and refuses too many.

    Attributes:
        limit: How many may be left out: `data.max_bad_rows`.
        count: How many were.
        first: The first of them, in words.
        hint: What to do about too many.
    """

    limit: int
    count: int = 0
    first: list[str] = field(default_factory=list)
    hint: str = "mend them, or have such rows left out: -s data.max_bad_rows=…"
    _num_seen: int = 0
    _over_at: int | None = None

    @property
    def are_too_many(self) -> bool:
        """There are more than may be left out; what is seen from now on serves to name the first three."""
        return self._over_at is not None

    def see(self, num_rows: int, faults: Mapping[int, str]) -> None:
        """Some rows, and what is wrong with those at these places.

        Raises:
            ConfigError: More than `limit` rows cannot be used, and the first three are named or far apart.
        """
        for place, fault in sorted(faults.items()):
            at = self._num_seen + place
            if self._over_at is None or (at - self._over_at <= _LOOK_ON_ROWS and len(self.first) < _NUM_NAMED):
                self.count += 1
                self.first += [fault] if len(self.first) < _NUM_NAMED else []
                if self.count > self.limit and self._over_at is None:
                    self._over_at = at
        self._num_seen += num_rows
        are_enough = len(self.first) == _NUM_NAMED
        if self._over_at is not None and (are_enough or self._num_seen - self._over_at > _LOOK_ON_ROWS):
            self.end()

    def end(self) -> None:
        """There are no more rows. Raises as `see`."""
        if self.are_too_many:
            said = f"more rows cannot be used than the {self.limit:,} that may be left out; the first ones:"
            raise ConfigError(self.first[0] if self.count == 1 else "\n  ".join([said, *self.first]), hint=self.hint)


def usable(
    rows: Iterable[Row], bad: BadRows, judge: Callable[[tuple[Any, ...]], str | None] = lambda values: None
) -> Iterator[Row]:
    """The rows that can be used; the others are added to `bad`.

    Args:
        rows: As `read_rows` gives them.
        bad: Counts, also over several calls.
        judge: Says what is wrong with a row's values, or None.

    Raises:
        ConfigError: More than `bad.limit` rows cannot be used. Reads on a little, to name the first three.
    """
    for row in rows:
        fault = row.fault or judge(row.values)
        bad.see(1, {0: f"{row.where}: {fault}"} if fault else {})
        if not fault and not bad.are_too_many:
            yield row
    bad.end()


def read_rows(source: str | Sequence[str], columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a source, in order, in constant memory. A row that cannot be read is a fault, and the rest is read.

    Args:
        source: A file, a directory, a pattern, or a list of these; see `find_sources`.
        columns: Which values, in this order.

    Raises:
        ConfigError: A file is missing, is not what its name says, or a column is in none of its rows.
        StorageError: Reading failed.
    """
    yield from read_files(find_sources(source), columns)


def read_files(sources: Iterable[Source], columns: Sequence[str]) -> Iterator[Row]:
    """The rows of some files, as `read_rows`."""
    for item in sources:
        with item.reading():
            for number, (values, line) in enumerate(_READERS[item.kind](item, columns), 1):
                where = f"{item.name}, row {number}" + (f" (line {line})" if line not in (None, number) else "")
                yield Row((), where, values) if isinstance(values, str) else Row(values, where)


def first_row(source: str | Sequence[str]) -> dict[str, Any]:
    """Every column of the first file, with the value of a row that can be read, or None where there is none.

    Raises:
        ConfigError: As `read_rows`.
        StorageError: As `read_rows`.
    """
    item = find_sources(source)[0]
    with item.reading():
        names = _HEADERS[item.kind](item)
        values = next((values for values, _ in _READERS[item.kind](item, names) if not isinstance(values, str)), None)
        return dict(zip(names, values or [None] * len(names), strict=True))


def _read_lines(source: Source, columns: Sequence[str]) -> Iterator[_Found]:
    if len(columns) > 1:
        hint = "give rows with columns, such as .jsonl, .csv or .parquet"
        raise ConfigError(f"{source.name}: a .txt file holds no column {columns[1]!r}", hint=hint)
    for number, line in _lines(source):
        text, fault = _decoded(line)
        yield fault or (text.rstrip("\r\n"),), number


def _lines(source: Source) -> Iterator[tuple[int, bytes]]:
    """The lines that are not empty, with their numbers."""
    with source.open() as file:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(_MARK) if number == 1 else line
            if text.strip():
                yield number, text


def _decoded(line: bytes) -> tuple[str, str | None]:
    """The line as text, as well as it goes, and what is wrong with it."""
    try:
        return line.decode(), None
    except UnicodeDecodeError as error:
        return line.decode(errors="replace"), f"is not UTF-8 text: {error}"


def _read_jsonl(source: Source, columns: Sequence[str]) -> Iterator[_Found]:
    """Line by line, because pyarrow guesses one type for a column and refuses rows of another."""
    return _chosen(source, columns, lambda: ((_parsed(line), number) for number, line in _lines(source)))


class _RowError(str):
    """What is wrong with a line; any other text is a value."""


def _parsed(line: bytes) -> Any:
    """What the line holds, or what is wrong with it."""
    text, fault = _decoded(line)
    if fault:
        return _RowError(fault)
    try:
        item = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(item, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return _RowError("holds half a character (one of a surrogate pair)")
    except (ValueError, RecursionError) as error:
        return _RowError(f"cannot be read as .jsonl: {error}")
    return item


def _read_json(source: Source, columns: Sequence[str]) -> Iterator[_Found]:
    return _chosen(source, columns, lambda: ((item, None) for item in _json_items(source)))


def _json_items(source: Source) -> Iterator[Any]:
    """The items of one JSON list, or JSON values one after the other, read piece by piece."""
    decoder, text, at, size, in_list = json.JSONDecoder(), "", 0, _BUFFER_BYTES, None
    with io.TextIOWrapper(source.open(), encoding="utf-8-sig") as file:
        while True:
            more = file.read(size)
            text, at = text[at:] + more, 0
            if in_list is None and text.strip():
                in_list, text = text.lstrip()[0] == "[", text.lstrip().removeprefix("[")
            while (at := _skipped(text, at)) < len(text):
                if in_list and text[at] == "]":
                    if text[at + 1 :].strip() or file.read(1):
                        raise ValueError("something follows the list")
                    return
                try:
                    item, end = decoder.raw_decode(text, at)
                except json.JSONDecodeError as error:
                    if not more or len(text) - at > _FIELD_BYTES:
                        raise ValueError(f"{error.msg} near {text[at : at + 40]!r}") from error
                    break
                if end == len(text) and more:
                    break  # the rest of a number may follow
                yield item
                at = end
            if not more:
                if in_list:
                    raise ValueError("it ends before its list does")
                return
            size = max(_BUFFER_BYTES, len(text) - at)


def _skipped(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n,":
        at += 1
    return at


def _chosen(
    source: Source, columns: Sequence[str], items: Callable[[], Iterator[tuple[Any, int | None]]]
) -> Iterator[_Found]:
    """The columns of objects. First reads until each column was seen once, which is one object of a good file."""
    missing, there = set(columns), dict[str, None]()
    for item, _ in items():
        if isinstance(item, dict):
            missing -= item.keys()
            there |= dict.fromkeys(item)
        if not missing:
            break
    if missing and there:
        raise no_column(source.name, [name for name in columns if name in missing], there, _IN_EVERY_FILE)
    for item, line in items():
        if not isinstance(item, dict):
            yield item if isinstance(item, _RowError) else "is not a JSON object", line
        elif lacking := [name for name in columns if name not in item]:
            yield f"has no column {lacking[0]!r}", line
        else:
            yield tuple(item[name] for name in columns), line


def _csv_rows(source: Source, faults: list[str]) -> Any:
    """A reader of the csv module. What is wrong with the bytes of the row that it gives is in `faults`."""
    csv.field_size_limit(_FIELD_BYTES)

    def texts() -> Iterator[str]:
        with source.open() as file:
            for number, line in enumerate(file):
                text, fault = _decoded(line if number else line.removeprefix(_MARK))
                faults.extend([fault] if fault else [])
                yield text

    return csv.reader(texts(), delimiter="\t" if source.kind == ".tsv" else ",", strict=True)


def _read_csv(source: Source, columns: Sequence[str]) -> Iterator[_Found]:
    faults: list[str] = []
    rows = _csv_rows(source, faults)
    header: list[str] = next((row for row in rows if row), [])
    if missing := [column for column in columns if column not in header]:
        raise no_column(source.name, missing, header, _IN_EVERY_FILE)
    places = [header.index(column) for column in columns]
    while True:
        try:
            row = next(rows, None)
        except csv.Error as error:
            row = []
            faults.append(f"cannot be read as {source.kind}: {error}")
        if row is None:
            return
        if row and len(row) != len(header):
            faults.append(f"has {len(row)} fields, and the header has {len(header)}")
        if faults:
            yield faults[0], rows.line_num
            faults.clear()
        elif row:
            yield tuple(row[place] for place in places), rows.line_num


def _read_parquet(source: Source, columns: Sequence[str]) -> Iterator[_Found]:
    with source.open() as raw:
        file = parquet.ParquetFile(raw, buffer_size=_BUFFER_BYTES)
        _check_columns(source.name, columns, file.schema_arrow)
        for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=list(dict.fromkeys(columns))):
            yield from _rows_of(batch, columns)


@contextmanager
def _arrow(source: Source) -> Iterator[Any]:
    """Arrow's own formats, the file and the stream, which the `datasets` library writes."""
    here = source.storage.path(source.path) if isinstance(source.storage, LocalStorage) else None
    with pa.memory_map(str(here)) if here else source.open() as raw:
        is_file = raw.read(6) == b"ARROW1"
        raw.seek(0)
        yield pa.ipc.open_file(raw) if is_file else pa.ipc.open_stream(raw)


def _read_arrow(source: Source, columns: Sequence[str]) -> Iterator[_Found]:
    with _arrow(source) as reader:
        _check_columns(source.name, columns, reader.schema)
        is_file = isinstance(reader, pa.ipc.RecordBatchFileReader)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            for begin in range(0, batch.num_rows, _BATCH_ROWS):
                yield from _rows_of(batch.slice(begin, _BATCH_ROWS), columns)


def _rows_of(batch: pa.RecordBatch, columns: Sequence[str]) -> Iterator[_Found]:
    values = zip(*(batch.column(name).to_pylist() for name in columns), strict=True)
    return ((row, None) for row in values)


def _check_columns(name: str, columns: Sequence[str], schema: pa.Schema) -> None:
    if missing := [column for column in columns if column not in schema.names]:
        raise no_column(name, missing, schema.names, _IN_EVERY_FILE)


def no_column(where: str, missing: Sequence[str], there: Iterable[str], hint: str) -> ConfigError:
    """The error for missing columns, with those that are there."""
    names = f"column{'s' if len(missing) > 1 else ''} {', '.join(map(repr, missing))}"
    return ConfigError(f"{where} has no {names}; it has {', '.join(there)}", hint=hint)


def _object_names(items: Iterable[Any]) -> list[str]:
    return next((list(item) for item in items if isinstance(item, dict)), [])


def _csv_names(source: Source) -> list[str]:
    return next((row for row in _csv_rows(source, []) if row), [])


def _arrow_names(source: Source) -> list[str]:
    with _arrow(source) as reader:
        return list(reader.schema.names)


def _parquet_names(source: Source) -> list[str]:
    with source.open() as raw:
        return list(parquet.read_schema(raw).names)


_HEADERS: dict[str, Callable[[Source], list[str]]] = {
    ".txt": lambda source: ["text"],
    ".jsonl": lambda source: _object_names(_parsed(line) for _, line in _lines(source)),
    ".json": lambda source: _object_names(_json_items(source)),
    ".csv": _csv_names,
    ".tsv": _csv_names,
    ".parquet": _parquet_names,
    ".arrow": _arrow_names,
    ".feather": _arrow_names,
}
_READERS: dict[str, Callable[[Source, Sequence[str]], Iterator[_Found]]] = {
    ".txt": _read_lines,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".feather": _read_arrow,
}
