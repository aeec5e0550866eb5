"""The `doctor` command: runs the checks on this machine, on a cluster, or as a job of its job server."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from outlast.checkpointing.errors import PreflightError
from outlast.checkpointing.storage.location import is_url
from outlast.cluster.cli.options import AsJson, Overrides
from outlast.cluster.output import print_json, print_line, print_log
from outlast.cluster.preflight.doctor_rules import Requirements
from outlast.cluster.preflight.finding import Finding, Level

#: Begin of the JSON report, by which it is found in a job's log.
JSON_HEAD = '{"checks": '


def doctor(
    run_file: Annotated[
        Path | None, Argument(metavar="[RUN.yaml]", help="A run file, whose requirements to check.")
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        Option(
            help="A Ray cluster, or its job server (http://HEAD:8265); default: RAY_ADDRESS, else "
            "RAY_API_SERVER_ADDRESS, else a new local one."
        ),
    ] = None,
    storage: Annotated[str | None, Option(help="Without a run file: a storage to test.")] = None,
    quick: Annotated[bool, Option("--quick", help="Only the checks that `train` runs too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a cluster from every node: versions, devices, memory, disk, storage, clocks, ports, an all-reduce.

    Exit code 3 if a check failed; warnings do not count.
    """
    from outlast.cluster.jobs.job_server import is_job_server

    target = address or os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_API_SERVER_ADDRESS")
    if target and is_job_server(target):
        findings = _run_as_job(target, run_file, overrides or [], storage, quick)
    else:
        at = storage if storage is None or is_url(storage) else str(Path(storage).absolute())
        requirements = Requirements(storage=at)
        if run_file is not None:
            from outlast.cluster.config.run_file import load_run
            from outlast.cluster.preflight.doctor import requirements_of

            requirements = requirements_of(load_run(str(run_file), overrides or [])[0].at_home(run_file.parent))
        findings = _run_here(target, requirements, quick)
    if as_json:
        rows = [{**asdict(finding), "level": finding.level.value} for finding in findings]
        print_json({"checks": rows}, indent=None)
    else:
        for finding in findings:
            print_line(f"{finding.level.value:8} {finding.check:12} {finding.text}")
            if finding.hint:
                print_line(f"{'':22}→ {finding.hint}")
    raise Exit(3 if any(finding.level is Level.FAILED for finding in findings) else 0)


def _run_here(address: str | None, requirements: Requirements, quick: bool) -> list[Finding]:
    from outlast.cluster.driver.ray_session import ray_session
    from outlast.cluster.jobs.ray_jobs import check_server
    from outlast.cluster.preflight.doctor import examine, job_server_address

    with ray_session(address) as is_existing:
        server = job_server_address() if is_existing else None
        findings = examine(requirements, quick=quick)
    return findings + (check_server(server) if server else [])


def _run_as_job(
    address: str, run_file: Path | None, overrides: list[str], storage: str | None, quick: bool
) -> list[Finding]:
    """Run the checks on the cluster, as a job of its job server."""
    from outlast.cluster.jobs import ray_jobs as jobs

    arguments, declared = ["doctor", "--json", *(["--quick"] if quick else [])], None
    if run_file is not None:
        from outlast.cluster.config.run_file import load_run

        config, declared = load_run(str(run_file), overrides)
        jobs.check_reachable(config)
        arguments.append("run.yaml")
    elif storage is not None:
        arguments += ["--storage", storage]
    client = jobs.connect(address)
    log, _ = jobs.run_command(client, arguments, declared)
    lines = [line for line in log.splitlines() if line.startswith(JSON_HEAD)]
    if not lines:
        print_log(log, to_stderr=True)
        hint = (
            "Ray there must run in an environment with outlast's dependencies (`pip install outlast`), its bin on PATH"
        )
        raise PreflightError(f"doctor at {address} ended without a report; its log is above", hint=hint)
    rows = [{**row, "level": Level(row["level"])} for row in json.loads(lines[-1])["checks"]]
    findings = [Finding(**row) for row in rows if row["check"] != "job server"]
    return findings + jobs.check_server(client.get_address())
