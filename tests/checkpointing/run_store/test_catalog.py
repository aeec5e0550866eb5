"""Claims, fencing and the resume point: an acknowledged commit is never lost, and a zombie's never counts."""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from outlast.checkpointing import fault_injection as faults
from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint, FaultSpec, InjectedFault
from outlast.checkpointing.format.layout import (
    CLAIM,
    AttemptId,
    CheckpointRef,
    attempt_dir,
    check_run_name,
    checkpoint_dir,
    parse_checkpoint,
)
from outlast.checkpointing.restore.verify import verify
from outlast.checkpointing.run_store.catalog import read_catalog, run_events
from outlast.checkpointing.run_store.claims import claim, higher_claim, launch_is_superseded, list_attempts, read_claim
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Buffer
from outlast.checkpointing.storage.local import LocalStorage
from tests.support.small_model import digests_of, small_model, train_step


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


def numbered(storage: LocalStorage, name: str) -> AttemptId:
    """A claim whose name the test chooses."""
    attempt = AttemptId.parse(name)
    assert attempt is not None
    storage.put(f"{attempt_dir('run', attempt)}/{CLAIM}", [b"{}"])
    return attempt


# -- claims ------------------------------------------------------------------------------------------------------------


def test_claims_count_up_and_say_who(storage: LocalStorage) -> None:
    assert list_attempts(RunStore(storage, "run")) == []
    made = [claim(RunStore(storage, "run"), {"launch": f"launch-{number}"}) for number in range(3)]
    assert [attempt.number for attempt in made] == [1, 2, 3]
    assert list_attempts(RunStore(storage, "run")) == made
    launches = [read_claim(RunStore(storage, "run"), attempt)["launch"] for attempt in made]
    assert launches == ["launch-0", "launch-1", "launch-2"]


def test_claims_are_ordered_by_number_then_nonce(storage: LocalStorage) -> None:
    names = ["0002-ffff", "0010-0000", "10000-aaaa", "0002-0000", "0009-bbbb"]
    for name in names:
        numbered(storage, name)
    storage.put("run/attempts/notes/a.txt", [b"not a claim"])
    storage.put("run/attempts/0003-zzzz", [b"neither is a file"])
    ordered = ["0002-0000", "0002-ffff", "0009-bbbb", "0010-0000", "10000-aaaa"]
    assert [str(attempt) for attempt in list_attempts(RunStore(storage, "run"))] == ordered
    assert claim(RunStore(storage, "run"), {}).number == 10001


def test_a_higher_claim_is_seen_by_all_below_it(storage: LocalStorage) -> None:
    low, same, high = (numbered(storage, name) for name in ("0001-aaaa", "0002-1111", "0002-2222"))
    assert higher_claim(RunStore(storage, "run"), low) == high
    assert higher_claim(RunStore(storage, "run"), same) == high
    assert higher_claim(RunStore(storage, "run"), high) is None


def test_racing_claims_have_one_winner(storage: LocalStorage) -> None:
    barrier = threading.Barrier(8)
    made: list[AttemptId] = []

    def race() -> None:
        barrier.wait()
        made.append(claim(RunStore(storage, "run"), {}))

    threads = [threading.Thread(target=race) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 8
    assert list_attempts(RunStore(storage, "run")) == sorted(made)
    assert [attempt for attempt in made if higher_claim(RunStore(storage, "run"), attempt) is None] == [max(made)]


@pytest.mark.parametrize(
    ("launches", "asking", "superseded"),
    [
        ([], "a", False),
        (["a"], "a", False),
        (["a"], "b", False),
        (["a", "a"], "a", False),
        (["a", "b"], "a", True),
        (["a", "b"], "b", False),
        (["a", "b"], "c", False),
        (["a", "b", "b"], "a", True),
        (["a", "b", "a"], "b", True),
    ],
)
def test_a_launch_takes_over_once(storage: LocalStorage, launches: list[str], asking: str, superseded: bool) -> None:
    for launch in launches:
        claim(RunStore(storage, "run"), {"launch": launch})
    assert launch_is_superseded(RunStore(storage, "run"), asking) is superseded


def test_a_claim_that_was_never_finished_belongs_to_nobody_else(storage: LocalStorage) -> None:
    """A worker group died between making its attempt's directory and writing the claim. The launch tries again, and
    nobody has taken over from it.
    """
    claim(RunStore(storage, "run"), {"launch": "a"})
    storage.path("run/attempts/0002-dead").mkdir()
    assert not launch_is_superseded(RunStore(storage, "run"), "a")


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"\xff\xfe", b"\0" * 40])
def test_a_damaged_claim_says_nothing(storage: LocalStorage, body: bytes) -> None:
    attempt = claim(RunStore(storage, "run"), {"launch": "a"})
    storage.put(f"{attempt_dir('run', attempt)}/{CLAIM}", [body])
    assert read_claim(RunStore(storage, "run"), attempt) == {}


