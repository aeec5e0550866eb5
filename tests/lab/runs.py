"""One run of the lab, submitted as a user would submit it."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from outlast.checkpointing.format.layout import attempt_dir
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.run_store.claims import list_attempts, read_claim
from outlast.checkpointing.run_store.journal import read_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.fault_tolerance.failure_cause import Cause
from outlast.cluster.monitoring.status import read_status
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.lab.hosts import Lab
from tests.support.groups.worker_group import digests, losses, run_group, tiny_config

Recovered = Callable[[str, str, float], None]
OUTLAST = str(Path(sys.executable).with_name("outlast"))


class Run:
    """A tiny run with a checkpoint every 100 steps, whose group restarts after losses. `sections` changes its file."""

    def __init__(
        self,
        folder: Path,
        name: str,
        text_file: str,
        steps: int,
        workers: int,
        sections: Mapping[str, Any] | None = None,
        storage: Storage | None = None,
    ) -> None:
        self.storage, self.name = storage or LocalStorage(folder / "runs"), name
        body = tiny_config(name, self.storage.url, text_file, steps=steps, eval_every=200).model_dump(
            mode="json", exclude_defaults=True
        )
        body["scale"] = {"workers": workers, "cpus_per_worker": 1}
        body["checkpoint"]["every"] = 100
        body["failure"] = {"max_failures": 1, "max_preemptions": -1, "in_place": False}
        for key, value in (sections or {}).items():
            body[key] = {**body[key], **value} if isinstance(value, Mapping) else value
        self.file = folder / f"{name}.yaml"
        self.file.write_text(yaml.safe_dump(body))

    @property
    def store(self) -> RunStore:
        """A new one each time, because a RunStore remembers what it has read."""
        return RunStore(self.storage, self.name)

    def submit(self, lab: Lab) -> subprocess.Popen[str]:
        """Submits, and follows in a process of its own."""
        command = [OUTLAST, "submit", str(self.file), "--address", lab.address, "--follow"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def wait_for_commit(self, follower: subprocess.Popen[Any], after: int = 0) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            assert follower.poll() is None, follower.communicate()
            accepted = read_catalog(self.storage, self.name).accepted
            if accepted and accepted[0].ref.step > after:
                return
            time.sleep(0.05)
        raise AssertionError(f"no commit after step {after} within 120 s")

    def workers(self) -> list[dict[str, Any]]:
        """What the newest claim says of its workers: rank, host, node, pid."""
        newest = list_attempts(self.store)[-1]
        return list(read_claim(self.store, newest)["workers"])

    def host_of(self, rank: int) -> int:
        return int(self.workers()[rank]["host"].rsplit("-h", 1)[1])

    def wait_for_steps(self, follower: subprocess.Popen[str], attempts: int, workers: int, since: float) -> float:
        """Waits until an attempt after so many others makes steps on so many workers.

        Returns the seconds from `since` (seconds since the epoch) to the first step of any of them.
        """
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline:
            assert follower.poll() is None, follower.communicate()
            told = self._told(attempts)
            steps = [event["ended_at"] for event in told if event["event"] == "step"]
            if steps and [event["world_size"] for event in told if event["event"] == "plan"][-1:] == [workers]:
                return float(min(steps)) - since
            time.sleep(0.1)
        raise AssertionError(f"no steps on {workers} workers within 200 s")

    def first_step(self, attempts: int) -> float | None:
        """When the first step of attempts after so many others ended, in seconds since the epoch."""
        return min((event["ended_at"] for event in self._told(attempts) if event["event"] == "step"), default=None)

    def _told(self, attempts: int) -> list[dict[str, Any]]:
        later = list_attempts(self.store)[attempts:]
        return [event for attempt in later for event in read_events(self.storage, attempt_dir(self.name, attempt))]

    def assert_cause(self, *causes: Cause) -> None:
        """So many failures, and the journal names their causes."""
        failures = read_status(self.store)["failures"]
        assert [failure["cause"] for failure in failures] == [cause.value for cause in causes], failures


def elastic_reference(
    assign: Callable[..., Assignment], storage: LocalStorage, name: str, steps: int
) -> tuple[dict[str, str], dict[int, float]]:
    """Digests and losses of the undisturbed run `name`, at any number of workers."""
    sections = {"exactness": "elastic", "checkpoint": {"every": 100}}
    assignment = assign(name, sections=sections, steps=steps, eval_every=200, micro_batch=2)
    assert run_group(assignment, storage, 1, limit_s=300)[0].outcome is Outcome.DONE
    return digests(storage, name), losses(storage, name)


def come_back(cluster: Lab, *hosts: int) -> None:
    """Start hosts again."""
    for host in hosts:
        cluster.start(host)
    cluster.wait_for_nodes(4)
