"""Sharded trainings that lose processes, nodes and bytes, and restart from snapshots in memory."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.train import Parallel
from outlast.trainers.loop.train_loop import Outcome
from tests.support.groups.worker_group import (
    digests,
    fault,
    losses,
    resumed,
    run_group,
    tiny_config,  # noqa: F401
    with_parallel,
)

Assign = Callable[..., Assignment]
STEPS, SAVE_EVERY = 16, 5
TRAIN = {"steps": STEPS}
SECTIONS = {"checkpoint": {"every": SAVE_EVERY, "memory": 2}}


@pytest.fixture
def sharded(assign: Assign) -> Assign:
    """Makes the assignment of a sharded run with snapshots in memory."""

    def make(name: str, *, sections: dict[str, Any] = SECTIONS, **options: Any) -> Assignment:
        return with_parallel(assign(name, sections=sections, **TRAIN, **options), Parallel.FSDP)

    return make


@pytest.fixture
def calm(sharded: Assign, storage: LocalStorage, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], str]:
    """Name of an undisturbed run without snapshots."""

    def make(size: int) -> str:
        name = f"calm-{size}"
        if not (Path(storage.url) / name).exists():
            sections = {"checkpoint": {"every": SAVE_EVERY, "memory": False}}
            ended = run_group(sharded(name, sections=sections), storage, size)
            assert [item.outcome for item in ended] == [Outcome.DONE] * size
        return name

    return make


def kill(assignment: Assignment, storage: LocalStorage, nodes: list[Path], step: int, rank: int, folder: Path) -> None:
    """Runs a group until a rank kills itself in a step."""
    injected = fault(FaultPoint.STEP, step, rank, FaultAction.SIGKILL, folder)
    ended = run_group(with_faults(assignment, injected), storage, len(nodes), nodes=nodes)
    assert Path(injected.record).exists(), "the fault did not fire"
    assert ended[rank].exit_code == -signal.SIGKILL


def with_faults(assignment: Assignment, *faults: Any) -> Assignment:
    from dataclasses import replace

    return replace(assignment, faults=faults)


def finish(assignment: Assignment, storage: LocalStorage, nodes: list[Path]) -> None:
    ended = run_group(assignment, storage, len(nodes), nodes=nodes)
    assert [item.outcome for item in ended] == [Outcome.DONE] * len(nodes), [item.error for item in ended]


def of_kind(storage: LocalStorage, run: str, kind: str) -> list[dict[str, Any]]:
    return [event for _, event in run_events(RunStore(storage, run)) if event["event"] == kind]


def make_nodes(folder: Path, numbers: list[int]) -> list[Path]:
    """Directories of the nodes of each rank."""
    nodes = [folder / f"node-{number}" for number in numbers]
    for node in nodes:
        node.mkdir(exist_ok=True)
    return nodes


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_killed_process_costs_the_steps_since_the_newest_snapshot_and_no_read(
    size: int, sharded: Assign, calm: Callable[[int], str], storage: LocalStorage, tmp_path: Path
) -> None:
    run, nodes = f"memory-{size}-{tmp_path.name}", make_nodes(tmp_path, [0] * size)
    kill(sharded(run), storage, nodes, 14, size - 1, tmp_path)
    [damaged] = [path for path in storage.path(run).rglob("checkpoint-10") if path.is_dir()]
    for path in damaged.rglob("*.safetensors"):
        path.write_bytes(b"")
    finish(sharded(run), storage, nodes)
    [event] = resumed(storage, run)
    assert event["step"] in (11, 12, 13, 14)
    assert event["source"] is None
    assert event["memory"]["moved"] == []
    assert event["memory"]["num_bytes"] > 0
    assert losses(storage, run) == losses(storage, calm(size))
    assert sorted(losses(storage, run)) == list(range(1, STEPS + 1))
    assert digests(storage, run) == digests(storage, calm(size))
    assert not list(tmp_path.glob("node-0/*/*")), "the snapshots of a finished launch are removed"
