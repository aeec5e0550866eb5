"""Parts of messages: the first line of an error, the nearest known word, the first of many names. None raises."""

import difflib
from collections.abc import Collection, Iterable
from itertools import islice

from outlast.checkpointing.redaction import redact


def first_line(error: BaseException) -> str:
    """Return the first line with words of a library's error, for use in a message; its class name if it has none.

    Credentials are redacted here, before a part of one is cut off and no longer recognised.
    """
    lines = (line.strip() for line in redact(str(error)).splitlines())
    return next((line for line in lines if any(map(str.isalnum, line))), type(error).__name__)[:300]


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the closest of the known words whatever their case, or None."""
    by_folded = {item.casefold(): item for item in known}
    return next((by_folded[item] for item in difflib.get_close_matches(word.casefold(), list(by_folded), n=1)), None)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a message about an unknown word: the nearest known one, or nothing."""
    return f"; did you mean {near!r}?" if (near := nearest(word, known)) else ""


def shorten_list(names: Collection[str], limit: int, noun: str = "in all") -> str:
    """Return the first names of a list as text; of a longer one with the number of all, such as (12 weights)."""
    first = ", ".join(islice(names, limit))
    return f"{first}, … ({len(names):,} {noun})" if len(names) > limit else first
