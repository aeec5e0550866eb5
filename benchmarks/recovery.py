"""Seconds from a fault to the next step, beside bare Ray Train under the same fault, in one Ray cluster of four hosts.

Where a worker is killed, also beside `transformers.Trainer` under a loop that starts it again, on one host without Ray.
outlast's seconds are split by what it notes in its journal.

    python -m benchmarks.recovery [--quick] [--json FILE]

Needs root and iproute2 (see tests/lab). A 30,000-weight GPT-2 on two hosts with a third to spare, dead nodes noticed
within about three seconds, a checkpoint every 100 steps. They take turns under each fault.
"""

from __future__ import annotations

import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from ray.job_submission import JobStatus, JobSubmissionClient

from benchmarks.command import command
from outlast.checkpointing.run_store.catalog import run_events
from outlast.checkpointing.run_store.claims import list_attempts, list_launches
from outlast.checkpointing.run_store.journal import read_events
from outlast.cluster.drills.demo import write_texts
from tests.lab.hosts import HEAD, Lab, lab, why_not
from tests.lab.runs import Run

STEPS, EVERY = 700, 100
DRAIN_STEPS = 3000  # a drain takes 30 s, in which bare Ray Train makes up to 60 steps a second
STRIKE_AT = 320  # by then outlast's standbys are there, which on two cores takes them half a minute
LIMIT_S = 400.0
Steps = list[tuple[float, int]]


class Ours:
    """A run of outlast's."""

    name = "outlast, restart"
    settings: ClassVar[Mapping[str, Any]] = {"failure": {"standby_after_s": 0}}

    def __init__(self, hosts: Lab, folder: Path, steps: int) -> None:
        write_texts(folder / "texts.jsonl")
        self._run = Run(folder, folder.name, str(folder / "texts.jsonl"), steps, 2, self.settings)
        self._hosts, self.host_of = hosts, self._run.host_of
        self._follower = self._run.submit(hosts)

    def steps(self) -> Steps:
        """When each step ended, in the order of time; steps made twice stand twice.

        A rank 0 that is killed takes the last seconds of its journal along; the launch's knows how far it had come.
        """
        events = [event for _, event in run_events(self._run.store) if event["event"] == "step"]
        events += [event["reached"] for event in self._told() if "reached" in event]
        return sorted({(event["ended_at"], event["step"]) for event in events})

    def _told(self) -> list[dict[str, Any]]:
        """The journals of the launches."""
        store = self._run.store
        return [e for name in list_launches(store) for e in read_events(store.storage, store.launch_dir(name))]

    def kill_worker(self) -> None:
        self._hosts.signal_inside(self._run.host_of(1), self._run.workers()[1]["pid"], signal.SIGKILL)

    def is_over(self) -> bool:
        return self._follower.poll() is not None

    def assert_struck(self) -> None:
        """The fault ended an attempt."""
        assert len(list_attempts(self._run.store)) > 1, "the run went on as if nothing had happened"

    def split(self, struck: float) -> dict[str, float]:
        """What the seconds from the fault to the first step went to, part by part in the order of time."""
        noticed = min(
            (event["noticed_at"] for event in self._told() if event.get("noticed_at", 0) > struck), default=struck
        )
        ways = [e["marks"] for _, e in run_events(self._run.store) if e["event"] == "under-way"]
        way = min((marks for marks in ways if marks["first_step"] > struck), key=lambda marks: marks["first_step"])
        parts, reached = {}, struck
        for name, at in {"detection": noticed, **way}.items():
            parts[f"{name}_s"] = max(0.0, at - reached)
            reached = max(reached, at)
        return parts

    def submit_again(self) -> None:
        self._follower.communicate()
        self._follower = self._run.submit(self._hosts)


