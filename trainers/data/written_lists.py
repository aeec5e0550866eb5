"""Lists that are written as texts, as .csv files need them."""

import ast
import io
import json
import tokenize
from itertools import pairwise
from typing import Any


def parse_list(value: Any) -> list[Any] | None:
    """Parse a text that is a list in the notation of JSON or Python; None for another value."""
    if not looks_like_list(value):
        return None
    for parse in (json.loads, _parse_python):
        try:
            items = parse(value.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        return items if isinstance(items, list) and all(isinstance(item, str | int | float) for item in items) else None
    return None


def looks_like_list(value: Any) -> bool:
    """Check whether a value is a text in square brackets."""
    return isinstance(value, str) and value.lstrip().startswith("[") and value.rstrip().endswith("]")


def _parse_python(text: str) -> Any:
    """Evaluate a literal of Python. Raises ValueError if texts follow each other without a comma, as numpy prints them.

    Python would join them to one.
    """
    value = ast.literal_eval(text)
    kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.type != tokenize.NL]
    if any(kind == after == tokenize.STRING for kind, after in pairwise(kinds)):
        raise ValueError("texts without a comma between them")
    return value
