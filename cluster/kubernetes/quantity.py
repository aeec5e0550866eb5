"""Quantities of Kubernetes, such as 500m or 16Gi. Pure."""

import re
from typing import Any

_QUANTITY = r"\+?(\d+(\.\d*)?|\.\d+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?\d+)?"
_SMALL = {"n": 1e9, "u": 1e6, "m": 1e3}
_LARGE = "kmgtpe"


def quantity_value(value: Any) -> float | None:
    """Return a quantity as a number; None if it is none."""
    if isinstance(value, bool) or not (match := re.fullmatch(_QUANTITY, str(value))):
        return None
    number, unit = str(value).removesuffix(match[3] or ""), match[3] or ""
    if unit[:1] in ("e", "E") and len(unit) > 1 and unit != "Ei":
        return float(f"{number}{unit}")
    if unit in _SMALL:
        return float(number) / _SMALL[unit]
    base = 1024.0 if unit.endswith("i") else 1000.0
    return float(number) * base ** (_LARGE.index(unit[0].lower()) + 1 if unit else 0)
