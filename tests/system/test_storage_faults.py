"""A storage that fails once or for good, at any operation of a real run, costs no acknowledged commit and no bit.

On a local disk and on an S3 server: each case copies a healthy run (two commits), lets an attempt resume and save four
times on a storage that fails at one chosen operation, and then a healthy attempt: it must resume, bit for bit, from the
newest acknowledged commit or one after it, and leave nothing but what counts after two commits of its own.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from enum import Enum
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import boto3
import pytest

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.format.layout import CheckpointRef, attempt_dir, checkpoint_dir, parse_checkpoint
from outlast.checkpointing.restore.verify import verify
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.run_store.journal import FLUSH_S, Journal
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage import local, retry
from outlast.checkpointing.storage import object_store as objects
from outlast.checkpointing.storage.base import Buffer, Entry, Storage, read_bytes, walk
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.storage.object_store import ObjectStorage
from tests.support.s3_server import s3_server
from tests.support.small_model import digests_of, small_model, train_step

T = TypeVar("T")
SLOW_S = retry._PAUSE_S + 0.1
NUM_AT_ONCE = 8
Written = dict[int, dict[str, str]]  #: digests of every state that may have been committed, by step


class Trouble(Enum):
    """What goes wrong, with the operating system's number for it, or a store's words."""

    FULL = (errno.ENOSPC, "NO_SUCH_BUCKET")  # for a store: the other kind of refusal, somebody must act
    IO_ERROR = (errno.EIO, "INTERNAL_FAILURE")
    THROTTLED = (errno.EAGAIN, "SLOW_DOWN: please reduce your request rate (503)")
    STALE = (0, "no error: a listing without what this attempt has put since it began")
    TIMED_OUT = (errno.ETIMEDOUT, "the request was sent, and the answer did not come")
    SLOW = (0, "no error: it takes longer than the pause before another try")

    def __str__(self) -> str:
        return self.name.lower().replace("_", " ")

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
        self._counting = threading.Lock()  # files of one checkpoint are written at the same time

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
        def stale() -> list[Entry]:
            return [entry for entry in self.inner.list(path) if f"{path}/{entry.name}" not in self._put]

        return self._act("list", path, lambda: self.inner.list(path), stale)

    def delete(self, path: str) -> None:
        self._act("delete", path, lambda: self.inner.delete(path))

    def _act(self, verb: str, path: str, act: Callable[[], T], stale: Callable[[], T] | None = None) -> T:
        trouble = self._next(verb)
        if trouble is None:
            return act()
        if trouble is Trouble.SLOW:
            time.sleep(SLOW_S)
            return act()
        if trouble is Trouble.STALE and stale is not None:
            return stale()
        if trouble is Trouble.TIMED_OUT and verb in ("write", "delete"):
            act()  # it is done, and the caller gets an error all the same
        with self._explained(verb, path):
            raise trouble.error(isinstance(self.inner, ObjectStorage))
        raise AssertionError("unreachable")

    def _next(self, verb: str) -> Trouble | None:
        """What is planned for the operation that begins now."""
        with self._counting:
            ordinal = self.done[verb]
            self.done[verb] += 1
            if self.plan is None or not self.plan.strikes(verb, ordinal):
                return None
            self.plan.fired += 1
            return self.plan.trouble

    def _explained(self, verb: str, path: str) -> AbstractContextManager[None]:
        if isinstance(self.inner, ObjectStorage):
            return objects._storage_errors(verb, self.inner.url, path)
        return local._storage_errors(verb, Path(self.inner.url) / path)


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
    """The attempt that meets the trouble, and the one after it. `storage` holds two commits, the steps 1 and 2."""
    struck = Attempt(dict(written)).run(Faulty(storage, plan), "struck", saves=4)
    assert plan.fired, "the fault did not fire"
    if struck.error is not None:
        assert struck.error.permanent is plan.trouble.permanent
        assert struck.error.hint
    else:
        assert struck.acknowledged == 6
    assert struck.error is None or plan.trouble is not Trouble.SLOW

    for item in read_catalog(storage, "run").accepted[:2]:
        assert verify(storage, checkpoint_dir("run", item.ref), item) == []
    heir = Attempt(struck.written).run(storage, "heir", saves=2)
    assert heir.error is None
    assert heir.began >= max(struck.acknowledged, 2), "an acknowledged commit is lost"
    accepted = [item.ref for item in read_catalog(storage, "run").accepted]
    assert [ref.step for ref in accepted] == [heir.began + 2, heir.began + 1]
    assert set(lying(storage)) == set(accepted), "litter stays"
    return struck


def lying(storage: Storage) -> Iterator[CheckpointRef]:
    """Every checkpoint of which a file lies there."""
    for attempt in list_attempts(RunStore(storage, "run")):
        for entry in walk(storage, attempt_dir("run", attempt)):
            if (step := parse_checkpoint(entry.name.split("/")[0])) is not None:
                yield CheckpointRef(step, attempt)


@pytest.fixture(autouse=True)
def without_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """No pause between two tries of a read, and as many operations on a slow machine as on a fast one."""
    monkeypatch.setattr(retry, "_PAUSE_S", 0.0)
    monkeypatch.setitem(cast(dict[str, Any], Journal.__init__.__kwdefaults__), "flush_s", math.inf)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Written]:
    root = tmp_path_factory.mktemp("healthy")
    made = Attempt({}).run(LocalStorage(root), "first", saves=2)
    assert made.error is None
    return root, made.written


@pytest.fixture(scope="module")
def servers() -> Iterator[Callable[[int], list[str]]]:
    """`servers(n)`: the addresses of so many S3 servers; each keeps a core busy."""
    with ExitStack() as stack:
        running: list[str] = []

        def start(number: int) -> list[str]:
            while len(running) < number:
                stack.enter_context(s3_server())
                running.append(os.environ["AWS_ENDPOINT_URL"])
            return running[:number]

        yield start


@pytest.fixture(scope="module")
def copier(
    healthy: tuple[Path, Written],
    tmp_path_factory: pytest.TempPathFactory,
    servers: Callable[[int], list[str]],
) -> Callable[[str, int], Callable[[], Storage]]:
    """`copier(place, num_servers)` makes copies of the healthy run: on a local disk, or on S3 servers in turn."""
    root, numbers, local = tmp_path_factory.mktemp("copies"), count(), LocalStorage(healthy[0])

    def to_disk() -> Storage:
        return LocalStorage(Path(shutil.copytree(healthy[0], root / f"case-{next(numbers)}")))

    def to_s3(clients: list[Any]) -> Storage:
        number = next(numbers)
        client, name = clients[number % len(clients)], f"case-{number}"
        client.create_bucket(Bucket=name)  # the more there is in one, the longer this server's listings take
        for entry in walk(local, ""):
            client.put_object(Bucket=name, Key=f"runs/{entry.name}", Body=read_bytes(local, entry.name))
        address = client.meta.endpoint_url.removeprefix("http://")
        return ObjectStorage(f"s3://{name}/runs?region=us-east-1&scheme=http&endpoint_override={address}")

    def make(place: str, num_servers: int) -> Callable[[], Storage]:
        if place == "local":
            return to_disk
        urls = servers(num_servers)
        clients = [boto3.client("s3", region_name="us-east-1", endpoint_url=url) for url in urls]
        return partial(to_s3, clients)

    return make


@pytest.fixture(scope="module")
def num_operations(healthy: tuple[Path, Written], copier: Any) -> Callable[[str], Counter[str]]:
    """`num_operations(place)`: how many of each kind an attempt does that nothing happens to."""

    @cache
    def made(place: str) -> Counter[str]:
        counting = Faulty(copier(place, 1)())
        assert Attempt(dict(healthy[1])).run(counting, "counted", saves=4).error is None
        assert min(counting.done.values()) > 5
        return counting.done

    return made


VERBS = ("write", "read", "list", "delete")
FAST = [("local", verb, trouble, False) for verb in VERBS for trouble in (Trouble.IO_ERROR, Trouble.TIMED_OUT)]
FAST += [
    ("local", "write", Trouble.FULL, True),
    ("local", "list", Trouble.STALE, True),
    ("local", "read", Trouble.SLOW, False),
    ("S3", "write", Trouble.TIMED_OUT, False),
]
ALL = [
    (place, verb, trouble, lasting)
    for place in ("local", "S3")
    for verb in VERBS
    for trouble in Trouble
    for lasting in (False, True)
    if trouble is not Trouble.STALE or verb == "list"
]


def named(cases: list[tuple[str, str, Trouble, bool]], full: bool) -> list[Any]:
    words = {case: f"{case[0]}-{case[1]}-{case[2].name}{'-for-good' if case[3] else ''}" for case in cases}
    marks = [pytest.mark.faults] if full else []
    return [pytest.param(*case, full, id=word + ("-all" if full else ""), marks=marks) for case, word in words.items()]


@pytest.mark.parametrize(("place", "verb", "trouble", "lasting", "full"), [*named(FAST, False), *named(ALL, True)])
def test_trouble_at_any_operation_costs_nothing_acknowledged(
    place: str,
    verb: str,
    trouble: Trouble,
    lasting: bool,
    full: bool,
    healthy: tuple[Path, Written],
    copier: Callable[[str, int], Callable[[], Storage]],
    num_operations: Callable[[str], Counter[str]],
    cover: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    number = num_operations(place if full else "local")[verb]
    few = sorted({*range(0, number, number // 3), *range(number - 6, number)})  # here and there, and in the last save
    ordinals = range(number) if full else few if place == "local" else few[4::4]

    copy = copier(place, 2 if full else 1)
    if trouble is Trouble.SLOW:  # the clock is what it could work through
        monkeypatch.setitem(cast(dict[str, Any], Journal.__init__.__kwdefaults__), "flush_s", FLUSH_S)

    def strike(ordinal: int) -> str:
        storage = copy()
        struck = go_through(storage, healthy[1], Plan(verb, ordinal, trouble, lasting))
        assert place == "S3" or not list(Path(storage.url).rglob("*.tmp"))
        return "error" if struck.error else "went on"

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        ended = Counter(pool.map(strike, ordinals))
    print(f"{place} {verb} {trouble}{' for good' if lasting else ''}: {dict(ended)}")
    what = "Storage that fails" if full else "Storage that fails, a slice of the same"
    cover(what, f"{trouble}{', for good' if lasting else ''}", f"{verb}, {place}", ended.total())
