"""A worker group without Ray: real processes, real gloo, a few tenths of a second to start.

A fork server imports torch and transformers once; every rank is forked from it. `run_group` does what Ray Train does
with a group: when one rank dies, the others go too.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint, FaultSpec
from outlast.checkpointing.format.layout import CheckpointRef, checkpoint_dir
from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.restore.verify import tensor_digests
from outlast.checkpointing.run_store.catalog import read_catalog, run_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.train import Parallel, ParallelSettings
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.loop.rank_activity import StepPhase
from outlast.trainers.loop.train_loop import Outcome

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.groups.worker_group_rank", "tests.support.groups.in_place_group"])

GRACE_S = 60.0
STOPPED_S = 1.0  #: long enough for the other ranks to come to wait
ACTIONS = [action for action in FaultAction if action is not FaultAction.PAUSE]  # that one is for drills
IN_TRAINING = (FaultPoint.ACCUMULATING, FaultPoint.STEP, FaultPoint.EVALUATING)


class Quiet:
    """A control that never stops and tells nobody."""

    def stop_requested(self) -> bool:
        return False

    def save_requested(self) -> str | None:
        return None

    def claimed(self, attempt: str) -> None:
        pass

    def at(self, phase: StepPhase, step: int) -> None:
        pass

    def worked(self, seconds: float) -> None:
        pass

    def progress(self, event: dict[str, Any]) -> None:
        pass


@dataclass
class StopAt(Quiet):
    """A control that asks for a stop once a step is done, on one rank only."""

    step: int
    seen: int = field(default=0)

    def stop_requested(self) -> bool:
        return self.seen >= self.step

    def progress(self, event: dict[str, Any]) -> None:
        self.seen = max(self.seen, event.get("step", 0))


@dataclass(frozen=True)
class Ended:
    """How a rank ended: an outcome, an error of ours, or another end (a signal, a traceback)."""

    exit_code: int
    outcome: Outcome | None = None
    error: OutlastError | None = None


def run_group(
    assignment: Assignment,
    storage: Storage,
    size: int,
    control: Quiet | None = None,
    folder: Path | None = None,
    limit_s: float = GRACE_S,
    device: str = "cpu",
    nodes: Sequence[Path] | None = None,
) -> list[Ended]:
    """Runs one attempt on `size` ranks and returns how each ended, in rank order. They share a `device`.

    A rank that has not ended after `limit_s` hangs, and that is an error. `nodes` are directories that stand for the
    shared memory of each rank's node.
    """
    from tests.support.groups.worker_group_rank import work

    rendezvous = (folder or Path(storage.url)) / f".rendezvous-{os.getpid()}-{time.monotonic_ns()}"
    pipes, processes = [], []
    for rank in range(size):
        mine, theirs = _context.Pipe(duplex=False)
        here = (rank, size, str(rendezvous), device)
        environment = dict(os.environ) | ({"OUTLAST_SNAPSHOTS": str(nodes[rank])} if nodes else {})
        arguments = (*here, assignment, storage.url, control or Quiet(), theirs, environment)
        processes.append(_context.Process(target=work, args=arguments, daemon=True))
        pipes.append((mine, theirs))
    for process in processes:
        process.start()
    for _, theirs in pipes:
        theirs.close()  # so that a rank that dies is heard as the end of its pipe
    deadline = time.monotonic() + limit_s
    for process in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
            process.join()
    assert not hung, f"ranks {hung} of {size} did not end within {limit_s} s"
    ended = []
    for process, (pipe, _) in zip(processes, pipes, strict=True):
        said = Ended(0)
        with contextlib.suppress(EOFError):
            said = pipe.recv() if pipe.poll() else said
        ended.append(replace(said, exit_code=process.exitcode or 0))
    return ended


def start_script(path: Path, arguments: list[str], size: int) -> list[BaseProcess]:
    """Starts a script on `size` ranks, with the environment that torchrun would give them."""
    from tests.support.groups.worker_group_rank import run_script

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    processes: list[BaseProcess] = []
    for rank in range(size):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {**place, **address} if size > 1 else {}
        processes.append(_context.Process(target=run_script, args=(str(path), arguments, environment), daemon=True))
        processes[-1].start()
    return processes


def fault(point: FaultPoint, step: int, rank: int, action: FaultAction, folder: Path) -> FaultSpec:
    return FaultSpec(point, step, rank, action, str(folder / f"fired-{point.value}-{step}-{rank}.json"))


def run_struck(assignment: Assignment, storage: Storage, size: int, strike: FaultSpec) -> list[Ended]:
    """As `run_group`, with a fault that must fire, and must end the group, or must not if the process only stopped.

    The process that stopped is woken after a while; the one that hangs is ended, as a watchdog would.
    """
    with ThreadPoolExecutor(1) as pool:
        watching = pool.submit(_wake_or_end, strike)
        ended = run_group(replace(assignment, faults=(strike,)), storage, size)
        assert Path(strike.record).exists(), "the fault did not fire"
        watching.result()
    if strike.action is FaultAction.STOP:
        assert [item.outcome for item in ended] == [Outcome.DONE] * size, "it was only slow"
    else:
        assert ended[strike.rank].exit_code == (1 if strike.action is FaultAction.EXCEPTION else -signal.SIGKILL)
        assert all(item.outcome is None and item.exit_code != 0 for item in ended)
    return ended


def _wake_or_end(strike: FaultSpec) -> None:
    if strike.action not in (FaultAction.STOP, FaultAction.HANG):
        return
    deadline = time.monotonic() + GRACE_S
    while (pid := _struck(strike)) is None:
        assert time.monotonic() < deadline, f"nobody struck by {strike}"
        time.sleep(0.02)
    time.sleep(STOPPED_S)
    os.kill(pid, signal.SIGCONT if strike.action is FaultAction.STOP else signal.SIGKILL)


def _struck(strike: FaultSpec) -> int | None:
    """The process that was struck; None while there is none, or it is to stop and has not."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        pid = int(json.loads(Path(strike.record).read_text())["pid"])
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return pid if strike.action is FaultAction.HANG or state == "T" else None
    return None


