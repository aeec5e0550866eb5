"""outlast.cluster: training on Ray; launches, restarts, monitoring, the command line. Only this package imports ray.

Names are imported when they are first used, so that a command line that needs none of them starts at once.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Finished": "driver.launch",
    "Launch": "driver.launch",
    "Report": "monitoring.report.report",
    "RunConfig": "config.run_config",
    "RunFailed": "fault_tolerance.failure_cause",
    "load_run": "config.run_file",
    "run_report": "monitoring.report.report",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
