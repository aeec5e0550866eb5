"""Output of the commands: everything printed passes here; credentials are redacted, control characters escaped.

Names, paths, metrics, messages and logs come from storages, data files and other machines. One call is one line: a line
break in it is escaped like any other control character, so that data cannot forge a line. `print_text` keeps the line
breaks of a text that has several. Stdout is for data, stderr for progress and errors.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from outlast.checkpointing.escaping import escaped, escaped_lines
from outlast.checkpointing.redaction import redact, redact_json

if TYPE_CHECKING:
    from rich.console import Console

_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_UNSAFE_IN_JSON = re.compile(r"[\x7f-\U0010ffff]")


def print_line(text: object = "", *, to_stderr: bool = False, redacted: bool = True) -> None:
    """Print one line; `redacted=False` for rows of data and what a model makes of them."""
    _write(f"{safe_line(str(text)) if redacted else escaped(str(text))}\n", to_stderr)


def print_text(text: str, *, to_stderr: bool = False, indent: str = "") -> None:
    """Print a text of several lines; lines after the first begin with `indent` or with white space of their own."""
    _write("".join(f"{line}\n" for line in safe_lines(text, indent)), to_stderr)


def print_log(text: str, *, to_stderr: bool = False) -> None:
    """Print a part of another program's log without its colours; it may end within a line."""
    plain = _COLOUR.sub("", redact(text)).replace("\r\n", "\n").replace("\r", "\n")
    _write("\n".join("\t".join(map(escaped, line.split("\t"))) for line in plain.split("\n")), to_stderr)


def print_document(text: str) -> None:
    """Print a document whose own format escapes control characters, for other programs."""
    _write(text, to_stderr=False)


def print_json(body: Any, *, indent: int | None = 1, ensure_ascii: bool = True, redacted: bool = True) -> None:
    """Print JSON in which no character acts on a terminal."""
    text = to_json(body, indent=indent, ensure_ascii=ensure_ascii, redacted=redacted)
    print_document(f"{text}\n")


def to_json(body: Any, *, indent: int | None = 1, ensure_ascii: bool = True, redacted: bool = True) -> str:
    """Encode as JSON, as `print_json` prints it."""
    text = json.dumps(redact_json(body) if redacted else body, indent=indent, ensure_ascii=ensure_ascii)
    return text if ensure_ascii else _UNSAFE_IN_JSON.sub(lambda match: _json_escape(match[0]), text)


def safe_line(text: str) -> str:
    """Redact and escape a text for one line of output."""
    return escaped(redact(text))


def safe_lines(text: str, indent: str = "") -> Iterable[str]:
    """Redact and escape a text of several lines."""
    for number, line in enumerate(escaped_lines(redact(text)).split("\n")):
        yield (indent if number and line[:1] not in ("", " ") else "") + line


def make_console(*, stderr: bool = False, redacted: bool = True) -> Console:
    """Make a console whose output is redacted and escaped, and in which data is no markup."""
    from outlast.cluster.safe_console import SafeConsole

    return SafeConsole(stderr=stderr, redacted=redacted)


def _json_escape(letter: str) -> str:
    return letter if escaped(letter) == letter else json.dumps(letter)[1:-1]


def _write(text: str, to_stderr: bool) -> None:
    stream = sys.stderr if to_stderr else sys.stdout
    stream.write(text)
    stream.flush()
