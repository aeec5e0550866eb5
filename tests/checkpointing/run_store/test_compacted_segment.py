"""Compacted journals say what their segments said: to the bit, at any instant, to every reader, whatever dies when."""

from __future__ import annotations

import io
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow.parquet as pq
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from outlast.checkpointing.errors import StorageRefused
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store import journal as journal_module
from outlast.checkpointing.run_store.compacted_segment import (
    CompactionError,
    StepColumns,
    compact,
    from_parquet,
    join,
    to_parquet,
)
from outlast.checkpointing.run_store.events import parse_event
from outlast.checkpointing.run_store.journal import (
    Journal,
    JournalTail,
    last_event_at,
    read_events,
    read_first_and_last,
)
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Buffer, Entry, ReadableStorage, Storage
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.monitoring.timeline_records import AttemptTimeline
from tests.support.crash_states import Disk, Effects, materialise
from tests.support.s3_server import s3_server

PLACE = "run/attempts/0001-aaaa"
Event = dict[str, Any]


def text(event: Event) -> str:
    """Equal for equal events, to the last bit of each number."""
    return json.dumps(event, sort_keys=True)


def line(event: Event) -> bytes:
    return json.dumps(event).encode() + b"\n"


def usual_step(number: int, **changed: Any) -> Event:
    body = {"loss": 1 / number, "lr": 1e-5, "grad_norm": 0.1 + 1 / number, "count": 60, "tokens": 64, "seconds": 0.28}
    return {"t": 100.0 + number, "event": "step", "step": number, **body, "ended_at": 99.5 + number, **changed}


# -- the file ----------------------------------------------------------------------------------------------------------

numbers = st.floats() | st.none() | st.integers() | st.booleans()
floats = st.floats()
usual = st.fixed_dictionaries(
    {
        "t": st.floats(),
        "event": st.just("step"),
        "step": st.integers(-5, 40),
        "loss": floats | st.none(),
        "lr": floats,
        "grad_norm": floats | st.none(),
        "count": st.integers(0, 2**62),
        "tokens": st.integers(0, 2**62),
        "seconds": floats,
        "ended_at": floats,
    }
)
odd = st.tuples(usual, st.dictionaries(st.sampled_from(["loss", "lr", "count", "tokens", "more"]), numbers)).map(
    lambda pair: {**pair[0], **{key: value for key, value in pair[1].items() if (key, value) != ("more", None)}}
)
others = st.fixed_dictionaries(
    {
        "t": st.floats(0, 1e10),
        "event": st.sampled_from(["start", "stop", "unknown", "slow", "failed", "done", "non-finite"]),
        "step": st.integers(0, 40),
        "ranks": st.lists(st.integers(0, 9), max_size=3),
        "error": st.text(max_size=9),
    }
)


@given(st.lists(st.one_of(usual, odd, others), max_size=30), st.integers(0, 30))
@example([usual_step(1, loss=None, grad_norm=float("nan")), usual_step(2, loss=float("inf"))], 0)
@example([usual_step(1, loss=-0.0), usual_step(2, lr=1), usual_step(3, count=2**70), usual_step(4, count=True)], 1)
def test_every_event_comes_back_as_it_was_to_the_last_bit(events: list[Event], cut: int) -> None:
    parts = [events[:cut], events[cut:]]
    whole = join([compact([[line(event) for event in part]]) for part in parts])
    read = from_parquet(to_parquet(whole))
    assert [text(event) for event in read] == [text(event) for event in events]
    assert [text(event) for event in read.after([len(parts[0]), 0])] == [text(event) for event in events[cut:]]
    half = len(parts[1]) // 2
    rest = [*parts[0], *parts[1][half:]]
    assert [text(event) for event in read.after([0, half])] == [text(event) for event in rest]


