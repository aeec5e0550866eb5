"""The `k8s` verbs. Thin: each one reads its arguments, calls one function, prints what comes back."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outlast.cluster.cli.options import AsJson, writing
from outlast.cluster.config.run_reference import RUN_FILES
from outlast.cluster.formatting import counted

if TYPE_CHECKING:
    from outlast.cluster.kubernetes.client import Cluster
    from outlast.cluster.preflight.finding import Finding

k8s = typer.Typer(help="Run on Kubernetes.", no_args_is_help=True)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The run file.", show_default=False)]
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name, or its run file.")]
Objects = Annotated[str, typer.Argument(metavar="FILE", help="Manifests, such as `render` prints; - for stdin.")]
Context = Annotated[str | None, typer.Option(help="A context of the kubeconfig; default: the current one.")]
Namespace = Annotated[str | None, typer.Option(help="Default: the one that the context is set to.")]


@k8s.callback()
def _k8s() -> None:
    """Run on Kubernetes."""


@k8s.command()
def render(
    run_file: RunFile,
    image: Annotated[str | None, typer.Option(help="Image with outlast and Ray in it; not :latest.")] = None,
    pull_secret: Annotated[str | None, typer.Option(help="A secret to fetch the image with.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Default: the one that kubectl is set to.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the RayJob; default: made from the run's.")] = None,
    labels: Annotated[
        list[str] | None, typer.Option("--label", metavar="KEY=VALUE", help="One more label for the RayJob.")
    ] = None,
    queue: Annotated[str | None, typer.Option(help="A local queue of Kueue.")] = None,
    claim: Annotated[str | None, typer.Option(help="An existing volume claim; default: a new one.")] = None,
    claim_size: Annotated[str | None, typer.Option(help="Size of a new claim.")] = None,
    storage_class: Annotated[str | None, typer.Option(help="Storage class of a new claim.")] = None,
    mount: Annotated[str | None, typer.Option(help="Where the claim is mounted; default: checkpoint.storage.")] = None,
    secret: Annotated[str | None, typer.Option(help="A secret whose keys become environment variables.")] = None,
    service_account: Annotated[str | None, typer.Option(help="An existing service account.")] = None,
    network_policy: Annotated[bool, typer.Option(help="Whom the pods talk to is limited.")] = True,
    egress_ports: Annotated[
        list[int] | None, typer.Option("--egress-port", help="A port that the pods may reach anywhere.")
    ] = None,
    worker_cpus: Annotated[int | None, typer.Option(help="CPUs of a worker without scale.cpus_per_worker.")] = None,
    worker_memory: Annotated[str | None, typer.Option(help="Memory of a worker.")] = None,
    head_cpus: Annotated[int | None, typer.Option(help="CPUs of the head.")] = None,
    head_memory: Annotated[str | None, typer.Option(help="Memory of the head.")] = None,
    shm: Annotated[str | None, typer.Option(help="Size of /dev/shm, part of the memory.")] = None,
    spot: Annotated[bool, typer.Option("--spot", help="Workers on spot nodes only.")] = False,
    fallback: Annotated[bool, typer.Option("--fallback", help="… and on others where there are none.")] = False,
    fallback_after_s: Annotated[int | None, typer.Option(help="Seconds to wait for a spot node.")] = None,
    head_nodes: Annotated[
        list[str] | None, typer.Option("--head-node", metavar="KEY=VALUE", help="For the head.")
    ] = None,
    worker_nodes: Annotated[
        list[str] | None, typer.Option("--worker-node", metavar="KEY=VALUE", help="For workers.")
    ] = None,
    worker_taints: Annotated[
        list[str] | None, typer.Option("--worker-taint", metavar="KEY=VALUE:EFFECT", help="Tolerated by workers.")
    ] = None,
    backoff_limit: Annotated[int | None, typer.Option(help="How often a failed job is started again.")] = None,
    grace_s: Annotated[int | None, typer.Option(help="Seconds from a pod's SIGTERM to its SIGKILL.")] = None,
    notice_s: Annotated[int | None, typer.Option(help="Seconds until a spot node's end, as Ray is told.")] = None,
    output: Annotated[Path | None, typer.Option("--output", metavar="FILE", help="Default: stdout.")] = None,
    into: Annotated[
        Path | None, typer.Option("--into", metavar="DIR", help="A folder for `kubectl apply -k` instead.")
    ] = None,
    parts: Annotated[
        list[str] | None,
        typer.Option("--with", metavar="PART", help="In it: dev, gpu, kueue, monitoring, nfs, spot."),
    ] = None,
) -> None:
    """Print the RayJob and what it needs, for kubectl or `apply`."""
    given = {key: value for key, value in locals().items() if key not in ("run_file", "output", "into", "parts")}
    from outlast.checkpointing.errors import ConfigError
    from outlast.cluster.config.run_config import load_run
    from outlast.cluster.kubernetes.kustomize import write_folder
    from outlast.cluster.kubernetes.render import cautions, render, to_yaml
    from outlast.cluster.kubernetes.settings import k8s_settings

    if parts and into is None:
        raise ConfigError("--with adds parts to a folder", hint="name it: --into DIR")
    settings = k8s_settings(**given)
    config, declared = load_run(str(run_file))  # not at_home(): the paths are the pods'
    objects = render(config, declared, settings)
    for caution in cautions(config, declared, settings):
        print(f"outlast: {caution}", file=sys.stderr)
    if into is not None:
        with writing(into):
            written = write_folder(into, objects, parts or [])
        for path in written:
            print(path)
    elif output is None:
        print(to_yaml(objects), end="")
    else:
        with writing(output):
            output.write_text(to_yaml(objects), encoding="utf-8")


@k8s.command()
def lint(
    files: Annotated[list[str], typer.Argument(metavar="FILE…", help="Manifests; - for stdin.")],
    as_json: AsJson = False,
) -> None:
    """Tell what KubeRay would refuse (exit code 2), and what would cost a run on nodes that vanish (a warning)."""
    from dataclasses import asdict

    from outlast.cluster.kubernetes.lint.linter import lint

    objects = [item for file in files for item in _read(file)]
    findings = lint(objects)
    _tell_rest(objects)
    if as_json:
        print(json.dumps([{**asdict(finding), "level": finding.level.value} for finding in findings]))
    else:
        for finding in findings:
            print(_line(finding))
    raise typer.Exit(_worst(findings))


@k8s.command()
def apply(
    file: Objects,
    context: Context = None,
    namespace: Namespace = None,
    force: Annotated[bool, typer.Option("--force", help="Take over fields that somebody else has set.")] = False,
) -> None:
    """Apply manifests on the server's side, after a look as `lint` has. What it refuses is not applied: exit code 2."""
    from outlast.cluster.kubernetes.lint.linter import lint
    from outlast.cluster.preflight.finding import Level

    objects = _read(file)
    findings = [finding for finding in lint(objects) if finding.level is not Level.OK]
    _tell_rest(objects)
    for finding in findings:
        print(_line(finding), file=sys.stderr)
    if code := _worst(findings):
        raise typer.Exit(code)
    for line in _cluster(context, namespace).apply(objects, force=force):
        print(line)


