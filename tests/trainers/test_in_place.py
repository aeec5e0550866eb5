"""A run goes on in memory when a process of it is lost: no step is lost or done twice, and all bits are the same."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
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
from tests.support.groups.worker_group import digests, losses, run_group

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


@dataclass(frozen=True)
class Case:
    """Processes of a group that are struck."""

    size: int
    place: Place
    ranks: tuple[int, ...]
    signal: signal.Signals | None = signal.SIGKILL
    is_elastic: bool = False
    num_spares: int = 1
    apart: int = 0  #: steps between two strikes

    def __str__(self) -> str:
        signal_name = "exception" if self.signal is None else self.signal.name.lower()
        world = "elastic" if self.is_elastic else "same-world"
        ranks = "".join(map(str, self.ranks))
        apart = f"-apart{self.apart}" if self.apart else ""
        return f"{self.size}-{world}-{self.place.name.lower()}-{signal_name}-rank{ranks}{apart}"

    def strikes(self, folder: Path) -> list[Strike]:
        step = {Place.EVALUATION: 4, Place.SAVE: 6}.get(self.place, 7 if not self.apart else 4)
        return [
            Strike(self.place, step + number * self.apart, rank, str(folder / f"struck-{number}"), self.signal)
            for number, rank in enumerate(self.ranks)
        ]


SHORT = [Place.FORWARD, Place.COLLECTIVE, Place.OPTIMIZER]
CASES = [
    *(Case(2, place, (rank,)) for place in SHORT for rank in (0, 1)),
    *(Case(2, place, (1,), signal.SIGSTOP) for place in (Place.FORWARD, Place.COLLECTIVE)),
    Case(2, Place.FORWARD, (1,), None),
    Case(3, Place.COLLECTIVE, (0, 2), num_spares=2),
    Case(3, Place.OPTIMIZER, (1, 1), num_spares=2, apart=1),
    Case(3, Place.COLLECTIVE, (0,), is_elastic=True, num_spares=0),
    Case(3, Place.OPTIMIZER, (2,), is_elastic=True, num_spares=1),
    Case(4, Place.COLLECTIVE, (1, 2, 3), is_elastic=True, num_spares=0),
    *(Case(2, place, (rank,)) for place in (Place.EVALUATION, Place.SAVE) for rank in (0, 1)),
]
FULL = [
    Case(size, place, (rank,), how, is_elastic, int(not is_elastic))
    for size in (2, 3, 4)
    for place in Place
    for rank in sorted({0, size - 1})
    for how in (signal.SIGKILL, signal.SIGSTOP, None)
    for is_elastic in (False, True)
]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.faults) for case in FULL if case not in CASES)], ids=str
)
def test_it_goes_on_in_memory(
    case: Case, assign: Assign, storage: LocalStorage, reference: MakeReference, elastic: Reference, tmp_path: Path
) -> None:
    run, strikes = f"ip-{case}", case.strikes(tmp_path)
    sections = {"exactness": "elastic"} if case.is_elastic else {}
    options = {
        "num_spares": case.num_spares,
        "is_elastic": case.is_elastic,
        "silence_s": 2.5 if case.signal is signal.SIGSTOP else 10.0,
    }
    with in_place_group(
        assign(run, sections=sections), storage, case.size, control=Striking(strikes), **options
    ) as group:
        ended = group.ended(is_left=case.signal is signal.SIGSTOP)
    assert all(Path(strike.record).exists() for strike in strikes)
    lost = [item for item in ended if item is None or item.exit_code or item.outcome is None]
    assert len(lost) == len(case.ranks), (ended, group.server.losses)
    assert [item.outcome for item in ended if item not in lost] == [Outcome.DONE] * (len(ended) - len(lost))
    assert_as(storage, run, elastic if case.is_elastic else reference(case.size))
    print(case, seconds_of(storage, run))


@pytest.fixture(scope="module")
def elastic(assign: Assign, storage: LocalStorage) -> Reference:
    """The uninterrupted run whose bits do not depend on the world size."""
    run_group(assign("in-place-elastic", sections={"exactness": "elastic"}), storage, 2)
    return Reference("in-place-elastic", digests(storage, "in-place-elastic"), losses(storage, "in-place-elastic"))
