"""A run goes on in memory when a process of it is lost: no step is lost or done twice, and all bits are the same."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.conftest import Reference
from tests.support.groups.in_place_group import Place, Strike, Striking, in_place_group
from tests.support.groups.worker_group import digests, losses

Assign = Callable[..., Assignment]
MakeReference = Callable[[int], Reference]


def assert_as(storage: LocalStorage, run: str, expected: Reference) -> None:
    """The same bits and the same loss of each step; each step and each evaluation recorded once."""
    assert digests(storage, run) == expected.digests
    assert losses(storage, run) == expected.losses
    counts = Counter(
        (event["event"], event["step"])
        for _, event in run_events(RunStore(storage, run))
        if event["event"] in ("step", "eval")
    )
    assert set(counts.values()) == {1}, counts


def seconds_of(storage: LocalStorage, run: str) -> list[dict[str, float]]:
    """Of each regrouping, seconds since the loss was noticed."""
    found = []
    for _, event in run_events(RunStore(storage, run)):
        if event["event"] == "regrouped":
            noticed = event["marks"]["noticed"]
            found.append({name: round(at - noticed, 3) for name, at in event["marks"].items()})
        elif event["event"] == "under-way" and found:
            found[-1]["step"] = round(event["marks"]["first_step"] - noticed, 3)
    return found


def test_without_a_loss_it_is_the_same_run(assign: Assign, storage: LocalStorage, reference: MakeReference) -> None:
    with in_place_group(assign("whole"), storage, 2, num_spares=1) as group:
        ended = group.ended()
    assert [item and item.outcome for item in ended] == [Outcome.DONE] * 3
    assert_as(storage, "whole", reference(2))
    assert len(list_attempts(RunStore(storage, "whole"))) == 1


@pytest.mark.parametrize("place", [Place.FORWARD, Place.COLLECTIVE, Place.OPTIMIZER])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_spare_replaces_a_killed_process(
    place: Place, rank: int, assign: Assign, storage: LocalStorage, reference: MakeReference, tmp_path: Path
) -> None:
    run = f"in-place-{place.name.lower()}-{rank}"
    strike = Strike(place, 7, rank, str(tmp_path / "struck"))
    with in_place_group(assign(run), storage, 2, num_spares=1, control=Striking([strike])) as group:
        ended = group.ended()
    assert Path(strike.record).exists()
    assert [item and item.exit_code for item in ended] == [
        -signal.SIGKILL if number == rank else 0 for number in range(3)
    ]
    assert [item.outcome for item in ended if item and not item.exit_code] == [Outcome.DONE] * 2
    assert_as(storage, run, reference(2))
    assert len(list_attempts(RunStore(storage, run))) == 2
    print(time.time(), seconds_of(storage, run))
