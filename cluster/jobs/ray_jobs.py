"""Runs on somebody else's Ray cluster, through its job server: submit, list, logs, stop, and the state of a run.

A submission carries the run file, the user's Python files and outlast itself, so that the cluster needs no more than
Ray and the libraries. The n-th submission of a run is the job `<run>-<n>`; a run with a live job is attached to.
Whether a run is done, and how far it is, is read from the run's own storage, which outlives the cluster.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from outlast.checkpointing.errors import ConfigError, PreflightError, first_line
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.jobs.bundle import _package, bundle
from outlast.cluster.preflight.finding import TOKEN_HINT, Finding, Level
from outlast.trainers.checks import preflight
from outlast.trainers.config.task_names import is_dotted
from outlast.trainers.user_code import make_importable

STOP_WAIT_S = 600
_PERIOD_S = 0.5
_DRIVER_CPUS = 0.01


@dataclass(frozen=True, slots=True)
class SubmittedJob:
    """One submission of a run.

    Attributes:
        id: `<run>-<n>`.
        run: Name of the run.
        number: The n.
        status: As the job server says: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED.
        message: What the job server says besides.
        driver_exit_code: What the driver ended with, if it ended by itself.
    """

    id: str
    run: str
    number: int
    status: str
    message: str = ""
    driver_exit_code: int | None = None

    @property
    def exit_code(self) -> int:
        """What `outlast train` ended with there; 75 for a job that was stopped, 1 where nobody knows."""
        if self.status == JobStatus.STOPPED.value:
            return 75
        if self.status == JobStatus.SUCCEEDED.value:
            return 0
        return max(1, self.driver_exit_code or 1)  # negative for a driver that was killed

    @property
    def is_live(self) -> bool:
        return not JobStatus(self.status).is_terminal()


def connect(address: str | None) -> JobSubmissionClient:
    """The job server at `address` (`http://head:8265`), or at RAY_API_SERVER_ADDRESS.

    Raises:
        PreflightError: Nobody answers there, or it is not a job server, or it asks for another token.
    """
    place = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not place:
        raise PreflightError(
            "no Ray cluster was named",
            hint="give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS; a run on this machine alone has no "
            "job: `outlast train RUN.yaml` goes on with it, and Ctrl-C stops it",
        )
    try:
        return JobSubmissionClient(place)
    except AuthenticationError as error:
        raise PreflightError(
            f"the job server at {place} wants a token: {error.message.splitlines()[0]}", hint=TOKEN_HINT
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        hint = "check the address (the dashboard's, usually port 8265)"
        raise PreflightError(f"no job server answers at {place}: {first_line(error)}", hint=hint) from error


def check_server(place: str) -> list[Finding]:
    """Whether strangers may run code on the cluster: its job server takes requests without a token from elsewhere."""
    host = urlsplit(place).hostname or ""
    try:
        is_near = all(ip_address(item[4][0]).is_loopback for item in socket.getaddrinfo(host, None))
        requests.get(f"{place.rstrip('/')}/api/version", timeout=10).raise_for_status()
    except (OSError, ValueError):  # it asks for a token, or it cannot be asked
        return [Finding(Level.OK, "job server", f"{place} does not answer strangers")]
    if is_near:
        return [Finding(Level.OK, "job server", f"{place} is open, to this machine only")]
    text = f"{place} is open: whoever reaches it may run anything on the cluster"
    return [
        Finding(Level.WARNING, "job server", text, "start every node with RAY_AUTH_MODE=token and a RAY_AUTH_TOKEN")
    ]


def jobs_of(client: JobSubmissionClient, run: str | None = None) -> list[SubmittedJob]:
    """Every submission of a run that the cluster remembers, or of every run; oldest first."""
    found = [_job(details) for details in client.list_jobs()]
    known = [job for job in found if job is not None and run in (None, job.run)]
    return sorted(known, key=lambda job: (job.run, job.number))


def _job(details: JobDetails) -> SubmittedJob | None:
    run, match = (details.metadata or {}).get("outlast_run"), re.fullmatch(r".+-(\d+)", details.submission_id or "")
    if run is None or match is None:
        return None
    return SubmittedJob(
        details.submission_id, run, int(match[1]), details.status.value, details.message or "", details.driver_exit_code
    )


def check_reachable(config: RunConfig) -> None:
    """Refuses places that mean nothing on another machine.

    Raises:
        ConfigError: The storage or the data is named by a relative path.
    """
    tokenizer = config.model.tokenizer.path if config.model.tokenizer else None
    places = {
        "checkpoint.storage": config.checkpoint.storage,
        **config.data.places,
        "model.path": config.model.path if (config.model.path or "").startswith(".") else None,  # else a hub id
        "model.tokenizer.path": tokenizer if (tokenizer or "").startswith(".") else None,
    }
    for key, place in places.items():
        if place and "://" not in place and not Path(place).is_absolute():
            raise ConfigError(
                f"{key} is {place!r}, which the cluster's machines would look for in their own working directory",
                hint=f"set {key} to a place that all of them see: a shared file system's absolute path, or s3://…",
            )


def check_code(config: RunConfig, code: Path | None) -> None:
    """Refuses names that mean nothing: of architectures, of their settings, of classes in `code`.

    Raises:
        ConfigError: There is no such thing.
    """
    if code is not None:
        make_importable(str(code.absolute()))
    named = (config.model.class_, config.model.task, config.train.optimizer)
    own = [place for place in named if place and is_dotted(place)]
    if code is not None or all(find_spec(place.partition(".")[0].partition(":")[0]) for place in own):
        preflight.check_code(config)  # else the cluster has it installed, or says that it has not


def submit(
    client: JobSubmissionClient,
    config: RunConfig,
    declared: Mapping[str, Any],
    *,
    code: Path | None = None,
    ship: bool = True,
    ignoring: Collection[str] = (),
) -> tuple[SubmittedJob, bool]:
    """Submits a run, unless it has a live job already.

    Args:
        client: The job server.
        config: The settings.
        declared: The settings as written; this is what travels, `${env:…}` unexpanded.
        code: A directory of the user's Python files, which become importable on every worker.
        ship: Send this outlast along, so that the cluster runs the same version.
        ignoring: Ids of jobs that are called live and are not.

    Returns:
        The job, and whether it is new.

    Raises:
        PreflightError: The job server refused.
    """
    before = jobs_of(client, config.name)
    for job in before:
        if job.is_live and job.id not in ignoring:
            return job, False
    number = before[-1].number + 1 if before else 1
    with bundle(declared, code) as folder:
        runtime_env: dict[str, Any] = {
            "working_dir": str(folder / "work"),
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": f"{stop_wait_s(config):g}"},
        }
        if ship:
            runtime_env["py_modules"] = [str(_package(folder))]
        try:
            client.submit_job(  # exec, because a stop waits until no process is left, and a shell leaves a zombie
                entrypoint="exec python -m outlast.cluster.cli train run.yaml --take-over",
                submission_id=f"{config.name}-{number}",
                metadata={"outlast_run": config.name},
                runtime_env=runtime_env,
                # What asks for nothing is put on the head; what asks for a CPU, wherever there is one.
                entrypoint_num_cpus=_DRIVER_CPUS if config.failure.survive_head else None,
            )
        except RuntimeError as error:
            raise PreflightError(f"the job server refused {config.name}-{number}: {error}") from error
    return SubmittedJob(f"{config.name}-{number}", config.name, number, JobStatus.PENDING.value), True


def run_verb(client: JobSubmissionClient, arguments: Sequence[str], declared: Mapping[str, Any] | None) -> str:
    """Runs a verb of the command line on the cluster, as a job of no run, with this outlast. Waits for it.

    Args:
        client: The job server.
        arguments: The verb and its arguments.
        declared: A run's settings as written, which the verb finds in `run.yaml`.

    Returns:
        Its log.
    """
    with bundle(declared or {}, None) as folder:
        job = client.submit_job(
            entrypoint=shlex.join(["exec", "python", "-m", "outlast.cluster.cli", *arguments]),
            runtime_env={"working_dir": str(folder / "work"), "py_modules": [str(_package(folder))]},
        )
    while not client.get_job_status(job).is_terminal():
        time.sleep(_PERIOD_S)
    log: str = client.get_job_logs(job)
    client.delete_job(job)
    return log


def stop_wait_s(config: RunConfig) -> float:
    """How long a driver that was asked to stop may take: for a step and a commit, so no longer than a stall."""
    return min(STOP_WAIT_S, config.failure.stall_s)


def find(client: JobSubmissionClient, job_id: str) -> SubmittedJob:
    """One job. Raises RuntimeError or OSError when the cluster has forgotten it or does not answer."""
    job = _job(client.get_job_info(job_id))
    assert job is not None
    return job


def newest(client: JobSubmissionClient, run: str) -> SubmittedJob:
    """A run's newest job.

    Raises:
        PreflightError: The cluster remembers none.
    """
    if found := jobs_of(client, run):
        return found[-1]
    raise PreflightError(f"the cluster remembers no job of run {run!r}", hint="`outlast list --address …` shows all")


def follow(client: JobSubmissionClient, job_id: str) -> SubmittedJob:
    """Prints the job's log to stderr as it grows, until the job ends.

    Raises:
        PreflightError: The job server has gone, and the job with it.
    """
    seen = 0
    while True:
        try:
            details = client.get_job_info(job_id)
            log = client.get_job_logs(job_id)
        except (RuntimeError, OSError) as error:
            raise PreflightError(
                f"the cluster has gone, or it has forgotten job {job_id}",
                hint="the checkpoints are in the run's storage: submit the run again on any cluster to go on; but with "
                "failure.survive_head it may be at work still (`outlast status` tells): then wait for the head",
            ) from error
        sys.stderr.write(log[seen:])
        sys.stderr.flush()
        seen = len(log)
        if details.status.is_terminal():
            job = _job(details)
            assert job is not None
            return job
        time.sleep(_PERIOD_S)


def stop(client: JobSubmissionClient, run: str) -> SubmittedJob | None:
    """Asks a run's live job to commit and end, and waits until it has. None when it has no live job."""
    for job in jobs_of(client, run):
        if job.is_live:
            client.stop_job(job.id)
            while not client.get_job_status(job.id).is_terminal():
                time.sleep(_PERIOD_S)
            return newest(client, run)
    return None
