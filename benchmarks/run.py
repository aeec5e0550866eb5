"""Runs the benchmarks and writes `benchmarks/RESULTS.md`, the machine named.

    python -m benchmarks.run [--quick] [stall] [io] [throughput] [recovery] [long_run]

Each leaves its figures in `benchmarks/results/NAME.json`; those that are not run again are taken from there.
"""

from __future__ import annotations

import argparse
import importlib
import json
import platform
from pathlib import Path
from typing import Any

PURPOSE = {
    "stall": "What one save costs training, in units of one memory copy of the state and of the raw disk",
    "io": "What outlast's bytes cost beside the bare disk or store, and how costs grow",
    "throughput": "Tokens per second, data preparation and resuming, side by side in one run",
    "long_run": "What a look at a run of a million steps and a thousand checkpoints costs",
    "recovery": "From a fault to the next step, two workers on four hosts, beside bare Ray Train",
}
HERE = Path(__file__).parent
QUARTILES = "_quartiles"


def run(name: str, *, quick: bool) -> None:
    """Runs one benchmark and keeps what it found."""
    result = importlib.import_module(f"benchmarks.{name}").measure(quick=quick)
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    result["machine"] = f"{cpu}, {result.get('machine', '')}, Python {platform.python_version()}"
    (HERE / "results").mkdir(exist_ok=True)
    text = json.dumps({**result, "quick": quick}, indent=1, ensure_ascii=False)
    (HERE / "results" / f"{name}.json").write_text(text + "\n")


def write_results() -> None:
    """Makes the page of what is there."""
    parts = ["# Results", "By `make bench`: medians, with quartiles where there are any. No test has a threshold."]
    for name, purpose in PURPOSE.items():
        path = HERE / "results" / f"{name}.json"
        if path.exists():
            result = json.loads(path.read_text())
            rows = result.pop("rows")
            notes = "; ".join(f"{key}: {value}" for key, value in result.items())
            parts += [f"## {purpose}", f"`python -m benchmarks.{name}`. {notes}.", _table(rows)]
    (HERE / "RESULTS.md").write_text("\n\n".join(parts) + "\n")


def _table(rows: list[dict[str, Any]]) -> str:
    """A median that has quartiles beside it is shown with them."""
    keys = [key for key in dict.fromkeys(key for row in rows for key in row) if not key.endswith(QUARTILES)]
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row.get(key), row.get(key + QUARTILES)) for key in keys) + " |")
    return "\n".join(lines)


def _cell(value: Any, quartiles: list[float] | None) -> str:
    if not isinstance(value, float):
        return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:.3g}" + (f" ({quartiles[0]:.3g}–{quartiles[1]:.3g})" if quartiles else "")


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PURPOSE))
    options = parser.parse_args()
    for name in options.names or PURPOSE:
        run(name, quick=options.quick)
    write_results()
