"""The command line. Thin: every verb finds its run, calls one function, prints what comes back.

Data goes to stdout, progress and errors to stderr. `outlast --help` must import neither torch nor ray, so everything
heavy is imported where it is used.
"""

from __future__ import annotations

import json
import shlex
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outlast.checkpointing.errors import OutlastError, first_line
from outlast.cluster.cli.checkpoints import checkpoints
from outlast.cluster.cli.doctor import doctor
from outlast.cluster.cli.kubernetes import k8s
from outlast.cluster.cli.options import RUN_FILES, Address, AsJson, Overrides, Root, Run, find_run, writing
from outlast.cluster.cli.predict import try_
from outlast.cluster.cli.setup import init, plan, validate
from outlast.cluster.cli.status import report, status

if TYPE_CHECKING:
    from outlast.cluster.config.run_config import RunConfig

app = typer.Typer(
    name="outlast",
    help="Fine-tune Hugging Face models on Ray; outlast the machines the run is on.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # drawing boxes takes as long as all the rest
    context_settings={"max_content_width": 120},
)
app.command()(init)
app.command()(validate)
app.command()(plan)
app.add_typer(checkpoints, name="checkpoints")
app.command("try")(try_)
app.command()(doctor)
app.command()(status)
app.command()(report)
app.add_typer(k8s, name="k8s")

Code = Annotated[Path | None, typer.Option(help="A directory of your own Python files, importable on the workers.")]
Ship = Annotated[bool, typer.Option(help="Send this outlast along, so that the cluster runs the same version.")]
RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.", show_default=False)]


def _say_version(asked: bool) -> None:
    if asked:
        version()
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    asked: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print versions, and end.")
    ] = False,
) -> None:
    """Global options; `main` reads --debug itself."""


@app.command()
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option(help="A Ray cluster; default: one of its own on this machine.")] = None,
    take_over: Annotated[bool, typer.Option("--take-over", help="Take the run from another launch at once.")] = False,
) -> None:
    """Start the run, or resume it, or say that it is done. Prints where the finished model lies.

    Ctrl-C and SIGTERM commit a checkpoint first (exit code 75).
    """
    from outlast.cluster.config.run_config import load_run

    config, declared = load_run(str(run_file), overrides or [])
    from outlast.checkpointing.storage.base import open_storage
    from outlast.cluster.driver.launch import Launch
    from outlast.cluster.monitoring.reporter import Reporter
    from outlast.trainers.loop.train_loop import Outcome

    config = config.at_home(run_file.parent)
    with Reporter(config.name, storage=open_storage(config.checkpoint.storage), keep=True) as reporter:
        code = str(run_file.parent.absolute())
        finished = Launch(config, declared, take_over=take_over, code=code, tell=reporter).run(address)
    options = [part for item in overrides or [] for part in ("-s", item)] + (["--address", address] if address else [])
    again = shlex.join(["outlast", "train", str(run_file), *options])
    if finished.model is not None:
        reporter.say("done")
        print(f"{config.checkpoint.storage}/{finished.model}")
    elif finished.outcome is Outcome.STOPPED:
        reporter.say(f"stopped, with a committed checkpoint; go on with: {again}")
    else:
        reporter.say(f"another launch has this run; to take it over: {again} --take-over")
    raise typer.Exit(finished.outcome.exit_code)


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Where to put it.")] = Path("outlast-demo"),
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the findings as JSON.")
    ] = None,
) -> None:
    """Real text, two workers, one killed: come back, and compare with an uninterrupted run.

    Exit code 1 if one bit differs.
    """
    from outlast.cluster.drills.demo import run_demo

    findings = run_demo(folder)
    if json_file is not None:
        with writing(json_file):
            json_file.write_text(json.dumps(findings, indent=1) + "\n")
    raise typer.Exit(0 if all(findings["equal"].values()) else 1)