class WithReplacement(Ours):
    """A run of outlast's that goes on in memory once the lost worker is replaced."""

    name = "outlast, in memory"
    settings: ClassVar = {"failure": {"standby_after_s": 0, "in_place": True}}

    def split(self, struck: float) -> dict[str, float]:
        """As `Ours.split`."""
        events = [event for _, event in run_events(self._run.store)]
        group = next(event for event in events if event["event"] == "regrouped")
        first = [event["marks"]["first_step"] for event in events if event["event"] == "under-way"]
        marks = {**group["marks"], "first_step": min(at for at in first if at > group["marks"]["group"])}
        parts, reached = {}, struck
        for name, at in marks.items():
            parts[f"{'detection' if name == 'noticed' else name}_s"] = max(0.0, at - reached)
            reached = max(reached, at)
        return parts


class WithSpare(WithReplacement):
    """A run of outlast's that goes on in memory with a spare."""

    name = "outlast, in memory, a spare"
    settings: ClassVar = {**WithReplacement.settings, "scale": {"spares": 1}}


class WithFewer(WithReplacement):
    """A run of outlast's that goes on in memory with one worker fewer."""

    name = "outlast, in memory, elastic"
    settings: ClassVar = {**WithReplacement.settings, "exactness": "elastic"}


class Bare:
    """A job of bare Ray Train's."""

    name = "bare Ray Train"

    def __init__(self, hosts: Lab, folder: Path, steps: int) -> None:
        self._folder, self._hosts = folder, hosts
        self._client = JobSubmissionClient(hosts.address)
        script = Path(__file__).with_name("recovery_bare.py")
        self._id = self._client.submit_job(entrypoint=f"exec {sys.executable} {script} {folder} {steps} {EVERY}")

    def steps(self) -> Steps:
        """As `Ours.steps`."""
        return read_steps(self._folder)

    def host_of(self, rank: int) -> int:
        """Any host with a worker that is not the one that writes the steps."""
        return max(host for host in (1, 2, 3) if self._hosts.processes(host, "RayTrainWorker"))

    def kill_worker(self) -> None:
        host = self.host_of(1)
        for pid in self._hosts.processes(host, "RayTrainWorker"):
            self._hosts.signal_inside(host, pid, signal.SIGKILL)

    def is_over(self) -> bool:
        return bool(JobStatus(self._client.get_job_status(self._id)).is_terminal())


class Relaunched:
    """A script with `transformers.Trainer`, under a loop."""

    name = "Trainer, relaunched"

    def __init__(self, hosts: Lab, folder: Path, steps: int) -> None:
        self._folder = folder
        script = Path(__file__).with_name("recovery_trainer.py")
        command = [sys.executable, str(script), str(folder), str(steps), str(EVERY)]
        self._loop = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def steps(self) -> Steps:
        """As `Ours.steps`."""
        return read_steps(self._folder)

    def kill_worker(self) -> None:
        os.kill(int((self._folder / "rank-1.pid").read_text()), signal.SIGKILL)

    def is_over(self) -> bool:
        return self._loop.poll() is not None


def read_steps(folder: Path) -> Steps:
    """What a peer wrote of its steps."""
    path = folder / "steps.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(float(line.split()[0]), int(line.split()[1])) for line in lines if len(line.split()) == 2]


def worker_killed(hosts: Lab, run: Any) -> int | None:
    run.kill_worker()
    return None


def node_lost(hosts: Lab, run: Any) -> int | None:
    lost: int = run.host_of(1)
    hosts.kill(lost)
    return lost


def node_drained(hosts: Lab, run: Any) -> int | None:
    leaving: int = run.host_of(1)
    hosts.evict(leaving)
    return leaving


def driver_killed(hosts: Lab, run: Any) -> int | None:
    for pid in hosts.processes(HEAD, "outlast.cluster.cli train"):
        hosts.signal_inside(HEAD, pid, signal.SIGKILL)
    wait(run.is_over)
    run.submit_again()
    return None


