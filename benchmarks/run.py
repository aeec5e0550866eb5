"""Runs every benchmark and writes `benchmarks/RESULTS.md`, the machine named."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

from benchmarks import io, recovery, stall, throughput

PURPOSE = {
    stall: "What one save costs training, in units of one memory copy of the state and of the raw disk",
    io: "What outlast's bytes cost beside the bare disk or store, and how costs grow",
    throughput: "Tokens per second, two gloo ranks, side by side in one run",
    recovery: "Seconds from a fault to the next step, two workers on four hosts, beside bare Ray Train",
}

QUARTILES = "_quartiles"


def _table(rows: list[dict[str, Any]]) -> str:
    """A median that has quartiles beside it is shown with them."""
    keys = [key for key in rows[0] if not key.endswith(QUARTILES)]
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        lines.append("| " + " | ".join(_cell(row[key], row.get(key + QUARTILES)) for key in keys) + " |")
    return "\n".join(lines)


def _cell(value: Any, quartiles: list[float] | None) -> str:
    if not isinstance(value, float):
        return "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:.4g}" + (f" ({quartiles[0]:.4g}–{quartiles[1]:.4g})" if quartiles else "")


def main(*, quick: bool = False) -> None:
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    how = ", with --quick (fewer rounds)" if quick else ""
    parts = [
        "# Results",
        f"Measured by `make bench` on: {cpu}, Python {platform.python_version()}{how}. Medians (quartiles).",
    ]
    for module, purpose in PURPOSE.items():
        result = module.measure(quick=quick)
        rows = result.pop("rows")
        parts += [f"## {purpose}", _table(rows), ", ".join(f"{key}: {value}" for key, value in result.items())]
    Path(__file__).with_name("RESULTS.md").write_text("\n\n".join(parts) + "\n")


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    main(quick="--quick" in sys.argv)
