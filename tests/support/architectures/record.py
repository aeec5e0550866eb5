"""Runs the whole sweep and writes its record: `python -m tests.support.architectures.record`."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import transformers

from tests.support.architectures.cases import cases_of, model_types
from tests.support.architectures.configurations import NOT_TEXT
from tests.support.architectures.sweep import DIFFERS, ERROR, NOT_BUILT, REFUSED, WORKS, Verdict, sweep

RECORD = Path(__file__).parents[3] / "docs/reference/architectures.json"
_WORST_LAST = (WORKS, REFUSED, NOT_BUILT, ERROR, DIFFERS)
#: Model types of one sweep: few, so that a test of them ends in a minute or two.
GROUP = 6


def groups() -> list[list[str]]:
    """All model types, in groups."""
    types = model_types()
    return [types[start : start + GROUP] for start in range(0, len(types), GROUP)]


def outcomes(verdicts: Iterable[Verdict]) -> dict[str, dict[str, dict[str, str]]]:
    """The worst outcome by model type, task and ranks: the verdict, and after a colon the reason."""
    found: dict[tuple[str, str, str], Verdict] = {}
    for item in verdicts:
        key = (item.model_type, item.task, item.ranks)
        if key not in found or _WORST_LAST.index(item.verdict) > _WORST_LAST.index(found[key].verdict):
            found[key] = item
    types: dict[str, dict[str, dict[str, str]]] = {}
    for (kind, task, ranks), item in found.items():
        why = re.sub(r"/\S*?/(site-packages|part-\d+)/", "", item.why)  # a machine's paths
        text = item.verdict + (f": {why}" if why else "")
        types.setdefault(kind, {}).setdefault(task, {})[ranks] = text
    return types


def record_of(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    return {
        "transformers": transformers.__version__,
        "cases": len(verdicts),
        "not_text": NOT_TEXT,
        "types": outcomes(verdicts),
    }


def main() -> None:
    verdicts, began = list[Verdict](), time.monotonic()
    for group in groups():
        with tempfile.TemporaryDirectory() as folder:
            verdicts += sweep(Path(folder), [case for kind in group for case in cases_of(kind)])
        print(f"{time.monotonic() - began:.0f} s, {len(verdicts)} cases: {', '.join(group)}", flush=True)
    RECORD.write_text(json.dumps(record_of(verdicts), indent=1) + "\n")


if __name__ == "__main__":
    main()
