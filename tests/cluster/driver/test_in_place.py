"""On a real Ray: a worker is lost, the others go on in memory, and the run has the bits of an undisturbed one."""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.driver.launch import Interrupted, Launch
from outlast.cluster.fault_tolerance.failure_cause import RunFailed
from outlast.trainers.loop.train_loop import Outcome
from tests.conftest import Reference
from tests.support.groups.worker_group import digests, fault, losses, run_group, tiny_config
from tests.support.tasks.blocked import BLOCKED_BY
from tests.support.tasks.raising import MESSAGE

MakeReference = Callable[[int], Reference]
Made = tuple[RunConfig, dict[str, Any]]


def made(name: str, storage: LocalStorage, text_file: str, **sections: Any) -> Made:
    sections = {"scale": {"workers": 2, "cpus_per_worker": 0.3}, **sections}
    body = tiny_config(name, storage.url, text_file).model_dump(mode="json", exclude_defaults=True) | sections
    return RunConfig.model_validate(body), body


@dataclass(frozen=True)
class Case:
    """Workers that are lost at step 7."""

    actions: tuple[FaultAction, ...]
    num_workers: int = 2
    num_spares: int = 1
    is_elastic: bool = False

    def __str__(self) -> str:
        world = "elastic" if self.is_elastic else "same-world"
        return f"{self.num_workers}-{world}-{self.num_spares}-spares-" + "-".join(each.value for each in self.actions)


CASES = [
    Case((FaultAction.SIGKILL,)),
    Case((FaultAction.SIGKILL,), num_spares=0),
    Case((FaultAction.SIGKILL,), num_workers=3, num_spares=0, is_elastic=True),
]
SLOW = [
    Case((FaultAction.STOP,)),
    Case((FaultAction.EXCEPTION,)),
    Case((FaultAction.SIGKILL, FaultAction.SIGKILL), num_workers=3),
]


@pytest.mark.ray
@pytest.mark.parametrize("case", [*CASES, *(pytest.param(case, marks=pytest.mark.faults) for case in SLOW)], ids=str)
def test_the_others_go_on(
    case: Case, storage: LocalStorage, text_file: str, reference: MakeReference, elastic: Reference, tmp_path: Path
) -> None:
    run = f"in-place-{case}"
    exactness = {"exactness": "elastic"} if case.is_elastic else {}
    scale = {"workers": case.num_workers, "spares": case.num_spares, "cpus_per_worker": 0.3}
    config, body = made(run, storage, text_file, scale=scale, **exactness)
    strikes = [fault(FaultPoint.STEP, 7, rank, action, tmp_path) for rank, action in enumerate(case.actions)]
    said: list[dict[str, Any]] = []
    ended = Launch(config, body, faults=strikes, tell=said.append).run()
    assert ended.outcome is Outcome.DONE
    assert all(Path(strike.record).exists() for strike in strikes)
    expected = elastic if case.is_elastic else reference(case.num_workers)
    assert digests(storage, run) == expected.digests
    assert losses(storage, run) == expected.losses
    found = [event for _, event in run_events(RunStore(storage, run))]
    counts = Counter((event["event"], event["step"]) for event in found if event["event"] in ("step", "eval"))
    assert set(counts.values()) == {1}, counts
    kinds = Counter(event["event"] for event in found)
    assert kinds["regrouped"] >= 1
    assert not kinds["resume"], "nobody read a checkpoint"
    plans = [body["sender"] for body in said if body["event"] == "plan"]
    assert sorted(plans) == sorted({event["sender"] for event in said if event["event"] == "step"}), "each its own"
    print(case, [event["marks"] for event in found if event["event"] == "regrouped"])


@pytest.mark.ray
def test_an_error_that_every_worker_raises_restarts_the_group(
    storage: LocalStorage, text_file: str, tmp_path: Path
) -> None:
    """Going on in memory is no help: the next group resumes from the newest checkpoint, as without it."""
    run = "in-place-all-raise"
    config, body = made(run, storage, text_file)
    strikes = [fault(FaultPoint.STEP, 7, rank, FaultAction.EXCEPTION, tmp_path) for rank in (0, 1)]
    assert Launch(config, body, faults=strikes).run().outcome is Outcome.DONE
    kinds = Counter(event["event"] for _, event in run_events(RunStore(storage, run)))
    assert kinds["resume"] == 1


