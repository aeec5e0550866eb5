"""How often a command asks the storage: each listing, claim, manifest and journal segment once."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.storage.object_store import ObjectStorage
from outlast.cluster.cli.main import app
from outlast.cluster.config.run_file import load_run
from outlast.cluster.driver.launch import Finished, Launch
from outlast.trainers.loop.train_loop import Outcome
from tests.support.s3_server import s3_server
from tests.support.small_model import small_model, train_step

#: Two attempts of one launch, whose driver was killed. The newest checkpoint's lineage names one that was deleted.
STORED = Path(__file__).parents[1] / "golden/run_0_1_0"
FIRST, SECOND = "golden/attempts/0001-904562ae", "golden/attempts/0002-7f166627"
LAUNCH = "golden/launches/20261129-192737-d746ba"
ALIVE = f"{LAUNCH}/alive.json"
MANIFESTS = {f"{FIRST}/checkpoint-10", f"{SECOND}/checkpoint-20", f"{SECOND}/checkpoint-30"}


class Operations:
    """What was asked of any storage since the last `clear`, by verb and path."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []

    def count(self, verb: str, below: str) -> Counter[str]:
        return Counter(path for done, path in self.done if done == verb and path.startswith(below))

    def clear(self) -> None:
        self.done.clear()


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Operations:
    found = Operations()

    def counted(verb: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(self: Storage, path: str, *arguments: Any) -> Any:
            found.done.append((verb, path))
            return real(self, path, *arguments)

        return operation

    for kind in (LocalStorage, ObjectStorage):
        for verb in ("put", "open", "list", "delete"):
            monkeypatch.setattr(kind, verb, counted(verb, getattr(kind, verb)))
    return found


@pytest.fixture(scope="module", params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path_factory.mktemp("runs"))
    else:
        with s3_server() as bucket:
            yield f"{bucket}/runs"


@pytest.fixture
def runs(root: str, request: pytest.FixtureRequest) -> str:
    """A copy of the stored run and of its data, in a place of the test's own."""
    place = f"{root}/{request.node.originalname}"
    storage = open_storage(place)
    for path in sorted((STORED / "runs").rglob("*")):
        if path.is_file():
            storage.put(path.relative_to(STORED / "runs").as_posix(), [path.read_bytes()])
    return place


def manifests(read: Counter[str]) -> set[str]:
    return {path.removesuffix("/manifest.json") for path in read if path.endswith("/manifest.json")}


def check_once(operations: Operations, run: str, lists: int = 1) -> Counter[str]:
    """Nothing is read twice, and no directory listed twice but `attempts/`. Returns what was read."""
    read, listed = operations.count("open", f"{run}/"), operations.count("list", run)
    assert listed.pop(f"{run}/attempts") == lists
    assert set(listed.values()) == {1}, listed
    # A driver that is no process any more is asked again: it may have said that it ends while it was looked at.
    assert read.pop(ALIVE, 1) <= 2
    assert set(read.values()) == {1}, read
    return read


@pytest.mark.parametrize("command", ["status", "checkpoints ls"])
def test_a_command_reads_everything_once(runs: str, operations: Operations, command: str) -> None:
    operations.clear()
    done = CliRunner().invoke(app, [*command.split(), f"{runs}/golden"])
    assert done.exit_code == 0, done.output
    assert "checkpoint-30" in done.output or " 30 " in done.output
    read = check_once(operations, "golden")
    assert manifests(read) == MANIFESTS
    claims, segments = {f"{FIRST}/claim.json", f"{SECOND}/claim.json"}, {f"{SECOND}/commits-0-000000.jsonl"}
    if command == "status":
        segments |= {f"{directory}/events-0-000000.jsonl" for directory in (FIRST, SECOND, LAUNCH)}
    else:
        claims = {f"{SECOND}/claim.json"}  # it declares what best means
    # The first attempt's commits are read because the manifest of step 10 is not there: it was deleted, not lost.
    segments |= {f"{FIRST}/commits-0-000000.jsonl"}
    assert read.keys() == {f"{path}/manifest.json" for path in MANIFESTS} | claims | segments


def test_a_start_reads_everything_once(
    runs: str, operations: Operations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver, up to the moment at which it starts workers."""
    shutil.copy(STORED / "texts.txt", tmp_path)
    (tmp_path / "run.yaml").write_text((STORED / "run.yaml").read_text().replace("storage: runs", f"storage: {runs}"))
    config, declared = load_run(str(tmp_path / "run.yaml"))
    launch = Launch(config.at_home(tmp_path), declared, take_over=True)
    monkeypatch.setattr(Launch, "_train", lambda *_, **__: Finished(Outcome.STOPPED, launch.id))
    operations.clear()
    assert launch.run().outcome is Outcome.STOPPED
    read = check_once(operations, "golden")
    assert manifests(read) == MANIFESTS | {f"{SECOND}/model"}
    assert f"{SECOND}/claim.json" in read
    # Of the first attempt nothing is asked but its commits: the second went beyond it.
    assert {path for path in read if path.startswith(f"{FIRST}/")} == {
        f"{FIRST}/checkpoint-10/manifest.json",
        f"{FIRST}/commits-0-000000.jsonl",
    }


def test_a_claim_and_a_resume_read_everything_once(root: str, operations: Operations) -> None:
    """Rank 0 of an attempt. `attempts/` is listed three times, because others may claim at any moment.

    1. Has another launch taken the run from mine? Then nothing is claimed.
    2. For the number of the claim: just before it is written, so that it is the highest.
    3. After the claim. Whoever has acknowledged a commit is in this listing, and whoever claims later finds my claim:
       so this one says whether I am superseded, and also which attempts I go on from.
    """
    storage = open_storage(f"{root}/claims")
    for launch in ("a", "b", "c"):
        checkpointer = Checkpointer(storage, "run", launch=launch, retention=Retention(keep_last=3))
        model, optimizer = small_model()
        step = (checkpointer.resume(model, optimizer) or {"step": 0})["step"]
        for number in range(step + 1, step + 5):
            train_step(model, optimizer, number)
            assert checkpointer.save(number, model, optimizer, {"step": number})
        checkpointer.flush()

    operations.clear()
    heir = Checkpointer(storage, "run", launch="d")
    read = check_once(operations, "run", lists=3)
    names = {path.rsplit("/", 1)[1] for path in manifests(read)}
    assert {"checkpoint-10", "checkpoint-11", "checkpoint-12"} <= names  # object stores also list emptied directories
    assert sum(path.endswith("/claim.json") for path in read) == 4, "the others', and its own as it was written"
    operations.clear()
    assert heir.resume(*small_model()) == {"step": 12}
    assert not operations.count("list", "run/attempts")["run/attempts"]
    assert not manifests(operations.count("open", "run/"))
    assert set(operations.count("open", "run/").values()) <= {1, 2}  # a file's header and its bytes

    for again in (1, 2):
        number = 12 + again
        operations.clear()
        assert heir.save(number, *small_model(), {"step": number})
        # After the manifest; and, when the second commit lets it delete, for what lower attempts left.
        assert operations.count("list", "run/attempts")["run/attempts"] == again
        read = operations.count("open", "run/")  # back, once: what this save wrote itself
        assert set(read.values()) == {1}
        assert all(f"/checkpoint-{number}/" in path for path in read)
