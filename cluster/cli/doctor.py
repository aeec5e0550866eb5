"""`outlast doctor`: what is wrong with a cluster, before a run finds out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outlast.cluster.cli.options import AsJson

if TYPE_CHECKING:
    from outlast.cluster.preflight.doctor_rules import Requirements
    from outlast.cluster.preflight.finding import Finding

#: How its report begins where it runs as a job, so that it is found in the job's log.
JSON_HEAD = '{"checks": '


def doctor(
    run_file: Annotated[
        Path | None, typer.Argument(metavar="[RUN.yaml]", help="A run file: what the cluster must be fit for.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("-s", "--set", metavar="KEY=VALUE", help="Override a setting.")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            help="A Ray cluster, or its job server (http://HEAD:8265); default: RAY_ADDRESS, else "
            "RAY_API_SERVER_ADDRESS, else a Ray of its own on this machine."
        ),
    ] = None,
    storage: Annotated[str | None, typer.Option(help="Without a run file: a storage to try.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only what `train` looks at, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Examine a cluster from every node: versions, devices, memory, disk, storage, clocks, ports, an all-reduce.

    Exit code 3 if anything failed; warnings are none of its business.
    """
    import os

    from outlast.cluster.preflight.doctor_rules import Requirements
    from outlast.cluster.preflight.finding import Level

    place = address or os.environ.get("RAY_ADDRESS") or os.environ.get("RAY_API_SERVER_ADDRESS")
    if place and place.startswith(("http://", "https://")):
        findings = _through_job_server(place, run_file, overrides or [], storage, quick)
    else:
        wanted = Requirements(storage=storage and _absolute(storage))
        if run_file is not None:
            from outlast.cluster.config.run_config import load_run
            from outlast.cluster.preflight.doctor import requirements_of

            wanted = requirements_of(load_run(str(run_file), overrides or [])[0].at_home(run_file.parent))
        findings = _here(place, wanted, quick)
    _print(findings, as_json)
    raise typer.Exit(3 if any(finding.level is Level.FAILED for finding in findings) else 0)


def _absolute(place: str) -> str:
    return place if "://" in place else str(Path(place).absolute())


def _here(address: str | None, wanted: Requirements, quick: bool) -> list[Finding]:
    from outlast.cluster.driver.ray_session import ray_session
    from outlast.cluster.jobs.ray_jobs import check_server
    from outlast.cluster.preflight.doctor import examine, job_server_of

    with ray_session(address) as joined:
        server = job_server_of() if joined else None
        found = examine(wanted, quick=quick)
    return found + (check_server(server) if server else [])


def _through_job_server(
    address: str, run_file: Path | None, overrides: list[str], storage: str | None, quick: bool
) -> list[Finding]:
    """The same, run on the cluster by its job server."""
    from outlast.checkpointing.errors import PreflightError
    from outlast.cluster.jobs import ray_jobs as jobs
    from outlast.cluster.preflight.finding import Finding, Level

    arguments, declared = ["doctor", "--json", *(["--quick"] if quick else [])], None
    if run_file is not None:
        from outlast.cluster.config.run_config import load_run

        config, declared = load_run(str(run_file), overrides)
        jobs.check_reachable(config)
        arguments.append("run.yaml")
    elif storage is not None:
        arguments += ["--storage", storage]
    client = jobs.connect(address)
    log = jobs.run_verb(client, arguments, declared)
    lines = [line for line in log.splitlines() if line.startswith(JSON_HEAD)]
    if not lines:
        print(log, file=sys.stderr, end="")
        raise PreflightError(
            f"the examination at {address} ended without a report; its log is above",
            hint="the cluster's image needs what outlast needs: `pip install outlast` there",
        )
    rows = [{**row, "level": Level(row["level"])} for row in json.loads(lines[-1])["checks"]]
    found = [Finding(**row) for row in rows if row["check"] != "job server"]
    return found + jobs.check_server(address)


def _print(findings: list[Finding], as_json: bool) -> None:
    from dataclasses import asdict

    if as_json:
        rows: list[dict[str, Any]] = [{**asdict(finding), "level": finding.level.value} for finding in findings]
        print(JSON_HEAD + json.dumps(rows) + "}")
        return
    for finding in findings:
        print(f"{finding.level.value:8} {finding.check:12} {finding.text}")
        if finding.hint:
            print(f"{'':22}→ {finding.hint}")
