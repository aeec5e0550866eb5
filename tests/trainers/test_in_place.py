"""A run goes on in memory when a process of it is lost: no step is lost or done twice, and all bits are the same."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from outlast.checkpointing.fault_injection import FaultAction, FaultPoint, FaultSpec, read_record
from outlast.checkpointing.format.layout import checkpoint_dir
from outlast.checkpointing.restore.verify import verify
from outlast.checkpointing.run_store.catalog import read_catalog, run_events
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.conftest import Reference
from tests.support.groups.in_place_group import Place, Strike, Striking, in_place_group
from tests.support.groups.worker_group import digests, fault, losses, run_group

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


def seconds_of(storage: LocalStorage, run: str, strikes: Sequence[Strike | FaultSpec]) -> list[dict[str, float]]:
    """Of each regrouping, seconds from the newest strike before it to the end of each phase."""
    struck_at = sorted(float((read_record(strike.record) or {"t": 0.0})["t"]) for strike in strikes)
    found: list[dict[str, float]] = []
    for _, event in run_events(RunStore(storage, run)):
        if event["event"] == "regrouped":
            struck = max((at for at in struck_at if at <= event["marks"]["group"]), default=0.0)
            found.append({name: round(at - struck, 3) for name, at in event["marks"].items()})
        elif event["event"] == "under-way" and found:
            found[-1]["step"] = round(event["marks"]["first_step"] - struck, 3)
    return found


def test_without_a_loss_it_is_the_same_run(assign: Assign, storage: LocalStorage, reference: MakeReference) -> None:
    with in_place_group(assign("whole"), storage, 2, num_spares=1) as group:
        ended = group.ended()
    assert [item and item.outcome for item in ended] == [Outcome.DONE] * 3
    assert_as(storage, "whole", reference(2))
    assert len(list_attempts(RunStore(storage, "whole"))) == 1


class Normed(nn.Module):
    """A model that can only be trained on more than one sample at once."""

    def __init__(self, vocab_size: int, width: int = 16) -> None:
        super().__init__()
        self.embed, self.norm = nn.Embedding(vocab_size, width), nn.BatchNorm1d(width)
        self.out = nn.Linear(width, vocab_size)

    def forward(self, input_ids: torch.Tensor, **_: object) -> SimpleNamespace:
        hidden = self.embed(input_ids)
        first = self.norm(hidden[:, 0])
        return SimpleNamespace(logits=self.out(torch.cat([first[:, None], hidden[:, 1:]], 1)))


def test_a_spare_rehearses_with_as_many_samples_as_a_pass_has(assign: Assign, storage: LocalStorage) -> None:
    model = {"class": f"{__name__}:Normed", "config": {"width": 16}}
    assignment = assign("ip-normed", sections={"model": model}, micro_batch=2)
    with in_place_group(assignment, storage, 2, num_spares=1) as group:
        ended = group.ended()
    assert [item and item.outcome for item in ended] == [Outcome.DONE] * 3


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
    if place.phase is not None
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
    silence_s = 2.5 if case.signal is signal.SIGSTOP else 10.0
    with in_place_group(
        assign(run, sections=sections),
        storage,
        case.size,
        num_spares=case.num_spares,
        control=Striking(strikes),
        is_elastic=case.is_elastic,
        silence_s=silence_s,
    ) as group:
        ended = group.ended(is_left=case.signal is signal.SIGSTOP)
    assert all(Path(strike.record).exists() for strike in strikes)
    lost = [item for item in ended if item is None or item.exit_code or item.outcome is None]
    assert len(lost) == len(case.ranks), (ended, group.server.losses)
    assert [item and item.outcome for item in ended if item not in lost] == [Outcome.DONE] * (len(ended) - len(lost))
    assert_as(storage, run, elastic if case.is_elastic else reference(case.size))
    print(case, seconds_of(storage, run, strikes))


@pytest.mark.parametrize("place", [Place.REFORMING, Place.COPYING])
@pytest.mark.parametrize("second", [0, 1])
def test_a_second_loss_while_it_regroups(
    place: Place, second: int, assign: Assign, storage: LocalStorage, reference: MakeReference, tmp_path: Path
) -> None:
    """Rank 1 is killed after its update, which others lack; then the source, or the replacement of rank 1."""
    run = f"ip-second-{place.name.lower()}-{second}"
    strikes = [
        Strike(Place.APPLIED, 7, 1, str(tmp_path / "first")),
        Strike(place, 7, second, str(tmp_path / "second")),
    ]
    with in_place_group(assign(run), storage, 3, num_spares=2, control=Striking(strikes)) as group:
        ended = group.ended()
    assert all(Path(strike.record).exists() for strike in strikes)
    done = [item for item in ended if item is not None and item.outcome is Outcome.DONE]
    assert len(done) == 3, (ended, group.server.losses)
    assert_as(storage, run, reference(3))
    print(place, second, seconds_of(storage, run, strikes))


def test_all_holders_of_the_state_are_lost(
    assign: Assign, storage: LocalStorage, reference: MakeReference, tmp_path: Path
) -> None:
    """Then the spares resume from the newest checkpoint, as after a restart."""
    strikes = [Strike(Place.FORWARD, 7, rank, str(tmp_path / f"struck-{rank}")) for rank in (0, 1)]
    with in_place_group(assign("ip-all-lost"), storage, 2, num_spares=2, control=Striking(strikes)) as group:
        ended = group.ended()
    assert [item and item.outcome for item in ended[2:]] == [Outcome.DONE] * 2, (ended, group.server.losses)
    assert digests(storage, "ip-all-lost") == reference(2).digests
    assert losses(storage, "ip-all-lost") == reference(2).losses


@pytest.mark.parametrize("point", [FaultPoint.WHILE_WRITING, FaultPoint.BEFORE_MANIFEST, FaultPoint.AFTER_MANIFEST])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_loss_during_a_save(
    point: FaultPoint,
    rank: int,
    overlap: bool,
    assign: Assign,
    storage: LocalStorage,
    reference: MakeReference,
    tmp_path: Path,
) -> None:
    run = f"ip-save-{point.value}-{rank}-{'background' if overlap else 'blocking'}"
    strike = fault(point, 6, rank, FaultAction.SIGKILL, tmp_path)
    # Step 6 is the first to be saved: it would be skipped while an earlier save is in flight.
    sections = {"checkpoint": {"overlap": overlap, "every": 6}}
    with in_place_group(assign(run, faults=(strike,), sections=sections), storage, 2, num_spares=1) as group:
        ended = group.ended()
    assert Path(strike.record).exists()
    done = [item for item in ended if item is not None and item.outcome is Outcome.DONE]
    assert len(done) == 2, (ended, group.server.losses)
    assert_as(storage, run, reference(2))
    for manifest in read_catalog(storage, run).accepted:
        assert verify(storage, checkpoint_dir(run, manifest.ref), manifest) == []
    print(run, seconds_of(storage, run, [strike]))


def test_a_member_that_was_only_stopped_commits_nothing(
    assign: Assign, storage: LocalStorage, reference: MakeReference, tmp_path: Path
) -> None:
    """Rank 0 stops with all it needs for a commit, and wakes up when the others are done."""
    strike = fault(FaultPoint.BEFORE_MANIFEST, 6, 0, FaultAction.STOP, tmp_path)
    with in_place_group(assign("ip-zombie", faults=(strike,)), storage, 2, num_spares=1, silence_s=2.5) as group:
        ended = group.ended(is_left=True)
        assert [item and item.outcome for item in ended[1:]] == [Outcome.DONE] * 2, (ended, group.server.losses)
        before = read_catalog(storage, "ip-zombie")
        os.kill(group.processes[0].pid or 0, signal.SIGCONT)
        [zombie, *_] = group.ended()
    assert zombie is not None
    assert zombie.outcome is not Outcome.DONE
    assert read_catalog(storage, "ip-zombie") == before
    assert digests(storage, "ip-zombie") == reference(2).digests
    assert losses(storage, "ip-zombie") == reference(2).losses, "also those that it adds to its own journal"


@pytest.fixture(scope="module")
def elastic(assign: Assign, storage: LocalStorage) -> Reference:
    """The uninterrupted run whose bits do not depend on the world size."""
    run_group(assign("in-place-elastic", sections={"exactness": "elastic"}), storage, 2)
    return Reference("in-place-elastic", digests(storage, "in-place-elastic"), losses(storage, "in-place-elastic"))