# -- attempts that overlap ---------------------------------------------------------------------------------------------


@dataclass
class Worker:
    """One attempt in this process, with a model of its own."""

    checkpointer: Checkpointer
    model: nn.Module
    optimizer: object
    step: int = 0

    def save(self, *, again: bool = False) -> bool:
        if not again:
            self.step += 1
            train_step(self.model, self.optimizer, self.step)  # type: ignore[arg-type]
        return self.checkpointer.save(self.step, self.model, self.optimizer, {"step": self.step})  # type: ignore[arg-type]

    @property
    def ref(self) -> CheckpointRef:
        return CheckpointRef(self.step, self.checkpointer.attempt)


def start(storage: LocalStorage, launch: str, *, keep_last: int = 2) -> Worker:
    model, optimizer = small_model()
    checkpointer = Checkpointer(storage, "run", launch=launch, retention=Retention(keep_last))
    assert not checkpointer.superseded
    state = checkpointer.resume(model, optimizer)
    return Worker(checkpointer, model, optimizer, state["step"] if state else 0)


def accepted(storage: LocalStorage) -> list[CheckpointRef]:
    return [manifest.ref for manifest in read_catalog(storage, "run").accepted]


def test_a_zombie_is_told_and_its_commit_never_counts(storage: LocalStorage) -> None:
    zombie = start(storage, "old")
    assert zombie.save()
    kept = zombie.ref
    heir = start(storage, "new")
    assert heir.step == 1

    assert not zombie.save(), "a commit after a higher claim must not be acknowledged"
    assert zombie.checkpointer.superseded
    disowned = zombie.ref

    assert heir.save()
    assert accepted(storage) == [heir.ref, kept]
    assert storage.list(checkpoint_dir("run", disowned)), "not deleted yet: one commit of its own is not enough"

    assert heir.save()
    assert disowned not in accepted(storage)
    assert storage.list(checkpoint_dir("run", disowned)) == []
    assert accepted(storage) == [heir.ref, replace(heir.ref, step=2)]
    superseded = [event for attempt, event in run_events(RunStore(storage, "run")) if event["event"] == "superseded"]
    assert [(event["step"], event["by"]) for event in superseded] == [(2, str(heir.checkpointer.attempt))]


def test_a_commit_just_before_the_claim_is_found_though_the_loser_never_knew(storage: LocalStorage) -> None:
    """The claim comes before the reading: whatever was acknowledged until then is seen."""
    first = start(storage, "old")
    assert first.save()
    assert first.save()
    assert start(storage, "new").step == 2


class Interrupted(LocalStorage):
    """Lets something else happen just before the file of a certain name is put, or before the n-th deletion."""

    def __init__(
        self, root: Path, happen: Callable[[], object], *, before_put: str = "", before_delete: int = -1
    ) -> None:
        super().__init__(root)
        self.happen, self.before_put, self.before_delete = happen, before_put, before_delete

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        if self.before_put and path.endswith(self.before_put):
            self.before_put = ""
            self.happen()
        super().put(path, chunks)

    def delete(self, path: str) -> None:
        self.before_delete -= 1
        if self.before_delete == -1:
            self.happen()
        super().delete(path)


def test_what_was_acknowledged_while_another_claimed_is_found(storage: LocalStorage) -> None:
    """The claim comes before the reading. In the other order the commit of step 2 would be lost."""
    older = start(storage, "old")
    assert older.save()
    acknowledged = []
    racing = Interrupted(Path(storage.url), lambda: acknowledged.append(older.save()), before_put=CLAIM)
    assert start(racing, "new").step == 2
    assert acknowledged == [True]


def test_an_attempt_that_was_overtaken_while_it_claimed_gives_way(storage: LocalStorage) -> None:
    """It looks again after its claim, and reads nothing when somebody is above it."""
    racing = Interrupted(Path(storage.url), lambda: numbered(storage, "0001-ffffffff"), before_put=CLAIM)
    late = Checkpointer(racing, "run", launch="late")
    assert late.superseded
    assert len(list_attempts(RunStore(storage, "run"))) == 2