@given(st.lists(st.one_of(usual, usual, usual, odd, others), max_size=40))
@example([usual_step(1), usual_step(2, t=float("nan")), usual_step(3, loss=None)])
@example([usual_step(2), usual_step(1), usual_step(32, lr=1), usual_step(33)])
def test_a_timeline_of_compacted_events_is_that_of_the_events(events: list[Event]) -> None:
    events = [event for event in events if _can_be_told(event)]
    one, many = (AttemptTimeline(AttemptId(1, "aaaa")) for _ in range(2))
    for event in events:
        one.apply(json.loads(line(event)))
    for event_or_steps in from_parquet(to_parquet(compact([[line(event) for event in events]]))).by_column():
        if isinstance(event_or_steps, StepColumns):
            many.apply_steps(event_or_steps)
        else:
            many.apply(event_or_steps)
    for name in ("step", "tokens", "loss", "lr", "grad_norm", "seconds", "ended_at"):
        assert getattr(one.steps, name).tobytes() == getattr(many.steps, name).tobytes(), name
    assert (one.last_seen_at, one.start, one.final, one.slow) == (many.last_seen_at, many.start, many.final, many.slow)
    assert [text(note.to_json()) for note in one.notes] == [text(note.to_json()) for note in many.notes]


def _can_be_told(event: Event) -> bool:
    """Whether a timeline takes it: numbers of a step must be numbers, however they came."""
    try:
        AttemptTimeline(AttemptId(1, "aaaa")).apply(event)
    except (TypeError, OverflowError):
        return False
    return True


def test_any_program_reads_the_losses_of_a_compacted_file() -> None:
    events = [{"t": 1.0, "event": "start"}, *(usual_step(number) for number in range(1, 2001))]
    data = to_parquet(compact([[line(event) for event in events]]))
    table = pq.read_table(io.BytesIO(data))
    assert table["loss"].to_pylist() == [None, *(1 / number for number in range(1, 2001))]
    assert len(data) < 0.2 * sum(len(line(event)) for event in events)


