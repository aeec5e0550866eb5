"""The head is lost and comes back while the run goes on: `failure.survive_head`, Ray's tables on a volume that stays.

All hosts share one machine here, so training steps aside while the head starts, and a head that takes longer than Ray
waits for its parts is started again, as systemd or a kubelet would.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from outlast.checkpointing.format.layout import attempt_dir
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.run_store.journal import read_events
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.fault_tolerance.failure_cause import Cause
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.lab.hosts import HEAD, Lab, lab
from tests.lab.runs import Run
from tests.lab.test_lab import reason
from tests.support.groups.worker_group import digests, losses, run_group

pytestmark = [
    pytest.mark.lab,
    pytest.mark.faults,
    pytest.mark.skipif(reason is not None, reason=f"the lab {reason}"),
    pytest.mark.timeout(900),
]
STEPS = 4000
WORKERS = (1, 2, 3)


def step_aside(cluster: Lab) -> None:
    """Gives every thread of the driver, the actors and those to come the lowest priority."""
    for pid in (pid for host in WORKERS for pid in cluster.pids(host)):
        with contextlib.suppress(OSError):
            if re.match(rb"ray::|python\0-m\0outlast", Path(f"/proc/{pid}/cmdline").read_bytes()):
                for thread in os.listdir(f"/proc/{pid}/task"):
                    os.setpriority(os.PRIO_PROCESS, int(thread), 19)


def start_head(cluster: Lab) -> None:
    """As whoever watches over it does: until it is there and knows all nodes."""
    for _ in range(4):
        cluster.start(HEAD, cpus=0)
        while cluster.is_up(HEAD):
            with contextlib.suppress(AssertionError):
                cluster.wait_for_nodes(1 + len(WORKERS), timeout_s=2)
                return
        cluster.kill(HEAD)
    raise AssertionError("the head did not come back")


def test_the_head_comes_back_and_the_run_never_stopped(
    tmp_path: Path, text_file: str, assign: Callable[..., Assignment], storage: LocalStorage
) -> None:
    """Then a worker is killed: the same driver starts the next group, through the new head."""
    reference = assign("lab-head", steps=STEPS, eval_every=200, sections={"checkpoint": {"every": 500}})
    assert run_group(reference, storage, 2, limit_s=300)[0].outcome is Outcome.DONE
    tables = tmp_path / "gcs"
    tables.mkdir()
    stays = {
        "RAY_gcs_storage": "rocksdb",
        "RAY_gcs_storage_path": str(tables),
        "RAY_gcs_rpc_server_reconnect_timeout_s": "600",
    }
    with lab(len(WORKERS), **stays) as cluster:
        run = Run(tmp_path, "head", text_file, STEPS, 2, {"failure": {"survive_head": True}})
        follower = run.submit(cluster)
        run.wait_for_commit(follower)
        cluster.kill(HEAD)
        gone = time.time()
        follower.kill()  # it would wait for a job server that is not there
        follower.communicate()
        step_aside(cluster)
        start_head(cluster)
        [attempt] = list_attempts(run.store)
        ended = [event["ended_at"] for event in _steps(run) if event["ended_at"] > gone]
        assert len(ended) > 100, "training went on without a head"
        follower = run.submit(cluster)  # finds the job at work, and follows it
        cluster.signal_inside(run.host_of(1), run.workers()[1]["pid"], signal.SIGKILL)
        out, err = follower.communicate(timeout=400)
        assert follower.returncode == 0, out + err
        assert "already running" in err
        run.assert_cause(Cause.WORKER_DIED)
        assert list_attempts(run.store)[0] == attempt
    assert digests(run.storage, run.name) == digests(storage, "lab-head")
    assert losses(run.storage, run.name) == losses(storage, "lab-head")


def _steps(run: Run) -> list[dict[str, float]]:
    [attempt] = list_attempts(run.store)
    return [event for event in read_events(run.storage, attempt_dir(run.name, attempt)) if event["event"] == "step"]
