"""A console of rich whose output is redacted and escaped. Apart from `output`, because it imports rich."""

from collections.abc import Iterable

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from outlast.checkpointing.escaping import escaped, escaped_lines
from outlast.checkpointing.redaction import redact


class SafeConsole(Console):
    """Escapes every text that it renders. Line breaks are kept: they are the layout of a renderable."""

    def __init__(self, *, stderr: bool = False, redacted: bool = True) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)
        self._is_redacted = redacted

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            text, style, control = segment
            text = redact(text) if self._is_redacted else text
            yield segment if control else Segment(escaped_lines(text), style)


def safe_text(text: str, style: str = "") -> Text:
    """Return text for a line of a console, with its escaped length."""
    return Text(escaped(redact(text)), style)
