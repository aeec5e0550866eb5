"""Runs as jobs of a Ray cluster, through its job server: submit, list, logs, stop.

A submission includes the run file, the user's Python files and outlast itself, so that the cluster needs only Ray and
the libraries. The n-th submission of a run is the job `<run>-<n>`; a run with a live job is attached to. A run's state
must be read from its storage, which outlives the cluster, and never from its jobs.
"""

import contextlib
import os
import re
import shlex
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from ray.job_submission import JobDetails, JobStatus

from outlast.checkpointing.error_hints import did_you_mean, first_line
from outlast.checkpointing.errors import ConfigError, PreflightError
from outlast.checkpointing.storage.location import ENV_VARIABLE, is_url
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.config.run_reference import RESUME_VARIABLE
from outlast.cluster.jobs.bundle import bundle, copy_package
from outlast.cluster.jobs.job_server import ANSWER_TIMEOUT_S, CONNECT_TIMEOUT_S, JobExists, JobServer
from outlast.cluster.preflight.finding import OPEN_HINT, Finding, Level
from outlast.trainers.checks import model_checks as preflight
from outlast.trainers.config.task_table import is_dotted
from outlast.trainers.user_code import make_importable

STOP_WAIT_S = 600
_POLL_S = 0.5
_DRIVER_CPUS = 0.01
#: Ids that are tried for one submission.
_MAX_IDS = 20


@dataclass(frozen=True, slots=True)
class SubmittedJob:
    """One submission of a run."""

    id: str  #: `<run>-<n>`
    run: str  #: name of the run
    number: int  #: the n
    status: str  #: the job server's: PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED
    message: str = ""  #: the job server's
    driver_exit_code: int | None = None  #: None if the driver did not end by itself

    @property
    def exit_code(self) -> int:
        """Exit code of `outlast train` in the job; 75 for a stopped job, 1 if unknown."""
        if self.status == JobStatus.STOPPED.value:
            return 75
        if self.status == JobStatus.SUCCEEDED.value:
            return 0
        return max(1, self.driver_exit_code or 1)  # negative for a driver that was killed

    @property
    def is_live(self) -> bool:
        return not JobStatus(self.status).is_terminal()


def connect(address: str | None) -> JobServer:
    """Connect to the job server at `address` or RAY_API_SERVER_ADDRESS (`http://head:8265`). Raises as JobServer."""
    return JobServer(given_address(address))


def given_address(address: str | None) -> str:
    """Return the address of the job server, which may be in RAY_API_SERVER_ADDRESS. Raises PreflightError if not."""
    server = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not server:
        raise PreflightError(
            "no Ray cluster was given",
            hint="give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS; a run on this machine only has no "
            "job: `outlast train RUN.yaml` resumes it, and Ctrl-C stops it",
        )
    return server


def check_server(address: str) -> list[Finding]:
    """Check whether other machines may run code on the cluster: its job server is reachable and needs no token."""
    try:
        answer = requests.get(f"{address.rstrip('/')}/api/version", timeout=(CONNECT_TIMEOUT_S, ANSWER_TIMEOUT_S))
    except (OSError, ValueError) as error:
        return [Finding(Level.OK, "job server", f"{address} does not answer without a token: {first_line(error)}")]
    if not answer.ok:
        return [Finding(Level.OK, "job server", f"{address} requires a token")]
    is_local = False
    with contextlib.suppress(OSError, ValueError):  # only its proxy may know the host
        found = socket.getaddrinfo(urlsplit(address).hostname or "", None)
        is_local = all(ip_address(item[4][0]).is_loopback for item in found)
    if is_local:
        return [Finding(Level.OK, "job server", f"{address} is open to this machine only")]
    text = f"{address} is open: any client that reaches it can run code on the cluster"
    return [Finding(Level.WARNING, "job server", text, OPEN_HINT)]


def jobs_of(client: JobServer, run: str | None = None) -> list[SubmittedJob]:
    """Return the submissions of a run, or of every run, in the cluster's records; oldest first."""
    jobs = [_job(details) for details in client.list_jobs()]
    ours = [job for job in jobs if job is not None and run in (None, job.run)]
    return sorted(ours, key=lambda job: (job.run, job.number))


def _job(details: JobDetails) -> SubmittedJob | None:
    run, match = (details.metadata or {}).get("outlast_run"), re.fullmatch(r".+-(\d+)", details.submission_id or "")
    if run is None or match is None:
        return None
    return SubmittedJob(
        details.submission_id, run, int(match[1]), details.status.value, details.message or "", details.driver_exit_code
    )


def check_reachable(config: RunConfig) -> None:
    """Raise ConfigError if the path of the storage, the data or the model is relative: other machines use it too."""
    for key, path in config.places.items():
        is_deferred = ENV_VARIABLE.search(path) is not None  # of a variable that only the cluster has
        if not is_url(path) and not Path(path).is_absolute() and not is_deferred:
            raise ConfigError(
                f"{key} is {path!r}, which each machine of the cluster resolves in its own working directory",
                hint=f"set {key} to a path that all machines share: a shared file system's absolute path, or s3://…",
            )


def check_named_code(config: RunConfig, code: Path | None) -> None:
    """Raise ConfigError if a name of an architecture, of a setting of one, or of a class in `code` does not exist."""
    if code is not None:
        make_importable(str(code.absolute()))
    paths = (config.model.class_, config.model.task, config.train.optimizer)
    own = [path for path in paths if path and is_dotted(path)]
    if code is not None or all(find_spec(path.partition(".")[0].partition(":")[0]) for path in own):
        preflight.check_code(config)  # else the cluster may have it installed, or reports that it is missing


