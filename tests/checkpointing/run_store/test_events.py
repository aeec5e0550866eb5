"""Journal events: today's keys, the way to JSON and back, and what is made of JSON that is not as expected."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outlast.checkpointing.format.layout import AttemptId, CheckpointRef
from outlast.checkpointing.run_store import events
from outlast.checkpointing.run_store.attempt_history import read_attempt_history
from outlast.checkpointing.run_store.catalog import build_catalog
from outlast.checkpointing.run_store.events import KINDS, EvalEvent, Event, UnknownEvent, parse_event
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage

#: What 0.1.0 writes of each kind beside `t` and `event`; a key with a question mark is not always there.
KEYS = {
    "start": "",
    "resume": "step source committed_at rejected passed_over memory?",
    "snapshots-unused": "reasons",
    "snapshots-off": "reason",
    "snapshot-interval": "steps blocked_s fenced_s processor_s num_bytes",
    "regrouped": "step attempt? lost source world_size? noticed_at? marks",
    "no-checkpoint": "rejected",
    "changed": "what before now same_bits",
    "plan": "num_steps batch world_size step",
    "under-way": "step marks",
    "step": "step loss lr grad_norm count tokens? seconds ended_at?",
    "step-skipped": "step reason scale",
    "non-finite": "step action message",
    "left-out": "step message",
    "eval": "step seconds eval_loss",
    "early-stop": "step reason best best_step",
    "save-requested": "step reason",
    "save-skipped": "step in_flight",
    "save": "step blocked_s fenced_s commit_s",
    "save-failed": "step error",
    "unsaved": "step error newest? unsaved_s limit_s?",
    "commit": "step digest num_bytes seconds?",
    "interval": "seconds blocked_s commit_s restart_s between_failures_s",
    "deleting": "checkpoints",
    "spared": "checkpoints",
    "delete": "step attempt",
    "delete-failed": "doomed error",
    "uploads-aborted": "count",
    "uploads-not-aborted": "error",
    "tracker": "name message",
    "slow": "ranks",
    "hang": "rank missing step phase threads",
    "rejected": "checkpoint reasons",
    "failed": "step error final",
    "superseded": "step by",
    "stop": "step",
    "done": "step model",
    "failure": "attempt noticed_at? cause rank message where? raised? reached? in_place? number? limit? ends? excerpt?",
    "resize": "before now planned attempt",
    "no-room": "since?",
    "phase": "name launch? num_steps? num_samples?",
    "note": "text",
    "rival": "launch",
    "damaged-model": "model faults",
    "stopping": "",
}

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
REFS = st.builds(CheckpointRef, st.integers(0, 10**6), st.builds(AttemptId, st.integers(1, 9999), st.just("9f2c")))


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    inner = get_args(hint)
    if get_origin(hint) is UnionType:
        return st.none() | values(next(part for part in inner if part is not NoneType))
    if get_origin(hint) is tuple:
        return st.lists(values(inner[0]), max_size=3).map(tuple)
    if get_origin(hint) is Mapping:
        return st.dictionaries(st.text(max_size=5), values(inner[1]), max_size=3)
    if is_dataclass(hint) and hint is not CheckpointRef:
        return instances(hint)  # type: ignore[arg-type]
    return {
        int: st.integers(-(2**63), 2**63 - 1),
        float: NUMBERS,
        str: st.text(),
        bool: st.booleans(),
        CheckpointRef: REFS,
        Any: st.text() | st.integers() | st.none(),
    }[hint]


def instances(cls: type[Any]) -> st.SearchStrategy[Any]:
    hints = get_type_hints(cls)
    made = {each.name: values(hints[each.name]) for each in fields(cls)}
    if cls is EvalEvent:
        made["scores"] = st.fixed_dictionaries({"eval_loss": NUMBERS})
    return st.builds(cls, **made)


EVENTS = st.sampled_from(sorted(KINDS)).flatmap(lambda kind: instances(KINDS[kind]))


def test_every_kind_is_listed() -> None:
    assert sorted(KINDS) == sorted(KEYS)
    assert [kind for kind, known in KINDS.items() if known.kind != kind or not known.__name__.endswith("Event")] == []


@given(EVENTS)
def test_an_event_comes_back_from_json_with_the_keys_of_0_1_0(event: Event) -> None:
    body = json.loads(json.dumps(event.to_json()))
    assert parse_event(body) == event
    keys = KEYS[event.kind].split()
    always = {key for key in keys if not key.endswith("?")}
    assert always | {"event"} <= body.keys() <= {key.rstrip("?") for key in keys} | {"t", "event"}
    assert ("t" in body) == bool(event.t)


@given(st.sampled_from([*KINDS, "of a later release"]), st.data())
def test_no_json_makes_parsing_raise(kind: str, data: st.DataObject) -> None:
    keys = [key.rstrip("?") for key in KEYS.get(kind, "step").split()]
    body = data.draw(st.dictionaries(st.sampled_from(["t", "other", *keys]), JSON))
    event = parse_event({**body, "event": kind})
    assert isinstance(event, UnknownEvent if kind not in KINDS else (KINDS[kind], UnknownEvent))
    assert isinstance(event.t, float)
    assert json.dumps(event.to_json())


def test_events_of_a_stored_run_are_known_and_stay_as_they_are() -> None:
    """`tests/golden/run_0_1_0` was written by outlast 0.1.0."""
    journals = list((Path(__file__).parents[2] / "golden/run_0_1_0").rglob("*.jsonl"))
    bodies = [json.loads(line) for path in journals for line in path.read_text().splitlines()]
    assert len({body["event"] for body in bodies}) >= 12
    for body in bodies:
        event = parse_event(body)
        assert type(event) is KINDS[body["event"]]
        assert event.to_json() == body


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        # an older release
        ({"event": "commit", "step": 3}, events.CommitEvent(step=3)),
        ({"event": "resume", "step": 3}, events.ResumeEvent(step=3, source=None, committed_at=None)),
        ({"event": "step", "step": 3}, events.StepEvent(step=3, loss=None, lr=None, grad_norm=None)),
        # a field of a wrong type has its default, or makes the event unknown
        ({"event": "commit", "step": 3, "digest": 7, "t": "now"}, events.CommitEvent(step=3)),
        ({"event": "failed", "step": [], "error": {}}, events.AttemptErrorEvent(step=None)),
        ({"event": "stop", "step": True}, events.StopEvent(step=0)),
        ({"event": []}, None),
        ({"event": "delete", "step": 3}, None),
        ({"event": "delete", "step": "3", "attempt": "0001-9f2c"}, None),
        ({"event": "save", "step": 2**63, "blocked_s": 1, "commit_s": 1}, None),
        # whole numbers are numbers; keys of a later release are ignored
        ({"event": "no-room", "t": 4, "since": 3, "more": 1}, events.NoRoomEvent(t=4.0, since=3.0)),
        ({"event": "eval", "step": 1, "eval_loss": 2, "eval_x": "?"}, EvalEvent(step=1, scores={"eval_loss": 2.0})),
    ],
)
def test_what_is_missing_or_of_a_wrong_type(body: dict[str, Any], expected: Event | None) -> None:
    event = parse_event(body)
    assert event == (expected or UnknownEvent(name=str(body["event"]), body=body))
    if expected is None:
        assert event.to_json() == body


def test_every_event_and_every_field_is_explained() -> None:
    """The reference page is made of this."""
    for cls in (*KINDS.values(), events.Rejection, events.SlowRank, events.Reached):
        assert cls.__doc__
        hints = get_type_hints(cls, include_extras=True)
        assert [each.name for each in fields(cls) if not getattr(hints[each.name], "__metadata__", ())] == []


def test_numbers_and_nesting_beyond_all_bounds_are_no_events(tmp_path: Path) -> None:
    digits = "9" * 5000
    body = {"event": "resume", "step": 1, "source": f"{digits}-abcd/checkpoint-{digits}", "committed_at": 1.0}
    assert parse_event(body).to_json()
    storage = LocalStorage(tmp_path)
    lines = [
        b'{"t": 1.0, "event": "delete", "step": 1, "attempt": "%s-abcd"}\n' % digits.encode(),
        b"[" * 200_000,
        b"\n",
    ]
    storage.put("run/attempts/0001-aaaa/commits-0-000000.jsonl", lines)
    storage.put("run/attempts/0001-aaaa/claim.json", [json.dumps({"launch": ["a"], "claimed_at": None}).encode()])
    store = RunStore(storage, "run")
    assert build_catalog(store).accepted == ()
    assert read_attempt_history(store) == []
