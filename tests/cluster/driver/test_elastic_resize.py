"""Elastic groups: settings, the checkpoint requested before a resize, and what `status` shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.errors import ConfigError, OutlastError
from outlast.checkpointing.format.layout import launch_dir
from outlast.checkpointing.run_store.events import GroupFailureEvent, ResizeEvent, parse_event
from outlast.checkpointing.run_store.journal import Journal
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_file import load_run
from outlast.cluster.driver.coordinator_client import CoordinatorClient
from outlast.cluster.fault_tolerance import coordinator as coordinator_module
from outlast.cluster.fault_tolerance.coordinator import Coordinator, CoordinatorHandle, SaveRequest
from outlast.cluster.monitoring.status import read_status
from outlast.trainers.data.batch_plan import make_plan
from tests.support.groups.worker_group import tiny_config

REASON = "the group is resized from 2 to 3 workers"
ASKED = {"event": "save-requested", "reason": REASON, "step": 40}


def load(tmp_path: Path, *overrides: str) -> Any:
    (tmp_path / "run.yaml").write_text("name: run\nmodel: {path: gpt2}\ndata: {train: texts.txt}\n")
    return load_run(str(tmp_path / "run.yaml"), overrides)[0]


@pytest.mark.parametrize(
    ("written", "least", "most", "is_elastic"), [("3", 3, 3, False), ("[2, 8]", 2, 8, True), ("[4, 4]", 4, 4, False)]
)
def test_one_number_of_workers_or_two(tmp_path: Path, written: str, least: int, most: int, is_elastic: bool) -> None:
    scale = load(tmp_path, f"scale.workers={written}", "scale.resize_every=90s").scale
    assert (scale.min_workers, scale.max_workers, scale.is_elastic) == (least, most, is_elastic)
    assert scale.resize_every.amount == 90
    assert (
        load(tmp_path, f"scale.workers={json.dumps(scale.model_dump(mode='json')['workers'])}").scale.workers
        == scale.workers
    )


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("scale.workers=0", r"scale.workers: write a number of workers, such as 4, or \[min, max\]"),
        ("scale.workers=two", "scale.workers: write a number"),
        ("scale.workers=[1, 2, 3]", "scale.workers: write a number"),
        ("scale.workers=[8, 2]", r"scale.workers: min workers \(8\) must not exceed max \(2\)"),
        ("scale.resize_every=20", "scale.resize_every: 20 is not a duration: write 90s, 2m or 1h"),
        ("failure.hang_after=1 epoch", "failure.hang_after: '1 epoch' is not a duration"),
    ],
)
def test_what_cannot_be(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, setting)


def test_even_the_largest_group_must_have_work(tmp_path: Path) -> None:
    config = tiny_config("run", str(tmp_path), "texts.txt")
    with pytest.raises(ConfigError, match="9 workers, but a batch of 8 has only 8 micro-batches"):
        make_plan(config, 100, load(tmp_path, "scale.workers=[1, 9]").scale.max_workers)


@pytest.mark.parametrize(
    ("is_training", "heard", "expected"),
    [
        pytest.param(True, [], False, id="nothing-yet"),
        pytest.param(True, [{"event": "commit", "step": 30}], False, id="an-older-save"),
        pytest.param(True, [ASKED], False, id="under-way"),
        pytest.param(True, [ASKED, {"event": "commit", "step": 39}], False, id="one-that-was-in-flight"),
        pytest.param(True, [ASKED, {"event": "commit", "step": 40}], True, id="committed"),
        pytest.param(True, [ASKED, {"event": "superseded"}], True, id="another-launch-continues"),
        pytest.param(True, [{"event": "done"}], True, id="the-run-has-ended"),
        pytest.param(False, [], True, id="nothing-to-save"),
    ],
)
def test_a_requested_save(is_training: bool, heard: list[dict[str, Any]], expected: bool) -> None:
    request = SaveRequest(REASON)
    assert request.take(is_training=is_training) == (REASON if is_training else None)
    assert request.take(is_training=True) is None
    for event in heard:
        request.apply(parse_event(event))
    assert request.is_fulfilled is expected


def test_a_save_request_ends_when_rank_0_is_gone() -> None:
    coordinator = Coordinator()
    assert coordinator.is_saved(60)
    coordinator.request_save(REASON)
    assert not coordinator.is_saved(60)
    assert coordinator.is_saved(-1)


def test_a_save_request_and_an_announced_loss_at_once_are_both_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_module, "find_coordinator", lambda launch: CoordinatorHandle(None))
    client = CoordinatorClient("no-launch", 0, 1)
    client._saves.extend([REASON, "a node is about to be lost"])
    assert [client.save_requested() for _ in range(3)] == [REASON, "a node is about to be lost", None]


def test_a_run_that_is_given_up_is_no_ranks_failure() -> None:
    coordinator = Coordinator()
    coordinator.give_up(OutlastError("given up"))
    assert str(coordinator.failure()) == "given up"
    assert coordinator.fail(1, ConfigError("a wrong setting")) == 1
    assert str(coordinator.failure()) == "a wrong setting"


def test_a_verdict_that_progress_has_overtaken_is_void() -> None:
    coordinator = Coordinator()
    coordinator.give_up(OutlastError("given up"))
    coordinator.exchange([{"event": "step", "step": 7}])
    assert coordinator.failure() is not None
    coordinator.exchange([{"event": "commit", "step": 8}])
    assert coordinator.failure() is None


def test_status_shows_why_the_number_of_workers_changed(tmp_path: Path) -> None:
    storage, place = LocalStorage(tmp_path), launch_dir("run", "one")
    storage.put(f"{place}/alive.json", [json.dumps({"t": 0, "ended": True, "exit_code": 0}).encode()])
    resizes = Journal(storage, place, 0, stream="events-resize", flush_s=0)
    failures = Journal(storage, place, 0, flush_s=0)
    resizes.write(ResizeEvent(attempt="0001-aaaa", before=3, now=2, planned=False))
    failures.write(GroupFailureEvent(attempt="0001-aaaa", cause="node lost", rank=2, message="its node has died"))
    resizes.write(ResizeEvent(attempt="0002-bbbb", before=2, now=3, planned=True))
    failures.write(GroupFailureEvent(attempt="0003-cccc", cause="hang", rank=0, message="and goes on with as many"))
    found = [(item["before"], item["now"], item["cause"]) for item in read_status(RunStore(storage, "run"))["sizes"]]
    assert found == [(3, 2, "node lost"), (2, 3, "resized")]
