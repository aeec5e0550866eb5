"""A forked rank of `tests.support.groups.worker_group`, imported once by the fork server so that ranks start fast."""

from __future__ import annotations

import contextlib
import os
import runpy
import sys
from typing import Any

import torch
import torch.distributed as dist
import transformers  # noqa: F401
from transformers import AutoModelForCausalLM, GPT2LMHeadModel, LlamaForCausalLM  # noqa: F401

from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.storage.factory import open_storage
from outlast.trainers import attempt  # noqa: F401
from outlast.trainers.attempt import Assignment, run_attempt
from outlast.trainers.distributed.world import World
from tests.support.groups.worker_group import Ended


def work(
    rank: int,
    size: int,
    rendezvous: str,
    device: str,
    assignment: Assignment,
    url: str,
    control: Any,
    pipe: Any,
    environment: dict[str, str],
) -> None:
    os.environ.update(environment)  # the fork server's is as old as the server
    log = os.open(f"{rendezvous}-{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 2)
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
        dist.barrier()  # else a rank that is refused at once may be gone before the others are connected with it
    try:
        world = World(torch.device(device), node=environment.get("OUTLAST_SNAPSHOTS", ""))
        pipe.send(Ended(0, outcome=run_attempt(assignment, open_storage(url), world, control)))
    except OutlastError as error:
        with contextlib.suppress(OSError):
            pipe.send(Ended(0, error=error))
    if size > 1:
        dist.destroy_process_group()


def run_script(path: str, arguments: list[str], environment: dict[str, str]) -> None:
    """Runs a script as `python path arguments` would, but for the seconds that its imports take."""
    os.environ.update(environment)
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")