@app.command()
def drill(
    run_file: RunFile,
    overrides: Overrides = None,
    faults: Annotated[
        list[str] | None,
        typer.Option(
            "--fault", metavar="FAULT", help="kill, kill-in-save, error, stop, damage or driver; again for more. All."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of each copy.")] = 12,
    address: Annotated[str | None, typer.Option(help="A Ray cluster; default: one of its own on this machine.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the copies in the storage.")] = False,
    as_json: AsJson = False,
) -> None:
    """Injure short copies of your own run on purpose; see whether each comes back with the same bits, and how soon.

    Exit code 1 if one does not.
    """
    from dataclasses import asdict

    from outlast.cluster.drills.drill import kinds_of, run_drill

    found = run_drill(run_file, overrides or [], kinds=kinds_of(faults), num_steps=steps, address=address, keep=keep)
    if as_json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
    raise typer.Exit(0 if all(finding.is_good for finding in found) else 1)


@app.command()
def version(as_json: AsJson = False) -> None:
    """Versions, for a bug report."""
    from outlast.cluster.preflight.versions import versions

    found = versions()
    print(json.dumps(found) if as_json else "\n".join(f"{name} {said or '-'}" for name, said in found.items()))


@app.command()
def submit(
    run_file: RunFile,
    overrides: Overrides = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show its log, and end as it ends.")] = False,
    supervise: Annotated[bool, typer.Option("--supervise", help="Stay, and submit again when it dies.")] = False,
    code: Code = None,
    ship: Ship = True,
) -> None:
    """Submit the run to a Ray cluster; a run that is at work there already is attached to. Prints the job's id.

    With --follow or --supervise the exit code is the run's.
    """
    from outlast.cluster.config.run_config import load_run

    if follow and supervise:
        raise typer.BadParameter("--follow shows one job, --supervise stays with all of them; give one of the two")
    config, declared = load_run(str(run_file), overrides or [])
    if supervise:
        _supervise([(config, declared)], address, code, ship)
    _submit(config, declared, address, follow, code, ship)


@app.command("supervise")
def supervise_runs(
    runs: Annotated[list[str], typer.Argument(metavar="RUN…", help="Run files, or runs that have begun.")],
    overrides: Overrides = None,
    address: Address = None,
    code: Code = None,
    ship: Ship = True,
    storage: Root = "./runs",
) -> None:
    """Keep runs going on a Ray cluster: submit again when a job or the whole cluster has died.

    Ends when all have ended, with the exit code of one that failed, if there is one.
    """
    from outlast.cluster.config.run_config import load_run

    found = [
        load_run(run, overrides or []) if run.endswith(RUN_FILES) else _remembered(run, storage, overrides or [])
        for run in runs
    ]
    _supervise(found, address, code, ship)


def _supervise(
    found: list[tuple[RunConfig, dict[str, Any]]], address: str | None, code: Path | None, ship: bool
) -> None:
    from outlast.cluster.jobs.ray_jobs import check_reachable
    from outlast.cluster.jobs.supervisor import Supervisor, supervise

    for config, _ in found:
        check_reachable(config)
    raise typer.Exit(supervise([Supervisor(config, declared, address, code, ship) for config, declared in found]))


def _remembered(run: str, root: str, overrides: list[str]) -> tuple[RunConfig, dict[str, Any]]:
    """A run's settings as its storage remembers them."""
    from outlast.cluster.config.run_config import settings_of
    from outlast.cluster.monitoring.status import declared_settings

    place, name, _ = find_run(run, root)
    return settings_of(declared_settings(place, name), run, overrides)


@app.command()
def resume(
    run: Run,
    overrides: Overrides = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Show its log, and end as it ends.")] = False,
    code: Code = None,
    ship: Ship = True,
    storage: Root = "./runs",
) -> None:
    """Submit a run again, with the settings that its storage remembers."""
    config, declared = _remembered(run, storage, overrides or [])
    _submit(config, declared, address, follow, code, ship)


def _submit(
    config: RunConfig, declared: dict[str, Any], address: str | None, follow: bool, code: Path | None, ship: bool
) -> None:
    from outlast.cluster.jobs import ray_jobs as jobs

    jobs.check_reachable(config)
    jobs.check_code(config, code)
    client = jobs.connect(address)
    for warning in jobs.judge_server(client.get_address()):
        if warning.hint:
            print(f"outlast: {warning.text}; {warning.hint}", file=sys.stderr)
    job, is_new = jobs.submit(client, config, declared, code=code, ship=ship)
    print(f"{'submitted' if is_new else 'already at work; attached to'} {job.id}", file=sys.stderr)
    print(job.id)
    if follow:
        from outlast.checkpointing.storage.base import open_storage
        from outlast.cluster.monitoring.reporter import terminal, watching

        with watching(open_storage(config.checkpoint.storage), config.name, terminal()):
            ended = jobs.follow(client, job.id)
        raise typer.Exit(ended.exit_code)


@app.command("list")
def list_runs(address: Address = None, storage: Root = "./runs", as_json: AsJson = False) -> None:
    """List the runs under --storage, or with --address the submissions that a cluster remembers."""
    rows: list[dict[str, Any]]
    if address is not None:
        from dataclasses import asdict

        from outlast.cluster.jobs import ray_jobs as jobs

        rows = [asdict(job) for job in jobs.jobs_of(jobs.connect(address))]
    else:
        from outlast.checkpointing.storage.base import open_storage
        from outlast.cluster.monitoring.status import list_runs as runs_in

        rows = runs_in(open_storage(storage))
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if not rows:
        print(f"no run {'is remembered there' if address is not None else f'lies in {storage}'}", file=sys.stderr)
    for row in rows:
        state = row.get("status") or f"{row['state']:8} step {row['step']}/{row['num_steps'] or '?'}"
        print(f"{row.get('id') or row['run']:32}  {state}")


@app.command()
def logs(
    run: Run,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the job ends.")] = False,
) -> None:
    """Print the log of a run's newest job. With --follow the exit code is the job's."""
    from outlast.cluster.jobs import ray_jobs as jobs

    client = jobs.connect(address)
    job = jobs.newest(client, _run_name(run))
    if follow:
        raise typer.Exit(jobs.follow(client, job.id).exit_code)
    print(client.get_job_logs(job.id), end="")


@app.command()
def stop(run: Run, address: Address = None) -> None:
    """Ask a run's job to commit a checkpoint and end; wait until it has. The exit code is the job's."""
    from outlast.cluster.jobs import ray_jobs as jobs

    name = _run_name(run)
    job = jobs.stop(jobs.connect(address), name)
    if job is None:
        print(f"run {name} has no live job", file=sys.stderr)
        return
    print(f"{job.id}: {job.status}; go on with: outlast resume {run}", file=sys.stderr)
    raise typer.Exit(job.exit_code)


def _run_name(text: str) -> str:
    """The run's name alone, whichever way RUN is written."""
    if text.endswith(RUN_FILES):
        from outlast.cluster.config.run_config import load_run

        return load_run(text)[0].name
    return text.rstrip("/").rpartition("/")[2]


for _group in (app, checkpoints, k8s):
    for _command in _group.registered_commands:  # the whole first line, as far as its first sentence goes
        _command.short_help = (_command.callback.__doc__ or "").partition("\n")[0].split(". ")[0].rstrip(".") + "."


def main() -> None:
    """Entry point: runs a verb, and turns every error into one message and an exit code."""
    debug = "--debug" in sys.argv
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        app(prog_name="outlast")
    except OutlastError as error:
        _fail(error.message, error.hint, error.exit_code, debug)
    except KeyboardInterrupt:
        _fail(
            "interrupted", "run the same command again to go on from the newest checkpoint, if there is one", 130, debug
        )
    except Exception as error:  # noqa: BLE001 - the last resort: say so, and how to see more
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            hint = "end what else needs memory here, or run the command on a machine with more"
            _fail(f"this machine's memory ran out: {first_line(error)}", hint, 1, debug)
        _fail(
            f"unexpected {type(error).__name__}: {error}",
            "run again as `outlast --debug …` for the traceback",
            1,
            debug,
        )


def _fail(message: str, hint: str, code: int, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"outlast: {message}", file=sys.stderr)
    if hint:
        print(f"  → {hint}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
