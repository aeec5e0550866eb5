"""On an existing cluster the workers outlive the driver: real processes, real signals, a Ray cluster of its own."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from outlast.checkpointing.run_store import events
from outlast.checkpointing.run_store.catalog import read_catalog, run_events
from outlast.checkpointing.run_store.claims import list_attempts, list_launches
from outlast.checkpointing.run_store.liveness import read_liveness
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_config import FailureSettings
from outlast.cluster.driver.detached.root import LaunchRoot
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.cluster.jobs.test_ray_jobs import BIN, Cluster
from tests.support.groups.worker_group import digests, run_group, tiny_config

NUM_STEPS = 600
FOREVER = 100_000
LIMIT_S = 100
#: What the cluster still holds of outlast, as a driver sees it.
ACTORS = """
import ray, sys, time
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
deadline = time.monotonic() + 30
while (left := [each for each in ray.util.list_named_actors(True) if "outlast" in each["namespace"]]) \
        and time.monotonic() < deadline:
    time.sleep(0.2)
print(left, ray.available_resources().get("CPU"))
"""


def test_a_driver_receives_each_event_once_and_what_it_needs_to_show_them() -> None:
    root = LaunchRoot(1e9)

    def add(event: events.Event) -> None:
        root._add_event({"sender": "0001-00000000", **event.to_json()})

    def kinds(bodies: list[dict[str, Any]]) -> list[str]:
        return [body["event"] for body in bodies]

    for event in (events.StartEvent(), events.PlanEvent(num_steps=9, batch=1, world_size=2)):
        add(event)
    first, cursor, _ = root.poll(None)
    assert kinds(first) == ["start", "plan"]
    assert kinds(root.poll(None)[0]) == ["start", "plan"], "the first driver may have died before it had them"
    add(events.UnderWayEvent(marks={}))
    second, cursor, _ = root.poll(cursor)
    add(events.NoteEvent(text="later"))
    assert (kinds(second), kinds(root.poll(cursor)[0])) == (["under-way"], ["note"])
    assert kinds(root.poll(None)[0]) == ["plan", "under-way", "note"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    yield cluster
    cluster.shut_down()


class Run:
    """A run on two workers in a storage of its own."""

    def __init__(self, folder: Path, text_file: str, address: str, steps: int, failure: Mapping[str, Any]) -> None:
        body = tiny_config("run", str(folder), text_file, steps=steps, eval_every=200).model_dump(
            mode="json", exclude_defaults=True
        )
        body |= {"scale": {"workers": 2}, "failure": dict(failure)}
        body["checkpoint"]["every"] = 200
        (folder / "run.yaml").write_text(yaml.safe_dump(body))
        self.address, self.file = address, folder / "run.yaml"
        self.storage = LocalStorage(folder)
        self.store = RunStore(self.storage, "run")
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *options: str) -> subprocess.Popen[str]:
        command = [str(BIN / "outlast"), "train", str(self.file), "--address", self.address, *options]
        self.started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return self.started[-1]

    def stop(self) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "outlast"), "stop", "run", "--address", self.address]
        return subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)

    @property
    def steps(self) -> list[int]:
        return [event["step"] for _, event in run_events(self.store.fresh()) if event["event"] == "step"]

    @property
    def alive(self) -> dict[str, Any]:
        return read_liveness(self.store.fresh(), list_launches(self.store.fresh())[-1])

    def wait(self, until: Callable[[], object]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not until():
            assert time.monotonic() < deadline, self.alive
            time.sleep(0.1)

    def lose_its_driver(self) -> None:
        """Start it, and kill the driver once the run has a checkpoint."""
        driver = self.start()
        self.wait(lambda: driver.poll() is not None or read_catalog(self.storage, "run").accepted)
        assert driver.poll() is None, driver.communicate()
        driver.kill()
        driver.communicate()


@pytest.fixture
def make_run(tmp_path: Path, text_file: str, cluster: Cluster) -> Iterator[Callable[..., Run]]:
    made: list[Run] = []

    def make(steps: int = FOREVER, **failure: Any) -> Run:
        made.append(Run(tmp_path, text_file, cluster.ray_address, steps, {"survive_driver": True, **failure}))
        return made[-1]

    yield make
    for run in made:
        for driver in run.started:
            if driver.poll() is None:
                driver.kill()
                driver.communicate()
        run.stop()


def left_on(cluster: Cluster) -> str:
    command = [str(BIN / "python"), "-c", ACTORS, cluster.ray_address]
    return subprocess.check_output(command, text=True, timeout=LIMIT_S).strip()


@pytest.mark.ray
@pytest.mark.faults  # two minutes
@pytest.mark.slice
def test_a_killed_driver_costs_no_step(
    make_run: Callable[..., Run],
    cluster: Cluster,
    assign: Callable[..., Assignment],
    storage: LocalStorage,
) -> None:
    undisturbed = assign("detached", steps=NUM_STEPS, eval_every=200, sections={"checkpoint": {"every": 200}})
    assert run_group(undisturbed, storage, 2)[0].outcome is Outcome.DONE
    run = make_run(NUM_STEPS)
    run.lose_its_driver()
    out, err = (driver := run.start()).communicate(timeout=LIMIT_S)
    assert driver.returncode == 0, err
    assert "attached to the running launch" in err
    assert len(list_attempts(run.store)) == len(list_launches(run.store)) == 1
    assert run.steps == list(range(1, NUM_STEPS + 1))
    assert digests(run.storage, "run") == digests(storage, "detached")
    assert (run.alive["ended"], run.alive["exit_code"]) == (True, 0)
    again, err = (driver := run.start()).communicate(timeout=LIMIT_S)
    assert (driver.returncode, again) == (0, out), err
    assert left_on(cluster) == "[] 2.0"


@pytest.mark.ray
@pytest.mark.faults  # a minute
def test_a_run_without_a_driver_ends_like_any_other(make_run: Callable[..., Run], cluster: Cluster) -> None:
    run = make_run(NUM_STEPS)
    run.lose_its_driver()
    run.wait(lambda: run.alive["ended"])
    assert run.alive["exit_code"] == 0
    assert json.loads((run.file.parent / "run/model/config.json").read_text())
    assert left_on(cluster) == "[] 2.0"
    _, err = (driver := run.start()).communicate(timeout=LIMIT_S)
    assert driver.returncode == 0, err
    assert len(list_launches(run.store.fresh())) == 1


@pytest.mark.ray
@pytest.mark.faults  # two minutes
def test_a_driver_that_was_away_at_the_end_learns_of_it(make_run: Callable[..., Run], cluster: Cluster) -> None:
    """It is stopped for longer than the result waits for it, and the root has ended."""
    run = make_run(NUM_STEPS)
    driver = run.start()
    run.wait(lambda: driver.poll() is not None or read_catalog(run.storage, "run").accepted)
    driver.send_signal(signal.SIGSTOP)
    run.wait(lambda: run.alive["ended"])
    run.wait(lambda: left_on(cluster) == "[] 2.0")
    driver.send_signal(signal.SIGCONT)
    out, err = driver.communicate(timeout=LIMIT_S)
    assert (driver.returncode, out.strip()) == (0, str(run.file.parent / "run/model")), err


def test_a_lease_is_longer_than_a_busy_driver_is_silent() -> None:
    with pytest.raises(ValueError, match="must be at least 1m"):
        FailureSettings.model_validate({"lease": "3s"})


@pytest.mark.ray
@pytest.mark.faults  # a minute
def test_a_run_without_a_driver_is_stopped(make_run: Callable[..., Run], cluster: Cluster) -> None:
    run = make_run()
    run.lose_its_driver()
    done = run.stop()
    assert done.returncode == 75, done.stderr
    assert read_catalog(run.storage, "run").accepted[0].ref.step == max(run.steps)
    assert run.alive["exit_code"] == 75
    assert left_on(cluster) == "[] 2.0"
    assert "no workers of run run are left" in run.stop().stderr


@pytest.mark.ray
@pytest.mark.faults  # two minutes
def test_the_lease_ends_a_run_that_no_driver_follows(make_run: Callable[..., Run], cluster: Cluster) -> None:
    run = make_run(lease="1m")
    run.lose_its_driver()
    run.wait(lambda: run.alive["ended"])
    assert run.alive["exit_code"] == 75
    assert read_catalog(run.storage, "run").accepted[0].ref.step == max(run.steps)
    assert left_on(cluster) == "[] 2.0"


@pytest.mark.ray
@pytest.mark.faults  # two minutes
def test_a_launch_that_takes_over_ends_the_workers_without_a_driver(make_run: Callable[..., Run]) -> None:
    run = make_run()
    run.lose_its_driver()
    first = list_launches(run.store)[-1]
    second = run.start("--take-over")
    run.wait(lambda: second.poll() is not None or len(list_attempts(run.store.fresh())) == 2)
    assert second.poll() is None, second.communicate()
    assert read_liveness(run.store.fresh(), first)["ended"]
    assert list_launches(run.store.fresh())[-1] != first
