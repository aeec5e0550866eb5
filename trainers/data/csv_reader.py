"""Reader of .csv and .tsv files. The header shows the delimiter; what it cannot show is a setting under `data.csv`."""

import csv
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.data import Quote
from outlast.trainers.data.sources import FIRST_ROWS, IN_EVERY_FILE, DataFile, RawRow, missing_column_error
from outlast.trainers.data.text_lines import read_lines

_FIELD_BYTES = 64 * 2**20  # a longer field is taken for an unbalanced quotation mark
_NAME_WORDS = 4  # a longer name of a column is taken for a text
_DELIMITERS = (",", "\t", ";", "|")
#: Errors of the csv module, and what they mean in the file.
_REASONS = {
    "new-line character": "has a carriage return within a field that is not quoted",
    "expected after": "has text after a quotation mark that closes; one within quoted text must be doubled "
    "(or set data.csv.quote: none)",
}
_DECIMAL_COMMA = re.compile(r"\s*[+-]?(\d{1,3}(\.\d{3})+|\d+)(,\d+)?([eE][+-]?\d+)?\s*")
_SEPARATOR = re.compile(r"sep=(.)[\r\n]*")  # Excel writes it before the header
_ENCODING = "-s data.csv.encoding=cp1252, or the encoding that it was written in"


@dataclass(slots=True)
class CsvFile:
    """An open file, after its header was read.

    Attributes:
        header: Names of the columns; empty if the file has no line.
        delimiter: Character between fields.
        rows: Rows of fields after the header, from the csv module.
        lines: Text of the lines that were read since `lines` was cleared.
        faults: Decoding errors since `faults` was cleared.
    """

    header: list[str]
    delimiter: str
    rows: Any
    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def open_csv(source: DataFile) -> CsvFile:
    """Read the header of a file.

    Raises:
        ConfigError: The header is not closed by a quotation mark.
    """
    csv.field_size_limit(_FIELD_BYTES)
    opened = CsvFile([], ",", None)
    lines = read_lines(source)

    def texts(before: Sequence[str]) -> Iterator[str]:
        yield from before
        for _, text, fault in lines:
            opened.lines.append(text)
            opened.faults.extend([f"{fault}; {_ENCODING}"] if fault else [])
            yield text

    before, first, declared = list[str](), "", None
    for number, first, fault in lines:
        if fault:
            raise ConfigError(f"{source.name}: its header, line {number}, {fault}", hint=_ENCODING)
        if declared is None and (mark := _SEPARATOR.fullmatch(first)):
            declared, first = mark[1], "\n"
        before.append(first)
        if first.strip():
            break
    is_quoted = source.csv.quote is not Quote.NONE
    opened.delimiter = source.csv.delimiter or declared or _delimiter(first, source.kind, is_quoted)
    quoting: dict[str, Any] = {"quoting": csv.QUOTE_NONE} if not is_quoted else {}
    after = first.split(opened.delimiter)[1:]
    opened.rows = csv.reader(
        texts(before),
        delimiter=opened.delimiter,
        strict=True,
        skipinitialspace=bool(after) and all(name.startswith(" ") for name in after),
        **quoting,
    )
    try:
        opened.header = next((row for row in opened.rows if row), [])
    except csv.Error as error:
        raise ConfigError(f"{source.name}: {_explain(error, len(before))}", hint="check its header") from error
    opened.lines.clear()
    return opened


def _delimiter(header: str, kind: str, is_quoted: bool) -> str:
    """Return the usual delimiter of the file type, or the one that the header has instead."""
    usual = "\t" if kind == ".tsv" else ","
    names = re.sub(r'"[^"]*"', "", header) if is_quoted else header
    return usual if usual in names else max(_DELIMITERS, key=lambda mark: (names.count(mark), mark == usual))


def has_decimal_comma(text: str) -> bool:
    """Check whether a text is a number whose decimal mark is a comma."""
    return "," in text and _DECIMAL_COMMA.fullmatch(text) is not None


