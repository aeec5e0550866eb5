"""Values of wrong types in claims and liveness files count as missing, whoever wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store.claims import read_claim
from outlast.checkpointing.run_store.journal import read_events
from outlast.checkpointing.run_store.liveness import read_liveness
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.run_store.typed_json import fitting, misfits, section
from outlast.checkpointing.storage.local import LocalStorage

WRONG: list[Any] = [None, True, 1.5, "x", [1], {"a": 1}]
CLAIM = {"launch": "a", "claimed_at": 1.5, "world_size": 2, "settings": {"a": 1}, "workers": [{"rank": 0}]}
ALIVE = {"t": 1.0, "began": 2.0, "host": "a", "pid": 3, "ended": True, "exit_code": None, "progress": {"step": 1}}


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(LocalStorage(tmp_path), "run")


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: type(wrong).__name__)
def test_a_claim(wrong: Any, store: RunStore) -> None:
    attempt = AttemptId(1, "abcd")
    for key, right in CLAIM.items():
        body = CLAIM | {key: wrong}
        store.storage.put(f"{store.attempt_dir(attempt)}/claim.json", [json.dumps(body).encode()])
        expected = body if type(wrong) is type(right) and wrong != [1] else {k: v for k, v in body.items() if k != key}
        assert read_claim(RunStore(store.storage, "run"), attempt) == expected, key


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: type(wrong).__name__)
def test_a_liveness_file(wrong: Any, store: RunStore) -> None:
    for key, right in ALIVE.items():
        body = ALIVE | {key: wrong}
        store.storage.put(f"{store.launch_dir('a')}/alive.json", [json.dumps(body).encode()])
        expected = body if type(wrong) is type(right) else {k: v for k, v in body.items() if k != key}
        assert read_liveness(store, "a") == {"t": 0.0, **expected}, key


@pytest.mark.parametrize("wrong", [10**400, -(10**400), 1e308, float("inf"), float("nan"), 2**63])
def test_numbers_beyond_all_bounds(wrong: float, store: RunStore) -> None:
    attempt = AttemptId(1, "abcd")
    body = {"claimed_at": wrong, "launch": "a"}
    store.storage.put(f"{store.attempt_dir(attempt)}/claim.json", [json.dumps(body).encode()])
    assert read_claim(store, attempt) == {"launch": "a"}
    body = {"t": wrong, "began": wrong, "host": "a"}
    store.storage.put(f"{store.launch_dir('a')}/alive.json", [json.dumps(body).encode()])
    assert read_liveness(store, "a") == {"t": 0.0, "host": "a"}


def test_a_liveness_file_without_content(store: RunStore) -> None:
    store.storage.put(f"{store.launch_dir('a')}/alive.json", [b"[]"])
    assert read_liveness(store, "a") == {}


def test_objects_within_objects() -> None:
    body = {"a": {"b": {"c": 1}}, "d": [1]}
    assert section(body, "a", "b") == {"c": 1}
    assert section(body, "d") == section(body, "a", "x", "y") == {}
    types: Mapping[str, Any] = {"a": Mapping[str, int], "d": tuple[bool | int, ...], "e": str}
    assert misfits(body, types) == {"a"}
    assert fitting(body, types) == {"d": [1]}


def test_a_journal_of_more_bytes_than_any_is_named_and_hides_no_other(store: RunStore, tmp_path: Path) -> None:
    """A gigabyte of a sparse file in the place of a segment."""
    folder = store.launch_dir("a")
    store.storage.put(f"{folder}/events-0-000000.jsonl", [b'{"event": "start"}\n'])
    with (tmp_path / folder / "events-1-000000.jsonl").open("wb") as file:
        file.truncate(2**30)
    assert list(read_events(store, folder)) == [{"event": "start"}]
    assert list(store.unreadable) == [f"{folder}/events-1-000000.jsonl"]
