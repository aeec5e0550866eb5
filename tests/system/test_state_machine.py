"""Any order of claims, races, saves, kills, damage and reads, beside a dictionary that says what must come of it."""

from __future__ import annotations

import random
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from outlast.checkpointing import fault_injection as faults
from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import NoCheckpointError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint, FaultSpec, InjectedFault
from outlast.checkpointing.format.layout import (
    CLAIM,
    MANIFEST,
    AttemptId,
    CheckpointRef,
    checkpoint_dir,
    parse_checkpoint,
)
from outlast.checkpointing.restore.verify import tensor_digests, verify
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Buffer
from outlast.checkpointing.storage.local import LocalStorage
from tests.support.small_model import digests_of, small_model, train_step

SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None
BEFORE_COMMIT = (FaultPoint.BEFORE_SNAPSHOT, FaultPoint.WHILE_WRITING, FaultPoint.BEFORE_MANIFEST)


# -- what must come of it ----------------------------------------------------------------------------------------------


@dataclass
class Saved:
    """One committed state. `damage` is the part that was struck: the manifest, a file, or nothing."""

    digests: dict[str, str]
    lineage: list[CheckpointRef]
    damage: str = ""


@dataclass
class Expected:
    """Every manifest that lies there."""

    saved: dict[CheckpointRef, Saved] = field(default_factory=dict)
    acknowledged: list[CheckpointRef] = field(default_factory=list)

    def readable(self, ref: CheckpointRef) -> bool:
        return ref in self.saved and self.saved[ref].damage != MANIFEST

    def accepted(self, below: AttemptId | None = None) -> list[CheckpointRef]:
        refs = [ref for ref in self.saved if self.readable(ref) and (below is None or ref.attempt < below)]
        if not refs:
            return []
        owner = max(ref.attempt for ref in refs)
        own = sorted((ref for ref in refs if ref.attempt == owner), reverse=True)
        return own + [ref for ref in self.saved[own[0]].lineage if self.readable(ref)]

    def resumes_from(self, attempt: AttemptId) -> CheckpointRef | None:
        return next((ref for ref in self.accepted(attempt) if not self.saved[ref].damage), None)

    def refuses(self, attempt: AttemptId) -> bool:
        committed = any(ref.attempt < attempt for ref in self.saved)
        return committed and self.resumes_from(attempt) is None


# -- the attempts ------------------------------------------------------------------------------------------------------


