"""Runs every benchmark and writes `benchmarks/RESULTS.md`, the machine named."""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

from benchmarks import recovery, stall, throughput

PURPOSE = {
    stall: "Blocked seconds of one save, in units of one memory copy of the state",
    throughput: "Tokens per second, two gloo ranks, side by side in one run",
    recovery: "Seconds from a fault to the next step, two workers on four hosts, beside bare Ray Train",
}


def _table(rows: list[dict[str, Any]]) -> str:
    keys = list(rows[0])
    lines = ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
    for row in rows:
        cells = [f"{row[key]:.4g}" if isinstance(row[key], float) else str(row[key]) for key in keys]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(*, quick: bool = False) -> None:
    cpu = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.machine())
    how = ", with --quick (fewer rounds)" if quick else ""
    parts = ["# Results", f"Measured by `make bench` on: {cpu}, Python {platform.python_version()}{how}."]
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
