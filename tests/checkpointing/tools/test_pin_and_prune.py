"""Pins and prunes from outside: a granted pin holds against a run at work, and a prune leaves a run that verifies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

import pytest

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError, NoCheckpointError, StorageError
from outlast.checkpointing.format.layout import CheckpointRef, attempt_dir, checkpoint_dir, pin_path
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.run_store.claims import claim
from outlast.checkpointing.run_store.deletion import is_being_deleted, list_pins
from outlast.checkpointing.run_store.journal import COMMITS, read_events
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Buffer, Entry
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.tools.pin_and_prune import pin, plan_prune, prune, unpin
from outlast.checkpointing.tools.query import list_checkpoints, verify_run
from tests.support.small_model import digests_of, small_model, train_step

NARROW = Retention(2)
WIDE = Retention(9)


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path)


class Run:
    """One attempt with a small model, which saves after every step."""

    def __init__(self, storage: LocalStorage, *, launch: str = "a", retention: Retention = NARROW) -> None:
        self.model, self.optimizer = small_model()
        self.checkpointer = Checkpointer(storage, "run", launch=launch, retention=retention)
        state = self.checkpointer.resume(self.model, self.optimizer)
        self.step = state["step"] if state else 0

    def save(self, times: int = 1) -> Run:
        for _ in range(times):
            self.step += 1
            train_step(self.model, self.optimizer, self.step)
            assert self.checkpointer.save(self.step, self.model, self.optimizer, {"step": self.step})
        return self

    def ref(self, step: int) -> CheckpointRef:
        return CheckpointRef(step, self.checkpointer.attempt)


def steps(storage: LocalStorage) -> list[int]:
    return [manifest.ref.step for manifest in read_catalog(storage, "run").accepted]


def whole(storage: LocalStorage) -> bool:
    return all(not verdict.faults for verdict in verify_run(RunStore(storage, "run")))


class Interrupted(LocalStorage):
    """Lets something happen just before the n-th operation from now on."""

    def __init__(self, url: str) -> None:
        super().__init__(Path(url))
        self.left = -1
        self.happen: Callable[[], object] = lambda: None

    def arm(self, left: int, happen: Callable[[], object]) -> None:
        self.left, self.happen = left, happen

    @property
    def fired(self) -> bool:
        return self.left < 0

    def _count(self) -> None:
        self.left -= 1
        if self.left == -1:
            self.happen()

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        self._count()
        super().put(path, chunks)

    def open(self, path: str) -> BinaryIO:
        self._count()
        return super().open(path)

    def list(self, path: str) -> list[Entry]:
        self._count()
        return super().list(path)

    def delete(self, path: str) -> None:
        self._count()
        super().delete(path)


# -- pins --------------------------------------------------------------------------------------------------------------


def test_a_pin_holds_while_the_run_goes_on_and_over_attempts(storage: LocalStorage) -> None:
    run = Run(storage).save(2)
    assert pin(RunStore(storage, "run"), "1", NARROW) == run.ref(1)
    run.save(3)
    assert steps(storage) == [5, 4, 1]
    rows = list_checkpoints(RunStore(storage, "run"), read_catalog(storage, "run"))
    assert [row["pinned"] for row in rows] == [False, False, True]
    heir = Run(storage, launch="b").save(3)
    assert steps(storage) == [8, 7, 1]
    assert whole(storage)
    assert unpin(RunStore(storage, "run"), run.ref(1).name) == run.ref(1)
    heir.save()
    assert steps(storage) == [9, 8]
    assert list_pins(RunStore(storage, "run")) == set()
    assert whole(storage)


def test_a_pin_outlives_a_resume_from_an_older_checkpoint(storage: LocalStorage) -> None:
    """Step 3 was damaged and pinned; the next attempt goes on from step 2, and does not clear step 3 away."""
    run = Run(storage, retention=WIDE).save(3)
    pin(RunStore(storage, "run"), "3", WIDE)
    weights = storage.path(checkpoint_dir("run", run.ref(3))) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    heir = Run(storage, launch="b", retention=WIDE)
    assert heir.step == 2
    heir.save(3)
    assert run.ref(3) not in [manifest.ref for manifest in read_catalog(storage, "run").accepted]
    assert weights.is_file()


def test_what_cannot_be_pinned_or_unpinned(storage: LocalStorage) -> None:
    with pytest.raises(ConfigError, match="there is no run"):
        pin(RunStore(storage, "run"), "1", NARROW)
    Run(storage).save(3)
    with pytest.raises(NoCheckpointError, match="has no checkpoint 1; it has: 3, 2"):
        pin(RunStore(storage, "run"), "1", NARROW)
    with pytest.raises(ConfigError, match="is not the name of a checkpoint"):
        pin(RunStore(storage, "run"), "3@nobody", NARROW)
    assert list_pins(RunStore(storage, "run")) == set()
    pin(RunStore(storage, "run"), "newest", NARROW)
    with pytest.raises(ConfigError, match=r"'2' is not a pinned checkpoint .* pinned: 3@0001-"):
        unpin(RunStore(storage, "run"), "2")


Retain = Callable[[Interrupted, Run], object]


def retain_in_a_save(storage: Interrupted, run: Run) -> None:
    run.save()


def retain_in_a_prune(storage: Interrupted, run: Run) -> None:
    prune(RunStore(storage, "run"), plan_prune(RunStore(storage, "run"), NARROW))


def ready(root: Path, retain: Retain) -> tuple[Interrupted, Run]:
    """A run whose next retention deletes checkpoint 1."""
    storage = Interrupted(str(root))
    wide = retain is retain_in_a_prune
    return storage, Run(storage, retention=WIDE if wide else NARROW).save(3 if wide else 2)


def try_to_pin(storage: LocalStorage, granted: list[CheckpointRef]) -> None:
    try:
        granted.append(pin(RunStore(storage, "run"), "1", NARROW))
    except NoCheckpointError:
        assert list_pins(RunStore(storage, "run")) == set(), "a refused pin is taken back"


@pytest.mark.parametrize("retain", [retain_in_a_save, retain_in_a_prune])
def test_a_pin_in_the_middle_of_a_retention_holds_or_is_refused(retain: Retain, tmp_path: Path) -> None:
    """Somebody pins before the first operation of a retention, before the second, … and after the last."""
    outcomes = []
    for moment in range(500):
        storage, run = ready(tmp_path / f"{moment}", retain)
        granted: list[CheckpointRef] = []
        storage.arm(moment, lambda: try_to_pin(LocalStorage(Path(storage.url)), granted))  # noqa: B023
        retain(storage, run)
        assert (1 in steps(storage)) == bool(granted), f"before operation {moment}"
        assert whole(storage)
        outcomes.append(bool(granted))
        if not storage.fired:
            break
    assert outcomes == sorted(outcomes, reverse=True), "early pins hold, late ones are refused"
    assert outcomes[0]
    assert outcomes.count(False) > 2, "one at least came between the announcement and the deletion"


@pytest.mark.parametrize("retain", [retain_in_a_save, retain_in_a_prune])
def test_a_retention_in_the_middle_of_a_pin(retain: Retain, tmp_path: Path) -> None:
    outcomes = []
    for moment in range(100):
        storage, run = ready(tmp_path / f"{moment}", retain)
        racing = Interrupted(storage.url)
        granted: list[CheckpointRef] = []
        racing.arm(moment, lambda: retain(storage, run))  # noqa: B023
        try_to_pin(racing, granted)
        assert (1 in steps(storage)) == bool(granted), f"before operation {moment}"
        outcomes.append(bool(granted))
        if not racing.fired:
            break
    assert set(outcomes) == {True, False}


def test_a_checkpoint_that_was_spared_can_be_pinned_again(tmp_path: Path) -> None:
    """The pin came just after the deletion was announced; the announcement does not stand for ever."""
    for moment in range(500):
        storage, run = ready(tmp_path / f"{moment}", retain_in_a_save)
        pinned = pin_path("run", run.ref(1))
        storage.arm(moment, lambda: LocalStorage(Path(storage.url)).put(pinned, [b"{}"]))  # noqa: B023
        run.save()
        events = read_events(storage, attempt_dir("run", run.ref(1).attempt), COMMITS)
        if "spared" in [event["event"] for event in events]:
            break
        assert storage.fired, "no pin came between the announcement and the second look"
    unpin(RunStore(storage, "run"), "1")
    assert pin(RunStore(storage, "run"), "1", NARROW) == run.ref(1)
    run.save(2)
    assert steps(storage) == [5, 4, 1]


@pytest.mark.parametrize(
    ("name", "step"),
    [("200@0001-9f2c", 200), ("0@0001-9f2c", 0), ("007@0001-9f2c", None), ("200@1", None), ("200", None)],
)
def test_names_of_checkpoints_among_attempts(name: str, step: int | None) -> None:
    ref = CheckpointRef.parse(name)
    assert (ref and ref.step) == step
    assert ref is None or ref.name == name


# -- prune -------------------------------------------------------------------------------------------------------------


def test_a_prune_shows_first_then_deletes_and_the_run_verifies(storage: LocalStorage) -> None:
    run = Run(storage, retention=WIDE).save(7)
    pin(RunStore(storage, "run"), "2", WIDE)
    plan = plan_prune(RunStore(storage, "run"), Retention(2, keep_every=4))
    assert [manifest.ref.step for manifest in plan.doomed] == [5, 3, 1]
    assert [manifest.ref.step for manifest in plan.kept] == [7, 6, 4, 2]
    assert steps(storage) == [7, 6, 5, 4, 3, 2, 1], "a plan deletes nothing"

    done = prune(RunStore(storage, "run"), plan)
    assert done == plan
    assert steps(storage) == [7, 6, 4, 2]
    assert whole(storage)
    assert not storage.path(checkpoint_dir("run", run.ref(5))).exists()
    assert plan_prune(RunStore(storage, "run"), Retention(2, keep_every=4)).doomed == ()

    run.save(4)  # the run was at work all the while, and goes on
    assert steps(storage) == [11, 10, 9, 8, 7, 6, 4, 2]
    assert Run(storage, launch="b").step == 11
    assert whole(storage)


def test_a_prune_reaches_the_attempts_that_the_newest_stands_on(storage: LocalStorage) -> None:
    Run(storage, retention=WIDE).save(3)
    heir = Run(storage, launch="b", retention=WIDE).save(2)
    before = digests_of(heir.model, heir.optimizer)
    prune(RunStore(storage, "run"), plan_prune(RunStore(storage, "run"), NARROW))
    assert steps(storage) == [5, 4]
    assert whole(storage)
    again = Run(storage, launch="c")
    assert digests_of(again.model, again.optimizer) == before


@pytest.mark.parametrize("commits", [0, 1])
def test_no_prune_unless_the_highest_claim_holds_two_commits(commits: int, storage: LocalStorage) -> None:
    Run(storage, retention=WIDE).save(4)
    Run(storage, launch="b", retention=WIDE).save(commits)
    with pytest.raises(ConfigError, match=rf"newest attempt 0002-\w+ has {commits} of the 2 commits"):
        plan_prune(RunStore(storage, "run"), NARROW)


def test_a_prune_never_touches_the_newest_two_of_the_highest_claim(storage: LocalStorage) -> None:
    """A policy that would keep other ones, if there were one."""

    class Nothing(Retention):
        def keep(self, *_: object) -> set[CheckpointRef]:
            return set()

    Run(storage, retention=WIDE).save(3)
    Run(storage, launch="b", retention=WIDE).save(3)
    prune(RunStore(storage, "run"), plan_prune(RunStore(storage, "run"), Nothing()))
    assert steps(storage) == [6, 5]


def test_a_prune_stops_when_a_new_attempt_begins(storage: LocalStorage) -> None:
    run = Run(storage, retention=WIDE).save(5)
    plan = plan_prune(RunStore(storage, "run"), NARROW)
    claim(RunStore(storage, "run"), {"launch": "b"})
    with pytest.raises(StorageError, match="a new attempt began after 0 of 3 deletions"):
        prune(RunStore(storage, "run"), plan)
    assert steps(storage) == [5, 4, 3, 2, 1]
    assert not is_being_deleted(RunStore(storage, "run"), run.ref(1)), "it is said that the rest stays"


def test_an_interrupted_prune_is_no_damage_and_the_next_one_clears_up(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def die() -> None:
        raise Killed

    remains = 0
    for moment in range(500):
        storage = Interrupted(str(tmp_path / f"{moment}"))
        Run(storage, retention=WIDE).save(4)
        plan = plan_prune(RunStore(storage, "run"), NARROW)
        storage.arm(moment, die)
        try:
            prune(RunStore(storage, "run"), plan)
        except Killed:
            assert {4, 3} <= set(steps(storage))
            assert whole(storage)
        else:
            break
        plan = plan_prune(RunStore(storage, "run"), NARROW)
        remains += len(plan.remains)
        prune(RunStore(storage, "run"), plan)
        assert steps(storage) == [4, 3]
        [attempt] = storage.path("run/attempts").iterdir()
        assert sorted(path.name for path in attempt.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
        assert whole(storage)
    assert remains, "no kill came between a manifest's deletion and that of the files"


def test_a_checkpoint_that_nobody_deleted_is_damage_even_after_a_prune(storage: LocalStorage) -> None:
    run = Run(storage, retention=WIDE).save(5)
    prune(RunStore(storage, "run"), plan_prune(RunStore(storage, "run"), Retention(3)))
    storage.path(f"{checkpoint_dir('run', run.ref(3))}/manifest.json").unlink()
    faults = {verdict.step: verdict.faults for verdict in verify_run(RunStore(storage, "run")) if verdict.faults}
    assert list(faults) == [3]
    assert "missing, although this checkpoint was committed" in faults[3][0]