class Stage(LocalStorage):
    """Calls `before` with the name of each file that is about to be put or deleted."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.before: Callable[[str, str], None] = lambda verb, path: None

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        self.before("put", path)
        super().put(path, chunks)

    def delete(self, path: str) -> None:
        self.before("delete", path)
        super().delete(path)


class Worker:
    """One attempt, and what is to be expected of it."""

    def __init__(self, storage: Stage, number: int) -> None:
        self.storage, self.number = storage, number
        self.model, self.optimizer = small_model()
        self.checkpointer = Checkpointer(storage, "run", launch=f"launch-{number}", retention=Retention(keep_last=2))
        self.step = 0
        self.lineage: list[CheckpointRef] = []
        self.commits: list[CheckpointRef] = []
        self.num_acknowledged = 0

    @property
    def attempt(self) -> AttemptId:
        return self.checkpointer.attempt

    def train(self) -> CheckpointRef:
        """The next step; each attempt trains on samples of its own, so that no two ever hold equal bits."""
        self.step += 1
        train_step(self.model, self.optimizer, self.step + 1000 * self.number)
        return CheckpointRef(self.step, self.attempt)

    def save(self) -> bool:
        return self.checkpointer.save(self.step, self.model, self.optimizer, {"step": self.step})

    def digests(self) -> dict[str, str]:
        return digests_of(self.model, self.optimizer)


class Attempts(RuleBasedStateMachine):
    """Workers of one run that come, race, save, die and wake up as zombies."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=SHM))
        self.expected = Expected()
        self.workers: list[Worker] = []
        self.num_workers = 0
        # Who wins a race for a number is drawn by lot; the same history must draw the same lots.
        self._token_hex, lots = secrets.token_hex, random.Random(0)
        secrets.token_hex = lambda nbytes=32: lots.randbytes(nbytes or 32).hex()

    def teardown(self) -> None:
        secrets.token_hex = self._token_hex
        faults.arm([], 0)
        shutil.rmtree(self.folder)

    @property
    def reader(self) -> LocalStorage:
        return LocalStorage(self.folder)

    # -- claims --------------------------------------------------------------------------------------------------------

    @initialize()
    def first(self) -> None:
        self.claim()

    @rule()
    def claim(self) -> None:
        self._begin(lambda: None)

    @rule()
    def claims_race(self) -> None:
        """Another attempt lists, claims, and reads between this one's listing and its claim."""
        self._begin(self.claim)

    @precondition(lambda self: self.workers)
    @rule()
    def a_commit_races_a_claim(self) -> None:
        self._begin(lambda: self.save(0))

    def _begin(self, meanwhile: Callable[[], None]) -> None:
        self.num_workers += 1
        stage = Stage(self.folder)

        def before(verb: str, path: str) -> None:
            if path.endswith(CLAIM):
                stage.before = lambda verb, path: None
                meanwhile()

        stage.before = before
        worker = Worker(stage, self.num_workers)
        highest = list_attempts(RunStore(self.reader, "run"))[-1]
        if worker.checkpointer.superseded:
            assert meanwhile == self.claim
            return
        assert worker.attempt == highest
        self._resume(worker)

    def _resume(self, worker: Worker) -> None:
        base = self.expected.resumes_from(worker.attempt)
        if self.expected.refuses(worker.attempt):
            with pytest.raises(NoCheckpointError):
                worker.checkpointer.resume(worker.model, worker.optimizer)
            return
        state = worker.checkpointer.resume(worker.model, worker.optimizer)
        assert (state["step"] if state else 0) == (base.step if base else 0)
        if base:
            assert worker.digests() == self.expected.saved[base].digests
            accepted = self.expected.accepted(worker.attempt)
            worker.step, worker.lineage = base.step, accepted[accepted.index(base) :]
        self.workers.append(worker)

    # -- saves ---------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.workers)
    @rule(back=st.integers(0, 2))
    def save(self, back: int) -> None:
        worker = self.workers[-1 - back % len(self.workers)]
        self._commits(worker, worker.train())
        if worker.save():
            self._acknowledged(worker)
        else:
            assert worker.attempt != list_attempts(RunStore(self.reader, "run"))[-1]
            self.workers.remove(worker)

    @precondition(lambda self: self.workers)
    @rule(
        back=st.integers(0, 2),
        point=st.sampled_from([*BEFORE_COMMIT, FaultPoint.AFTER_MANIFEST, FaultPoint.AFTER_RETENTION]),
    )
    def die_while_saving(self, back: int, point: FaultPoint) -> None:
        worker = self.workers[-1 - back % len(self.workers)]
        ref = worker.train()
        newest = worker.attempt == list_attempts(RunStore(self.reader, "run"))[-1]
        record = self.folder / f"fired-{worker.number}"
        faults.arm([FaultSpec(point, ref.step, 0, FaultAction.EXCEPTION, str(record))], 0)
        if point not in BEFORE_COMMIT:
            self._commits(worker, ref)
        if point is FaultPoint.AFTER_RETENTION and not newest:
            assert not worker.save(), "superseded before it gets there"
        else:
            with pytest.raises(InjectedFault):
                worker.save()
            assert record.exists()
            if point is FaultPoint.AFTER_RETENTION:
                self._acknowledged(worker)
        faults.arm([], 0)
        self.workers.remove(worker)

    @precondition(lambda self: self.workers and self.workers[-1].num_acknowledged)
    @rule(after=st.integers(0, 8))
    def die_while_deleting(self, after: int) -> None:
        """The newest attempt saves, and is gone after so many deletions if there are as many."""
        worker = self.workers[-1]
        left = [after]

        def before(verb: str, path: str) -> None:
            left[0] -= verb == "delete"
            if left[0] < 0:
                raise InjectedFault(path)

        if worker.attempt != list_attempts(RunStore(self.reader, "run"))[-1]:
            return
        self._commits(worker, worker.train())
        lay = dict(self.expected.saved)
        worker.storage.before = before
        try:
            assert worker.save()
            worker.storage.before = lambda verb, path: None
            self._acknowledged(worker)
        except InjectedFault:
            self._acknowledged(worker)
            self.workers.remove(worker)
            for ref, saved in lay.items():  # what it meant to delete and has not, lies there still
                if ref not in self.expected.saved and self._lies(ref):
                    self.expected.saved[ref] = saved

    def _lies(self, ref: CheckpointRef) -> bool:
        return (self.folder / checkpoint_dir("run", ref) / MANIFEST).exists()

    def _commits(self, worker: Worker, ref: CheckpointRef) -> None:
        self.expected.saved[ref] = Saved(worker.digests(), list(worker.lineage))

    def _acknowledged(self, worker: Worker) -> None:
        ref = CheckpointRef(worker.step, worker.attempt)
        assert worker.attempt == list_attempts(RunStore(self.reader, "run"))[-1]
        self.expected.acknowledged.append(ref)
        worker.commits.append(ref)
        worker.num_acknowledged += 1
        if worker.num_acknowledged < 2:
            return
        keep = sorted([*worker.commits, *worker.lineage], reverse=True)[:2]
        doomed = {item for item in (*worker.commits, *worker.lineage) if item not in keep}
        worker.commits = [item for item in worker.commits if item in keep]
        worker.lineage = [item for item in worker.lineage if item in keep]
        if worker.num_acknowledged == 2:
            doomed |= {item for item in self.expected.saved if item.attempt < worker.attempt} - set(worker.lineage)
        for item in doomed:
            self.expected.saved.pop(item, None)

    # -- damage --------------------------------------------------------------------------------------------------------

    @precondition(lambda self: any(not self.expected.saved[ref].damage for ref in self.expected.accepted()))
    @rule(
        back=st.integers(0, 1),
        file=st.sampled_from([MANIFEST, "model.safetensors", "training_state/state.json"]),
        how=st.sampled_from(["flip", "cut", "remove"]),
    )
    def damage(self, back: int, file: str, how: str) -> None:
        """To the newest checkpoint that is whole, or to the one before it."""
        healthy = [ref for ref in self.expected.accepted() if not self.expected.saved[ref].damage]
        ref = healthy[back % len(healthy)]
        path = self.folder / checkpoint_dir("run", ref) / file
        data = bytearray(path.read_bytes())
        if how == "cut" or file == MANIFEST:
            data = data[: len(data) // 2]
        data[len(data) // 2] ^= 1
        path.unlink() if how == "remove" and file != MANIFEST else path.write_bytes(data)
        self.expected.saved[ref].damage = file

    # -- reads ---------------------------------------------------------------------------------------------------------

    @invariant()
    def a_reader_finds_what_counts(self) -> None:
        found = read_catalog(self.reader, "run")
        assert [item.ref for item in found.accepted] == self.expected.accepted()
        for item in found.accepted:
            directory, saved = checkpoint_dir("run", item.ref), self.expected.saved[item.ref]
            assert bool(verify(self.reader, directory, item)) == bool(saved.damage)
            if not saved.damage:
                assert tensor_digests(self.reader, directory, item) == saved.digests

    @invariant()
    def nothing_acknowledged_is_lost(self) -> None:
        """While nothing is damaged: the last acknowledged commit counts."""
        if self.expected.acknowledged and not any(saved.damage for saved in self.expected.saved.values()):
            newest = self.expected.acknowledged[-1]
            assert newest in self.expected.accepted() or newest not in self.expected.saved

    @rule()
    def two_commits_clear_up(self) -> None:
        """Whatever happened: after two commits of a new attempt, only what counts lies there."""
        self.claim()
        worker = self.workers[-1] if self.workers else None
        if (
            worker is None
            or worker.num_acknowledged
            or worker.attempt != list_attempts(RunStore(self.reader, "run"))[-1]
        ):
            return  # nothing whole is left, and the run refuses
        self.save(0)
        self.save(0)
        lying = {
            CheckpointRef(step, attempt)
            for attempt in list_attempts(RunStore(self.reader, "run"))
            for entry in self.reader.list(f"run/attempts/{attempt}")
            if (step := parse_checkpoint(entry.name)) is not None
        }
        assert lying == set(self.expected.accepted())
        assert not list(self.folder.rglob("*.tmp"))


CHECKS = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


def test_any_history() -> None:
    few = settings(max_examples=25, stateful_step_count=15, suppress_health_check=CHECKS)
    run_state_machine_as_test(Attempts, settings=few)


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_many_long_histories() -> None:
    """About two minutes; other histories each time."""
    many = settings(max_examples=250, stateful_step_count=30, derandomize=False, suppress_health_check=CHECKS)
    run_state_machine_as_test(Attempts, settings=many)