def test_damage_is_noticed() -> None:
    data = to_parquet(compact([[line(usual_step(number)) for number in range(1, 3000)]]))
    draw = random.Random(0)
    for _ in range(60):
        bad = bytearray(data)
        bad[draw.randrange(4, len(data) - 4000)] ^= 1 << draw.randrange(8)
        with pytest.raises(CompactionError):
            from_parquet(bytes(bad))
    for torn in (b"", b"PAR1", data[: len(data) // 2], data[:-1], b"{}" * 100):
        with pytest.raises(CompactionError):
            from_parquet(torn)


# -- the journal -------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 600)
    monkeypatch.setattr(journal_module, "COMPACTED_SEGMENTS", 2)
    monkeypatch.setattr(journal_module, "JOINED_FILES", 3)


Files = dict[str, bytes]


@dataclass
class Memory:
    """A storage in memory that keeps every state it was in, and fails where it is told to."""

    files: Files = field(default_factory=dict)
    states: list[Files] = field(default_factory=lambda: [{}])
    fails: Callable[[str, str], bool] = lambda verb, path: False
    url: str = "memory"

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        self._change("put", path, {**self.files, path: b"".join(chunks)})

    def delete(self, path: str) -> None:
        self._change("delete", path, {key: data for key, data in self.files.items() if key != path})

    def _change(self, verb: str, path: str, after: Files) -> None:
        if self.fails(verb, path):
            raise StorageRefused(f"cannot {verb} {path}")
        self.files = after
        self.states.append(after)

    def open(self, path: str) -> BinaryIO:
        try:
            return io.BytesIO(self.files[path])
        except KeyError:
            raise FileNotFoundError(path) from None

    def list(self, path: str) -> list[Entry]:
        return _list(self.files, path)


def _list(files: Files, path: str) -> list[Entry]:
    inside = {key.removeprefix(f"{path}/"): len(data) for key, data in files.items() if key.startswith(f"{path}/")}
    return [Entry(name, size) for name, size in sorted(inside.items())]


def write(storage: Storage, num_steps: int, *, directory: str = PLACE) -> list[Event]:
    """A journal of so many steps with other events among them, flushed now and then. Returns its events."""
    written = Journal(storage, directory, 0, flush_s=1e9)
    written.write(parse_event({"event": "start"}))
    for number in range(1, num_steps + 1):
        event = usual_step(number, loss=None if number % 7 == 0 else 1 / number)
        written.write(parse_event({key: value for key, value in event.items() if key != "t"}))
        if number % 5 == 0:
            written.write(parse_event({"event": "commit", "step": number, "digest": "d" * 32, "num_bytes": 10}))
        if number % 3 == 0:
            written.flush()
            written.wait()
    written.write(parse_event({"event": "done", "step": num_steps}))
    written.flush()
    written.wait()
    return list(read_events(storage, directory))


@pytest.fixture(scope="module")
def recorded() -> Iterator[Memory]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal_module, "SEGMENT_BYTES", 600)
        patch.setattr(journal_module, "COMPACTED_SEGMENTS", 2)
        patch.setattr(journal_module, "JOINED_FILES", 3)
        storage = Memory()
        events = write(storage, 150)
        assert len(events) == 150 + 30 + 2
        yield storage


def told(storage: ReadableStorage, directory: str = PLACE) -> list[str]:
    return [text(event) for event in read_events(storage, directory)]


def durable(state: Files, everything: list[str]) -> int:
    """How many events a state holds, found without the reader: the newest line of its newest segment."""
    names = sorted(name for name in state if name.endswith(".jsonl"))
    last = text(json.loads(state[names[-1]].splitlines()[-1])) if names else ""
    return everything.index(last) + 1 if names else 0


def test_segments_become_few_files_and_the_ends_stay(recorded: Memory) -> None:
    names = [entry.name for entry in recorded.list(PLACE)]
    wide = [name for name in names if name.endswith(".parquet")]
    assert wide[0] == "events-0-000001-000006.parquet", "files were joined"
    assert len(names) < 15
    assert "events-0-000000.jsonl" in names
    assert sorted(names, key=lambda name: name.split("-")[2])[-1].endswith(".jsonl")
    assert len({name for state in recorded.states for name in state if name.endswith(".jsonl")}) > 25
    assert next(read_first_and_last(recorded, PLACE))["event"] == "start"
    assert list(read_first_and_last(recorded, PLACE))[-1]["event"] == "done"
    assert last_event_at(recorded, PLACE) == list(read_events(recorded, PLACE))[-1]["t"]


def test_whenever_its_writer_dies_a_journal_holds_each_event_once(recorded: Memory) -> None:
    everything = told(recorded)
    for state in recorded.states:
        assert told(Memory(state)) == everything[: durable(state, everything)]


class Moving:
    """A storage that changes while it is read, before each look at it, as a writer's would."""

    def __init__(self, states: list[Files], pace: Iterator[int]) -> None:
        self.states, self._pace, self.at = states, pace, 0
        self.url = "moving"

    def _move(self) -> Files:
        self.at = min(len(self.states) - 1, self.at + next(self._pace))
        return self.states[self.at]

    def open(self, path: str) -> BinaryIO:
        return Memory(self._move()).open(path)

    def list(self, path: str) -> list[Entry]:
        return _list(self._move(), path)

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        raise AssertionError("a reader writes nothing")

    def delete(self, path: str) -> None:
        raise AssertionError("a reader deletes nothing")


paces = st.tuples(st.integers(0, 100), st.integers(0, 999), st.sampled_from([1, 3, 20, 80]))


def _pace(seed: int, most: int) -> Iterator[int]:
    draw = random.Random(seed)
    while True:
        yield draw.choice([0, 0, 1, most])


@given(paces)
def test_a_reader_misses_nothing_while_segments_are_compacted(recorded: Memory, given_pace: Any) -> None:
    begin, seed, most = given_pace
    everything = told(recorded)
    states = recorded.states[min(begin, len(recorded.states) - 1) :]
    storage = Moving(states, _pace(seed, most))
    found = told(RunStore(storage, "run") if seed % 2 else storage)
    assert found == everything[: len(found)]
    assert len(found) >= durable(states[0], everything)


@given(paces)
def test_how_a_journal_began_and_ends_is_found_while_segments_are_compacted(recorded: Memory, given_pace: Any) -> None:
    begin, seed, most = given_pace
    everything = told(recorded)
    states = recorded.states[max(1, min(begin, len(recorded.states) - 1)) :]
    storage = Moving(states, _pace(seed, most))
    found = [text(event) for event in read_first_and_last(RunStore(storage, "run") if seed % 2 else storage, PLACE)]
    assert found[0] == everything[0]
    assert everything.index(found[-1]) + 1 >= durable(states[0], everything)


@given(paces)
def test_a_follower_gets_each_event_once(recorded: Memory, given_pace: Any) -> None:
    begin, seed, most = given_pace
    everything = told(recorded)
    storage = Moving(recorded.states[min(begin, len(recorded.states) - 1) :], _pace(seed, most))
    tail, steps, rest = JournalTail(storage), list[int](), list[str]()
    while storage.at < len(storage.states) - 1 or not rest or json.loads(rest[-1])["event"] != "done":
        for item in tail.new(PLACE):
            if isinstance(item, StepColumns):
                steps += item["step"].tolist()
            elif item["event"] == "step":
                steps.append(item["step"])
            else:
                rest.append(text(item))
    assert steps == list(range(1, 151))
    assert rest == [item for item in everything if json.loads(item)["event"] != "step"]
    assert list(tail.new(PLACE)) == []


def test_a_compacted_file_that_cannot_be_read_is_passed_over(recorded: Memory) -> None:
    """Either its segments are still there, or nothing else suffers."""
    everything = told(recorded)
    fresh = [(now, set(now) - set(before)) for before, now in pairwise(recorded.states)]
    compacted = [(state, name) for state, names in fresh for name in names if name.endswith(".parquet")]
    assert len(compacted) > 10
    for state, name in compacted:
        assert told(Memory({**state, name: state[name][:50]})) == everything[: durable(state, everything)]
    wide = next(name for name in recorded.files if name.endswith("000001-000006.parquet"))
    lost = list(from_parquet(recorded.files[wide]))
    left = told(Memory({**recorded.files, wide: b"PAR1"}))
    first = everything.index(text(lost[0]))
    assert left == everything[:first] + everything[first + len(lost) :]


def test_a_listing_that_a_compaction_overtook_is_made_again(recorded: Memory) -> None:
    """Such as that of a large directory, whose names come from several moments."""
    everything = told(recorded)
    after = recorded.states[-1]
    narrow = {name: data for name, data in after.items() if not name.endswith(".parquet")}
    looks = iter([narrow])

    class Torn(Memory):
        def list(self, path: str) -> list[Entry]:
            return _list(next(looks, after), path)

    assert told(Torn(after)) == everything


def test_an_old_listing_brings_nothing_back(recorded: Memory) -> None:
    """Such as a mount's, which shows for a while what was before."""
    num_compacted = [sum(name.endswith(".parquet") for name in state) for state in recorded.states]
    compacted = next(number for number, count in enumerate(num_compacted) if count == 2)
    now, before = recorded.states[compacted], recorded.states[compacted - 1]
    storage = Memory(now)
    tail = JournalTail(storage)
    assert list(tail.new(PLACE))
    storage.files = before
    assert list(tail.new(PLACE)) == []


def test_commits_are_not_compacted(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    written = Journal(storage, PLACE, 0, stream="commits", flush_s=0)
    for number in range(100):
        written.write(parse_event({"event": "commit", "step": number, "digest": "d" * 32, "num_bytes": 1}))
    written.wait()
    assert {entry.name.rsplit(".")[-1] for entry in storage.list(PLACE)} == {"jsonl"}
    assert len(list(read_events(storage, PLACE, "commits"))) == 100


def test_after_a_power_cut_a_journal_holds_what_was_flushed(tmp_path: Path) -> None:
    """In every state that the disk may be in."""
    disk, num_flushed, checked = Disk(), 0, 0
    (tmp_path / "real").mkdir()
    storage = LocalStorage(tmp_path / "real")
    with Effects(tmp_path / "real") as effects:
        events = write(storage, 30)
    lines = [text(event) for event in events]
    for effect in effects.done:
        disk.apply(effect)
        if effect[0] == "sync":
            continue
        for number, state in enumerate(disk.states()):
            place = tmp_path / f"state-{checked}-{number}"
            place.mkdir()
            materialise(state, place)
            found = told(LocalStorage(place))
            assert found == lines[: len(found)]
            assert len(found) >= num_flushed, "what was durable before has gone"
            shutil.rmtree(place)
        checked += 1
        now = {name: data for name, data in disk.now().items() if data is not None and name.endswith(".jsonl")}
        if effect[0] == "unlink" and now:
            num_flushed = max(num_flushed, durable(now, lines))
    assert num_flushed > 20


_ENDLESS = """
import sys
from pathlib import Path
from outlast.checkpointing.run_store import journal
from outlast.checkpointing.run_store.events import parse_event
from outlast.checkpointing.storage.local import LocalStorage
journal.SEGMENT_BYTES, journal.COMPACTED_SEGMENTS, journal.JOINED_FILES = 600, 2, 3
written = journal.Journal(LocalStorage(Path(sys.argv[1])), "run", 0, flush_s=1e9)
for number in range(10**9):
    body = dict(loss=1 / (number + 1), lr=1e-5, grad_norm=0.5, count=1, tokens=1, seconds=0.1, ended_at=1.0)
    written.write(parse_event({"event": "step", "step": number, **body}))
    written.flush()
    if number % 10 == 0:
        print(number, flush=True)
"""


def test_a_writer_that_is_killed_leaves_each_event_once(tmp_path: Path) -> None:
    draw = random.Random(0)
    for turn in range(3):
        folder = tmp_path / str(turn)
        command = [sys.executable, "-c", _ENDLESS, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            until, acknowledged = draw.randrange(60, 150), 0
            for said in process.stdout:
                acknowledged = int(said)
                if acknowledged >= until and any((folder / "run").glob("*.parquet")):
                    break
            time.sleep(draw.random() / 50)
            process.send_signal(signal.SIGKILL)
        steps = [event["step"] for event in read_events(LocalStorage(folder), "run")]
        assert steps == list(range(len(steps)))
        assert len(steps) > acknowledged


def test_two_readers_of_a_live_journal_on_s3(tmp_path: Path) -> None:
    with s3_server() as url:
        storage = open_storage(f"{url}/runs")
        events: list[Event] = []
        writer = threading.Thread(target=lambda: events.extend(write(storage, 90)))
        writer.start()
        tail, steps = JournalTail(open_storage(f"{url}/runs")), list[int]()
        while True:
            was_alive = writer.is_alive()
            for item in tail.new(PLACE):
                if isinstance(item, StepColumns):
                    steps += item["step"].tolist()
                elif item["event"] == "step":
                    steps.append(item["step"])
            found = [event["step"] for event in read_events(storage, PLACE) if event["event"] == "step"]
            assert found == list(range(1, len(found) + 1))
            if not was_alive:
                break
        writer.join()
        assert steps == found == list(range(1, 91))
        names = [entry.name for entry in storage.list(PLACE)]
        assert any(name.endswith(".parquet") for name in names)
