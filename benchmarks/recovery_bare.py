"""The job of `recovery.py`'s peer: bare Ray Train with DDP, a checkpoint from rank 0 every so many steps.

    python recovery_bare.py FOLDER STEPS EVERY [MAX_FAILURES]

Written as Ray's guides have it: `ray.train.report` with a directory, `ray.train.get_checkpoint` on the way back. Rank 0
appends a line for each step to `FOLDER/steps.txt`: seconds since the epoch, step.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, FailureConfig, RunConfig, ScalingConfig
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, GPT2Config


def train(options: dict[str, Any]) -> None:
    """One attempt of one worker."""
    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(11)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=32, vocab_size=400)
    model = DistributedDataParallel(AutoModelForCausalLM.from_config(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    first = 0
    if checkpoint := ray.train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            saved = torch.load(os.path.join(folder, "state.pt"))
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    with open(os.path.join(options["folder"], "steps.txt"), "a") as log:
        for step in range(first + 1, options["steps"] + 1):
            for micro in range(4):
                ids = torch.randint(400, (1, 16))
                model.require_backward_grad_sync = micro == 3
                (model(input_ids=ids, labels=ids).loss / 4).backward()
            optimizer.step()
            optimizer.zero_grad()
            if rank == 0:
                print(time.time(), step, file=log, flush=True)
            if step % options["every"]:
                continue
            with tempfile.TemporaryDirectory() as folder:
                if rank == 0:
                    state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
                    torch.save(state, os.path.join(folder, "state.pt"))
                ray.train.report({"step": step}, checkpoint=Checkpoint(folder) if rank == 0 else None)


def main() -> None:
    """The driver."""
    folder, (steps, every, max_failures) = sys.argv[1], [*map(int, sys.argv[2:]), 2][:3]
    trainer = ray.train.torch.TorchTrainer(
        train,
        train_loop_config={"folder": folder, "steps": steps, "every": every},
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1}),
        run_config=RunConfig(name="bare", storage_path=folder, failure_config=FailureConfig(max_failures=max_failures)),
    )
    trainer.fit()
    Path(folder, "done.json").write_text(json.dumps({"done": True}))


if __name__ == "__main__":
    main()
