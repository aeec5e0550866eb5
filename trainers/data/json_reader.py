"""Reader of .json and .jsonl files: rows that are JSON objects, read in chunks.

A .json file holds a list of rows, rows one after another, an object with a list of rows under `data`, or SQuAD's
articles. pyarrow's own reader would infer one type for a column; here each value keeps its type.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from outlast.trainers.data.sources import FIRST_ROWS, IN_EVERY_FILE, DataFile, RawRow, missing_column_error
from outlast.trainers.data.text_lines import open_text, read_lines

_BUFFER_BYTES = 2**20
_ITEM_CHARS = 64 * 2**20  # a longer JSON value is an error


def object_names(source: DataFile) -> list[str]:
    """Return the names of the columns, those of the first rows."""
    objects = (item for item, _ in islice(_objects(source), FIRST_ROWS) if isinstance(item, dict))
    return list(dict.fromkeys(name for item in objects for name in item))


def read_objects(source: DataFile, columns: Sequence[str], sparse: Collection[str] = ()) -> Iterator[RawRow]:
    """Read JSON objects. A first pass ends once each column was seen: after one object of a good file."""
    missing, seen = set(columns) - set(sparse), dict[str, None]()
    for item, _ in _objects(source):
        if isinstance(item, dict):
            missing -= item.keys()
            seen |= dict.fromkeys(item)
        if not missing:
            break
    if missing and seen:
        raise missing_column_error(source.name, [name for name in columns if name in missing], seen, IN_EVERY_FILE)
    for item, line in _objects(source):
        if not isinstance(item, dict):
            yield item if isinstance(item, _RowError) else "is not a JSON object", line
        elif absent := [name for name in columns if name not in item and name not in sparse]:
            yield f"has no column {absent[0]!r}", line
        else:
            yield tuple(item.get(name) for name in columns), line


class _RowError(str):
    """Error text of a line, as opposed to a value that is a text."""


def _parse(text: str) -> Any:
    """Parse a line of JSON. Returns its value, or a `_RowError`."""
    try:
        return _with_characters(json.loads(text), text)
    except (ValueError, RecursionError) as error:
        return _RowError(f"cannot be read as .jsonl: {error}")


def _with_characters(item: Any, text: str) -> Any:
    """Return a value parsed from JSON text; a `_RowError` if no encoding has all its characters."""
    if "\\ud" in text.lower():
        try:
            json.dumps(item, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return _RowError("has an unpaired surrogate, which is not a character")
    return item


def _objects(source: DataFile) -> Iterator[tuple[Any, int | None]]:
    """Iterate over the items of a file, and their lines."""
    if source.kind == ".json":
        return ((item, None) for item in _rows_within(_json_items(source)))
    lines = ((number, text, fault) for number, text, fault in read_lines(source) if text.strip())
    return ((_RowError(fault) if fault else _parse(text), number) for number, text, fault in lines)


def _rows_within(items: Iterator[Any]) -> Iterator[Any]:
    """Iterate over items; if the only one is an object with a list under `data`, over the rows in that.

    Such is the form of SQuAD: articles of paragraphs, each a context with questions.
    """
    first = next(items, None)
    inner = first.get("data") if isinstance(first, dict) else None
    if not isinstance(inner, list) or not all(isinstance(item, dict) for item in inner):
        yield from [] if first is None else [first]
    elif (second := next(items, None)) is not None:
        yield from (first, second)
    else:
        for row in inner:
            yield from _squad_rows(row) if isinstance(row.get("paragraphs"), list) else [row]
    yield from items


def _squad_rows(article: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Iterate over the questions of an article, as the `datasets` library gives them."""
    try:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = question.get("answers") or []
                columns = {name: [answer[name] for answer in answers] for name in ("text", "answer_start")}
                about = {"id": question.get("id"), "title": article.get("title"), "context": paragraph["context"]}
                yield {**about, "question": question["question"], "answers": columns}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"an article is not in the form of SQuAD: {error!r}") from error


def _json_items(source: DataFile) -> Iterator[Any]:
    """Iterate over the items of one JSON list, or over concatenated JSON values, reading in chunks."""
    decoder, text, at, size, in_list = json.JSONDecoder(), "", 0, _BUFFER_BYTES, None
    with open_text(source) as file:
        while True:
            more = file.read(size)
            text, at = text[at:] + more, 0
            if in_list is None and text.strip():
                in_list, text = text.lstrip()[0] == "[", text.lstrip().removeprefix("[")
            while (at := _skip_separators(text, at)) < len(text):
                if in_list and text[at] == "]":
                    if text[at + 1 :].strip() or file.read(1):
                        raise ValueError("the file has data after the list")
                    return
                try:
                    item, end = decoder.raw_decode(text, at)
                except json.JSONDecodeError as error:
                    if not more or len(text) - at > _ITEM_CHARS:
                        raise ValueError(f"{error.msg} near {text[at : at + 40]!r}") from error
                    break
                if end == len(text) and more:
                    break  # a number may continue in the next chunk
                yield _with_characters(item, text[at:end])
                at = end
            if not more:
                if in_list:
                    raise ValueError("the list is not closed")
                return
            size = max(_BUFFER_BYTES, len(text) - at)


def _skip_separators(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n,":
        at += 1
    return at
