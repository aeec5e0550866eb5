"""Lines of a text file of any encoding that it declares: UTF-8, or UTF-16 and UTF-32 with a byte order mark."""

import codecs
import io
from collections.abc import Iterator

from outlast.trainers.data.sources import DataFile

#: Encodings by byte order mark. The mark of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8",
}
_HEAD_BYTES = 2**16


def read_lines(source: DataFile) -> Iterator[tuple[int, str, str | None]]:
    """Iterate over all lines: the number, the text with its line break, and the fault of a line that is not UTF-8.

    A line ends with `\\n`; in a file that has only `\\r`, as old spreadsheets write it, with that.

    Raises:
        UnicodeDecodeError: The file is not in the encoding of its byte order mark, or in `data.csv.encoding`.
    """
    encoding, line_break = _detect(source)
    with source.open() as file:
        if encoding == "utf-8" and line_break == "\n":
            for number, line in enumerate(file, 1):
                yield number, *_decode(line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)
            return
        encoding = "utf-8-sig" if encoding == "utf-8" else encoding
        with io.TextIOWrapper(file, encoding, newline=line_break) as lines:
            for number, text in enumerate(lines, 1):
                yield number, text.removesuffix(line_break) + "\n", None


def open_text(source: DataFile) -> io.TextIOWrapper:
    """Open the file as text."""
    encoding, _ = _detect(source)
    return io.TextIOWrapper(source.open(), "utf-8-sig" if encoding == "utf-8" else encoding)


def _detect(source: DataFile) -> tuple[str, str]:
    """Return the encoding and the line break."""
    with source.open() as file:
        head = file.read(_HEAD_BYTES)
    given = source.csv.encoding if source.kind in (".csv", ".tsv") else "utf-8"
    encoding = next((name for mark, name in _MARKS.items() if head.startswith(mark)), given)
    return encoding, "\r" if b"\r" in head and b"\n" not in head else "\n"


def _decode(line: bytes) -> tuple[str, str | None]:
    """Decode a line. Returns the text, with replacement characters where needed, and the error text or None."""
    try:
        return line.decode(), None
    except UnicodeDecodeError as error:
        return line.decode(errors="replace"), f"is not UTF-8 text: {error}"
