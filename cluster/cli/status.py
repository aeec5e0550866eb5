"""The commands `status` and `report`. Both must read the run's storage only: its cluster may be gone."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import BadParameter, Exit, Option

from outlast.cluster.cli.options import Address, AsJson, Run, StorageRoot, print_runs, print_unreadable, writing
from outlast.cluster.config.run_reference import RUN_FILES, find_run
from outlast.cluster.formatting import counted, duration, when
from outlast.cluster.output import make_console, print_json, print_line

if TYPE_CHECKING:
    from outlast.cluster.monitoring.status import RunSnapshot


def status(
    run: Run,
    address: Address = None,
    storage: StorageRoot = "./runs",
    watch: Annotated[bool, Option("--watch", help="Update until the run has ended; exit with its result.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show a run's progress, from its storage; with --address, its jobs too. For a storage, list its runs.

    With --watch the exit code is 0 for a finished run, 75 for a stopped one, 1 for one that failed or whose driver has
    been silent for ten minutes: a supervisor would have restarted it. A custom loop has no driver; it is shown until
    Ctrl-C.
    """
    from outlast.checkpointing.run_store.claims import list_attempts, list_launches
    from outlast.cluster.monitoring.status import as_values, take_snapshot
    from outlast.cluster.monitoring.timeline import State, TimelineReader

    if watch and (as_json or address):
        raise BadParameter("--watch shows the run's storage in the terminal; omit --json and --address")
    store, _ = find_run(run, storage)
    if not list_attempts(store) and not list_launches(store) and (rows := _runs_in(run)):
        print_json(rows) if as_json else print_runs(rows)
        return
    if watch:
        from outlast.cluster.monitoring.console_progress import terminal
        from outlast.cluster.monitoring.console_progress import watch as watch_run

        summary = watch_run(store, terminal())
        raise Exit({State.DONE: 0, State.STOPPED: 75}.get(summary.state, 1))
    timeline = TimelineReader(store).update()
    summary = take_snapshot(timeline, time.time())
    body = as_values(store, timeline, summary)
    print_unreadable(store.unreadable)
    if address is not None:
        from outlast.cluster.jobs.ray_jobs import connect, jobs_of

        body["jobs"] = [asdict(job) for job in jobs_of(connect(address), store.run)]
    if as_json:
        print_json(body)
        return
    _print(run, summary, body)


def _runs_in(storage: str) -> list[dict[str, Any]]:
    """Return the runs of a storage that was given instead of a run."""
    from outlast.checkpointing.storage.factory import open_storage
    from outlast.checkpointing.storage.location import is_url
    from outlast.cluster.monitoring.status import list_runs

    is_storage = is_url(storage) or Path(storage).is_dir()
    if not is_storage:
        return []
    rows, unreadable = list_runs(open_storage(storage))
    print_unreadable(unreadable)
    return rows


def _print(run: str, summary: RunSnapshot, body: dict[str, Any]) -> None:
    from outlast.cluster.monitoring.live_panel import panel
    from outlast.cluster.monitoring.timeline import State

    console = make_console()
    for line in panel(summary, console.width, num_interruptions=0):
        console.print(line, soft_wrap=True)
    if newest := body["newest_checkpoint"]:
        print_line(f"newest checkpoint: step {newest['step']}, {when(newest['committed_at'])}, {newest['path']}")
    print_line(f"attempts: {body['attempts']}")
    for end in summary.interruptions:
        rank = f" (rank {end.rank})" if end.rank is not None else ""
        print_line(f"  {when(end.at)}  {end.cause}{rank}" + (f": {end.message[:160]}" if end.message else ""))
        where = next((item.get("where") for item in body["failures"] if item.get("attempt") == end.attempt), None)
        if where:
            print_line(f"    {where}")
    for item in summary.regroupings:
        print_line(f"  {when(item.at)}  {item.description}; {item.outcome}")
        phases = ", ".join(f"{name} {duration(seconds)}" for name, seconds in item.phases.items())
        source = "" if item.source is None else f"state of rank {item.source}, after step {item.step}; "
        print_line(f"    {source}{phases}")
    for change in body["sizes"]:
        print_line(f"  {when(change['t'])}  {counted(change['before'], 'worker')} → {change['now']}: {change['cause']}")
    for job in body.get("jobs", []):
        print_line(f"job {job['id']}: {job['status']}")
    for damaged in body["damaged"]:
        print_line(f"damaged: {damaged}; for details: outlast checkpoints verify {run}")
    if summary.state in (State.STOPPED, State.LOST):
        start = f"from step {newest['step']}" if newest else "from the beginning"
        file = run if run.endswith(RUN_FILES) else "RUN.yaml"
        print_line(f"→ outlast train {file} (or submit) resumes {start}")


def report(
    run: Run,
    output: Annotated[
        Path | None, Option("-o", "--output", metavar="FILE", help="The file to write; default: RUN-report.html.")
    ] = None,
    verify: Annotated[bool, Option("--verify", help="Read every byte of every checkpoint first.")] = False,
    storage: StorageRoot = "./runs",
) -> None:
    """Write an HTML report of a run: losses, failures, goodput, checkpoints, settings."""
    from outlast.cluster.monitoring.report.report import Report

    store, _ = find_run(run, storage)
    target = output or Path(f"{store.run}-report.html")
    html = Report.read(store, verify=verify).to_html()
    print_unreadable(store.unreadable)
    with writing(target):
        target.write_text(html, encoding="utf-8", errors="backslashreplace")  # halves of surrogates
    print_line(target)
