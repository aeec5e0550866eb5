"""A storage server that is down for a while, drains as short as they come, and a host whose clock is wrong.

Each case ends with the digests of a run that nothing happened to, and the journal names the cause.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from outlast.checkpointing.run_store.catalog import read_catalog, run_events
from outlast.checkpointing.run_store.claims import list_attempts, read_claim
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.fault_tolerance.failure_cause import Cause
from outlast.cluster.monitoring.status import read_status
from outlast.trainers.attempt import Assignment
from outlast.trainers.loop.train_loop import Outcome
from tests.lab.hosts import HEAD, Lab, lab
from tests.lab.runs import Run
from tests.lab.test_lab import finish, reason
from tests.support.groups.worker_group import digests, losses, run_group
from tests.support.s3_proxy import proxy_to
from tests.support.s3_server import s3_server

pytestmark = [
    pytest.mark.lab,
    pytest.mark.faults,
    pytest.mark.skipif(reason is not None, reason=f"the lab {reason}"),
    pytest.mark.timeout(500),
]
STEPS = 1500  # goes on for longer than what happens to it
DOWN_S = 30.0


@pytest.fixture(scope="module")
def reference(assign: Callable[..., Assignment], storage: LocalStorage) -> tuple[Any, Any]:
    """Digests and losses of an undisturbed run on plain processes."""
    assignment = assign("lab-time", sections={"checkpoint": {"every": 500}}, steps=STEPS, eval_every=200)
    assert run_group(assignment, storage, 2, limit_s=400)[0].outcome is Outcome.DONE
    return digests(storage, "lab-time"), losses(storage, "lab-time")


@pytest.fixture
def cluster(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with lab(3, **getattr(request, "param", {})) as made:
        yield made


@pytest.mark.parametrize(
    "cluster", [{"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": s} for s in ("1", "5")], indirect=True, ids=["1s", "5s"]
)
def test_a_node_is_drained_at_short_notice(
    cluster: Lab, tmp_path: Path, text_file: str, reference: tuple[Any, Any]
) -> None:
    """No longer than Ray Train's own look every 5 s: the newest checkpoint stays, and no failure is counted."""
    run = Run(tmp_path, "drain", text_file, STEPS, 2)
    follower = run.submit(cluster)
    run.wait_for_commit(follower)
    leaving, before = run.host_of(1), read_catalog(run.storage, run.name).accepted[0].ref.step
    cluster.evict(leaving)
    finish(run, follower, reference)
    [resumed] = [event for _, event in run_events(run.store) if event["event"] == "resume"]
    assert resumed["step"] >= before
    assert not resumed["rejected"]
    run.assert_cause(Cause.PREEMPTED)


def test_the_storage_server_is_down_for_a_while(
    tmp_path: Path, text_file: str, reference: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs one failure at the most: what is retried for so long, or the next attempt waits, within two minutes."""
    with Lab() as hosts, s3_server() as url, ExitStack() as up:
        server, at = os.environ["AWS_ENDPOINT_URL"], (hosts.here, 9000)
        address = up.enter_context(proxy_to(server, at))[1]
        given = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        start(hosts, {host: {**given, "AWS_ENDPOINT_URL": address} for host in (HEAD, 1, 2)})
        run = Run(tmp_path, "down", text_file, STEPS, 2, storage=open_storage(url))
        follower = run.submit(hosts)
        run.wait_for_commit(follower)
        up.close()
        time.sleep(DOWN_S)
        with proxy_to(server, at):
            finish(run, follower, reference)
            failures = read_status(run.store)["failures"]
            assert [failure["cause"] for failure in failures] in ([], [Cause.ERROR.value]), failures
            assert all("onnect" in failure["message"] for failure in failures), failures


def test_clocks_are_wrong(tmp_path: Path, text_file: str, reference: tuple[Any, Any]) -> None:
    """One host is an hour behind, one an hour ahead, in all that Python asks; a kernel has but one such clock."""
    environments: dict[int, dict[str, str]] = {HEAD: {}}
    for host, seconds in ((1, -3600), (2, 3600)):
        folder = tmp_path / f"clock-{host}"
        folder.mkdir()
        wrong = f"import time\n_right = time.time\ntime.time = lambda: _right() + {seconds}\n"
        (folder / "sitecustomize.py").write_text(wrong)
        environments[host] = {"PYTHONPATH": f"{folder}:{os.environ.get('PYTHONPATH', '')}"}
    with Lab() as hosts:
        start(hosts, environments)
        run = Run(tmp_path, "clocks", text_file, STEPS, 2)
        follower = run.submit(hosts)
        run.wait_for_commit(follower)
        claimed_at = read_claim(run.store, list_attempts(run.store)[-1])["claimed_at"]
        assert abs(claimed_at - time.time()) > 3000, "the clocks are right"
        hosts.signal_inside(run.host_of(1), run.workers()[1]["pid"], signal.SIGKILL)
        finish(run, follower, reference)
        run.assert_cause(Cause.WORKER_DIED)


def start(hosts: Lab, environments: Mapping[int, Mapping[str, str]]) -> None:
    hosts.start(HEAD, cpus=0, environment=environments[HEAD])
    hosts.wait_for_nodes(1)
    for host in environments.keys() - {HEAD}:
        hosts.start(host, environment=environments[host])
    hosts.wait_for_nodes(len(environments))
