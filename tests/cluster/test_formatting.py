"""Numbers and times as they come from a storage: any at all."""

from __future__ import annotations

from math import inf, nan

import pytest

from outlast.cluster.formatting import clock, duration, when


@pytest.mark.parametrize("seconds", [nan, inf, -inf, 1e308, -1e18, 2.0**63])
def test_an_impossible_time_is_unknown(seconds: float) -> None:
    assert when(seconds) == clock(seconds, 0.0) == "unknown time"
    assert duration(abs(seconds)) == "? s" or abs(seconds) < inf


def test_a_time_is_shown_on_another_day() -> None:
    assert clock(0.0, 1e9).startswith("19")
    assert duration(3700.0) == "1 h 1 min"
