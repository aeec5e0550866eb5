"""What a RunStore remembers, and what it must not."""

from __future__ import annotations

from pathlib import Path

import pytest

from outlast.checkpointing.format.layout import CLAIM, AttemptId
from outlast.checkpointing.run_store.claims import claim, higher_claim, launch_is_superseded, list_attempts, read_claim
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import read_bytes
from outlast.checkpointing.storage.local import LocalStorage


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(LocalStorage(tmp_path), "run")


def test_a_listing_and_a_small_file_stay_as_they_were_first_seen(store: RunStore) -> None:
    for name in ("manifest.json", "commits-0-000000.jsonl"):
        store.storage.put(f"run/a/{name}", [b"first"])
    names = [entry.name for entry in store.list("run/a")]
    assert [read_bytes(store, f"run/a/{name}") for name in names] == [b"first"] * 2
    for name in (*names, "more.json"):
        store.storage.put(f"run/a/{name}", [b"second"])
    assert [entry.name for entry in store.list("run/a")] == names
    assert [read_bytes(store, f"run/a/{name}") for name in names] == [b"first"] * 2
    now = store.fresh()
    assert len(now.list("run/a")) == 3
    assert read_bytes(now, "run/a/manifest.json") == b"second"
    store.refresh()
    assert len(store.list("run/a")) == 3
    assert read_bytes(store, "run/a/manifest.json") == b"second"


def test_what_was_missing_stays_missing(store: RunStore) -> None:
    with pytest.raises(FileNotFoundError):
        store.open("run/manifest.json")
    store.storage.put("run/manifest.json", [b"{}"])
    with pytest.raises(FileNotFoundError):
        store.open("run/manifest.json")
    assert read_bytes(store.fresh(), "run/manifest.json") == b"{}"


def test_what_may_be_long_is_not_remembered(store: RunStore) -> None:
    for name in ("events-0-000000.jsonl", "model.safetensors"):
        store.storage.put(f"run/{name}", [b"first"])
        assert read_bytes(store, f"run/{name}") == b"first"
        store.storage.put(f"run/{name}", [b"second"])
        assert read_bytes(store, f"run/{name}") == b"second"


def test_a_claim_is_read_once_by_all_who_look_anew(store: RunStore) -> None:
    attempt = claim(store, {"launch": "a"})
    unfinished = AttemptId(9, "0000")
    assert read_claim(store, attempt) == {"launch": "a"}
    assert read_claim(store, unfinished) == {}
    store.storage.delete(f"{store.attempt_dir(attempt)}/{CLAIM}")
    store.storage.put(f"{store.attempt_dir(unfinished)}/{CLAIM}", [b'{"launch": "b"}'])
    assert read_claim(store, unfinished) == {}
    assert read_claim(store.fresh(), attempt) == {"launch": "a"}
    assert read_claim(store.fresh(), unfinished) == {"launch": "b"}


def test_the_protocol_looks_anew_whatever_is_remembered(store: RunStore) -> None:
    mine = claim(store, {"launch": "a"})
    assert list_attempts(store) == [mine]
    higher = claim(RunStore(store.storage, "run"), {"launch": "b"})
    assert list_attempts(store) == [mine], "this is what must not decide"
    assert higher_claim(store, mine) == higher
    assert launch_is_superseded(store, "a")
    assert claim(store, {"launch": "c"}).number == higher.number + 1
