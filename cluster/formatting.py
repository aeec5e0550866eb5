"""Formatting of numbers, sizes and times for one line, and of values for JSON. Pure."""

import time
from collections.abc import Mapping
from math import isfinite
from typing import Any

_YEAR_10000 = 253_402_300_800  #: in seconds since the epoch


def finite(body: Any) -> Any:
    """Replace NaN and infinite numbers by None, because JSON has none."""
    if isinstance(body, Mapping):
        return {key: finite(item) for key, item in body.items()}
    if isinstance(body, list | tuple):
        return [finite(item) for item in body]
    return None if isinstance(body, float) and not isfinite(body) else body


def size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def counted(number: int, noun: str) -> str:
    """Format a count, with a regular plural: 1 worker, 2 workers."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def when(seconds: float) -> str:
    if not _is_moment(seconds):
        return "unknown time"
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


def clock(seconds: float, now: float) -> str:
    """Format a time near `now`: the time of day, with the date on another day."""
    if not _is_moment(seconds):
        return "unknown time"
    then, today = time.localtime(seconds), time.localtime(now)
    return time.strftime("%H:%M:%S" if then[:3] == today[:3] else "%Y-%m-%d %H:%M", then)


def _is_moment(seconds: float) -> bool:
    """Return whether the system's calendar has this time: one that was read may be any number, or NaN."""
    return abs(seconds) < _YEAR_10000


def duration(seconds: float) -> str:
    """Format seconds in the two largest units: 0.04 s, 41 s, 3 min 20 s, 2 h 5 min, 4 d 1 h."""
    if not isfinite(seconds):
        return "? s"
    if seconds < 9.95:
        return f"{seconds:.2g} s" if seconds >= 0.0005 else "0 s"
    total = round(seconds)
    for large, small, name, lesser in ((86400, 3600, "d", "h"), (3600, 60, "h", "min"), (60, 1, "min", "s")):
        if total >= large:
            rest = total % large // small
            return f"{total // large} {name}" + (f" {rest} {lesser}" if rest else "")
    return f"{total} s"


def short(number: float) -> str:
    """Format a number with three digits and a unit prefix: 950, 12.3 k, 4.56 M."""
    for factor, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= 0.9995 * factor:
            return f"{number / factor:.3g}{letter}"
    return f"{number:.3g}"


def share(fraction: float) -> str:
    """Format a fraction as per cent; neither a tiny fraction as 0 % nor one below 1 as 100 %."""
    percent = 100 * fraction
    if 0 < percent < 0.1:
        return "<0.1 %"
    if 99.5 <= percent < 100:
        return f"{int(100 * percent) / 100:.2f} %"
    return f"{percent:.1f} %" if percent < 9.95 else f"{percent:.0f} %"
