"""The commands for Ray jobs: `submit`, `supervise`, `resume`, `list`, `logs` and `stop`."""

from __future__ import annotations

import shlex
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, BadParameter, Exit, Option

from outlast.cluster.cli.options import (
    Address,
    AsJson,
    Follow,
    Overrides,
    Run,
    RunFile,
    Ship,
    ShippedCode,
    StorageRoot,
    Trusted,
    print_runs,
    print_unreadable,
)
from outlast.cluster.config.run_reference import RUN_FILES, find_run, run_name, stored_config
from outlast.cluster.output import print_json, print_line, print_log

if TYPE_CHECKING:
    from outlast.cluster.config.run_config import RunConfig


def submit(
    run_file: RunFile,
    overrides: Overrides = None,
    address: Address = None,
    follow: Follow = False,
    supervise: Annotated[bool, Option("--supervise", help="Keep running, and submit again when it fails.")] = False,
    code: ShippedCode = None,
    ship: Ship = True,
    dry_run: Annotated[bool, Option("--dry-run", help="Only list which files are sent, and which stay.")] = False,
) -> None:
    """Submit the run to a Ray cluster, or attach to its live job. Prints the job's id, unless on a terminal.

    With --follow or --supervise the exit code is the run's. Of --code, files are left out that `.gitignore` or
    `.outlastignore` names, that hold credentials by their name, or that a link outside the folder leads to; so are
    environments and data.
    """
    from outlast.cluster.config.run_file import load_run

    if follow and supervise:
        raise BadParameter("--follow shows one job, --supervise all of them; give one of the two")
    config, declared = load_run(str(run_file), overrides or [], elsewhere=True)
    if dry_run:
        _list_files(config, code, ship)
        return
    if supervise:
        _supervise([(config, declared)], address, code, ship)
    _submit(config, declared, address, follow, code, ship)


def supervise(
    runs: Annotated[list[str], Argument(metavar="RUN…", help="Run files, or existing runs.")],
    overrides: Overrides = None,
    address: Address = None,
    code: ShippedCode = None,
    ship: Ship = True,
    trusted: Trusted = False,
    storage: StorageRoot = "./runs",
) -> None:
    """Keep runs running on a Ray cluster: submit again when a job or the whole cluster has died.

    Ends when all have ended, with the exit code of one that failed, if any.
    """
    from outlast.cluster.config.run_file import load_run

    settings = [
        load_run(run, overrides or [], elsewhere=True)
        if run.endswith(RUN_FILES)
        else _load_from_storage(run, storage, overrides or [], trusted)
        for run in runs
    ]
    _supervise(settings, address, code, ship)


def _supervise(
    settings: list[tuple[RunConfig, dict[str, Any]]], address: str | None, code: Path | None, ship: bool
) -> None:
    from outlast.cluster.jobs import supervisor
    from outlast.cluster.jobs.ray_jobs import given_address

    given_address(address)
    for config, declared in settings:
        _check(config, declared, code, reads_storage=True)
    _warn(code, address)
    runs = [supervisor.Supervisor(config, declared, address, code, ship) for config, declared in settings]
    raise Exit(supervisor.supervise(runs))


def _load_from_storage(run: str, root: str, overrides: list[str], trusted: bool) -> tuple[RunConfig, dict[str, Any]]:
    store, _ = find_run(run, root)
    return stored_config(run, store, overrides, trusted=trusted, elsewhere=True)


def resume(
    run: Run,
    overrides: Overrides = None,
    address: Address = None,
    follow: Follow = False,
    code: ShippedCode = None,
    ship: Ship = True,
    trusted: Trusted = False,
    storage: StorageRoot = "./runs",
) -> None:
    """Submit a run again, with the settings from its storage."""
    config, declared = _load_from_storage(run, storage, overrides or [], trusted)
    _submit(config, declared, address, follow, code, ship)


def _submit(
    config: RunConfig, declared: dict[str, Any], address: str | None, follow: bool, code: Path | None, ship: bool
) -> None:
    from outlast.cluster.jobs import ray_jobs as jobs

    jobs.given_address(address)  # without one, other advice would be about a cluster that is not meant
    _check(config, declared, code, reads_storage=follow)
    _warn(code, address)
    client = jobs.connect(address)
    for warning in jobs.check_server(client.get_address()):
        if warning.hint:
            print_line(f"outlast: {warning.text}; {warning.hint}", to_stderr=True)
    job, is_new = jobs.submit(client, config, declared, code=code, ship=ship)
    if not sys.stdout.isatty():
        print_line(job.id)
    print_line(f"{'submitted' if is_new else 'already running; attached to'} {job.id}", to_stderr=True)
    if follow:
        from outlast.cluster.jobs.job_log import follow as follow_log
        from outlast.cluster.monitoring.console_progress import live_panel, terminal

        text = "following its log, which begins when the cluster has set the job up; Ctrl-C leaves the run running"
        print_line(text, to_stderr=True)
        with suppress(KeyboardInterrupt):
            with live_panel(config.store, terminal()):
                ended = follow_log(client, job.id)
            raise Exit(ended.exit_code)
        chosen = f"{config.name} --address {client.get_address()}"
        print_line(f"outlast: {job.id} goes on; to follow it: outlast logs {chosen} --follow", to_stderr=True)
        print_line(f"  → to stop it: outlast stop {chosen}", to_stderr=True)
        raise Exit(130)


