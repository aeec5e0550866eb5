"""A storage that fails once or for good, at any operation of a real run, costs no acknowledged commit and no bit.

Each case copies a healthy run (two commits), lets an attempt resume and save four times on a storage that fails at one
chosen operation, and then a healthy attempt: it must resume, bit for bit, from the newest acknowledged commit or one
after it, and leave nothing but what counts after two commits of its own.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import pytest

import outlast.checkpointing.storage as storage_module
from outlast.checkpointing import objects
from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.layout import CheckpointRef, attempt_dir, checkpoint_dir, parse_checkpoint
from outlast.checkpointing.lineage import catalogue, list_attempts
from outlast.checkpointing.objects import ObjectStorage
from outlast.checkpointing.reader import verify
from outlast.checkpointing.retention import Retention
from outlast.checkpointing.storage import Buffer, Entry, LocalStorage, Storage, read_bytes, walk
from tests.s3 import s3_server
from tests.small import digests_of, small_model, train_step

T = TypeVar("T")
Written = dict[int, dict[str, str]]  #: digests of every state that may have been committed, by step


class Trouble(Enum):
    """What goes wrong, with the operating system's number for it, or a store's words."""

    FULL = (errno.ENOSPC, "NO_SUCH_BUCKET")  # for a store: the other kind of refusal, somebody must act
    IO_ERROR = (errno.EIO, "INTERNAL_FAILURE")
    THROTTLED = (errno.EAGAIN, "SLOW_DOWN: please reduce your request rate (503)")
    STALE = (0, "")  # no error: a listing without what this attempt has put since it began
    TIMED_OUT = (errno.ETIMEDOUT, "the request was sent, and the answer did not come")

    @property
    def permanent(self) -> bool:
        return self is Trouble.FULL

    def error(self, remote: bool) -> OSError:
        return OSError(self.value[1]) if remote else OSError(self.value[0], os.strerror(self.value[0]))


@dataclass
class Plan:
    """Trouble at the `ordinal`-th operation of one kind (from 0), once or from then on."""

    verb: str
    ordinal: int
    trouble: Trouble
    lasting: bool = False
    fired: int = 0

    def strikes(self, verb: str, ordinal: int) -> bool:
        return verb == self.verb and (ordinal == self.ordinal or (self.lasting and ordinal > self.ordinal))


class Faulty:
    """A real storage whose operations fail as planned; errors take the way that real ones take."""

    def __init__(self, inner: Storage, plan: Plan | None = None) -> None:
        self.inner, self.plan, self.done = inner, plan, Counter[str]()
        self._put: set[str] = set()

    @property
    def url(self) -> str:
        return self.inner.url

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        body = list(chunks)
        # Of directories only those of this attempt are new.
        self._put |= {place for place in (path, *map(str, Path(path).parents)) if place.count("/") >= 2}
        self._act("write", path, lambda: self.inner.put(path, body))

    def open(self, path: str) -> BinaryIO:
        return self._act("read", path, lambda: self.inner.open(path))

    def list(self, path: str) -> list[Entry]:
        plan, ordinal = self.plan, self.done["list"]
        if plan is None or plan.trouble is not Trouble.STALE or not plan.strikes("list", ordinal):
            return self._act("list", path, lambda: self.inner.list(path))
        self.done["list"] += 1
        plan.fired += 1
        return [entry for entry in self.inner.list(path) if f"{path}/{entry.name}" not in self._put]

    def delete(self, path: str) -> None:
        self._act("delete", path, lambda: self.inner.delete(path))

    def _act(self, verb: str, path: str, act: Callable[[], T]) -> T:
        plan, ordinal = self.plan, self.done[verb]
        self.done[verb] += 1
        if plan is None or not plan.strikes(verb, ordinal):
            return act()
        plan.fired += 1
        if plan.trouble is Trouble.TIMED_OUT and verb in ("write", "delete"):
            act()  # it is done, and the caller gets an error all the same
        with self._explained(verb, path):
            raise plan.trouble.error(isinstance(self.inner, ObjectStorage))
        raise AssertionError("unreachable")

    def _explained(self, verb: str, path: str) -> AbstractContextManager[None]:
        if isinstance(self.inner, ObjectStorage):
            return objects._explained(verb, self.inner.url, path)
        return storage_module._explained(verb, Path(self.inner.url) / path)


@dataclass
class Attempt:
    """What one attempt did: the states it may have committed, what was acknowledged, and how it ended."""

    written: Written
    began: int = 0
    acknowledged: int = 0
    error: StorageError | None = None

    def run(self, storage: Storage, launch: str, saves: int) -> Attempt:
        model, optimizer = small_model(seed=len(launch))
        try:
            checkpointer = Checkpointer(storage, "run", launch=launch, retention=Retention(keep_last=2))
            state = checkpointer.resume(model, optimizer)
            self.began = state["step"] if state else 0
            if self.began:
                assert digests_of(model, optimizer) == self.written[self.began], "resumed with other bits"
            for step in range(self.began + 1, self.began + 1 + saves):
                train_step(model, optimizer, step)
                self.written[step] = digests_of(model, optimizer)
                assert checkpointer.save(step, model, optimizer, {"step": step})
                self.acknowledged = step
        except StorageError as error:
            self.error = error
        return self


def go_through(storage: Storage, written: Written, plan: Plan) -> Attempt:
    """The attempt that meets the trouble, and the one after it. `storage` holds two commits."""
    struck = Attempt(dict(written)).run(Faulty(storage, plan), "struck", saves=4)
    assert plan.fired, "the fault did not fire"
    if struck.error is not None:
        assert struck.error.permanent is plan.trouble.permanent
        assert struck.error.hint
    else:
        assert struck.acknowledged == 6

    for item in catalogue(storage, "run").accepted[:2]:
        assert verify(storage, checkpoint_dir("run", item.ref), item) == []
    heir = Attempt(struck.written).run(storage, "heir", saves=2)
    assert heir.error is None
    assert heir.began >= max(struck.acknowledged, 2), "an acknowledged commit is lost"
    accepted = [item.ref for item in catalogue(storage, "run").accepted]
    assert [ref.step for ref in accepted] == [heir.began + 2, heir.began + 1]
    assert set(lying(storage)) == set(accepted), "litter stays"
    return struck


def lying(storage: Storage) -> Iterator[CheckpointRef]:
    """Every checkpoint of which a file lies there."""
    for attempt in list_attempts(storage, "run"):
        for entry in walk(storage, attempt_dir("run", attempt)):
            if (step := parse_checkpoint(entry.name.split("/")[0])) is not None:
                yield CheckpointRef(step, attempt)


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two tries of a read."""
    monkeypatch.setattr(storage_module, "_PAUSE_S", 0.0)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Written]:
    root = tmp_path_factory.mktemp("healthy")
    made = Attempt({}).run(LocalStorage(root), "first", saves=2)
    assert made.error is None
    return root, made.written


