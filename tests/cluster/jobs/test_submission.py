"""Submitters at the same time, and logs that are followed, on a real job server. About a minute."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.driver.ray_session import _check_answers
from outlast.cluster.jobs import job_log
from outlast.cluster.jobs.job_log import follow
from outlast.cluster.jobs.job_server import JobServer
from outlast.cluster.jobs.ray_jobs import find_job, jobs_of, stop, submit
from tests.cluster.jobs.test_ray_jobs import Cluster, outlast
from tests.support.groups.worker_group import tiny_config

pytestmark = pytest.mark.ray
NUM_LINES = 20_000


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.shut_down()


def test_of_submitters_at_the_same_instant_one_submits(cluster: Cluster, tmp_path: Path) -> None:
    """All have seen that there is no job before any of them submits."""
    body = tiny_config("far", str(tmp_path), "/none.txt").model_dump(mode="json", exclude_defaults=True)
    config = RunConfig.model_validate(body)
    barrier = threading.Barrier(3)

    class Client(JobServer):
        def submit_job(self, **arguments: object) -> str:
            barrier.wait(60)
            return str(super().submit_job(**arguments))

    def one(_: int) -> tuple[str, bool]:
        job, is_new = submit(Client(cluster.address), config, body)
        return job.id, is_new

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(one, range(3)))
    assert sorted(found) == [("far-1", False), ("far-1", False), ("far-1", True)]
    client = JobServer(cluster.address)
    assert [job.id for job in jobs_of(client, "far")] == ["far-1"]
    stop(client, "far")
    run_file = tmp_path / "far.yaml"
    run_file.write_text(yaml.safe_dump(body))
    for run in ("far", str(run_file), str(tmp_path / "far"), f"file://{tmp_path}/far"):
        assert "has no live job" in outlast("stop", run, "--address", cluster.address).stderr
    assert "did you mean 'far'?" in outlast("stop", "fra", "--address", cluster.address, code=3).stderr


@contextmanager
def counted_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the characters of logs that are fetched as a whole."""
    sizes: list[int] = []
    original = JobServer.get_job_logs

    def get_job_logs(self: JobServer, job_id: str) -> str:
        log = str(original(self, job_id))
        sizes.append(len(log))
        return log

    with monkeypatch.context() as patch:
        patch.setattr(JobServer, "get_job_logs", get_job_logs)
        yield sizes


def start_job(client: JobServer, number: int, seconds: float) -> str:
    script = f"import time\nfor n in range({NUM_LINES}): print('line', n)\ntime.sleep({seconds})\nprint('end', end='')"
    return str(
        client.submit_job(
            entrypoint=f'python -u -c "{script}"', submission_id=f"log-{number}", metadata={"outlast_run": "log"}
        )
    )


EXPECTED = "".join(f"line {number}\n" for number in range(NUM_LINES)) + "end"


@pytest.mark.parametrize("has_stream", [True, False], ids=["stream", "no-stream"])
def test_a_followed_log_is_whole_and_is_sent_once(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, has_stream: bool
) -> None:
    """Without a stream, as behind a proxy that has none, it is read as a whole."""
    client = JobServer(cluster.address)
    job_id = start_job(client, 1 if has_stream else 2, 3)
    if not has_stream:
        monkeypatch.setattr(JobServer, "has_proxy", property(lambda _: True))
        monkeypatch.setattr(job_log, "_CHECK_S", 0.5)
    with counted_bytes(monkeypatch) as sizes:
        ended = follow(client, job_id)
    assert ended.status == "SUCCEEDED"
    assert capsys.readouterr().err.endswith(EXPECTED)
    assert bool(sizes) is not has_stream


def test_a_stream_that_breaks_goes_on_where_it_was(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = JobServer(cluster.address)
    breaks: list[int] = []
    job_id = start_job(client, 3, 3)
    original = JobServer.tail_job_logs

    async def tail_job_logs(self: JobServer, job_id: str) -> object:
        number = 0
        async for text in original(self, job_id):
            yield text
            number += 1
            if number == 50 * (len(breaks) + 1) and len(breaks) < 2:
                breaks.append(number)
                raise RuntimeError("WebSocket connection closed unexpectedly")

    monkeypatch.setattr(JobServer, "tail_job_logs", tail_job_logs)
    assert follow(client, job_id).status == "SUCCEEDED"
    assert len(breaks) == 2
    assert capsys.readouterr().err.endswith(EXPECTED)


def test_a_lost_server_ends_a_followed_log(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Last, because the cluster is gone then."""
    _check_answers(cluster.ray_address)
    monkeypatch.setattr(job_log, "_CHECK_S", 0.5)
    client = JobServer(cluster.address)
    job_id = start_job(client, 4, 600)
    while find_job(client, job_id).status != "RUNNING":
        time.sleep(0.1)
    killer = threading.Timer(2, cluster.kill)
    killer.start()
    with pytest.raises(Exception, match="the cluster does not answer"):
        follow(client, job_id)
    killer.join()
