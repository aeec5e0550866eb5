"""Rows with labels, and what is learned from them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.preparation.prepare import Prepared


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def labelled(labels: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"text": f"text number {index}", "label": label} for index, label in enumerate(labels)]


def learned(found: Prepared, storage: LocalStorage) -> list[Any]:
    samples = found.split(storage, "train").take(range(found.num_samples))
    return [sample["labels"].tolist() for sample in samples]