def newest(storage: LocalStorage, run: str) -> Manifest:
    return read_catalog(storage, run).accepted[0]


def digests(storage: Storage, run: str, ref: CheckpointRef | None = None) -> dict[str, str]:
    """SHA-256 of every tensor of a checkpoint, the newest accepted one by default."""
    manifest = next(item for item in read_catalog(storage, run).accepted if ref in (None, item.ref))
    return tensor_digests(storage, checkpoint_dir(run, manifest.ref), manifest)


def resumed(storage: LocalStorage, run: str) -> list[dict[str, Any]]:
    """The `resume` events of a run, oldest first."""
    return [event for _, event in run_events(RunStore(storage, run)) if event["event"] == "resume"]


def losses(storage: Storage, run: str) -> dict[int, float]:
    """Every step's loss; a step that was done twice must have had the same loss both times."""
    found: dict[int, float] = {}
    for _, event in run_events(RunStore(storage, run)):
        if event["event"] == "step":
            assert found.setdefault(event["step"], event["loss"]) == event["loss"], f"step {event['step']} differs"
    return found


def with_parallel(assignment: Assignment, parallel: Parallel) -> Assignment:
    """The same with the model spread over the ranks in this way."""
    scale = ParallelSettings(parallel=parallel)
    return replace(assignment, config=assignment.config.model_copy(update={"scale": scale}))


def tiny_config(
    name: str, storage: str, data: str, *, sections: Mapping[str, Any] | None = None, **train: Any
) -> TrainingConfig:
    """A GPT-2 of 30,000 weights with dropout on, 10 steps, a checkpoint every 3. `sections` changes other blocks."""
    body: dict[str, Any] = {
        "name": name,
        "seed": 11,
        "model": {
            "config": {"model_type": "gpt2", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32},
            "tokenizer": {"train_bpe": 400},
        },
        "data": {"train": data, "eval": "5%", "max_length": 16},
        "train": {"steps": 10, "batch": 8, "micro_batch": 1, "lr": 1e-3, "eval_every": 4, "warmup": 2, **train},
        "checkpoint": {"storage": storage, "every": 3, "overlap": False},
    }
    for key, value in (sections or {}).items():
        body[key] = {**body.get(key, {}), **value} if isinstance(value, Mapping) else value
    return TrainingConfig.model_validate(body)


if __name__ == "__main__":
    sys.exit("a helper of the tests")
