"""What the cases of the lab share: the seconds of recovery, as a table at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture
def recovered(record_property: Callable[[str, object], None]) -> Callable[[str, str, float], None]:
    """`recovered(case, cause, seconds)`: from the fault to the first new step."""
    return lambda case, cause, seconds: record_property("recovered", (case, cause, seconds))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    found = [value for report in reports for name, value in report.user_properties if name == "recovered"]
    if found:
        terminalreporter.section("seconds of recovery")
        terminalreporter.write_line("| what happened | cause in the journal | first step after |")
        terminalreporter.write_line("|---|---|---|")
        for case, cause, seconds in found:
            terminalreporter.write_line(f"| {case} | {cause} | {seconds:.1f} s |")
