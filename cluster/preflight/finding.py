"""The result line that `doctor` and `k8s lint` share: a level, the text, and what to do. Imports nothing of outlast."""

from dataclasses import dataclass
from enum import Enum

TOKEN_HINT = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token"
OPEN_HINT = "start every node with RAY_AUTH_MODE=token and a RAY_AUTH_TOKEN"


class Level(Enum):
    """Severity of a finding."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Finding:
    """One result of a check."""

    level: Level
    check: str  #: the check, or the object that was checked
    text: str  #: what was found, and where
    hint: str = ""  #: what to do
