"""Sharded trainings that lose processes, nodes and bytes, and restart from snapshots in memory."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
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


def snapshots(node: Path) -> dict[int, list[Path]]:
    """The descriptions of snapshots on a node by step."""
    found: dict[int, list[Path]] = {}
    for path in node.rglob("*.json"):
        found.setdefault(int(path.name.split(".")[1]), []).append(path)
    return found


def flip(description: Path) -> None:
    """Flips one bit of the data of a snapshot."""
    body = json.loads(description.read_bytes()[32:])
    path = description.with_name(body["data"])
    with path.open("r+b") as file:
        file.seek(body["num_bytes"] // 2)
        [byte] = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


def check_end(storage: LocalStorage, run: str, calm: str) -> None:
    assert losses(storage, run) == losses(storage, calm)
    assert digests(storage, run) == digests(storage, calm)


def test_a_damaged_byte_leads_to_the_older_snapshot_and_then_to_the_checkpoint(
    sharded: Assign, calm: Callable[[int], str], storage: LocalStorage, tmp_path: Path
) -> None:
    run, nodes = f"damaged-{tmp_path.name}", make_nodes(tmp_path, [0, 0])
    kill(sharded(run), storage, nodes, 14, 0, tmp_path)
    older, newer = sorted(step for step, paths in snapshots(nodes[0]).items() if len(paths) == 2)
    flip(snapshots(nodes[0])[newer][1])
    kill(sharded(run), storage, nodes, 14, 1, tmp_path)
    assert [(event["step"], event["source"]) for event in resumed(storage, run)] == [(older, None)]
    [unused] = of_kind(storage, run, "snapshots-unused")
    assert unused["reasons"][0].startswith(f"step {newer}: the snapshot of rank ")

    for paths in snapshots(nodes[0]).values():
        flip(paths[0])
    finish(sharded(run), storage, nodes)
    assert resumed(storage, run)[-1]["step"] == 10
    assert resumed(storage, run)[-1]["source"].endswith("checkpoint-10")
    assert all("is damaged" in reason for reason in of_kind(storage, run, "snapshots-unused")[-1]["reasons"])
    check_end(storage, run, calm(2))


@pytest.mark.parametrize("lost", [[0], [1], [2], [0, 1]], ids=str)
def test_a_lost_node(
    lost: list[int], sharded: Assign, calm: Callable[[int], str], storage: LocalStorage, tmp_path: Path
) -> None:
    """Three ranks on three nodes: each one's part is also on the next one's. A new node takes the lost one's place."""
    run, nodes = f"node-{tmp_path.name}", make_nodes(tmp_path, [0, 1, 2])
    kill(sharded(run), storage, nodes, 13, lost[0], tmp_path)
    for number in lost:
        shutil.rmtree(nodes[number])
        nodes[number] = make_nodes(tmp_path, [10 + number])[0]
    finish(sharded(run), storage, nodes)
    [event] = resumed(storage, run)
    if len(lost) == 1:
        assert event["step"] in (11, 12, 13)
        assert event["memory"]["moved"] == lost
    else:
        assert event["step"] == 10
        assert event["source"].endswith("checkpoint-10")
        [unused] = of_kind(storage, run, "snapshots-unused")
        assert "no node has the complete part of rank 0" in unused["reasons"][0]
    check_end(storage, run, calm(3))


def test_ranks_that_change_places_take_their_parts_from_where_they_are(
    sharded: Assign, calm: Callable[[int], str], storage: LocalStorage, tmp_path: Path
) -> None:
    """Three ranks on two nodes, without copies at buddies, each come back on the other node."""
    run, (first, second) = f"moved-{tmp_path.name}", make_nodes(tmp_path, [0, 1])
    kill(sharded(run), storage, [first, first, second], 13, 1, tmp_path)
    for path in (*first.rglob("*.json"), *second.rglob("*.json")):
        rank, holder = path.name.split(".")[2:4]
        if rank != f"{holder}-of-3":
            path.unlink()
    finish(sharded(run), storage, [second, second, first])
    assert resumed(storage, run)[0]["memory"]["moved"] == [0, 1, 2]
    check_end(storage, run, calm(3))


@pytest.mark.parametrize("point", [FaultPoint.AFTER_SNAPSHOT, FaultPoint.ACCUMULATING])
@pytest.mark.parametrize("rank", [0, 1])
def test_killed_while_a_snapshot_is_taken(
    point: FaultPoint,
    rank: int,
    sharded: Assign,
    calm: Callable[[int], str],
    storage: LocalStorage,
    tmp_path: Path,
) -> None:
    """The snapshot before it is whole: no step from which all could go on is overwritten."""
    run, nodes = f"taking-{tmp_path.name}", make_nodes(tmp_path, [0, 1])
    sections = {"checkpoint": {"every": 1000, "memory": 2}}
    strikes = [fault(point, step, rank, FaultAction.SIGKILL, tmp_path) for step in (12, 13)]
    ended = run_group(sharded(run, sections=sections, faults=tuple(strikes)), storage, 2, nodes=nodes)
    assert ended[rank].exit_code == -signal.SIGKILL
    kept = {step for step in snapshots(nodes[0]) if step in snapshots(nodes[1])}
    finish(sharded(run, sections=sections), storage, nodes)
    [event] = resumed(storage, run)
    assert event["memory"]
    assert event["step"] == max(kept)
    check_end(storage, run, calm(2))


def test_other_launches_do_not_use_them_and_remove_them(
    sharded: Assign, calm: Callable[[int], str], storage: LocalStorage, tmp_path: Path
) -> None:
    run, nodes = f"litter-{tmp_path.name}", make_nodes(tmp_path, [0, 0])
    kill(sharded(run), storage, nodes, 14, 0, tmp_path)
    kill(sharded(run, launch="second"), storage, nodes, 11, 1, tmp_path)
    assert [event["source"].rpartition("/")[2] for event in resumed(storage, run)] == ["checkpoint-10"]
    assert len({path.parent for path in nodes[0].rglob("*.data")}) <= 1
    finish(sharded(run, launch="third"), storage, nodes)
    assert not list(nodes[0].glob("*/*"))
    check_end(storage, run, calm(2))


def test_without_memory_auto_goes_on_and_a_demand_fails(
    sharded: Assign, calm: Callable[[int], str], storage: LocalStorage, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    run, nodes = f"none-{tmp_path.name}", [file, file]
    finish(sharded(run, sections={"checkpoint": {"every": SAVE_EVERY}}), storage, nodes)
    [event] = of_kind(storage, run, "snapshots-off")
    assert str(file) in event["reason"]
    check_end(storage, run, calm(2))
    ended = run_group(sharded(f"{run}-demanded"), storage, 2, nodes=nodes)
    assert all(item.error is not None and "checkpoint.memory" in item.error.message for item in ended)