def test_a_checkpoint_that_is_deleted_while_it_is_looked_for_is_not_lost(storage: LocalStorage) -> None:
    """Its deletion is told after the reader has read that journal: it looks once more before it calls that damage."""

    class Deleting(LocalStorage):
        def open(self, path: str) -> BinaryIO:
            if path.endswith("checkpoint-1/manifest.json"):
                assert worker.save(), "this deletes step 1"
            return super().open(path)

    worker = start(storage, "a")
    assert worker.save()
    assert worker.save()
    found = read_catalog(Deleting(Path(storage.url)), "run")
    assert worker.step == 3
    assert ([item.ref.step for item in found.accepted], found.rejected) == ([2], ())


def test_a_claim_during_the_commit_takes_the_acknowledgement_away(storage: LocalStorage) -> None:
    """The manifest was on its way when the claim came: durable, perhaps, and not acknowledged."""
    racing = Interrupted(
        Path(storage.url),
        lambda: claim(RunStore(storage, "run"), {"launch": "new"}),
        before_put="checkpoint-2/manifest.json",
    )
    worker = start(racing, "old")
    assert worker.save()
    assert not worker.save()
    commits = [event["step"] for _, event in run_events(RunStore(storage, "run")) if event["event"] == "commit"]
    assert commits == [1]


def test_nothing_is_deleted_before_the_second_commit(storage: LocalStorage) -> None:
    """One commit may turn out damaged, or disowned by a claim that a slow listing has not shown yet."""
    first = start(storage, "a")
    assert first.save()
    assert first.save()
    heir = start(storage, "b")
    assert heir.save()
    assert [ref.step for ref in accepted(storage)] == [3, 2, 1]
    assert heir.save()
    assert [ref.step for ref in accepted(storage)] == [4, 3]


@pytest.mark.parametrize("survived", range(4))
def test_a_deletion_that_dies_half_way_leaves_no_damage(survived: int, storage: LocalStorage) -> None:
    """The manifest goes first, so that what is left of a checkpoint is no checkpoint; the next attempt clears it up."""

    def die() -> None:
        raise InjectedFault("here it ends")

    worker = start(Interrupted(Path(storage.url), die, before_delete=survived), "a")
    assert worker.save()
    assert worker.save()
    with pytest.raises(InjectedFault):
        worker.save()
    found = read_catalog(storage, "run")
    assert not found.rejected
    assert [item.ref.step for item in found.accepted] == ([3, 2, 1] if survived == 0 else [3, 2])
    for manifest in found.accepted:
        assert verify(storage, checkpoint_dir("run", manifest.ref), manifest) == []

    heir = start(storage, "b")
    assert heir.step == 3
    assert heir.save()
    assert heir.save()
    assert [item.ref.step for item in read_catalog(storage, "run").accepted] == [5, 4]
    assert storage.list(checkpoint_dir("run", replace(worker.ref, step=1))) == []


def test_a_zombie_deletes_nothing(storage: LocalStorage) -> None:
    zombie = start(storage, "old")
    assert zombie.save()
    assert zombie.save()
    heir = start(storage, "new")
    assert not zombie.save()
    assert accepted(storage)[-2:] == [replace(zombie.ref, step=2), replace(zombie.ref, step=1)]
    assert heir.step == 2


def test_two_launches_do_not_fence_each_other_in_turn(storage: LocalStorage) -> None:
    older = start(storage, "older")
    assert older.save()
    newer = start(storage, "newer")
    before = list_attempts(RunStore(storage, "run"))
    again = Checkpointer(storage, "run", launch="older")
    assert again.superseded
    assert list_attempts(RunStore(storage, "run")) == before, "the loser does not even claim"
    assert newer.save()
    assert start(storage, "newer").step == 2, "the newest launch may fail and come back"


def test_the_resume_point_goes_through_an_attempt_without_commits(storage: LocalStorage) -> None:
    first = start(storage, "a")
    assert first.save()
    start(storage, "b")
    start(storage, "c")
    last = start(storage, "d")
    assert last.step == 1
    assert last.save()
    assert accepted(storage) == [last.ref, first.ref]


def test_a_run_without_commits_starts(storage: LocalStorage) -> None:
    start(storage, "a")
    assert read_catalog(storage, "run").is_fresh
    assert start(storage, "b").step == 0


def test_a_step_is_saved_once(storage: LocalStorage) -> None:
    worker = start(storage, "a")
    assert worker.save()
    [before] = read_catalog(storage, "run").accepted
    assert worker.save(again=True), "there already"
    heir = start(storage, "b")
    assert heir.save(again=True), "it is what it resumed from"
    assert read_catalog(storage, "run").accepted == (before,)


def test_optimizer_state_is_not_forgotten_silently(storage: LocalStorage) -> None:
    """A checkpoint without optimizer state cannot give one back; going on with empty moments is another run."""
    model, optimizer = small_model()
    train_step(model, optimizer, 1)
    Checkpointer(storage, "run", launch="a").save(1, model, None, {"step": 1})
    with pytest.raises(ConfigError, match="optimizer"):
        Checkpointer(storage, "run", launch="b").resume(*small_model())


