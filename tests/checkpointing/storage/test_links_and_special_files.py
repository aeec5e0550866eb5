"""A run from anywhere: no link leads out of it, pipes and devices are not read, nothing behind them is deleted."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.checkpointing.errors import ConfigError, NotAFileError, OutlastError, StorageRefused
from outlast.checkpointing.hf_trainer_seals import newest_sealed, seal
from outlast.checkpointing.restore.verify import verify
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.run_store.claims import list_checkpoints_of
from outlast.checkpointing.run_store.journal import read_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Entry, read_bytes
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.storage.regular_files import read_small_file
from outlast.checkpointing.tools.pin_and_prune import plan_prune, prune
from tests.checkpointing.tools.test_pin_and_prune import NARROW, WIDE, Run, steps, whole


@pytest.fixture
def storage(tmp_path: Path) -> LocalStorage:
    return LocalStorage(tmp_path / "runs")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A directory of the user that has nothing to do with the run."""
    folder = tmp_path / "elsewhere"
    (folder / "inner").mkdir(parents=True)
    for name in ("manifest.json", "thesis.tex", "inner/notes"):
        (folder / name).write_bytes(b"mine")
    return folder


def untouched(folder: Path) -> bool:
    return sorted(path.name for path in folder.rglob("*")) == ["inner", "manifest.json", "notes", "thesis.tex"]


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


SPECIAL: dict[str, Callable[[Path], None]] = {
    "a named pipe": make_pipe,
    "a socket": make_socket,
    "a symbolic link": lambda path: path.symlink_to("/dev/zero"),
}


# -- deletion ----------------------------------------------------------------------------------------------------------


def test_retention_leaves_what_lies_behind_an_own_checkpoint(storage: LocalStorage, elsewhere: Path) -> None:
    run = Run(storage).save(2)
    own = storage.path(f"run/attempts/{run.checkpointer.attempt}/checkpoint-1")
    own.rename(elsewhere.parent / "moved")
    own.symlink_to(elsewhere)
    run.save(2)
    assert untouched(elsewhere)
    assert own.is_symlink()
    events = read_events(storage, f"run/attempts/{run.checkpointer.attempt}")
    errors = [event["error"] for event in events if event["event"] == "delete-failed"]
    assert errors
    assert all("checkpoint-1 is a symbolic link" in error for error in errors)
    assert steps(storage) == [4, 3]


def test_retention_leaves_what_lies_behind_a_link_in_a_checkpoint(storage: LocalStorage, elsewhere: Path) -> None:
    run = Run(storage).save(2)
    own = storage.path(f"run/attempts/{run.checkpointer.attempt}/checkpoint-1")
    (own / "data").symlink_to(elsewhere)
    (own / "training_state" / "thesis").symlink_to(elsewhere / "thesis.tex")
    run.save(2)
    assert untouched(elsewhere)
    left = sorted(str(path.relative_to(own)) for path in own.rglob("*") if not path.is_dir() or path.is_symlink())
    assert left == ["data", "training_state/thesis"]
    run.save(2)
    events = read_events(storage, f"run/attempts/{run.checkpointer.attempt}")
    [failed] = [event for event in events if event["event"] == "delete-failed"]
    assert "data (a symbolic link), training_state/thesis (a symbolic link)" in failed["error"], "named once"


def test_prune_names_the_links_and_leaves_them(storage: LocalStorage, elsewhere: Path) -> None:
    run = Run(storage, retention=WIDE).save(4)
    attempt = storage.path(f"run/attempts/{run.checkpointer.attempt}")
    (attempt / "checkpoint-1" / "data").symlink_to(elsewhere)
    (attempt / "checkpoint-7").symlink_to(elsewhere)
    store = RunStore(storage, "run")
    plan = plan_prune(store, NARROW)
    assert [line.removeprefix(f"{attempt}/") for line in plan.left] == [
        "checkpoint-1/data: a symbolic link",
        "checkpoint-7: a symbolic link",
    ]
    assert [item.ref.step for item in prune(store, plan).doomed] == [2, 1]
    assert untouched(elsewhere)
    assert (attempt / "checkpoint-7").is_symlink()
    assert steps(storage) == [4, 3]
    assert not (attempt / "checkpoint-2").exists(), "the link in one keeps no other"


def test_the_rest_of_a_killed_writer_is_told_from_files_of_others(storage: LocalStorage) -> None:
    storage.put("run/d/a", [b"1"])
    folder = storage.path("run/d")
    (folder / ".mine.tmp").write_bytes(b"mine")
    storage.delete("run/d/a")
    assert (folder / ".mine.tmp").read_bytes() == b"mine"


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_in_a_checkpoint_is_damage(kind: str, storage: LocalStorage) -> None:
    run = Run(storage).save(2)
    place = f"run/attempts/{run.checkpointer.attempt}/checkpoint-2"
    manifest = read_catalog(storage, "run").accepted[0]
    weights = storage.path(f"{place}/model.safetensors")
    weights.unlink()
    SPECIAL[kind](weights)
    [fault] = verify(storage, place, manifest)
    assert fault.startswith(f"model.safetensors: {kind}")
    with pytest.raises(NotAFileError, match=rf"checkpoint-2/model\.safetensors is {kind}"):
        storage.open(f"{place}/model.safetensors")
    heir = Run(storage, launch="b")
    assert heir.step == 1, "resumed from the older one"


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["manifest.json", "claim.json", "commits-0-000000.jsonl", "events-0-000000.jsonl"])
def test_a_special_file_in_a_run_hangs_no_reader(name: str, kind: str, storage: LocalStorage) -> None:
    run = Run(storage).save(2)
    attempt = storage.path(f"run/attempts/{run.checkpointer.attempt}")
    place = attempt / "checkpoint-2" / name if name == "manifest.json" else attempt / name
    place.unlink(missing_ok=True)
    SPECIAL[kind](place)
    catalog = read_catalog(storage, "run")
    assert 1 in [item.ref.step for item in catalog.accepted]
    if name == "manifest.json":
        assert any(kind in reason for item in catalog.rejected for reason in item.reasons)


