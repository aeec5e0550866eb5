"""Local cache of prepared data: fetched once for all workers, verified, bounded."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from outlast.checkpointing.errors import ConfigError, DamagedError, PreflightError, StorageRefused
from outlast.checkpointing.format.manifest import FileEntry
from outlast.checkpointing.save.writer import write_file
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.preparation.local_cache import evict, limit_bytes, local_copy, make_private_directory
from tests.support.groups.ranks import on_ranks

CONTENT = bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OUTLAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/data"


@pytest.fixture
def stored(tmp_path: Path) -> tuple[LocalStorage, FileEntry]:
    storage = LocalStorage(tmp_path / "store")
    return storage, write_file(storage, ".data/abc", "train.arrow", [CONTENT])


def test_a_copy_is_reused_and_replaced_when_damaged(stored: tuple[LocalStorage, FileEntry], cache: Path) -> None:
    storage, entry = stored
    copy = local_copy(storage, ".data/abc", "abc", entry)
    assert copy.read_bytes() == CONTENT
    original = storage.path(".data/abc/train.arrow")
    original.unlink()
    assert local_copy(storage, ".data/abc", "abc", entry) == copy, "nothing is fetched twice"
    original.write_bytes(CONTENT)
    copy.write_bytes(CONTENT[:-1])
    assert local_copy(storage, ".data/abc", "abc", entry).read_bytes() == CONTENT
    original.write_bytes(CONTENT[:-1])
    copy.unlink()
    with pytest.raises(DamagedError, match="bytes changed since the data was prepared"):
        local_copy(storage, ".data/abc", "abc", entry)
    assert not copy.exists()


def fetch(root: str, cache: str, entry: FileEntry) -> int:
    """Return how often this rank read the store."""
    os.environ["OUTLAST_CACHE"] = cache
    opened: list[str] = []

    class Counting(LocalStorage):
        def open(self, path: str):  # type: ignore[no-untyped-def]
            opened.append(path)
            time.sleep(0.2)
            return super().open(path)

    local_copy(Counting(Path(root)), ".data/abc", "abc", entry)
    return len(opened)


def test_one_worker_of_a_machine_fetches(stored: tuple[LocalStorage, FileEntry], tmp_path: Path) -> None:
    storage, entry = stored
    assert sorted(on_ranks(3, fetch, storage.url, str(tmp_path / "cache"), entry)) == [0, 0, 1]


def named(name: str) -> str:
    """A fingerprint for it."""
    return name.encode().hex().zfill(32)


def fill(cache: Path, name: str, num_bytes: int, age_s: float) -> None:
    folder = cache / named(name)
    folder.mkdir(parents=True)
    (folder / "train.arrow").write_bytes(bytes(num_bytes))
    os.utime(folder, (time.time() - age_s,) * 2)


@pytest.mark.parametrize(
    ("limit", "left"),
    [
        (400, {"old", "older", "oldest", "fresh"}),
        (399, {"old", "older", "fresh"}),
        (250, {"old", "fresh"}),
        (0, {"fresh"}),
    ],
)
def test_the_least_recently_used_is_evicted_first(cache: Path, limit: int, left: set[str]) -> None:
    for name, age_s in (("old", 1000), ("oldest", 3000), ("older", 2000), ("fresh", 10)):
        fill(cache, name, 100, age_s)
    evict(cache, limit, spared="none")
    assert {path.name for path in cache.iterdir() if path.is_dir()} == set(map(named, left))


def test_a_new_copy_evicts_old_ones(
    stored: tuple[LocalStorage, FileEntry], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage, entry = stored
    fill(cache, "old", 5000, 2000)
    monkeypatch.setenv("OUTLAST_CACHE_GB", "0.0000148")
    local_copy(storage, ".data/abc", "abc", entry)
    assert not (cache / "old").exists()
    assert (cache / "abc/train.arrow").exists()


def test_an_invalid_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTLAST_CACHE_GB", "much")
    with pytest.raises(ConfigError, match="OUTLAST_CACHE_GB is 'much'"):
        limit_bytes()


def test_nothing_is_evicted_that_is_not_a_copy(cache: Path, tmp_path: Path) -> None:
    """`OUTLAST_CACHE=~` makes `~/data` the cache."""
    for place in (cache / "thesis", tmp_path / "elsewhere"):
        place.mkdir(parents=True)
        (place / "train.arrow").write_bytes(bytes(100))
    (cache / named("link")).symlink_to(tmp_path / "elsewhere")
    fill(cache, "old", 100, 1000)
    os.utime(cache / "thesis", (0, 0))
    os.utime(tmp_path / "elsewhere", (0, 0))
    evict(cache, 0, spared="none")
    assert {path.name for path in cache.iterdir() if path.is_dir()} == {"thesis", named("link")}
    assert (tmp_path / "elsewhere" / "train.arrow").exists()


def test_only_this_user_may_write_to_the_cache(stored: tuple[LocalStorage, FileEntry], cache: Path) -> None:
    storage, entry = stored
    local_copy(storage, ".data/abc", "abc", entry)
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(0o777)
    with pytest.raises(PreflightError, match="every user may write") as caught:
        local_copy(storage, ".data/abc", "abc", entry)
    assert "OUTLAST_CACHE" in caught.value.hint


def test_a_planted_lock_or_copy_is_not_followed(
    stored: tuple[LocalStorage, FileEntry], cache: Path, tmp_path: Path
) -> None:
    storage, entry = stored
    cache.mkdir(parents=True, mode=0o700)
    (tmp_path / "precious").write_bytes(b"mine")
    (cache / "abc.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"abc\.lock"):
        local_copy(storage, ".data/abc", "abc", entry)
    (cache / "abc.lock").unlink()
    (tmp_path / "elsewhere").mkdir()
    (cache / "abc").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageRefused, match="symbolic link"):
        local_copy(storage, ".data/abc", "abc", entry)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    assert (tmp_path / "precious").read_bytes() == b"mine"


def test_a_private_directory_is_made_or_checked(tmp_path: Path) -> None:
    made = make_private_directory(tmp_path / "new" / "cache")
    assert made.stat().st_mode & 0o777 == 0o700
    made.chmod(0o775)
    assert make_private_directory(made).stat().st_mode & 0o777 == 0o700
    made.chmod(0o1777)
    with pytest.raises(PreflightError, match="every user may write") as caught:
        make_private_directory(made)
    assert "chmod 700" in caught.value.hint
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(PreflightError, match="is not a directory"):
        make_private_directory(tmp_path / "file")
    if os.geteuid() == 0:
        made.chmod(0o700)
        os.chown(made, 1234, 1234)
        with pytest.raises(PreflightError, match="belongs to another user"):
            make_private_directory(made)
        (tmp_path / "own").mkdir(mode=0o700)
        (tmp_path / "planted").symlink_to(tmp_path / "own")
        os.chown(tmp_path / "planted", 1234, 1234, follow_symlinks=False)
        with pytest.raises(PreflightError, match="belongs to another user"):
            make_private_directory(tmp_path / "planted")