# -- any order of claims, saves and crashes ----------------------------------------------------------------------------

POINTS = [
    FaultPoint.BEFORE_SNAPSHOT,
    FaultPoint.WHILE_WRITING,
    FaultPoint.BEFORE_MANIFEST,
    FaultPoint.AFTER_MANIFEST,
    FaultPoint.AFTER_RETENTION,
]


@dataclass
class History:
    """A run with any number of attempts alive at once, and what must hold of it."""

    storage: LocalStorage
    alive: list[Worker] = field(default_factory=list)
    written: dict[CheckpointRef, dict[str, str]] = field(default_factory=dict)
    acknowledged: CheckpointRef | None = None
    num_launches: int = 0

    def claim(self) -> None:
        self.num_launches += 1
        worker = start(self.storage, f"launch-{self.num_launches}")
        if self.acknowledged is not None:
            assert self.acknowledged in [item.ref for item in worker.checkpointer.catalogue.accepted]
            resumed = worker.checkpointer.catalogue.accepted[0].ref
            assert digests_of(worker.model, worker.optimizer) == self.written[resumed]  # type: ignore[arg-type]
        self.alive.append(worker)

    def save(self, index: int, crash: FaultPoint | None) -> None:
        if not self.alive:
            return
        worker = self.alive[-1 - index % len(self.alive)]
        step, newest = worker.step + 1, worker.checkpointer.attempt == list_attempts(RunStore(self.storage, "run"))[-1]
        record = self.storage.path(f"fired-{len(self.written)}-{self.num_launches}-{step}-{id(worker)}")
        faults.arm([FaultSpec(crash, step, 0, FaultAction.EXCEPTION, str(record))] if crash else [], 0)
        crashed = False
        try:
            said = worker.save()
        except InjectedFault as error:
            crashed, said = True, "after-retention" in str(error)
        finally:
            faults.arm([], 0)
        self.written[worker.ref] = digests_of(worker.model, worker.optimizer)  # type: ignore[arg-type]
        if not crashed:
            assert said is newest, "acknowledged if, and only if, nobody has claimed since"
        if said:
            self.acknowledged = worker.ref
        if crashed or not said:
            self.alive.remove(worker)

    def check(self) -> None:
        found = read_catalog(self.storage, "run")
        assert not found.rejected
        if self.acknowledged is not None:
            assert self.acknowledged in [item.ref for item in found.accepted]
        for manifest in found.accepted:
            assert verify(self.storage, checkpoint_dir("run", manifest.ref), manifest) == []


ACTIONS = st.one_of(
    st.just("claim"),
    st.tuples(st.integers(0, 2), st.one_of(st.none(), st.none(), st.sampled_from(POINTS))),
)


@settings(max_examples=60)
@given(actions=st.lists(ACTIONS, max_size=16))
def test_an_acknowledged_commit_is_never_lost(actions: list[str | tuple[int, FaultPoint | None]]) -> None:
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        history = History(LocalStorage(folder))
        for action in ["claim", *actions]:
            if isinstance(action, str):
                history.claim()
            else:
                history.save(*action)
            history.check()
    finally:
        shutil.rmtree(folder)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "A1", "support-bot", "a.b_c-d", "x" * 63])
def test_names_that_will_do(name: str) -> None:
    assert check_run_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a..b", "/", "a/b", "../a", "-a", "a-", ".a", "a.", "a b", "a\n", "é", "x" * 64, ".data"]
)
def test_names_that_will_not(name: str) -> None:
    with pytest.raises(ConfigError, match="not usable"):
        check_run_name(name)


@pytest.mark.parametrize(
    ("name", "attempt"),
    [
        ("0001-9f2c", AttemptId(1, "9f2c")),
        ("12345-00000000", AttemptId(12345, "00000000")),
        ("001-9f2c", None),
        ("0001-XYZW", None),
        ("0001-9f2c.bak", None),
        ("0001", None),
    ],
)
def test_names_of_attempts(name: str, attempt: AttemptId | None) -> None:
    assert AttemptId.parse(name) == attempt
    assert attempt is None or str(attempt) == name


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-0", 0),
        ("checkpoint-200", 200),
        ("checkpoint-007", None),
        ("checkpoint-", None),
        ("checkpoint--1", None),
        ("checkpoint-1.tmp", None),
        ("model", None),
    ],
)
def test_names_of_checkpoints(name: str, step: int | None) -> None:
    assert parse_checkpoint(name) == step
