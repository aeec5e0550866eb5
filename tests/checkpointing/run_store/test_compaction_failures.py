"""Compactions of a journal that fail: each event stays readable once, and training goes on."""

from __future__ import annotations

import io
import threading
from typing import BinaryIO

import pytest

from outlast.checkpointing.run_store import journal as journal_module
from outlast.checkpointing.run_store.events import parse_event
from outlast.checkpointing.run_store.journal import Journal, JournalTail, read_events
from tests.checkpointing.run_store.test_compacted_segment import PLACE, Memory, usual_step, write


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 600)
    monkeypatch.setattr(journal_module, "COMPACTED_SEGMENTS", 2)
    monkeypatch.setattr(journal_module, "JOINED_FILES", 3)


@pytest.mark.parametrize("verb", ["put", "delete"])
def test_what_cannot_be_compacted_stays_as_it_is(verb: str) -> None:
    broken = Memory(fails=lambda did, path: did == verb and (verb == "delete" or path.endswith(".parquet")))
    healthy = Memory()
    found, wanted = write(broken, 60), write(healthy, 60)
    assert [{**event, "t": 0} for event in found] == [{**event, "t": 0} for event in wanted]
    assert any(name.endswith(".parquet") for name in broken.files) == (verb == "delete")
    left = [{name for name in files if name.endswith(".jsonl")} for files in (broken.files, healthy.files)]
    assert left[0] > left[1]


@pytest.mark.parametrize("verb", ["put", "delete"])
@pytest.mark.parametrize("ordinal", range(4))
def test_one_failure_leaves_each_event_once(verb: str, ordinal: int) -> None:
    """A joined file hides the segments within its range, so it must hold all of them."""
    calls = []

    def fails(did: str, path: str) -> bool:
        if did == verb and (verb == "delete" or path.endswith(".parquet")):
            calls.append(path)
            return len(calls) == ordinal + 1
        return False

    broken, healthy = Memory(fails=fails), Memory()
    found, wanted = write(broken, 400), write(healthy, 400)
    assert [{**event, "t": 0} for event in found] == [{**event, "t": 0} for event in wanted]
    assert len(calls) > ordinal + 8
    assert any("-000001-" not in name and name.endswith(".parquet") for name in broken.files)


def test_a_process_that_starts_no_more_threads_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    storage = Memory()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        journal = Journal(storage, PLACE, 0, flush_s=1e9)
        for number in range(1, 40):
            journal.write(parse_event(usual_step(number)))
            journal.flush()
    assert {name.rsplit(".")[-1] for name in storage.files} == {"jsonl"}
    for number in range(40, 60):
        journal.write(parse_event(usual_step(number)))
        journal.flush()
        journal.wait()
    assert any(name.endswith(".parquet") for name in storage.files)
    assert [event["step"] for event in read_events(storage, PLACE)] == list(range(1, 60))


def test_a_follower_that_could_not_read_a_file_gets_the_rest_once() -> None:
    """The joined file brings what the unreadable one held, and nothing twice."""

    class Unreliable(Memory):
        unreadable = ""

        def open(self, path: str) -> BinaryIO:
            return io.BytesIO(b"garbage") if path == self.unreadable else super().open(path)

    storage, seen = Unreliable(), list[int]()
    journal, tail = Journal(storage, PLACE, 0, flush_s=1e9), JournalTail(storage)

    def follow() -> None:
        for events in tail.new(PLACE):
            seen.extend([events["step"]] if isinstance(events, dict) else events["step"].tolist())

    for number in range(1, 61):
        journal.write(parse_event(usual_step(number)))
        journal.flush()
        journal.wait()
        compacted = sorted(name for name in storage.files if name.endswith(".parquet"))
        if len(compacted) == 2 and not storage.unreadable:
            storage.unreadable = compacted[1]
            follow()
            assert 0 < len(seen) < number
    assert storage.unreadable not in ("", *storage.files)
    follow()
    assert sorted(seen) == list(range(1, 61))
