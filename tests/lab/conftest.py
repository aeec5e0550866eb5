"""What the cases of the lab share: the seconds of recovery, as a table at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

_recovered: list[tuple[str, str, float]] = []


@pytest.fixture
def recovered() -> Callable[[str, str, float], None]:
    """`recovered(case, cause, seconds)`: from the fault to the first new step."""
    return lambda case, cause, seconds: _recovered.append((case, cause, seconds))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _recovered:
        terminalreporter.section("seconds of recovery")
        terminalreporter.write_line("| what happened | cause in the journal | first step after |")
        terminalreporter.write_line("|---|---|---|")
        for case, cause, seconds in _recovered:
            terminalreporter.write_line(f"| {case} | {cause} | {seconds:.1f} s |")
