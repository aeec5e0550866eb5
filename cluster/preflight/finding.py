"""One finding of a check."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

TOKEN_HINT = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token"


class Level(Enum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report.

    Attributes:
        level: How bad it is.
        check: What was examined.
        text: What was found, and on which node.
        hint: What to do.
    """

    level: Level
    check: str
    text: str
    hint: str = ""
