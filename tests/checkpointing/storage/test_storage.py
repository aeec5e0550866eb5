"""Every storage keeps the same few promises; the local one earns them with rename and fsync, and says what is wrong."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError, StorageError, StorageRefused
from outlast.checkpointing.format.layout import checkpoint_dir
from outlast.checkpointing.restore.verify import verify
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.storage.base import Entry, Storage, read_bytes, walk
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.storage.object_store import ObjectStorage
from tests.support.s3_server import BUCKET, s3_server
from tests.support.small_model import digests_of, small_model, train_step

SHM = Path("/dev/shm")


# -- conformance: another storage joins by one line in MAKERS ---------------------------------------------------------

MAKERS: dict[str, Callable[[Path], Storage]] = {
    "local": LocalStorage,
    "local-not-made-yet": lambda folder: LocalStorage(folder / "not" / "made" / "yet"),
    "tmpfs": lambda folder: LocalStorage(Path(tempfile.mkdtemp(dir=SHM))),
    "s3": lambda folder: ObjectStorage(f"s3://{BUCKET}/{folder.name}"),
}


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture(params=MAKERS)
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "tmpfs" and not os.access(SHM, os.W_OK):
        pytest.skip(f"{SHM} is not there or not writable")
    if request.param == "s3":
        request.getfixturevalue("bucket")
    made = MAKERS[request.param](tmp_path)
    yield made
    if request.param == "tmpfs":
        shutil.rmtree(made.url)


class TestConformance:
    """What every implementation promises."""

    def test_what_is_put_is_read_back(self, storage: Storage) -> None:
        storage.put("run/a.bin", [b"one", memoryview(b"two"), b"", b"three"])
        assert read_bytes(storage, "run/a.bin") == b"onetwothree"

    def test_chunks_may_come_from_a_generator(self, storage: Storage) -> None:
        storage.put("a", (bytes([number]) for number in range(5)))
        assert read_bytes(storage, "a") == bytes(range(5))

    def test_a_put_replaces(self, storage: Storage) -> None:
        storage.put("a", [b"a long first version"])
        storage.put("a", [b"second"])
        assert read_bytes(storage, "a") == b"second"
        assert storage.list("") == [Entry("a", 6)]

    def test_an_empty_file_is_a_file(self, storage: Storage) -> None:
        storage.put("none", [])
        storage.put("some", [b""])
        assert storage.list("") == [Entry("none", 0), Entry("some", 0)]
        assert read_bytes(storage, "none") == b""

    def test_a_big_file_in_many_chunks(self, storage: Storage) -> None:
        chunks = [bytes([number]) * (2**20 + number) for number in range(20)]
        storage.put("big", chunks)
        assert storage.list("") == [Entry("big", sum(map(len, chunks)))]
        with storage.open("big") as file:
            assert file.read() == b"".join(chunks)

    def test_an_open_file_seeks(self, storage: Storage) -> None:
        storage.put("a", [bytes(range(100))])
        with storage.open("a") as file:
            file.seek(90)
            assert file.read(5) == bytes(range(90, 95))
            file.seek(0)
            buffer = bytearray(3)
            assert file.readinto(buffer) == 3  # type: ignore[attr-defined]
            assert buffer == bytes(range(3))

    def test_a_list_is_sorted_and_shallow(self, storage: Storage) -> None:
        for path in ("d/b", "d/a", "d/c/deep", "d/c/deeper/still", "e"):
            storage.put(path, [b"12"])
        assert storage.list("d") == [Entry("a", 2), Entry("b", 2), Entry("c", None)]
        assert [entry.name for entry in storage.list("")] == ["d", "e"]
        assert [entry.name for entry in walk(storage, "d")] == ["a", "b", "c/deep", "c/deeper/still"]

    def test_a_missing_directory_lists_as_empty(self, storage: Storage) -> None:
        assert storage.list("") == []
        assert storage.list("nowhere/at/all") == []
        assert list(walk(storage, "nowhere")) == []

    def test_a_missing_file_is_proof(self, storage: Storage) -> None:
        storage.put("d/a", [b""])
        for path in ("b", "d/b", "x/y"):
            with pytest.raises(FileNotFoundError):
                storage.open(path)

    def test_a_deleted_file_is_gone(self, storage: Storage) -> None:
        storage.put("d/a", [b"1"])
        storage.put("d/b", [b"2"])
        storage.delete("d/a")
        assert storage.list("d") == [Entry("b", 1)]
        with pytest.raises(FileNotFoundError):
            storage.open("d/a")

    def test_deleting_what_is_not_there_is_fine(self, storage: Storage) -> None:
        storage.delete("a")
        storage.delete("d/e/f")
        storage.put("d/a", [b"1"])
        storage.delete("d/b")
        storage.delete("d/a")
        storage.delete("d/a")
        assert list(walk(storage, "")) == []

    def test_directories_empty_with_their_last_file(self, storage: Storage) -> None:
        """On a file system they vanish; on an object store a name may stay behind, with nothing under it."""
        storage.put("a/b/c/one", [b"1"])
        storage.put("a/two", [b"2"])
        storage.delete("a/b/c/one")
        assert list(walk(storage, "a")) == [Entry("two", 1)]
        storage.delete("a/two")
        assert list(walk(storage, "")) == []
        if isinstance(storage, LocalStorage):
            assert storage.list("") == []
        storage.put("a/again", [b"3"])
        assert read_bytes(storage, "a/again") == b"3"

    def test_a_put_that_fails_leaves_nothing(self, storage: Storage) -> None:
        with pytest.raises(RuntimeError, match="half way"):
            storage.put("d/a", failing())
        assert storage.list("d") == []
        with pytest.raises(FileNotFoundError):
            storage.open("d/a")

    def test_a_put_that_fails_leaves_what_was_there(self, storage: Storage) -> None:
        storage.put("d/a", [b"before"])
        with pytest.raises(RuntimeError, match="half way"):
            storage.put("d/a", failing())
        assert storage.list("d") == [Entry("a", 6)]
        assert read_bytes(storage, "d/a") == b"before"

    def test_nobody_sees_half_a_put(self, storage: Storage) -> None:
        """While chunks come, other threads list and read: the old version, whole, until the put is over."""
        storage.put("d/a", [b"old"])
        seen = []

        def chunks() -> Iterator[bytes]:
            for part in (b"n", b"e", b"w", b"er"):
                yield part
                seen.append((storage.list("d"), read_bytes(storage, "d/a")))

        storage.put("d/a", chunks())
        assert seen == [([Entry("a", 3)], b"old")] * 4
        assert read_bytes(storage, "d/a") == b"newer"

    def test_racing_puts_leave_one_of_them_whole(self, storage: Storage) -> None:
        bodies = [bytes([number]) * 300_000 for number in range(6)]
        barrier = threading.Barrier(len(bodies))

        def put(body: bytes) -> None:
            barrier.wait()
            storage.put("d/a", [body[:100_000], body[100_000:]])

        threads = [threading.Thread(target=put, args=(body,)) for body in bodies]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert read_bytes(storage, "d/a") in bodies
        assert storage.list("d") == [Entry("a", 300_000)]

    def test_its_url_opens_it_again(self, storage: Storage) -> None:
        storage.put("a", [b"1"])
        assert read_bytes(open_storage(storage.url), "a") == b"1"


def failing() -> Iterator[bytes]:
    yield b"some"
    raise RuntimeError("half way")


# -- the local one -----------------------------------------------------------------------------------------------------


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_storage("./runs").url == str(tmp_path / "runs")
    assert open_storage("~/runs").url == str(tmp_path / "runs")
    assert open_storage(f"file://{tmp_path}/runs").url == str(tmp_path / "runs")
    with pytest.raises(ConfigError, match="gopher://") as caught:
        open_storage("gopher://host/runs")
    assert "s3://bucket/prefix" in caught.value.hint


def test_a_relative_storage_stays_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    storage = open_storage("runs")
    monkeypatch.chdir("/")
    storage.put("a", [b"1"])
    assert (tmp_path / "runs" / "a").read_bytes() == b"1"


def test_a_put_is_durable_in_the_right_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's bytes before its name, and the name before the put returns; new directories as well."""
    done: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def recorded_fsync(fd: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        done.append(("sync", "temporary" if path.name.endswith(".tmp") else str(path.relative_to(tmp_path))))
        fsync(fd)

    def recorded_replace(source: Path, target: Path) -> None:
        assert Path(source).parent == Path(target).parent
        done.append(("rename", str(Path(target).relative_to(tmp_path))))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    storage = LocalStorage(tmp_path)
    storage.put("run/deep/a", [b"1"])
    assert done == [
        ("sync", "."),
        ("sync", "run"),
        ("sync", "temporary"),
        ("rename", "run/deep/a"),
        ("sync", "run/deep"),
    ]
    done.clear()
    storage.put("run/deep/a", [b"2"])
    assert done == [("sync", "temporary"), ("rename", "run/deep/a"), ("sync", "run/deep")]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)], ids=oct)