def number_of_operations(healthy: tuple[Path, Written], folder: Path) -> Counter[str]:
    shutil.copytree(healthy[0], folder)
    counting = Faulty(LocalStorage(folder))
    assert Attempt(dict(healthy[1])).run(counting, "counted", saves=4).error is None
    return counting.done


# -- a local disk ------------------------------------------------------------------------------------------------------

VERBS = ("write", "read", "list", "delete")
FAST = [(verb, trouble, False) for verb in VERBS for trouble in (Trouble.IO_ERROR, Trouble.TIMED_OUT)]
FAST.append(("write", Trouble.FULL, True))
FAST.append(("list", Trouble.STALE, True))
ALL = [
    (verb, trouble, lasting)
    for verb in VERBS
    for trouble in Trouble
    for lasting in (False, True)
    if trouble is not Trouble.STALE or verb == "list"
]


def named(cases: list[tuple[str, Trouble, bool]], full: bool) -> list[Any]:
    words = {case: f"{case[0]}-{case[1].name}{'-for-good' if case[2] else ''}" for case in cases}
    marks = [pytest.mark.faults] if full else []
    return [pytest.param(*case, full, id=word + ("-all" if full else ""), marks=marks) for case, word in words.items()]


@pytest.mark.parametrize(("verb", "trouble", "lasting", "full"), [*named(FAST, False), *named(ALL, True)])
def test_trouble_at_any_operation_costs_nothing_acknowledged(
    verb: str,
    trouble: Trouble,
    lasting: bool,
    full: bool,
    healthy: tuple[Path, Written],
    tmp_path: Path,
    cover: Callable[..., None],
) -> None:
    count = number_of_operations(healthy, tmp_path / "counted")[verb]
    assert count > 5
    ended = Counter[str]()
    few = {*range(0, count, count // 3), *range(count - 6, count)}  # here and there, and through the last save
    for ordinal in range(count) if full else sorted(few):
        folder = tmp_path / str(ordinal)
        shutil.copytree(healthy[0], folder)
        plan = Plan(verb, ordinal, trouble, lasting)
        struck = go_through(LocalStorage(folder), healthy[1], plan)
        ended["error" if struck.error else "went on"] += 1
        assert not list(folder.rglob("*.tmp"))
    print(f"{verb} {trouble.name}{' for good' if lasting else ''}: {dict(ended)}")
    cover(
        "Storage that fails",
        trouble.name.lower().replace("_", " ") + (", for good" if lasting else ""),
        f"{verb}, local",
        ended.total(),
    )


# -- an object store ---------------------------------------------------------------------------------------------------


@pytest.mark.faults
def test_trouble_on_s3(healthy: tuple[Path, Written], tmp_path: Path, cover: Callable[..., None]) -> None:
    """A slice: every fifth operation of each kind, with each trouble in turn."""
    counts = number_of_operations(healthy, tmp_path / "counted")
    local = LocalStorage(healthy[0])
    with s3_server() as bucket:
        number = 0
        for verb, count in counts.items():
            for ordinal in range(0, count, 5):
                number += 1
                remote = ObjectStorage(f"{bucket}/case-{number}")
                for entry in walk(local, ""):
                    remote.put(entry.name, [read_bytes(local, entry.name)])
                kinds = [trouble for trouble in Trouble if trouble is not Trouble.STALE or verb == "list"]
                trouble = kinds[number % len(kinds)]
                go_through(remote, healthy[1], Plan(verb, ordinal, trouble))
                cover("Storage that fails", trouble.name.lower().replace("_", " "), f"{verb}, S3")
        print(f"{number} cases")
        assert number > 15
