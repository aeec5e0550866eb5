"""Runs as jobs of a Ray cluster, through its job server: submit, list, logs, stop.

A submission includes the run file, the user's Python files and outlast itself, so that the cluster needs only Ray and
the libraries. The n-th submission of a run is the job `<run>-<n>`; a run with a live job is attached to. A run's state
must be read from its storage, which outlives the cluster, and never from its jobs.
"""

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
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from outlast.checkpointing.error_hints import first_line
from outlast.checkpointing.errors import ConfigError, PreflightError
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.config.run_reference import RESUME_VARIABLE
from outlast.cluster.jobs.bundle import bundle, copy_package
from outlast.cluster.output import print_log
from outlast.cluster.preflight.finding import OPEN_HINT, TOKEN_HINT, Finding, Level
from outlast.trainers.checks import model_checks as preflight
from outlast.trainers.config.task_table import is_dotted
from outlast.trainers.user_code import make_importable

STOP_WAIT_S = 600
_POLL_S = 0.5
_DRIVER_CPUS = 0.01


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


def connect(address: str | None) -> JobSubmissionClient:
    """Connect to the job server at `address` or RAY_API_SERVER_ADDRESS (`http://head:8265`). Raises PreflightError."""
    server = address or os.environ.get("RAY_API_SERVER_ADDRESS")
    if not server:
        raise PreflightError(
            "no Ray cluster was given",
            hint="give --address http://HEAD:8265, or set RAY_API_SERVER_ADDRESS; a run on this machine only has no "
            "job: `outlast train RUN.yaml` resumes it, and Ctrl-C stops it",
        )
    try:
        return JobSubmissionClient(server)
    except AuthenticationError as error:
        raise PreflightError(
            f"the job server at {server} requires a token: {error.message.splitlines()[0]}", hint=TOKEN_HINT
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        hint = "check the address (the dashboard's, usually port 8265)"
        raise PreflightError(f"no job server answers at {server}: {first_line(error)}", hint=hint) from error


def check_server(address: str) -> list[Finding]:
    """Check whether other machines may run code on the cluster: its job server is reachable and needs no token."""
    host = urlsplit(address).hostname or ""
    try:
        is_local = all(ip_address(item[4][0]).is_loopback for item in socket.getaddrinfo(host, None))
        requests.get(f"{address.rstrip('/')}/api/version", timeout=10).raise_for_status()
    except (OSError, ValueError):  # it requires a token, or does not answer
        return [Finding(Level.OK, "job server", f"{address} requires a token")]
    if is_local:
        return [Finding(Level.OK, "job server", f"{address} is open to this machine only")]
    text = f"{address} is open: any client that reaches it can run code on the cluster"
    return [Finding(Level.WARNING, "job server", text, OPEN_HINT)]


def jobs_of(client: JobSubmissionClient, run: str | None = None) -> list[SubmittedJob]:
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
    tokenizer = config.model.tokenizer.path if config.model.tokenizer else None
    paths = {
        "checkpoint.storage": config.checkpoint.storage,
        **config.data.places,
        "model.path": config.model.path if (config.model.path or "").startswith(".") else None,  # else a hub id
        "model.tokenizer.path": tokenizer if (tokenizer or "").startswith(".") else None,
    }
    for key, path in paths.items():
        if path and "://" not in path and not Path(path).is_absolute():
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
    client: JobSubmissionClient,
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
        PreflightError: The job server refused the job.
    """
    before = jobs_of(client, config.name)
    for job in before:
        if job.is_live and job.id not in ignoring:
            return job, False
    number = before[-1].number + 1 if before else 1
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
        try:
            client.submit_job(  # exec, because a stop waits for all processes, and a shell leaves a zombie
                entrypoint="exec python -m outlast.cluster.cli train run.yaml --take-over",
                submission_id=f"{config.name}-{number}",
                metadata={"outlast_run": config.name},
                runtime_env=runtime_env,
                # A driver without requirements runs on the head; one that needs a CPU, wherever one is free.
                entrypoint_num_cpus=_DRIVER_CPUS if config.failure.survive_head else None,
            )
        except RuntimeError as error:
            raise PreflightError(f"the job server refused {config.name}-{number}: {error}") from error
    return SubmittedJob(f"{config.name}-{number}", config.name, number, JobStatus.PENDING.value), True


def run_command(client: JobSubmissionClient, arguments: Sequence[str], declared: Mapping[str, Any] | None) -> str:
    """Run a command of outlast on the cluster, as a job of no run, with this outlast. Return its log when it has ended.

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
    client.delete_job(job)
    return log


def resume_command(run: str, declared: Mapping[str, Any]) -> str:
    """Return the command with which a client resumes a run: by its place in the storage, as far as that is declared."""
    storage = str(dict(declared.get("checkpoint") or {}).get("storage") or "")
    place = f"{storage.rstrip('/')}/{run}" if storage and "$" not in storage and "?" not in storage else run
    return shlex.join(["outlast", "resume", place])


def resume_command_of(client: JobSubmissionClient, job_id: str) -> str | None:
    """Return the command with which the run of a job is resumed; None for a job of an older release."""
    given = (client.get_job_info(job_id).runtime_env or {}).get("env_vars") or {}
    return given.get(RESUME_VARIABLE)


def stop_wait_s(config: RunConfig) -> float:
    """Return the seconds that a driver may take to stop: for a step and a commit, so no longer than a stall."""
    return min(STOP_WAIT_S, config.failure.stall_s)


def find_job(client: JobSubmissionClient, job_id: str) -> SubmittedJob:
    """Return one job. Raises RuntimeError or OSError if the cluster does not know it or does not answer."""
    job = _job(client.get_job_info(job_id))
    assert job is not None
    return job


def newest_job(client: JobSubmissionClient, run: str) -> SubmittedJob:
    """Return a run's newest job. Raises PreflightError if the cluster has none."""
    if jobs := jobs_of(client, run):
        return jobs[-1]
    raise PreflightError(f"the cluster has no job of run {run!r}", hint="`outlast list --address …` shows all jobs")


def follow(client: JobSubmissionClient, job_id: str) -> SubmittedJob:
    """Print the job's log to stderr as it grows, until the job ends. Raises PreflightError if the server is lost."""
    seen = 0
    while True:
        try:
            job = find_job(client, job_id)
            log = client.get_job_logs(job_id)
        except (RuntimeError, OSError) as error:
            raise PreflightError(
                f"the cluster does not answer, or does not know job {job_id}",
                hint="the checkpoints are in the run's storage: submit the run on any cluster to resume it; but with "
                "failure.survive_head it may still be running (see `outlast status`): then wait for the head",
            ) from error
        whole = log.rfind("\n") + 1 if job.is_live else len(log)  # a part of a credential is not recognised
        print_log(log[seen:whole], to_stderr=True)
        seen = max(seen, whole)
        if not job.is_live:
            return job
        time.sleep(_POLL_S)


def stop(client: JobSubmissionClient, run: str) -> SubmittedJob | None:
    """Have a run's live job commit and end, and wait for its end. Return None if it has no live job."""
    for job in jobs_of(client, run):
        if job.is_live:
            client.stop_job(job.id)
            while not client.get_job_status(job.id).is_terminal():
                time.sleep(_POLL_S)
            return newest_job(client, run)
    return None
