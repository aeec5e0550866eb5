"""The command line that every benchmark has: `--quick` and `--json FILE`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def command(measure: Callable[..., dict[str, Any]]) -> None:
    """Runs `measure(quick=…)`, and prints what it found or writes it to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fewer rounds, the same rows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args()
    text = json.dumps(measure(quick=options.quick), indent=1)
    options.json.write_text(text) if options.json else print(text)
