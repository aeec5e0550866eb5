"""A store that acknowledges every write, and does not keep the bytes: found before anything relies on it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import StorageRefused
from outlast.checkpointing.run_store.claims import list_attempts, list_checkpoints_of
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Buffer, walk
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.storage.object_store import ObjectStorage
from outlast.checkpointing.storage.round_trip import check_round_trip
from tests.support.s3_proxy import MANGLING, Mischief, Proxy, proxy_to
from tests.support.s3_server import s3_server
from tests.support.small_model import small_model, train_step

FILES = ["model.safetensors", "training_state/optimizer", "training_state/state.json"]
FOUND = {
    Mischief.FRAME: r"kept the framing of a chunked upload as content \(.* were written and .* read\)",
    Mischief.CUT: r"the end is missing \(.* were written and .* read\)",
    Mischief.FLIP: "byte [0-9,]+ is another",
}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, str]]:
    with s3_server() as url:
        yield url, os.environ["AWS_ENDPOINT_URL"]


@pytest.fixture
def odd(server: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Proxy, ObjectStorage]]:
    """The rules, and a storage that goes through them."""
    with proxy_to(server[1]) as (proxy, address):
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        yield proxy, ObjectStorage(f"{server[0]}/runs")


@pytest.mark.parametrize("mischief", MANGLING)
def test_a_probe_finds_a_store_that_changes_bytes(odd: tuple[Proxy, ObjectStorage], mischief: Mischief) -> None:
    proxy, storage = odd
    proxy.add("PUT", "probe", mischief)
    with pytest.raises(StorageRefused, match=FOUND[mischief]) as refused:
        check_round_trip(storage, "x/probe")
    assert ("aws-chunked" in refused.value.hint) == (mischief is Mischief.FRAME)
    assert not [entry for entry in walk(storage, "x") if entry.num_bytes], "nothing is left"


def test_a_probe_passes_and_leaves_nothing(odd: tuple[Proxy, ObjectStorage], tmp_path: Path) -> None:
    for storage in (odd[1], LocalStorage(tmp_path)):
        check_round_trip(storage, "y/probe")
        assert not [entry for entry in walk(storage, "y") if entry.num_bytes]


@pytest.mark.parametrize("content", [None, b"other"], ids=["kept", "changed"])
def test_a_store_that_refuses_to_delete_is_judged_by_its_bytes(tmp_path: Path, content: bytes | None) -> None:
    """A bucket under retention keeps what it has, and that is not what the probe asks."""

    class Locked(LocalStorage):
        def put(self, path: str, chunks: Iterable[Buffer]) -> None:
            super().put(path, chunks if content is None else [content])

        def delete(self, path: str) -> None:
            raise StorageRefused(f"cannot delete {path}", hint="")

    if content is None:
        check_round_trip(Locked(tmp_path), "probe")
    else:
        with pytest.raises(StorageRefused, match="does not read back"):
            check_round_trip(Locked(tmp_path), "probe")


@pytest.mark.parametrize("mischief", MANGLING)
def test_a_claim_that_does_not_read_back_ends_an_own_loop(odd: tuple[Proxy, ObjectStorage], mischief: Mischief) -> None:
    proxy, storage = odd
    proxy.add("PUT", "claim.json", mischief)
    with pytest.raises(StorageRefused, match=FOUND[mischief]):
        Checkpointer(storage, f"claim-{mischief.name.lower()}", launch="a")


@pytest.mark.parametrize("mischief", MANGLING)
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("is_async", [False, True], ids=["save", "async"])
def test_a_first_commit_that_does_not_read_back_is_not_acknowledged(
    odd: tuple[Proxy, ObjectStorage], mischief: Mischief, file: str, is_async: bool
) -> None:
    proxy, storage = odd
    run = f"commit-{mischief.name}-{FILES.index(file)}-{is_async}".lower()
    model, optimizer = small_model()
    train_step(model, optimizer, 0)
    checkpointer = Checkpointer(storage, run, launch="a")
    assert checkpointer.resume(model, optimizer) is None
    proxy.add("PUT", file, mischief)
    if is_async:
        checkpointer.async_save(1, model, optimizer, {"step": 1})
    save = checkpointer.close if is_async else lambda: checkpointer.save(1, model, optimizer, {"step": 1})
    with pytest.raises(StorageRefused, match=f"does not read back: .*{file}"):
        save()
    store = RunStore(storage, run)
    refs = [ref for attempt in list_attempts(store) for ref in list_checkpoints_of(store, attempt)]
    assert not [entry for ref in refs for entry in walk(storage, store.checkpoint_dir(ref)) if entry.num_bytes]


def test_a_later_commit_that_lost_bytes_is_not_acknowledged(odd: tuple[Proxy, ObjectStorage]) -> None:
    proxy, storage = odd
    model, optimizer = small_model()
    with Checkpointer(storage, "later", launch="a") as checkpointer:
        checkpointer.resume(model, optimizer)
        train_step(model, optimizer, 0)
        assert checkpointer.save(1, model, optimizer, {"step": 1})
        proxy.add("PUT", "checkpoint-2/model.safetensors", Mischief.CUT)
        train_step(model, optimizer, 1)
        with pytest.raises(StorageRefused, match=r"model\.safetensors: [0-9,]+ bytes were written, and [0-9,]+ are"):
            checkpointer.save(2, model, optimizer, {"step": 2})
    with Checkpointer(storage, "later", launch="b") as checkpointer:
        assert checkpointer.resume(model, optimizer) == {"step": 1}
