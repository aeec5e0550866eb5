"""`failure.on_save_error: go-on`: training outlives a storage that refuses, and nothing of it is lost but time.

Real ranks on a real S3 server behind a proxy that answers 403 or 503, and on a real file system that is full.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.errors import StorageError, StorageRefused
from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.claims import list_attempts, list_checkpoints_of
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Storage, walk
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.storage.object_store import ObjectStorage
from outlast.checkpointing.tools.query import verify_run
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.train import TrainingFailureSettings
from outlast.trainers.loop.save_timer import goes_on
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.preparation.prepare import prepare
from tests.support.groups.worker_group import Ended, Quiet, StopAt, digests, run_group, tiny_config
from tests.support.s3_proxy import Mischief, Proxy, proxy_to
from tests.support.s3_server import s3_server

GO_ON = {"on_save_error": "go-on"}
#: Refusals of one path that no test uses up.
MANY = 10_000


# -- the decision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "unsaved_s", "expected"),
    [
        ({}, 0.0, False),
        ({"max_unsaved": None}, 0.0, False),
        (GO_ON, 0.0, True),
        (GO_ON, 3599.0, True),
        (GO_ON, 3600.0, False),
        ({**GO_ON, "max_unsaved": "10m"}, 599.9, True),
        ({**GO_ON, "max_unsaved": "10m"}, 600.0, False),
        ({**GO_ON, "max_unsaved": None}, 1e9, True),
    ],
    ids=str,
)
def test_whether_training_goes_on(settings: dict[str, Any], unsaved_s: float, expected: bool) -> None:
    assert goes_on(TrainingFailureSettings.model_validate(settings), unsaved_s) is expected


# -- an object store that refuses --------------------------------------------------------------------------------------


@dataclass
class Store:
    """An S3 server, the proxy in front of it, and tiny runs in it."""

    storage: ObjectStorage
    proxy: Proxy
    text_file: str
    folder: Path

    def run(self, assignment: Assignment, size: int, control: Quiet | None = None) -> list[Ended]:
        return run_group(assignment, self.storage, size, control, self.folder, limit_s=110)

    def assign(self, name: str, failure: dict[str, Any], *, overlap: bool, parallel: str = "ddp") -> Assignment:
        sections = {"failure": failure, "checkpoint": {"overlap": overlap}, "scale": {"parallel": parallel}}
        config = tiny_config(name, self.storage.url, self.text_file, sections=sections)
        declared = config.model_dump(mode="json", exclude_defaults=True)
        return Assignment(config, declared, "first", prepare(config, self.storage))

    def deny(self, *words: str, mischief: Mischief = Mischief.DENY) -> None:
        for word in words:
            self.proxy.add("PUT", word, mischief, MANY)


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, str]]:
    with s3_server() as url:
        yield url, os.environ["AWS_ENDPOINT_URL"]


@pytest.fixture
def store(server: tuple[str, str], text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    url, endpoint = server
    with proxy_to(endpoint) as (proxy, address):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        yield Store(ObjectStorage(url), proxy, text_file, tmp_path)


def _events(storage: Storage, run: str, kind: str) -> list[dict[str, Any]]:
    return [event for _, event in run_events(RunStore(storage, run)) if event["event"] == kind]


def _checkpoints(storage: Storage, run: str) -> list[int]:
    """The steps of all checkpoints that have files, committed or not; a store may list empty directories."""
    store = RunStore(storage, run)
    refs = [ref for attempt in list_attempts(store) for ref in list_checkpoints_of(store, attempt)]
    return sorted(ref.step for ref in refs if any(walk(storage, store.checkpoint_dir(ref))))


@pytest.mark.parametrize(("parallel", "overlap"), [("ddp", False), ("ddp", True), ("fsdp", True)])
def test_a_refusal_of_any_rank_costs_no_step(store: Store, parallel: str, overlap: bool) -> None:
    """Rank 1 alone is refused at step 3, rank 0 at step 6; step 9 is committed."""
    name = f"{parallel}-{overlap}".lower()
    plain = store.assign(f"{name}-plain", {}, overlap=overlap, parallel=parallel)
    assert [item.outcome for item in store.run(plain, 2)] == [Outcome.DONE] * 2

    run = store.assign(name, GO_ON, overlap=overlap, parallel=parallel)
    store.deny("checkpoint-3/training_state/optimizer-00001", "checkpoint-6/model")
    ended = store.run(run, 2, StopAt(8))
    assert [item.outcome for item in ended] == [Outcome.STOPPED] * 2
    failed = [event["step"] for event in _events(store.storage, name, "save-failed")]
    assert failed in ([3, 6], [3]), "while the save of step 3 is in flight, that of step 6 may be skipped"
    assert overlap or failed == [3, 6]
    unsaved = _events(store.storage, name, "unsaved")
    assert [(event.get("newest"), event["limit_s"]) for event in unsaved] == [(None, 3600.0)] * len(failed)
    assert all("no more room" in event["error"] for event in unsaved)
    assert _checkpoints(store.storage, name)[0] == 9, "what was written of a failed save is deleted"

    ended = store.run(replace(run, launch="second"), 2)
    assert [item.outcome for item in ended] == [Outcome.DONE] * 2
    assert digests(store.storage, name) == digests(store.storage, f"{name}-plain")
    assert {item.faults for item in verify_run(RunStore(store.storage, name))} == {()}


def test_a_store_that_throttles_is_outlived_too(store: Store) -> None:
    """About half a minute: the SDK and outlast try again with growing pauses first."""
    store.deny("checkpoint-3/trainer_state.json", mischief=Mischief.THROTTLE)
    ended = store.run(store.assign("throttled", GO_ON, overlap=False), 1)
    assert [item.outcome for item in ended] == [Outcome.DONE]
    assert [event["step"] for event in _events(store.storage, "throttled", "save-failed")] == [3]
    assert [event["step"] for event in _events(store.storage, "throttled", "commit")] == [6, 9, 10]


def test_by_default_a_refusal_ends_the_attempt(store: Store) -> None:
    run = store.assign("stops", {}, overlap=False)
    store.deny("checkpoint-3/")
    ended = store.run(run, 2)
    assert all(isinstance(item.error, StorageRefused) for item in ended)
    assert _events(store.storage, "stops", "unsaved") == []


@pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlapping"])
def test_the_last_save_must_succeed(store: Store, overlap: bool) -> None:
    name = f"last-{overlap}".lower()
    store.deny("checkpoint-9/", "checkpoint-10/")
    ended = store.run(store.assign(name, GO_ON, overlap=overlap), 2)
    assert all(isinstance(item.error, StorageRefused) and "checkpoint-10" in item.error.message for item in ended)
    assert [event["step"] for event in _events(store.storage, name, "save-failed")][-1] == 10


def test_the_save_of_a_stop_must_succeed(store: Store) -> None:
    store.deny(*(f"checkpoint-{step}/" for step in range(4, 7)))
    ended = store.run(store.assign("stopped", GO_ON, overlap=True), 1, StopAt(3))
    assert isinstance(ended[0].error, StorageRefused)


def test_the_limit_ends_the_attempt(store: Store) -> None:
    store.deny("checkpoint-3/", "checkpoint-6/")
    run = store.assign("limited", {**GO_ON, "max_unsaved": "0.001s"}, overlap=False)
    ended = store.run(run, 2)
    for item in ended:
        assert isinstance(item.error, StorageRefused)
        assert "no save has succeeded for" in item.error.message
        assert "failure.max_unsaved: 0.001s" in item.error.message


# -- a file system that is full ----------------------------------------------------------------------------------------


@dataclass
class FillAt(Quiet):
    """Fills the file system once a step is committed, and frees it after so many saves have failed."""

    filler: str
    step: int
    failures: int = 2
    num_failed: int = field(default=0)

    def progress(self, event: dict[str, Any]) -> None:
        if event["event"] == "commit" and event["step"] == self.step:
            with open(self.filler, "wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(b"\0" * 4096)
        if event["event"] == "unsaved":
            self.num_failed += 1
            if self.num_failed == self.failures:
                Path(self.filler).unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", place]).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("overlap", [False, True], ids=["waiting", "overlapping"])
def test_a_full_disk_costs_no_step(
    small_disk: Path,
    tmp_path: Path,
    overlap: bool,
    assign: Callable[..., Assignment],
    storage: LocalStorage,
    text_file: str,
) -> None:
    """From the commit of step 2 on nothing can be written, not even the journal."""
    sections = {"failure": GO_ON, "checkpoint": {"overlap": overlap, "every": 2}}
    plain = assign(f"not-full-{overlap}".lower(), sections=sections)
    run_group(plain, storage, 2)

    here = LocalStorage(small_disk)
    config = tiny_config("full", here.url, text_file, sections=sections)
    run = replace(plain, config=config, prepared=prepare(config, here))
    ended: list[Ended] = run_group(run, here, 2, FillAt(f"{small_disk}/filler", 2), folder=tmp_path)
    assert [item.outcome for item in ended] == [Outcome.DONE] * 2, ended
    skipped = {event["step"] for event in _events(here, "full", "save-skipped")}
    assert overlap or not skipped
    first = next(step for step in (4, 6, 8) if step not in skipped)  # while that of step 2 is in flight
    assert next(event["step"] for event in _events(here, "full", "save-failed")) == first
    assert all(event.get("newest") == 2 for event in _events(here, "full", "unsaved"))
    assert digests(here, "full") == digests(storage, plain.config.name)
    steps = [event["step"] for event in _events(here, "full", "step")]
    assert steps == list(range(1, 11)), "the journal keeps what could not be written"


def test_a_full_disk_ends_a_run_by_default(
    small_disk: Path, tmp_path: Path, assign: Callable[..., Assignment], storage: LocalStorage, text_file: str
) -> None:
    here = LocalStorage(small_disk)
    config = tiny_config("full", here.url, text_file, sections={"checkpoint": {"every": 2}})
    run = replace(assign("unused"), config=config, prepared=prepare(config, here))
    ended = run_group(run, here, 2, FillAt(f"{small_disk}/filler", 2), folder=tmp_path)
    assert all(item.outcome is None for item in ended)
    assert any(isinstance(item.error, StorageError) and "No space left" in item.error.message for item in ended)
