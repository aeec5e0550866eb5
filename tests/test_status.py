"""What a run's own storage says of its state, when nobody is there to ask."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.layout import launch_dir
from outlast.checkpointing.storage import LocalStorage
from outlast.cluster.status import list_runs, read_status
from outlast.cluster.story import SILENCE_S
from tests.small import small_model


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no run 'run'"):
        read_status(LocalStorage(tmp_path), "run")
    assert list_runs(LocalStorage(tmp_path)) == []


def test_a_loop_of_ones_own_has_nobody_to_tell(tmp_path: Path) -> None:
    storage, (model, optimizer) = LocalStorage(tmp_path), small_model()
    checkpointer = Checkpointer(storage, "run")
    checkpointer.resume(model, optimizer)
    assert checkpointer.save(3, model, optimizer, {})
    found = read_status(storage, "run")
    assert (found["state"], found["step"], found["attempts"]) == ("unattended", 3, 1)
    assert found["newest_checkpoint"]["step"] == 3
    assert found["newest_checkpoint"]["verified_at"] is None
    again = Checkpointer(storage, "run")
    assert again.resume(model, optimizer) is not None
    again.flush()
    assert read_status(storage, "run")["newest_checkpoint"]["verified_at"] == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize(
    ("silent_s", "code", "state"),
    [(0, None, "starting"), (SILENCE_S + 1, None, "lost"), (0, 75, "stopped"), (0, 3, "failed")],
)
def test_a_launch_that_no_worker_has_joined(tmp_path: Path, silent_s: float, code: int | None, state: str) -> None:
    storage = LocalStorage(tmp_path)
    body = {"t": time.time() - silent_s, "ended": code is not None, "exit_code": code}
    storage.put(f"{launch_dir('run', 'one')}/alive.json", [json.dumps(body).encode()])
    [found] = list_runs(storage)
    assert (found["run"], found["state"], found["step"]) == ("run", state, 0)
    assert found["newest_checkpoint"] is None
