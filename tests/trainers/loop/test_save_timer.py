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
from outlast.checkpointing.save.save_interval import FIRST_AUTO_S, SaveInterval
from outlast.checkpointing.storage.base import Entry
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.loop import save_timer as pace_module
from outlast.trainers.loop.save_timer import ASSUMED_BETWEEN_FAILURES_S, SaveTimer
from tests.support.small_model import small_model, train_step


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return time.time()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(pace_module, "time", made)
    return made


def test_the_interval_follows_from_costs_and_is_told(tmp_path: Path, clock: Clock) -> None:
    storage = LocalStorage(tmp_path)
    for launch in ("a", "b"):
        Checkpointer(storage, "run", launch=launch).flush()
    saver = Checkpointer(storage, "run", launch="c")
    model, optimizer = small_model()
    train_step(model, optimizer, 1)
    pace = SaveTimer(SaveInterval.parse("auto"), saver)
    pace.first_step_is_done()
    assert not pace.is_due()
    clock.now += FIRST_AUTO_S
    assert pace.is_due()

    pace.saved(urgent=False)
    assert saver.save(1, model, optimizer, {})
    saver.last_save = (2.0, 3.0)
    assert not pace.is_due()
    saver.flush()
    [told] = [event for _, event in run_events(RunStore(storage, "run")) if event["event"] == "interval"]
    assert told["between_failures_s"] == pytest.approx(ASSUMED_BETWEEN_FAILURES_S / 3, abs=60), "three attempts"
    expected = math.sqrt(2 * 2.0 * (told["between_failures_s"] + told["restart_s"]))
    assert told["seconds"] == pytest.approx(expected, abs=0.1)
    clock.now += expected - 1
    assert not pace.is_due()
    clock.now += 2
    assert pace.is_due()


def test_an_urgent_save_says_nothing_of_the_others(tmp_path: Path, clock: Clock) -> None:
    saver = Checkpointer(LocalStorage(tmp_path), "run")
    pace = SaveTimer(SaveInterval.parse("auto"), saver)
    pace.saved(urgent=True)
    saver.last_save = (300.0, 300.0)
    clock.now += FIRST_AUTO_S
    assert pace.is_due(), "as if there had been none"


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
    pace = SaveTimer(SaveInterval.parse("auto"), saver)
    pace.first_step_is_done()
    saver.last_save = (1.0, 1.0)
    clock.now += FIRST_AUTO_S
    assert pace.is_due()
