"""JSON of a storage or a checkpoint: input, with bounds that everything that outlast writes is far within."""

from __future__ import annotations

import json
from typing import Any

_MAX_DEPTH = 100


def parse_json(data: bytes | str) -> Any:
    """Parse JSON. Raises ValueError, also for values that are nested too deeply for those who walk through them."""
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    if is_too_deep(value):
        raise ValueError(_TOO_DEEP)
    return value


def is_too_deep(value: Any) -> bool:
    """Return whether lists and objects are nested more deeply than in anything that outlast writes."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(_MAX_DEPTH):
        items = (item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer))
        level = [item for item in items if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


_TOO_DEEP = f"nested more than {_MAX_DEPTH} levels deep"
