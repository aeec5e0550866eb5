"""JSON from a storage: bounds on its depth, for everybody who walks through it."""

from __future__ import annotations

import pytest

from outlast.checkpointing.format.manifest import Manifest, ManifestError
from outlast.checkpointing.json_input import parse_json
from outlast.checkpointing.run_store.events import ChangedEvent
from outlast.checkpointing.run_store.journal import read_events
from outlast.checkpointing.storage.base import read_object
from outlast.checkpointing.storage.local import LocalStorage


def nested(depth: int, begin: str = "[", end: str = "]") -> str:
    return begin * depth + "1" + end * depth


@pytest.mark.parametrize("depth", [101, 900, 1_000_000])
@pytest.mark.parametrize(("begin", "end"), ["[]", ('{"a":', "}"), ('[{"a":', "}]")])
def test_what_is_nested_too_deeply_is_no_json(depth: int, begin: str, end: str, storage: LocalStorage) -> None:
    text = nested(depth, begin, end)
    with pytest.raises(ValueError, match="nested more than 100 levels deep"):
        parse_json(text)
    storage.put("deep/claim.json", [f'{{"launch": {text}}}'.encode()])
    assert read_object(storage, "deep/claim.json") == {}
    with pytest.raises(ManifestError):
        Manifest.parse(f'{{"format": 1, "extra": {text}}}'.encode())


def test_what_is_nested_less_is_as_it_is() -> None:
    assert parse_json(nested(99)) == eval(nested(99))
    assert parse_json('{"a": [1, null]}') == {"a": [1, None]}
    assert parse_json("1") == 1


def test_an_event_that_is_nested_too_deeply_hides_no_other(storage: LocalStorage) -> None:
    """Those who show it would fail: `before` of a change is any value."""
    start, deep = '{"event": "start", "t": 1.0}', f'{{"event": "changed", "before": {nested(500)}}}'
    storage.put("deep/events-0-000000.jsonl", ["\n".join([start, deep, start]).encode()])
    assert [event["event"] for event in read_events(storage, "deep")] == ["start", "start"]
    assert ChangedEvent.kind == "changed"
