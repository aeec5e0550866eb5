"""An object store that throttles, hangs up, and loses answers: a put is done once it is done, and says so."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError, StorageError
from outlast.checkpointing.format.manifest import BLOCK_BYTES
from outlast.checkpointing.restore.reader import read_tensors
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.storage import object_store as objects
from outlast.checkpointing.storage.base import read_bytes
from outlast.checkpointing.storage.object_store import ObjectStorage
from tests.support.s3_proxy import MANGLING, Mischief, Proxy, proxy_to
from tests.support.s3_server import s3_server
from tests.support.small_model import digests_of, small_model, train_step

#: More than one part of a multi-part upload, and more than one window of them.
LARGE = bytes(range(256)) * 4096 * 24
QUICK = [mischief for mischief in Mischief if mischief not in (Mischief.LATE, Mischief.DENY, *MANGLING)]
ALL = [*QUICK, pytest.param(Mischief.LATE, marks=pytest.mark.faults)]  # 3 to 20 seconds each


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def rough(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Proxy, ObjectStorage]]:
    """The rules, and a storage that goes through them."""
    with proxy_to(os.environ["AWS_ENDPOINT_URL"]) as (proxy, url):
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setattr(objects, "_PAUSES_S", (0.01, 0.02, 0.05, 0.1))
        monkeypatch.setattr(objects, "_SDK_ATTEMPTS", 3)  # two fail here, and the waits grow
        yield proxy, ObjectStorage(f"{bucket}/rough")


@pytest.mark.parametrize("mischief", ALL)
@pytest.mark.parametrize("size", [10, len(LARGE)], ids=["small", "large"])
def test_a_put_survives(rough: tuple[Proxy, ObjectStorage], mischief: Mischief, size: int) -> None:
    proxy, storage = rough
    name = f"{mischief.name}-{size}"
    proxy.add("PUT", name, mischief, 2)
    storage.put(name, [LARGE[:size]] if size == 10 else [LARGE[i : i + 2**20] for i in range(0, size, 2**20)])
    assert len(proxy.met) == 2, "the mischief did not happen"
    assert read_bytes(storage, name) == LARGE[:size]
    assert [entry.num_bytes for entry in storage.list("") if entry.name == name] == [size]


@pytest.mark.parametrize("mischief", ALL)
def test_the_end_of_a_large_put_survives(rough: tuple[Proxy, ObjectStorage], mischief: Mischief) -> None:
    """The POST that makes one object of the parts. Done twice it would say that there is no such upload."""
    proxy, storage = rough
    name = f"end-{mischief.name}"
    proxy.add("POST", f"{name}?uploadId", mischief)
    storage.put(name, [LARGE])
    assert len(proxy.met) == 1
    assert read_bytes(storage, name) == LARGE


@pytest.mark.parametrize("num_chunks", [pytest.param(1, marks=pytest.mark.faults), 3])
def test_an_end_that_never_comes_leaves_what_was_there(rough: tuple[Proxy, ObjectStorage], num_chunks: int) -> None:
    """And that it is there, of equal size, is not taken for success."""
    proxy, storage = rough
    name, size = f"twice-{num_chunks}", len(LARGE) // num_chunks
    storage.put(name, [LARGE])
    proxy.add("POST", f"{name}?uploadId", Mischief.BREAK, 1000)
    with pytest.raises(StorageError, match=rf"cannot write .*/{name}"):
        storage.put(name, [LARGE[::-1][begin : begin + size] for begin in range(0, len(LARGE), size)])
    assert proxy.met
    assert read_bytes(storage, name) == LARGE


@pytest.mark.parametrize("mischief", ALL)
@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
def test_reading_listing_and_deleting_survive(
    rough: tuple[Proxy, ObjectStorage], mischief: Mischief, method: str
) -> None:
    proxy, storage = rough
    folder = f"{method}-{mischief.name}"
    storage.put(f"{folder}/file", [b"content"])
    proxy.add(method, folder, mischief, 2)
    assert [entry.name for entry in storage.list(folder)] == ["file"]
    assert read_bytes(storage, f"{folder}/file") == b"content"
    storage.delete(f"{folder}/file")
    assert [entry for entry in storage.list(folder) if entry.num_bytes] == []
    assert proxy.met


@pytest.mark.faults  # ten seconds
def test_what_never_gets_better_is_an_error(rough: tuple[Proxy, ObjectStorage]) -> None:
    proxy, storage = rough
    proxy.add("PUT", "never", Mischief.THROTTLE, 1000)
    with pytest.raises(StorageError, match=r"cannot write .*/never") as caught:
        storage.put("never", [b"x"])
    assert not caught.value.permanent


@pytest.mark.faults  # twenty seconds
@pytest.mark.slice
def test_a_run_goes_on_through_all_of_it(rough: tuple[Proxy, ObjectStorage]) -> None:
    proxy, storage = rough
    model, optimizer = small_model()
    for method in ("PUT", "GET", "DELETE"):
        for mischief in QUICK:
            proxy.add(method, "weathered", mischief, 3)
    saver = Checkpointer(storage, "weathered")
    saver.resume(model, optimizer)
    for step in range(1, 5):
        train_step(model, optimizer, step)
        assert saver.async_save(step, model, optimizer, {"step": step})
        assert saver.wait()
    assert len(proxy.met) > 20
    again, moments = small_model(1)
    assert Checkpointer(storage, "weathered", launch="b").resume(again, moments) == {"step": 4}
    assert digests_of(again, moments) == digests_of(model, optimizer)


def test_a_slice_is_read_by_the_blocks_that_it_touches(rough: tuple[Proxy, ObjectStorage]) -> None:
    _, storage = rough
    model, _ = small_model(width=3000)  # 36 MB
    saver = Checkpointer(storage, "sliced")
    assert saver.save(1, model, None, {})
    [manifest] = read_catalog(storage, "sliced").accepted
    assert max(len(entry.blocks) for entry in manifest.files) == 3
    assert 2 * BLOCK_BYTES < manifest.num_bytes < 3 * BLOCK_BYTES
    tensors = read_tensors(storage, f"sliced/attempts/{manifest.ref}", manifest)
    assert tensors["0.weight"].equal(model[0].weight)  # type: ignore[index]


def test_an_unknown_option_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown option 'regoin'; known options: endpoint_override, region, scheme"):
        ObjectStorage("s3://bucket/prefix?regoin=x")