def test_a_manifest_larger_than_memory_is_damage(storage: LocalStorage) -> None:
    run = Run(storage).save(2)
    manifest = storage.path(f"run/attempts/{run.checkpointer.attempt}/checkpoint-2/manifest.json")
    os.truncate(manifest, 2**42)
    [rejected] = read_catalog(storage, "run").rejected
    assert "more than any file of its kind" in rejected.reasons[0]


def test_a_checkpoint_behind_a_link_is_rejected_by_name(storage: LocalStorage, tmp_path: Path) -> None:
    run = Run(storage).save(2)
    own = storage.path(f"run/attempts/{run.checkpointer.attempt}/checkpoint-2")
    own.rename(tmp_path / "moved")
    own.symlink_to(tmp_path / "moved")
    [rejected] = read_catalog(storage, "run").rejected
    assert f"{own} is a symbolic link" in rejected.reasons[0]
    assert [ref.step for ref in list_checkpoints_of(RunStore(storage, "run"), run.checkpointer.attempt)] == [1]


def test_a_link_in_place_of_a_directory_of_the_run_is_named(storage: LocalStorage, tmp_path: Path) -> None:
    Run(storage).save(2)
    attempts = storage.path("run/attempts")
    attempts.rename(tmp_path / "moved")
    attempts.symlink_to(tmp_path / "moved")
    with pytest.raises(StorageRefused, match="run/attempts is a symbolic link") as caught:
        read_catalog(storage, "run")
    assert "the run's own directory may be a link" in caught.value.hint


@pytest.mark.parametrize("path", ["run/../../out", "{elsewhere}/thesis.tex", "run//a", "./a", "run/a\0b"])
def test_no_path_leaves_the_storage(path: str, storage: LocalStorage, elsewhere: Path) -> None:
    storage.put("run/a", [b"1"])
    path = path.format(elsewhere=elsewhere)
    for act in (storage.open, storage.list, storage.delete, lambda path: storage.put(path, [b"1"])):
        with pytest.raises(NotAFileError, match="is not a path below"):
            act(path)
    assert untouched(elsewhere)


def test_a_write_goes_through_no_link(storage: LocalStorage, elsewhere: Path) -> None:
    storage.put("run/a", [b"1"])
    storage.path("run/d").symlink_to(elsewhere)
    storage.path("run/thesis").symlink_to(elsewhere / "thesis.tex")
    for path in ("run/d/new", "run/d/inner/new", "run/thesis"):
        with pytest.raises(StorageRefused, match="symbolic link"):
            storage.put(path, [b"1"])
    assert untouched(elsewhere)
    assert (elsewhere / "thesis.tex").read_bytes() == b"mine"


# -- links that are the user's own -------------------------------------------------------------------------------------


def test_the_storage_and_the_run_may_be_links(storage: LocalStorage, tmp_path: Path) -> None:
    Run(storage).save(2)
    storage.path("run").rename(tmp_path / "big-disk")
    storage.path("run").symlink_to(tmp_path / "big-disk")
    (tmp_path / "data").symlink_to(tmp_path / "runs")
    linked = LocalStorage(tmp_path / "data")
    assert linked.list("") == [Entry("run", None)]
    Run(linked, launch="b").save(3)
    assert steps(linked) == [5, 4]
    assert whole(linked)
    assert sorted((tmp_path / "big-disk" / "attempts").iterdir())


def test_files_that_the_user_names_may_be_links(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "rows").write_bytes(b"rows")
    (tmp_path / "near").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "also").symlink_to("rows")
    storage = LocalStorage(Path("/"), follow_links=True)
    assert read_bytes(storage, f"{tmp_path}/near/../near/also".removeprefix("/")) == b"rows"
    assert [entry.special for entry in storage.list(str(tmp_path / "near").removeprefix("/"))] == ["", ""]


# -- seals, small files, directories -----------------------------------------------------------------------------------


def test_a_seal_names_the_pipe_in_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    os.mkfifo(folder / "log")
    with pytest.raises(ConfigError, match="log is a named pipe"):
        seal(folder)
    (folder / "log").unlink()
    seal(folder)
    os.mkfifo(folder / "log")
    with pytest.raises(OutlastError, match="log: a named pipe"):
        newest_sealed(tmp_path)


def test_a_small_file_is_regular_and_small(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "endless").symlink_to("/dev/zero")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**27)
    for name, reason in {"pipe": "named pipe", "endless": "device", "large": "more than 64 MiB"}.items():
        with pytest.raises(OSError, match=reason):
            read_small_file(tmp_path / name)
