"""`every: auto`: the interval follows from what saves cost and how often the run was interrupted, and is journaled."""

from __future__ import annotations

import math
import time
from pathlib import Path

import pytest

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.save.save_schedule import FIRST_AUTO_S, SaveInterval
from outlast.checkpointing.storage.base import Entry
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.loop import save_timer as timer_module
from outlast.trainers.loop.save_timer import ASSUMED_BETWEEN_FAILURES_S, SaveTimer
from tests.support.small_model import small_model, train_step


class Clock:
    """A clock that only moves when the test moves it."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(timer_module, "time", made)
    return made


def test_the_interval_follows_from_costs_and_is_journaled(tmp_path: Path, clock: Clock) -> None:
    storage = LocalStorage(tmp_path)
    for launch in ("a", "b"):
        Checkpointer(storage, "run", launch=launch).flush()
    saver = Checkpointer(storage, "run", launch="c")
    model, optimizer = small_model()
    train_step(model, optimizer, 1)
    timer = SaveTimer(SaveInterval.parse("auto"), saver)
    timer.first_step_done()
    assert not timer.is_due()
    clock.now += FIRST_AUTO_S
    assert timer.is_due()

    timer.saved(urgent=False)
    assert saver.save(1, model, optimizer, {})
    saver.last_save = (2.0, 3.0)
    assert not timer.is_due()
    saver.flush()
    [interval] = [event for _, event in run_events(RunStore(storage, "run")) if event["event"] == "interval"]
    assert interval["between_failures_s"] == pytest.approx(ASSUMED_BETWEEN_FAILURES_S / 3, abs=60), "three attempts"
    expected = math.sqrt(2 * 2.0 * (interval["between_failures_s"] + interval["restart_s"]))
    assert interval["seconds"] == pytest.approx(expected, abs=0.1)
    clock.now += expected - 1
    assert not timer.is_due()
    clock.now += 2
    assert timer.is_due()


def test_an_urgent_save_says_nothing_of_the_others(tmp_path: Path, clock: Clock) -> None:
    saver = Checkpointer(LocalStorage(tmp_path), "run")
    timer = SaveTimer(SaveInterval.parse("auto"), saver)
    timer.saved(urgent=True)
    saver.last_save = (300.0, 300.0)
    clock.now += FIRST_AUTO_S
    assert timer.is_due(), "as if there had been none"


def test_an_estimate_that_cannot_be_made_is_no_end(tmp_path: Path, clock: Clock) -> None:
    class Deaf(LocalStorage):
        deaf = False

        def list(self, path: str) -> list[Entry]:
            if self.deaf:
                raise StorageError("no answer")
            return super().list(path)

    storage = Deaf(tmp_path)
    saver = Checkpointer(storage, "run")
    storage.deaf = True
    timer = SaveTimer(SaveInterval.parse("auto"), saver)
    timer.first_step_done()
    saver.last_save = (1.0, 1.0)
    clock.now += FIRST_AUTO_S
    assert timer.is_due()
