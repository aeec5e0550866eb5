"""Groups that shrink and grow, in a Ray cluster of several hosts. A minute and a half.

Every case ends with the digests of a run that nothing happened to, and the journal names the causes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.lineage import run_events
from outlast.checkpointing.storage import LocalStorage
from outlast.cluster.failures import Cause
from outlast.cluster.status import read_status
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop import Outcome
from tests.group import digests, losses, run_group
from tests.lab.hosts import lab
from tests.lab.runs import Run
from tests.lab.test_lab import reason

pytestmark = [
    pytest.mark.lab,
    pytest.mark.faults,
    pytest.mark.skipif(reason is not None, reason=f"the lab {reason}"),
    pytest.mark.timeout(500),
]
STEPS = 1500
ELASTIC = {"exactness": "elastic"}


def events(run: Run, kind: str) -> list[dict[str, Any]]:
    return [event for _, event in run_events(run.storage, run.name) if event["event"] == kind]


def wait_for_world(run: Run, size: int, follower: Any) -> float:
    """Waits until the newest attempt makes steps on so many workers; seconds that it took."""
    began = time.monotonic()
    while time.monotonic() < began + 150:
        assert follower.poll() is None, follower.communicate()
        found = read_status(run.storage, run.name)
        if found["world_size"] == size and len(run.workers()) == size and found["loss"] is not None:
            return time.monotonic() - began
        time.sleep(0.2)
    raise AssertionError(f"no steps on {size} workers within 150 s")


def test_shrinks_without_a_spare_and_grows_again(
    tmp_path: Path, text_file: str, assign: Callable[..., Assignment], storage: LocalStorage
) -> None:
    undisturbed = assign("lab-elastic", sections=ELASTIC, steps=STEPS, eval_every=200)
    assert run_group(undisturbed, storage, 1, limit_s=240)[0].outcome is Outcome.DONE
    scale = {"workers": [1, 2], "cpus_per_worker": 1, "resize_every": "5s"}
    run = Run(tmp_path, "elastic", text_file, STEPS, 2, {**ELASTIC, "scale": scale})
    with lab(2) as cluster:
        follower = run.submit(cluster)
        run.wait_for_commit(follower)
        lost = run.host_of(1)
        cluster.kill(lost)
        shrunk_s = wait_for_world(run, 1, follower)
        cluster.start(lost)
        grown_s = wait_for_world(run, 2, follower)
        out, err = follower.communicate(timeout=300)
        assert follower.returncode == 0, out + err
    print(f"first step with fewer after {shrunk_s:.1f} s; with the new node after {grown_s:.1f} s")
    assert digests(run.storage, run.name) == digests(storage, "lab-elastic")
    assert losses(run.storage, run.name) == losses(storage, "lab-elastic")
    run.assert_cause(Cause.NODE_LOST)
    sizes = [
        (change["before"], change["now"], change["cause"]) for change in read_status(run.storage, run.name)["sizes"]
    ]
    assert sizes == [(2, 1, "node lost"), (1, 2, "resized")]
    [asked] = events(run, "save-requested")
    resumed = events(run, "resume")[-1]
    assert resumed["step"] >= asked["step"], "the checkpoint before the resize is what the larger group began with"