@k8s.command()
def status(run: RunName, context: Context = None, namespace: Namespace = None, as_json: AsJson = False) -> None:
    """Show a run's RayJobs, pods and warnings. How far the training is: `outlast status`, from its storage."""
    told = _cluster(context, namespace).status(_name(run))
    if as_json:
        print(json.dumps(told))
        return
    for job in told["jobs"]:
        said = " ".join(str(job[key]) for key in ("deployment", "job", "reason") if job[key])
        print(f"rayjob/{job['name']}  {job['phase']}: {said}")
        tries = f"{job['tries_failed']} of {job['backoff_limit'] + 1} tries failed"
        print(f"  cluster {job['cluster'] or '-'}, workers {job['workers_ready']} of {job['workers_wanted']}; {tries}")
        if job["message"]:
            print(f"  {job['message']}")
    for pod in told["pods"]:
        more = [counted(pod["restarts"], "restart")] if pod["restarts"] else []
        more += [str(pod[key]) for key in ("waits_for", "last_end") if pod[key]]
        print(f"  {pod['role']:9} {pod['name']}  {pod['phase']}  {pod['node'] or '-'}  {', '.join(more)}".rstrip())
    for row in told["warnings"]:
        print(f"  warning: {row['of']}: {row['reason']}: {row['message']}")


@k8s.command()
def suspend(run: RunName, context: Context = None, namespace: Namespace = None) -> None:
    """Free a run's nodes, with a checkpoint first."""
    print(_cluster(context, namespace).suspend(_name(run)))


@k8s.command()
def resume(run: RunName, context: Context = None, namespace: Namespace = None) -> None:
    """Go on with a run that was suspended, or whose RayJob has ended: with another RayJob, from its storage."""
    print(_cluster(context, namespace).resume(_name(run)))


@k8s.command()
def delete(
    run: RunName,
    context: Context = None,
    namespace: Namespace = None,
    storage: Annotated[bool, typer.Option("--storage", help="The volume claim too, with all checkpoints.")] = False,
) -> None:
    """Delete a run's objects. A run that is at work commits a checkpoint first."""
    for line in _cluster(context, namespace).delete(_name(run), storage=storage):
        print(line)


def _cluster(context: str | None, namespace: str | None) -> Cluster:
    from outlast.cluster.kubernetes.client import Cluster

    return Cluster(context, namespace)


def _name(run: str) -> str:
    if run.endswith(RUN_FILES):
        from outlast.cluster.config.run_config import load_run

        return load_run(run)[0].name
    return run


def _read(file: str) -> list[dict[str, Any]]:
    from outlast.checkpointing.errors import ConfigError
    from outlast.cluster.kubernetes.lint.linter import read_objects

    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read: {error.strerror}", hint="name what `outlast k8s render` wrote"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no text: {error.reason}", hint="name what `outlast k8s render` wrote") from error
    return read_objects(text)


def _tell_rest(objects: list[dict[str, Any]]) -> None:
    """Says of what lint knows nothing, so that its silence is not taken for a word."""
    from outlast.cluster.kubernetes.lint.linter import unchecked_objects

    if names := unchecked_objects(objects):
        print(f"outlast: not looked at, for want of rules: {', '.join(names)}", file=sys.stderr)


def _line(finding: Finding) -> str:
    return f"{finding.level.value:8} {finding.check}  {finding.text}"


def _worst(findings: list[Finding]) -> int:
    """2 where something would be refused; warnings are none of an exit code's business."""
    from outlast.cluster.preflight.finding import Level

    return 2 if any(finding.level is Level.FAILED for finding in findings) else 0