@pytest.mark.ray
@pytest.mark.faults
def test_an_error_that_comes_back_gives_the_run_up(storage: LocalStorage, text_file: str) -> None:
    """Whichever rank reports its end first: as soon as without going on in memory, and with the user's error."""
    config, body = made("in-place-raises", storage, text_file)
    body["model"] |= {"task": "tests.support.tasks.raising:Raising"}
    config, said = RunConfig.model_validate(body), list[dict[str, Any]]()
    launch = Launch(config, body, code=str(Path(__file__).parents[3]), tell=said.append)
    with pytest.raises(RunFailed, match="the same error twice without a step in between"):
        launch.run()
    ends = [event["message"] for event in said if event["event"] == "failure" and not event.get("in_place")]
    assert len(ends) == 2
    assert all(MESSAGE in message for message in ends)


@pytest.mark.ray
def test_a_stop_while_a_lost_worker_is_not_replaced(
    storage: LocalStorage, text_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing can be saved then, and the launch does not claim that something was."""
    strike = fault(FaultPoint.STEP, 2, 1, FaultAction.SIGKILL, tmp_path)
    monkeypatch.setenv(BLOCKED_BY, strike.record)
    config, body = made("in-place-stop", storage, text_file)
    body["model"] |= {"task": "tests.support.tasks.blocked:Blocked"}
    config = RunConfig.model_validate(body)

    def tell(event: dict[str, Any]) -> None:
        if event["event"] == "failure":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="nothing is saved"):
        Launch(config, body, code=str(Path(__file__).parents[3]), faults=[strike], tell=tell).run()
    assert Path(strike.record).exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"scale": {"workers": 1, "spares": 1}}, "scale.spares needs at least 2 scale.workers"),
        ({"scale": {"workers": 2, "spares": 1, "parallel": "fsdp"}}, "scale.spares needs scale.parallel: ddp"),
        ({"scale": {"workers": [2, 3], "spares": 1}, "exactness": "elastic"}, "need a fixed number"),
        ({"scale": {"workers": 2, "spares": 1}, "failure": {"in_place": False}}, "does not go with"),
        ({"scale": {"workers": 1}, "failure": {"in_place": True}}, "failure.in_place: true needs at least 2"),
        ({"scale": {"workers": [2, 3]}, "failure": {"in_place": True}}, "needs exactness: elastic"),
    ],
)
def test_where_it_cannot_be(storage: LocalStorage, text_file: str, sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made("never", storage, text_file, **sections)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"scale": {"workers": 2}}, True),
        ({"scale": {"workers": 1}}, False),
        ({"scale": {"workers": 2, "gpus_per_worker": 1}}, False),
        ({"scale": {"workers": 2, "gpus_per_worker": 1}, "failure": {"in_place": True}}, True),
        ({"scale": {"workers": 2, "parallel": "fsdp"}}, False),
        ({"scale": {"workers": [2, 3]}}, False),
        ({"scale": {"workers": [2, 3]}, "exactness": "elastic"}, True),
        ({"scale": {"workers": 2}, "failure": {"in_place": False}}, False),
    ],
)
def test_by_default_it_is_on_where_it_is_tried(
    storage: LocalStorage, text_file: str, sections: dict[str, Any], expected: bool
) -> None:
    assert made("never", storage, text_file, **sections)[0].goes_on_in_place is expected


@pytest.fixture(scope="module")
def elastic(assign: Callable[..., Any], storage: LocalStorage) -> Reference:
    """The uninterrupted run whose bits do not depend on the world size."""
    run_group(assign("on-ray-elastic", sections={"exactness": "elastic"}), storage, 2)
    return Reference("on-ray-elastic", digests(storage, "on-ray-elastic"), losses(storage, "on-ray-elastic"))