def _with_point(text: str) -> str:
    """Return a number whose decimal mark is a comma with a point instead; any other text as it is."""
    return text.replace(".", "").replace(",", ".") if _DECIMAL_COMMA.fullmatch(text) else text


def csv_names(source: DataFile) -> list[str]:
    """Return the names of the columns. One without a name, as spreadsheets and pandas write them, cannot be read."""
    return [name for name in open_csv(source).header if name]


def csv_advice(source: DataFile) -> list[str]:
    """Return what may explain that a file lacks a column: another encoding, or no line with names."""
    file = open_csv(source)
    with suppress(csv.Error):
        for _ in islice(file.rows, FIRST_ROWS):
            pass
    advice = [f"the file is not UTF-8: {_ENCODING}"] if file.faults else []
    if any(_looks_like_data(name) for name in file.header):
        advice.append("the first line is taken for the names of the columns: put one with names before it")
    return advice


def _looks_like_data(name: str) -> bool:
    return re.fullmatch(r"[-+]?\d+([.,]\d+)?", name.strip()) is not None or len(name.split()) > _NAME_WORDS


def csv_note(source: DataFile) -> str | None:
    """Return what the header showed about the dialect, if it is not the usual one of the file type."""
    delimiter = open_csv(source).delimiter
    usual = source.csv.delimiter or ("\t" if source.kind == ".tsv" else ",")
    return None if delimiter == usual else f"{source.name}: fields are separated by {delimiter!r} (data.csv.delimiter)"


def read_csv(source: DataFile, columns: Sequence[str]) -> Iterator[RawRow]:
    """Read the values of columns, all of them texts or None. Yields an error text for a row that cannot be read."""
    file = open_csv(source)
    if absent := [name for name in columns if name not in file.header]:
        raise missing_column_error(source.name, absent, filter(None, file.header), IN_EVERY_FILE)
    for name in columns:
        if file.header.count(name) > 1:
            raise ConfigError(
                f"{source.name} has {file.header.count(name)} columns {name!r}", hint="rename one of them"
            )
    indices, missing = [file.header.index(name) for name in columns], frozenset(source.csv.missing)
    convert = _with_point if source.csv.decimal == "," else str
    while True:
        file.lines.clear()
        begin = file.rows.line_num + 1
        try:
            row = next(file.rows, None)
        except csv.Error as error:
            row = []
            file.faults.append(_explain(error, begin))
        if row is None:
            return
        if row and len(row) != len(file.header):
            file.faults.append(f"has {len(row)} fields but the header has {len(file.header)}")
        _check_unquoted(source, file, begin)
        if file.faults:
            yield file.faults[0], file.rows.line_num
            file.faults.clear()
        elif row:
            yield tuple(None if row[index] in missing else convert(row[index]) for index in indices), file.rows.line_num


def _explain(error: csv.Error, line: int) -> str:
    reason = str(error)
    if "field larger" in reason:
        return f"has a field of more than {_FIELD_BYTES:,} characters, perhaps from a quotation mark that opens a text"
    for part, meaning in _REASONS.items():
        if part in reason:
            return meaning
    if "unexpected end of data" in reason:
        what = f"a quotation mark in line {line} opens a text that does not end"
        return f"{what}; if texts are not quoted, set data.csv.quote: none"
    return f"cannot be split into fields: {reason}"


def _check_unquoted(source: DataFile, file: CsvFile, begin: int) -> None:
    """Raise ConfigError if quotation marks join lines of which each is a row, as in files that do not quote texts."""
    if len(file.lines) < 2 or source.csv.quote is not Quote.AUTO or file.delimiter != "\t":
        return
    if all(line.count("\t") == len(file.header) - 1 for line in file.lines):
        raise ConfigError(
            f"{source.name}, line {begin}: quotation marks join lines {begin} to {begin + len(file.lines) - 1} to one "
            f"row, but each of them has {len(file.header)} fields",
            hint="-s data.csv.quote=none if texts are not quoted, or -s data.csv.quote=double if they are",
        )
