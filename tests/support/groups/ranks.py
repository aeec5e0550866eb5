"""Any function on several real processes with a gloo group: `on_ranks(3, work, *arguments)`."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist

_context = multiprocessing.get_context("forkserver")
LIMIT_S = 90.0


def on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Calls a module's function on `size` ranks. Returns what each returned; an error on any rank is raised here."""
    with TemporaryDirectory() as folder:
        place = str(Path(folder) / "rendezvous")
        pipes = [_context.Pipe(duplex=False) for _ in range(size)]
        processes = [
            _context.Process(target=_rank, args=(rank, size, place, function, arguments, pipes[rank][1]), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        for _, theirs in pipes:
            theirs.close()
        answers: list[Any] = []
        try:
            for rank, (mine, _) in enumerate(pipes):
                assert mine.poll(LIMIT_S), f"rank {rank} does not answer"
                answers.append(pickle.loads(mine.recv_bytes()))
        finally:
            for process in processes:
                process.join(5)
                if process.is_alive():
                    process.kill()
    for rank, (failed, answer) in enumerate(answers):
        assert not failed, f"rank {rank}:\n{answer}"
    return [answer for _, answer in answers]


def _rank(rank: int, size: int, place: str, function: Callable[..., Any], arguments: Any, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    dist.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=size)
    answer: tuple[bool, Any]
    try:
        answer = (False, function(*arguments))
    except BaseException:  # noqa: BLE001 - shown by the test
        answer = (True, traceback.format_exc())
    # As plain bytes: a pipe's own way lends tensors out, and a lender that has gone cannot be asked for them.
    pipe.send_bytes(pickle.dumps(answer))
    dist.destroy_process_group()
