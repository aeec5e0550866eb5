"""How long a save blocks the step loop, in units of one memory copy of the same bytes.

    python -m benchmarks.stall [--quick] [--json FILE]

One process, a model with AdamW state of about 600 MB (60 MB with --quick), a save to the current directory's disk and
a copy into a kept buffer in turns; medians.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.state import optimizer_tensors
from outlast.checkpointing.storage import LocalStorage
from outlast.checkpointing.weights import named_weights


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Runs the benchmark."""
    rounds, width = (3, 720) if quick else (10, 2280)
    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(10)))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.ones(1, width)).sum().backward()
    optimizer.step()
    state = [*named_weights(model).values(), *optimizer_tensors(model, optimizer).values()]
    kept = [torch.empty_like(tensor) for tensor in state]
    saves, copies, folder = [], [], Path(tempfile.mkdtemp(dir="."))
    try:
        checkpointer = Checkpointer(LocalStorage(folder), "stall")
        checkpointer.resume(model, optimizer)
        for step in range(rounds + 1):
            began = time.perf_counter()
            for target, tensor in zip(kept, state, strict=True):
                target.copy_(tensor)
            copied = time.perf_counter()
            assert checkpointer.save(step, model, optimizer, {"step": step})
            saves.append(time.perf_counter() - copied)
            copies.append(copied - began)
    finally:
        shutil.rmtree(folder)
    memcpy_s, save_s = statistics.median(copies[1:]), statistics.median(saves[1:])  # the first of each is not counted
    row = {
        "name": "outlast blocking",
        "blocked_over_memcpy": save_s / memcpy_s,
        "commit_s": save_s,
        "memcpy_s": memcpy_s,
    }
    return {
        "machine": f"{platform.machine()}, {multiprocessing.cpu_count()} cores",
        "state_bytes": sum(tensor.nbytes for tensor in state),
        "rounds": rounds,
        "rows": [row],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    result = measure(quick=options.quick)
    text = json.dumps(result, indent=1)
    options.json.write_text(text) if options.json else print(text)