def submit(
    client: JobServer,
    config: RunConfig,
    declared: Mapping[str, Any],
    *,
    code: Path | None = None,
    ship: bool = True,
    ignoring: Collection[str] = (),
) -> tuple[SubmittedJob, bool]:
    """Submit a run, unless it has a live job. Return the job, and whether it is new.

    Args:
        client, config: The job server, and the settings.
        declared: The settings as written, `${env:…}` unexpanded; these are sent.
        code: A directory of the user's Python files, which become importable on every worker.
        ship: Send this outlast along, so that the cluster runs the same version.
        ignoring: Ids of jobs that are reported live but are not.

    Raises:
        ConfigError: The code cannot be sent.
        PreflightError: The job server refused the job, or does not answer.
    """
    number = 0
    for _ in range(_MAX_IDS):
        known = jobs_of(client, config.name)
        for job in known:
            if job.is_live and job.id not in ignoring:
                return job, False
        number = max([number, *(job.number for job in known)]) + 1
        job_id = f"{config.name}-{number}"
        try:
            _submit_as(job_id, client, config, declared, code, ship)
        except JobExists:  # submitted by another at the same time; or not listed, because it is no run of outlast
            continue
        return SubmittedJob(job_id, config.name, number, JobStatus.PENDING.value), True
    problem = f"the job server has other jobs with the ids {config.name}-{number - _MAX_IDS + 1} to {number}"
    raise PreflightError(problem, hint="give the run another name, or delete those jobs: ray job delete …")


def _submit_as(
    job_id: str, client: JobServer, config: RunConfig, declared: Mapping[str, Any], code: Path | None, ship: bool
) -> None:
    with bundle(declared, code) as folder:
        runtime_env: dict[str, Any] = {
            "working_dir": str(folder / "work"),
            "env_vars": {
                "RAY_JOB_STOP_WAIT_TIME_S": f"{stop_wait_s(config):g}",
                RESUME_VARIABLE: resume_command(config.name, declared),
            },
        }
        if ship:
            runtime_env["py_modules"] = [str(copy_package(folder))]
        client.submit_job(  # exec, because a stop waits for all processes, and a shell leaves a zombie
            entrypoint="exec python -m outlast.cluster.cli train run.yaml --take-over",
            submission_id=job_id,
            metadata={"outlast_run": config.name},
            runtime_env=runtime_env,
            # A driver without requirements runs on the head; one that needs a CPU, wherever one is free.
            entrypoint_num_cpus=_DRIVER_CPUS if config.failure.survive_head else None,
        )


def run_command(client: JobServer, arguments: Sequence[str], declared: Mapping[str, Any] | None) -> tuple[str, int]:
    """Run a command of outlast on the cluster, as a job of no run, with this outlast. Return its log and exit code.

    The command finds the `declared` settings of a run in `run.yaml`.
    """
    with bundle(declared or {}, None) as folder:
        job = client.submit_job(
            entrypoint=shlex.join(["exec", "python", "-m", "outlast.cluster.cli", *arguments]),
            runtime_env={"working_dir": str(folder / "work"), "py_modules": [str(copy_package(folder))]},
        )
    while not client.get_job_status(job).is_terminal():
        time.sleep(_POLL_S)
    log: str = client.get_job_logs(job)
    details = client.get_job_info(job)
    client.delete_job(job)
    return log, 0 if details.status == JobStatus.SUCCEEDED else max(1, details.driver_exit_code or 1)


def resume_command(run: str, declared: Mapping[str, Any]) -> str:
    """Return the command with which a client resumes a run: by its place in the storage, as far as that is declared."""
    storage = str(dict(declared.get("checkpoint") or {}).get("storage") or "")
    place = f"{storage.rstrip('/')}/{run}" if storage and "$" not in storage and "?" not in storage else run
    return shlex.join(["outlast", "resume", place])


def resume_command_of(client: JobServer, job_id: str) -> str | None:
    """Return the command with which the run of a job is resumed; None for a job of an older release."""
    given = (client.get_job_info(job_id).runtime_env or {}).get("env_vars") or {}
    return given.get(RESUME_VARIABLE)


def stop_wait_s(config: RunConfig) -> float:
    """Return the seconds that a driver may take to stop: for a step and a commit, so no longer than a stall."""
    return min(STOP_WAIT_S, config.failure.stall_s)


def find_job(client: JobServer, job_id: str) -> SubmittedJob:
    """Return one job. Raises PreflightError if the cluster does not know it or does not answer."""
    job = _job(client.get_job_info(job_id))
    assert job is not None
    return job


def newest_job(client: JobServer, run: str) -> SubmittedJob:
    """Return a run's newest job. Raises PreflightError if the cluster has none."""
    every = jobs_of(client)
    if jobs := [job for job in every if job.run == run]:
        return jobs[-1]
    problem = f"the cluster has no job of run {run!r}{did_you_mean(run, {job.run for job in every})}"
    raise PreflightError(problem, hint="`outlast list --address …` shows all jobs")


def stop(client: JobServer, run: str) -> SubmittedJob | None:
    """Have a run's live job commit and end, and wait for its end. Return None if its jobs have ended.

    Raises PreflightError if the cluster has no job of the run.
    """
    newest_job(client, run)
    for job in jobs_of(client, run):
        if job.is_live:
            client.stop_job(job.id)
            while find_job(client, job.id).is_live:
                time.sleep(_POLL_S)
            return newest_job(client, run)
    return None
