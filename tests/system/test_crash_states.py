"""After a crash at any instant the disk may be in many states; in each, the newest acknowledged commit is loaded whole.

A real run is recorded once: an attempt with three saves, its heir with three more, deletions and a sweep among them.
Its storage operations are done again by a real `LocalStorage` whose system calls are recorded, and by writers with a
fault of their own, which must be found out.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import NoCheckpointError
from outlast.checkpointing.format.layout import MANIFEST
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.storage.base import Buffer, Entry
from outlast.checkpointing.storage.local import LocalStorage
from tests.support.crash_states import Disk, Effect, Effects, Tree, materialise, tree_of
from tests.support.small_model import digests_of, small_model, train_step

SHM = "/dev/shm" if Path("/dev/shm").is_dir() else None
#: So many of all states in the fast suite, spread evenly.
NUM_FAST = 150

# -- the run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """A put, or a deletion (no data), or an acknowledgement (no path)."""

    path: str
    data: bytes | None = None
    step: int = 0


@dataclass
class Run:
    """What the writer asked of its storage, and what each checkpoint must load as."""

    operations: list[Operation] = field(default_factory=list)
    written: dict[int, dict[str, str]] = field(default_factory=dict)


class Recorded(LocalStorage):
    """Writes down what is put and deleted. The first look at the claims after a manifest is its acknowledgement."""

    def __init__(self, root: Path, operations: list[Operation]) -> None:
        super().__init__(root)
        self.operations = operations
        self._committed = 0

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        data = b"".join(bytes(chunk) for chunk in chunks)
        super().put(path, [data[: len(data) // 2], data[len(data) // 2 :]])
        self.operations.append(Operation(path, data))
        if path.endswith(f"/{MANIFEST}"):
            self._committed = int(path.split("checkpoint-")[1].split("/")[0])

    def list(self, path: str) -> list[Entry]:
        if self._committed and path == "run/attempts":
            self.operations.append(Operation("", step=self._committed))
            self._committed = 0
        return super().list(path)

    def delete(self, path: str) -> None:
        super().delete(path)
        self.operations.append(Operation(path))


@cache
def recorded() -> Run:
    run = Run()
    with tempfile.TemporaryDirectory(dir=SHM) as folder:
        storage = Recorded(Path(folder), run.operations)
        for launch in ("a", "b"):
            model, optimizer = small_model()
            checkpointer = Checkpointer(storage, "run", launch=launch, retention=Retention(keep_last=2))
            state = checkpointer.resume(model, optimizer)
            begin = state["step"] if state else 0
            for step in range(begin + 1, begin + 4):
                train_step(model, optimizer, step)
                run.written[step] = digests_of(model, optimizer)
                assert checkpointer.save(step, model, optimizer, {"step": step})
    assert [item.step for item in run.operations if item.step] == [1, 2, 3, 4, 5, 6]
    assert sum(item.data is None and not item.step for item in run.operations) > 10, "nothing was deleted"
    return run


# -- the states --------------------------------------------------------------------------------------------------------

State = tuple[int, Tree]  #: the last step acknowledged before the crash, and the disk after it


def effects_of(operations: list[Operation], *, dropped: str = "") -> list[Effect | int]:
    """The system calls of a real LocalStorage, and the acknowledged steps among them. `dropped`: "file" or "directory"
    leaves out those fsyncs, as a careless writer would.
    """
    effects: list[Effect | int] = []
    with tempfile.TemporaryDirectory(dir=SHM) as folder:
        storage, disk = LocalStorage(Path(folder)), Disk()
        for item in operations:
            if item.step:
                effects.append(item.step)
                continue
            with Effects(Path(folder)) as recorder:
                if item.data is None:
                    storage.delete(item.path)
                else:
                    storage.put(item.path, [item.data[: len(item.data) // 2], item.data[len(item.data) // 2 :]])
            for effect in recorder.done:
                is_directory = effect[0] == "sync" and disk.now().get(effect[1]) is None
                disk.apply(effect)
                if effect[0] != "sync" or dropped != ("directory" if is_directory else "file"):
                    effects.append(effect)
        assert disk.now() == tree_of(Path(folder)), "a system call went by unrecorded"
    return effects


def on_a_disk(effects: list[Effect | int]) -> Iterator[State]:
    """Each state once, in the order in which crashes may first leave them."""
    disk, acknowledged = Disk(), 0
    seen: set[tuple[int, frozenset[tuple[str, bytes | None]]]] = set()
    for effect in [*effects, None]:
        for tree in disk.states():
            code = (acknowledged, frozenset(tree.items()))
            if code not in seen:
                seen.add(code)
                yield acknowledged, tree
        if isinstance(effect, int):
            acknowledged = effect
        elif effect is not None:
            disk.apply(effect)


def on_an_object_store(operations: list[Operation]) -> Iterator[State]:
    """A put or deletion is done or not. Those of one checkpoint's files may be on their way together, from several
    ranks, so any of them may be done when the crash comes.
    """
    objects: dict[str, bytes] = {}
    acknowledged = 0
    flying: list[Operation] = []
    for item in operations:
        is_file = item.data is not None and "/checkpoint-" in item.path and not item.path.endswith(MANIFEST)
        if flying and not is_file:
            for size in range(len(flying)):
                for landed in combinations(flying, size):
                    yield acknowledged, with_directories({**objects, **{one.path: one.data or b"" for one in landed}})
            objects |= {one.path: one.data or b"" for one in flying}
            flying = []
        if is_file:
            flying.append(item)
            continue
        yield acknowledged, with_directories(objects)
        acknowledged = item.step or acknowledged
        if item.data is not None:
            objects[item.path] = item.data
        elif item.path:
            objects.pop(item.path, None)
    yield acknowledged, with_directories(objects)


def with_directories(objects: dict[str, bytes]) -> Tree:
    folders = {str(parent) for path in objects for parent in Path(path).parents} - {"."}
    return {**dict.fromkeys(folders), **objects}


def problem(state: State, written: dict[int, dict[str, str]]) -> str:
    """What is wrong with resuming from this state with the real reader, or nothing."""
    acknowledged, tree = state
    folder = Path(tempfile.mkdtemp(dir=SHM))
    try:
        materialise(tree, folder)
        model, optimizer = small_model(seed=1)
        checkpointer = Checkpointer(LocalStorage(folder), "run", launch="after")
        try:
            loaded = checkpointer.resume(model, optimizer)
        except NoCheckpointError as error:
            return f"step {acknowledged} was acknowledged, and nothing loads: {error}"
        step = loaded["step"] if loaded else 0
        if step < acknowledged:
            return f"step {acknowledged} was acknowledged, and step {step} loads"
        if step and digests_of(model, optimizer) != written[step]:
            return f"step {step} loads with other bits than it was saved with"
        return ""
    finally:
        shutil.rmtree(folder)


def problems(states: Iterable[State], written: dict[int, dict[str, str]]) -> Iterator[str]:
    return (wrong for state in states if (wrong := problem(state, written)))


# -- the tests ---------------------------------------------------------------------------------------------------------

FULL = [pytest.param(False, id="some"), pytest.param(True, id="all", marks=pytest.mark.faults)]


@pytest.mark.parametrize("full", FULL)
def test_every_crash_on_a_disk_leaves_what_was_acknowledged(full: bool, cover: Callable[..., None]) -> None:
    run = recorded()
    states = list(on_a_disk(effects_of(run.operations)))
    tried = states if full else states[:: len(states) // NUM_FAST]
    print(f"{len(states):,} states, {len(tried):,} tried")
    cover("Power cuts, every legal state of the storage", "states", "local disk", len(tried))
    assert len(tried) >= NUM_FAST
    assert {acknowledged for acknowledged, _ in tried} == set(range(7))
    assert list(problems(tried, run.written)) == []


def test_every_crash_on_an_object_store_leaves_what_was_acknowledged(cover: Callable[..., None]) -> None:
    run = recorded()
    states = list(on_an_object_store(run.operations))
    print(f"{len(states):,} states")
    cover("Power cuts, every legal state of the storage", "states", "object store", len(states))
    assert list(problems(states, run.written)) == []


def manifest_first(operations: list[Operation]) -> list[Operation]:
    """The writer that commits before its files are there."""
    moved: list[Operation] = []
    for item in operations:
        index = len(moved)
        if item.data is not None and item.path.endswith(f"/{MANIFEST}"):
            folder = item.path.removesuffix(MANIFEST)
            index = next(number for number, other in enumerate(moved) if other.path.startswith(folder))
        moved.insert(index, item)
    return moved


def acknowledged_early(operations: list[Operation]) -> list[Operation]:
    """The writer that says so before its manifest is durable."""
    moved = list(operations)
    for index, item in enumerate(operations):
        if item.step:
            moved[index - 1], moved[index] = moved[index], moved[index - 1]
    return moved


def makes_room_first(operations: list[Operation]) -> list[Operation]:
    """The writer that makes room for a checkpoint before the checkpoint is there."""
    doomed = [item for item in operations if item.data is None and not item.step and "/checkpoint-3/" in item.path]
    left = [item for item in operations if item not in doomed]
    index = next(number for number, item in enumerate(left) if "/checkpoint-4/" in item.path)
    return left[:index] + doomed + left[index:]


@pytest.mark.parametrize("backend", ["disk", "objects"])
@pytest.mark.parametrize(
    "change", [manifest_first, acknowledged_early, makes_room_first], ids=lambda change: change.__name__
)
def test_a_writer_in_another_order_is_found_out(change: object, backend: str) -> None:
    run = recorded()
    operations = change(run.operations)  # type: ignore[operator]
    states = on_a_disk(effects_of(operations)) if backend == "disk" else on_an_object_store(operations)
    wrong = next(problems(states, run.written), "")
    print(wrong)
    assert wrong


@pytest.mark.parametrize("dropped", ["file", "directory"])
def test_a_writer_that_does_not_sync_is_found_out(dropped: str) -> None:
    run = recorded()
    wrong = next(problems(on_a_disk(effects_of(run.operations, dropped=dropped)), run.written), "")
    print(wrong)
    assert wrong
