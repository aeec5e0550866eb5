"""Escaping of foreign text for a terminal: names, paths and messages from a storage, a data file or another machine."""

from unicodedata import category

#: Categories of Unicode: control and format characters, surrogates, separators of lines and paragraphs.
UNPRINTABLE = ("Cc", "Cf", "Cs", "Zl", "Zp")
#: Format characters that spelling and emoji need: they join letters and reorder nothing.
_JOINERS = "\u200c\u200d"


def escaped(text: str) -> str:
    """Escape characters that would act on a terminal: control and format characters, also those that reorder text."""
    if text.isprintable():
        return text
    return "".join(map(_escaped_letter, text))


def escaped_lines(text: str) -> str:
    """Escape a text of several lines, whose line breaks are kept."""
    return "\n".join(escaped(line.expandtabs()) for line in text.split("\n"))


def _escaped_letter(letter: str) -> str:
    return ascii(letter)[1:-1] if category(letter) in UNPRINTABLE and letter not in _JOINERS else letter