def _check(config: RunConfig, declared: dict[str, Any], code: Path | None, *, reads_storage: bool) -> None:
    """Check what can be checked before anything is sent, and name the settings that only the cluster can check."""
    from outlast.checkpointing.errors import ConfigError
    from outlast.cluster.config.run_file import deferred
    from outlast.cluster.jobs import ray_jobs as jobs
    from outlast.cluster.jobs.bundle import check_code

    check_code(code)
    jobs.check_reachable(config)
    later = deferred(declared)
    if reads_storage and (name := later.get("checkpoint.storage")):
        problem = f"checkpoint.storage uses ${{env:{name}}}, but {name} is not set; the run is followed in its storage"
        raise ConfigError(problem, hint=f"export {name}=…, or submit without --follow and --supervise")
    for key, name in later.items():
        line = f"{key} uses ${{env:{name}}}, which is not set here: it must be on the cluster, which checks the setting"
        print_line(f"outlast: {line}", to_stderr=True)
    if not any(key.startswith(("model.", "train.")) for key in later):
        jobs.check_named_code(config, code)


def _list_files(config: RunConfig, code: Path | None, ship: bool) -> None:
    from outlast.cluster.jobs.bundle import check_code, describe_bundle
    from outlast.cluster.jobs.ray_jobs import check_reachable

    _warn(code, None)
    for line in describe_bundle(code, ship=ship):
        print_line(line)
    check_code(code)
    check_reachable(config)


def _warn(code: Path | None, address: str | None) -> None:
    """Print what of the code is not sent, and whether a token is sent unencrypted."""
    from outlast.cluster.jobs.bundle import warn_of_code
    from outlast.cluster.preflight.plain_http import plain_http_warnings

    for text in (*warn_of_code(code), *plain_http_warnings(address)):
        print_line(f"outlast: {text}", to_stderr=True)


def list_(address: Address = None, storage: StorageRoot = "./runs", as_json: AsJson = False) -> None:
    """List the runs in --storage, or with --address a cluster's submissions."""
    rows: list[dict[str, Any]]
    where = f"in {storage}" if address is None else "on this cluster"
    if address is not None:
        from outlast.cluster.jobs import ray_jobs as jobs

        rows = [asdict(job) for job in jobs.jobs_of(jobs.connect(address))]
    else:
        from outlast.checkpointing.storage.factory import open_storage
        from outlast.checkpointing.storage.local import LocalStorage
        from outlast.cluster.monitoring.status import list_runs

        rows, unreadable = list_runs(root := open_storage(storage))
        print_unreadable(unreadable)
        if isinstance(root, LocalStorage) and not root.path("").is_dir():
            where = f"{where}, which is no directory"
    if as_json:
        print_json(rows)
        return
    if not rows:
        print_line(f"no runs {where}", to_stderr=True)
    print_runs(rows)


def logs(
    run: Run,
    address: Address = None,
    follow: Annotated[bool, Option("--follow", help="Print until the job ends.")] = False,
) -> None:
    """Print the log of a run's newest job. With --follow the exit code is the job's."""
    from outlast.cluster.jobs import ray_jobs as jobs

    client = jobs.connect(address)
    job = jobs.newest_job(client, run_name(run))
    if follow:
        from outlast.cluster.jobs.job_log import follow as follow_log

        raise Exit(follow_log(client, job.id).exit_code)
    print_log(client.get_job_logs(job.id))


def stop(run: Run, address: Address = None) -> None:
    """Have a run commit a checkpoint and end, and wait for it. The exit code is the run's.

    --address is a job server, which must have had a job of the run, or a Ray cluster (HEAD:6379) that this machine is
    part of. A run that has lost its driver is stopped too.
    """
    from outlast.cluster.jobs import ray_jobs as jobs

    name = run_name(run)
    if address is not None and "://" not in address:
        _stop_without_driver(name, address)
        return
    client = jobs.connect(address)
    job = jobs.stop(client, name)
    if job is None:
        print_line(f"run {name} has no live job", to_stderr=True)
        log, exit_code = jobs.run_command(client, ["stop", name, "--address", "auto"], None)
        print_log(log, to_stderr=True)
        raise Exit(exit_code)
    again = jobs.resume_command_of(client, job.id) or shlex.join(["outlast", "resume", run])
    again += f" --address {shlex.quote(address)}" if address else ""
    print_line(f"{job.id}: {job.status}; to resume: {again}", to_stderr=True)
    raise Exit(job.exit_code)


def _stop_without_driver(name: str, address: str) -> None:
    """Stop a run on the Ray cluster at `address` that needs no driver."""
    from outlast.cluster.driver.detached.attachment import stop_run

    finished = stop_run(name, address)
    if finished is None:
        print_line(f"no workers of run {name} are left on the cluster", to_stderr=True)
        return
    print_line(f"{name}: launch {finished.launch}: {finished.outcome.value}", to_stderr=True)
    raise Exit(finished.outcome.exit_code)
