"""A generation in memory claims the run beside its steps: late, refused, or after another launch."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.fault_injection import read_record, write_record
from outlast.checkpointing.run_store.attempt_history import REGROUPED
from outlast.checkpointing.run_store.catalog import read_catalog, run_events
from outlast.checkpointing.run_store.claims import claim, list_attempts, read_claim
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Buffer
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.monitoring.regroupings import regroupings
from outlast.cluster.monitoring.timeline import TimelineReader
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.rank_activity import StepPhase
from outlast.trainers.loop.train_loop import Outcome
from tests.conftest import Reference
from tests.support.groups.in_place_group import Place, Strike, Striking, in_place_group
from tests.support.groups.worker_group import digests, losses

Assign = Callable[..., Assignment]
MakeReference = Callable[[int], Reference]


@dataclass
class Gated(Striking):
    """A control in whose process a claim after the first waits for the file `gate`, or is refused until it is there."""

    gate: str = ""
    is_refused: bool = False
    rival: tuple[str, str] | None = None  #: storage and run that another launch claims before the gate opens

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        put = LocalStorage.put

        def gated(storage: LocalStorage, path: str, chunks: Iterable[Buffer]) -> None:
            if path.endswith("/claim.json") and "/0001-" not in path and not self._is_rival:
                if self.is_refused and not Path(self.gate).exists():
                    raise StorageError("no more room")
                while not Path(self.gate).exists():
                    time.sleep(0.01)
                write_record(f"{self.gate}.claimed", {})
            put(storage, path, chunks)

        self._is_rival = False
        setattr(LocalStorage, "put", gated)  # noqa: B010

    def at(self, phase: StepPhase, step: int) -> None:
        super().at(phase, step)
        if step == 9 and not self.is_refused:
            if self.rival and write_record(f"{self.gate}.rival", {}):
                self._is_rival = True
                for _ in range(2):  # the generation's number is that of the first one
                    claim(RunStore(LocalStorage(Path(self.rival[0])), self.rival[1]), {"launch": "second"})
                self._is_rival = False
            Path(self.gate).touch()

    def progress(self, event: dict[str, Any]) -> None:
        if event["event"] == "save-failed":
            Path(self.gate).touch()


def events(storage: LocalStorage, run: str, kind: str) -> list[dict[str, Any]]:
    return [event for _, event in run_events(RunStore(storage, run)) if event["event"] == kind]


def assert_whole(storage: LocalStorage, run: str, expected: Reference) -> None:
    assert digests(storage, run) == expected.digests
    assert losses(storage, run) == expected.losses
    assert Counter(event["step"] for event in events(storage, run, "step")) == Counter(range(1, 11))


@pytest.mark.parametrize("rank", [0, 1])
def test_steps_go_on_before_the_claim(
    rank: int, assign: Assign, storage: LocalStorage, reference: MakeReference, tmp_path: Path
) -> None:
    """The claim is made after step 9 only; the save of that step waits for it."""
    run = f"claim-late-{rank}"
    control = Gated([Strike(Place.FORWARD, 7, rank, str(tmp_path / "struck"))], gate=str(tmp_path / "gate"))
    with in_place_group(assign(run), storage, 2, num_spares=1, control=control) as group:
        ended = group.ended()
    assert [item.outcome for item in ended if item and item.outcome] == [Outcome.DONE] * 2, (ended, group.server.losses)
    assert_whole(storage, run, reference(2))
    claimed_at = (read_record(f"{control.gate}.claimed") or {})["t"]
    ended_at = {event["step"]: event["ended_at"] for event in events(storage, run, "step")}
    assert ended_at[8] < claimed_at
    first, second = list_attempts(RunStore(storage, run))
    kinds = [event["event"] for attempt, event in run_events(RunStore(storage, run)) if attempt == second]
    assert kinds[0] == "regrouped"
    assert {"plan", "under-way", "commit"} <= set(kinds)
    assert [item.ref.attempt for item in read_catalog(storage, run).accepted[-2:]] == [second, first]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_generation_that_is_lost_before_its_claim(
    rank: int, assign: Assign, storage: LocalStorage, reference: MakeReference, tmp_path: Path
) -> None:
    """The next one continues the first attempt, as the claims show, so that neither loss counts as a failure.

    A claim that is in flight in a process that goes on may come after that of the next generation.
    """
    run = f"claim-never-{rank}"
    strikes = [Strike(Place.FORWARD, 7, 1, str(tmp_path / "first")), Strike(Place.FORWARD, 8, rank, f"{tmp_path}/next")]
    control = Gated(strikes, gate=str(tmp_path / "gate"))
    with in_place_group(assign(run), storage, 2, num_spares=2, control=control) as group:
        ended = group.ended()
    assert [item.outcome for item in ended if item and item.outcome] == [Outcome.DONE] * 2, (ended, group.server.losses)
    assert all(Path(strike.record).exists() for strike in strikes)
    assert_whole(storage, run, reference(2))
    store = RunStore(storage, run)
    first, *late, third = list_attempts(store)
    assert third.number == first.number + 2
    assert not (late and rank == 0), "its claim was in flight in a process that was killed"
    timeline = TimelineReader(store).update()
    assert {timeline.ends[item].cause for item in (first, *late)} == {REGROUPED}
    regrouping = list(regroupings(timeline))[-1]
    assert (regrouping.before, regrouping.attempt, regrouping.num_redone) == (str(first), str(third), 0)
    made = [list(item.steps.step) for item in timeline.claimed_attempts]
    assert sorted(step for steps in made for step in steps) == list(range(1, 11))


def test_a_refused_claim_is_a_failed_save(
    assign: Assign, storage: LocalStorage, reference: MakeReference, tmp_path: Path
) -> None:
    """The save of step 9 fails; then the storage takes the claim, and the last save is committed."""
    strikes = [Strike(Place.FORWARD, 7, 1, str(tmp_path / "struck"))]
    control = Gated(strikes, gate=str(tmp_path / "gate"), is_refused=True)
    sections = {"failure": {"on_save_error": "go-on"}, "checkpoint": {"overlap": False}}
    with in_place_group(assign("claim-refused", sections=sections), storage, 2, num_spares=1, control=control) as group:
        ended = group.ended()
    assert [item.outcome for item in ended if item and item.outcome] == [Outcome.DONE] * 2, (ended, group.server.losses)
    assert_whole(storage, "claim-refused", reference(2))
    assert [event["step"] for event in events(storage, "claim-refused", "save-failed")] == [9]
    assert [event["step"] for event in events(storage, "claim-refused", "commit")] == [3, 6, 10]


def test_another_launch_supersedes_a_generation_that_has_not_claimed(
    assign: Assign, storage: LocalStorage, tmp_path: Path
) -> None:
    run, strikes = "claim-superseded", [Strike(Place.FORWARD, 7, 1, str(tmp_path / "struck"))]
    control = Gated(strikes, gate=str(tmp_path / "gate"), rival=(storage.url, run))
    with in_place_group(assign(run), storage, 2, num_spares=1, control=control) as group:
        ended = group.ended()
    outcomes = [item.outcome for item in ended if item and item.exit_code == 0]
    assert outcomes == [Outcome.SUPERSEDED] * 2, (ended, group.server.losses)
    store = RunStore(storage, run)
    assert read_claim(store, list_attempts(store)[-1])["launch"] == "second"
    assert [item.ref.step for item in read_catalog(storage, run).accepted] == [6, 3]