def test_files_have_the_mode_that_the_umask_leaves(umask: int, mode: int, tmp_path: Path) -> None:
    """Others may be meant to read the model; a temporary file of the library's kind would be 0600."""
    before = os.umask(umask)
    try:
        LocalStorage(tmp_path).put("a", [b"1"])
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == mode


def test_what_a_killed_writer_left_is_not_seen_and_goes_with_its_directory(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("d/a", [b"1"])
    (tmp_path / "d" / ".b.0badf00d.tmp").write_bytes(b"half")
    assert storage.list("d") == [Entry("a", 1)]
    storage.delete("d/a")
    assert list(tmp_path.iterdir()) == []


def test_one_name_that_leads_nowhere_does_not_empty_a_listing(tmp_path: Path) -> None:
    """It stands for a file that is deleted between reading its name and asking its size: absence of one is no proof of
    the absence of all.
    """
    storage = LocalStorage(tmp_path)
    storage.put("d/a", [b"1"])
    (tmp_path / "d" / "gone").symlink_to("nowhere")
    assert Entry("a", 1) in storage.list("d")


def test_a_file_that_stands_where_a_directory_is_needed(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    inside, above = LocalStorage(tmp_path / "file"), LocalStorage(tmp_path)
    for act in (
        lambda: inside.put("a", [b"1"]),
        lambda: inside.list(""),
        lambda: above.put("file/a", [b"1"]),
        lambda: above.list("file"),
    ):
        with pytest.raises(StorageRefused, match="Not a directory") as caught:
            act()
        assert "move it or set checkpoint.storage" in caught.value.hint
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_directory_is_not_a_file(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("d/a", [b"1"])
    with pytest.raises(StorageError, match="Is a directory"):
        storage.open("d")
    with pytest.raises(StorageError, match="d"):
        storage.put("d", [b"1"])
    assert storage.list("d") == [Entry("a", 1)]


# -- disks that refuse -------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own of 1 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Takes every byte that is left."""
    path, block = folder / "filler", bytes(4096)
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(block):
            pass
    assert shutil.disk_usage(folder).free == 0
    return path


def test_a_full_disk_is_refused_and_leaves_no_litter(tiny_disk: Path) -> None:
    storage = LocalStorage(tiny_disk)
    storage.put("d/a", [b"before"])
    with pytest.raises(StorageRefused, match=r"cannot write .*/d/a: No space left on device") as caught:
        storage.put("d/a", (bytes(2**18) for _ in range(5)))
    assert "free some space" in caught.value.hint
    assert [path.name for path in (tiny_disk / "d").iterdir()] == ["a"]
    assert read_bytes(storage, "d/a") == b"before"
    storage.put("d/b", [bytes(2**18)])


def test_a_checkpoint_on_a_full_disk_costs_no_earlier_one(tiny_disk: Path) -> None:
    storage = LocalStorage(tiny_disk)
    model, optimizer = small_model(width=64)
    checkpointer = Checkpointer(storage, "full", launch="first")
    assert checkpointer.resume(model, optimizer) is None
    for step in (1, 2):
        train_step(model, optimizer, step)
        assert checkpointer.save(step, model, optimizer, {"step": step})
    saved = digests_of(model, optimizer)
    filler = fill(tiny_disk)

    train_step(model, optimizer, 3)
    with pytest.raises(StorageRefused, match="No space left on device") as caught:
        checkpointer.save(3, model, optimizer, {"step": 3})
    assert caught.value.message.startswith("cannot write ")
    assert "free some space" in caught.value.hint
    assert caught.value.permanent
    with pytest.raises(StorageRefused, match="No space left on device"):
        Checkpointer(storage, "full", launch="second")

    accepted = read_catalog(storage, "full").accepted
    assert [item.ref.step for item in accepted] == [2, 1]
    for manifest in accepted:
        assert verify(storage, checkpoint_dir("full", manifest.ref), manifest) == []

    filler.unlink()
    model, optimizer = small_model(seed=1, width=64)
    checkpointer = Checkpointer(storage, "full", launch="second")
    assert checkpointer.resume(model, optimizer) == {"step": 2}
    assert digests_of(model, optimizer) == saved
    train_step(model, optimizer, 3)
    assert checkpointer.save(3, model, optimizer, {"step": 3})


def test_a_read_only_disk_is_read_and_not_written(tiny_disk: Path) -> None:
    storage = LocalStorage(tiny_disk)
    model, optimizer = small_model()
    train_step(model, optimizer, 1)
    assert Checkpointer(storage, "frozen").save(1, model, optimizer, {"step": 1})
    subprocess.run(["mount", "-o", "remount,ro", str(tiny_disk)], check=True)

    manifest = read_catalog(storage, "frozen").accepted[0]
    assert verify(storage, checkpoint_dir("frozen", manifest.ref), manifest) == []
    path = f"{checkpoint_dir('frozen', manifest.ref)}/model.safetensors"
    for act in (
        lambda: storage.put("a", [b"1"]),
        lambda: storage.put("new/a", [b"1"]),
        lambda: storage.delete(path),
        lambda: Checkpointer(storage, "frozen"),
    ):
        with pytest.raises(StorageRefused, match="Read-only file system") as caught:
            act()
        assert "write access" in caught.value.hint
    assert verify(storage, checkpoint_dir("frozen", manifest.ref), manifest) == []


def test_writers_and_deleters_share_a_directory(tmp_path: Path) -> None:
    """As pins and probes do: a deletion takes an empty directory along, and must not fail the write of another."""
    storage = LocalStorage(tmp_path)

    def write_and_delete(name: str) -> None:
        for number in range(100):
            storage.put(f"run/pins/{name}", [f"{number}".encode()])
            assert read_bytes(storage, f"run/pins/{name}") == f"{number}".encode()
            storage.delete(f"run/pins/{name}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write_and_delete, "abcd"))
    assert not list(tmp_path.iterdir())