FAULTS: dict[str, tuple[Callable[[Lab, Any], int | None], int, tuple[type, ...]]] = {
    "worker SIGKILL": (worker_killed, STEPS, (WithSpare, WithFewer, WithReplacement, Ours, Bare, Relaunched)),
    "node SIGKILL, one to spare": (node_lost, STEPS, (WithSpare, WithReplacement, Ours, Bare)),
    "node SIGTERM, drain of 30 s": (node_drained, DRAIN_STEPS, (WithReplacement, Ours, Bare)),
    "driver SIGKILL, submitted again at once": (driver_killed, STEPS, (Ours,)),  # ends bare Ray Train
}


def wait(condition: Callable[[], Any]) -> None:
    """Waits until `condition()` is true."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{condition} not within {LIMIT_S:g} s")
        time.sleep(0.1)


def one(hosts: Lab, folder: Path, name: str, kind: type[Any]) -> dict[str, float]:
    """One job under one fault."""
    fault, steps, _ = FAULTS[name]
    run = kind(hosts, folder, steps)
    wait(lambda: any(step >= STRIKE_AT for _, step in run.steps()))
    struck = time.time()
    gone = fault(hosts, run)
    wait(run.is_over)
    made = run.steps()
    if gone is not None:
        if name.startswith("node SIGTERM"):
            hosts.wait_until_gone(gone)
        hosts.start(gone)
        hosts.wait_for_nodes(4)
    pauses = enumerate(pairwise(made), start=1)
    gap, at = max((after[0] - before[0], index) for index, (before, after) in pauses if after[0] > struck)
    if isinstance(run, Ours):
        run.assert_struck()
    else:
        assert gap > 1, f"{kind.name} went on as if nothing had happened, or had ended before"
    reached = max(step for _, step in made[:at])
    first_new = next(moment for moment, step in made[at:] if step > reached)
    assert max(step for _, step in made) == steps, f"{kind.name} ended at {max(step for _, step in made)}"
    found = {"stood_s": gap, "redone": reached - made[at][1] + 1, "to_new_s": first_new - max(struck, made[at - 1][0])}
    return found | (run.split(struck) if isinstance(run, Ours) and not name.startswith("node SIGTERM") else {})


@contextmanager
def folder_for_all() -> Iterator[Path]:
    """A folder that every host sees."""
    with tempfile.TemporaryDirectory(prefix="outlast-recovery-", dir=os.environ.get("TMPDIR", "/var/tmp")) as place:
        yield Path(place)


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Runs the benchmark; medians over the rounds."""
    if reason := why_not():
        return {"rows": [{"fault": f"not measured: this machine {reason}"}]}
    rounds = 1 if quick else 3
    rows: list[dict[str, Any]] = []
    with lab(3) as hosts, folder_for_all() as folder:
        for name, (_, _, kinds) in FAULTS.items():
            found: dict[type, list[dict[str, float]]] = {kind: [] for kind in kinds}
            for number in range(rounds):
                for kind in kinds:
                    place = folder / f"{kind.__name__.lower()}-{len(rows)}-{number}"
                    place.mkdir()
                    found[kind].append(one(hosts, place, name, kind))
            for kind, results in found.items():
                medians = {key: statistics.median(result[key] for result in results) for key in results[0]}
                rows.append({"fault": name, "name": kind.name, **medians})  # type: ignore[attr-defined]
            print(*rows[-len(kinds) :], sep="\n", file=sys.stderr)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "rounds": rounds,
        "stood_s": "seconds without a step",
        "redone": "steps made again. outlast's are seen when its journal is written, often with a commit, so that less "
        "was to be made again: compare stood_s",
        "to_new_s": "seconds from the fault (or the last step after its announcement) to the first new step",
        "…_s": "outlast's seconds from the fault; process: teardown and new process, or for one that waited both under "
        "actor; group: process group",
        "rows": rows,
    }


if __name__ == "__main__":
    command(measure)
