"""Processes that run one function after another, with a group of gloo for each call.

An error, a death or a hang ends the call, not the caller: a group that had one is replaced by new processes.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from outlast.checkpointing.errors import OutlastError

_context = multiprocessing.get_context("forkserver")

LIMIT_S = 60.0
COLLECTIVE_S = 20.0


@dataclass(frozen=True)
class Answer:
    """What became of a call on one rank.

    Attributes:
        kind: "ok", "refused" (an OutlastError), "error" (any other), "died" or "hung".
        value: What the function returned, or the text of the error.
    """

    kind: str
    value: Any = None


class Processes:
    """Some ranks, started at the first call and after each one that failed."""

    def __init__(self, size: int, folder: Path) -> None:
        self.size, self.folder = size, folder
        self._processes: list[BaseProcess] = []
        self._pipes: list[Any] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def call(
        self, function: Callable[..., Any], *arguments: Any, limit_s: float = LIMIT_S, **named: Any
    ) -> list[Answer]:
        """Call a function of a module on every rank."""
        if not self._processes:
            self._start()
        rendezvous = str(self.folder / f".rendezvous-{os.getpid()}-{time.monotonic_ns()}")
        for pipe in self._pipes:
            pipe.send((rendezvous, function, arguments, named))
        deadline, answers = time.monotonic() + limit_s, list[Answer]()
        for pipe in self._pipes:
            answer = Answer("hung", f"no answer within {limit_s:.0f} s")
            try:
                if pipe.poll(max(0.0, deadline - time.monotonic())):
                    answer = pipe.recv()
            except (EOFError, ConnectionError):
                answer = Answer("died")
            if answer.kind in ("died", "hung"):
                deadline = min(deadline, time.monotonic() + 2 * COLLECTIVE_S)
            answers.append(answer)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(rendezvous)
        if any(answer.kind != "ok" for answer in answers) and (self.size > 1 or answers[0].kind in ("died", "hung")):
            self.close()
        return answers

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(0.2)
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        for rank in range(self.size):
            mine, theirs = _context.Pipe()
            log = str(self.folder / f"rank-{rank}.log")
            process = _context.Process(target=_serve, args=(rank, self.size, theirs, log), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(mine)


def _serve(rank: int, size: int, pipe: Any, log: str) -> None:
    os.environ.update({"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"})
    output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            rendezvous, function, arguments, named = pipe.recv()
            pipe.send(_answer(rank, size, rendezvous, function, arguments, named))


def _answer(
    rank: int, size: int, rendezvous: str, function: Any, arguments: Sequence[Any], named: dict[str, Any]
) -> Answer:
    try:
        if size > 1:
            limit = timedelta(seconds=COLLECTIVE_S)
            dist.init_process_group("gloo", f"file://{rendezvous}", limit, rank=rank, world_size=size)
            dist.barrier()
        return Answer("ok", function(*arguments, **named))
    except OutlastError as error:
        return Answer("refused", f"{type(error).__name__}: {error.message}")
    except BaseException as error:  # noqa: BLE001 - it is the finding
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{'/'.join(last.filename.split('/')[-3:])}:{last.lineno}"
        first = (str(error).strip().splitlines() or [""])[0]
        return Answer("error", f"{type(error).__name__}: {first[:300]} ({place})")
    finally:
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError, ValueError):
                dist.destroy_process_group()
