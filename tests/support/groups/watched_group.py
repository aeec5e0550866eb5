"""A group without Ray whose ranks have watchdogs as under Ray: the coordinator answers on a socket of the test."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

import torch.distributed as dist

from outlast.checkpointing.format.layout import AttemptId, attempt_dir
from outlast.checkpointing.storage.factory import open_storage
from outlast.cluster.fault_tolerance.coordinator import Coordinator, CoordinatorHandle
from outlast.cluster.fault_tolerance.watchdog import Watchdog
from outlast.trainers.loop.rank_activity import RankActivity, StepPhase
from tests.support.groups.worker_group import Quiet


@contextmanager
def serve(address: Path) -> Iterator[Coordinator]:
    """Serve a coordinator on a socket."""
    coordinator, lock = Coordinator(), threading.Lock()

    def answer(client: Any) -> None:
        with suppress(EOFError, OSError):
            while True:
                method, arguments = client.recv()
                with lock:
                    client.send(getattr(coordinator, method)(*arguments))

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(listener.accept(),), daemon=True).start()

    with Listener(str(address), family="AF_UNIX") as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield coordinator


class SocketTransport(CoordinatorHandle):
    """A `CoordinatorHandle` over the socket."""

    def __init__(self, address: str) -> None:
        self._connection: Connection[Any, Any] = Client(address, family="AF_UNIX")

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any) -> Any:
            self._connection.send((method, arguments))
            return self._connection.recv()

        return call


@dataclass
class Watched(Quiet):
    """A control whose ranks each have a watchdog from the claim on."""

    address: str
    url: str
    run: str
    hang_after_s: float | None
    step_progress: RankActivity = field(default_factory=RankActivity)

    def claimed(self, attempt: str) -> None:
        claimed = AttemptId.parse(attempt)
        assert claimed is not None
        directory = attempt_dir(self.run, claimed)
        Watchdog(
            SocketTransport(self.address),
            attempt,
            dist.get_rank(),
            dist.get_world_size(),
            self.step_progress,
            self.hang_after_s,
            open_storage(self.url),
            lambda: directory,
            self.progress,
            period_s=0.2,
        ).__enter__()

    def at(self, phase: StepPhase, step: int) -> None:
        self.step_progress.at(phase, step)

    def worked(self, seconds: float) -> None:
        self.step_progress.worked(seconds)
