"""The `k8s` commands: each reads its arguments, calls one function and prints the result. No logic belongs here."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Exit, Option, Typer, confirm

from outlast.checkpointing.errors import ConfigError, PreflightError
from outlast.cluster.cli.options import AsJson, RunFile, Texts, writing
from outlast.cluster.config.run_reference import RUN_FILES, run_name
from outlast.cluster.formatting import counted
from outlast.cluster.output import print_document, print_json, print_line
from outlast.cluster.preflight.finding import Finding, Level

if TYPE_CHECKING:
    from outlast.cluster.kubernetes.client import KubernetesNamespace
    from outlast.cluster.kubernetes.ownership import RunIdentity

k8s = Typer(help="Run on Kubernetes.", no_args_is_help=True)

RunName = Annotated[str, Argument(metavar="RUN", help="A run's name, or its run file.")]
Objects = Annotated[str, Argument(metavar="FILE", help="Manifests, as printed by `render`; - for stdin.")]
Context = Annotated[str | None, Option(help="A context of the kubeconfig; default: the current one.")]
KubeRay = Annotated[
    str | None, Option(help="The cluster's release of KubeRay, if it is not the one whose rules lint has.")
]
Namespace = Annotated[str | None, Option(help="Namespace; default: the context's.")]


@k8s.command()
def render(
    run_file: RunFile,
    image: Annotated[str | None, Option(help="Image with outlast and Ray in it; not :latest.")] = None,
    pull_secret: Annotated[str | None, Option(help="A secret to pull the image with.")] = None,
    namespace: Annotated[str | None, Option(help="Namespace of all objects; default: kubectl's current one.")] = None,
    name: Annotated[str | None, Option(help="Name of the RayJob; default: made from the run's.")] = None,
    labels: Annotated[Texts, Option("--label", metavar="KEY=VALUE", help="A label for the RayJob; repeatable.")] = None,
    queue: Annotated[str | None, Option(help="A local queue of Kueue.")] = None,
    elastic_queue: Annotated[
        bool, Option("--elastic-queue", help="With --queue: Kueue admits workers as they are added.")
    ] = False,
    schedule: Annotated[str | None, Option(help="Times to start or resume the run, in cron's format.")] = None,
    time_zone: Annotated[str | None, Option(help="Time zone of the schedule.")] = None,
    sidecar: Annotated[bool, Option("--sidecar", help="Submit the job from a container in the head's pod.")] = False,
    keep_failed_s: Annotated[int | None, Option(help="Seconds for which the head of a failed run is kept.")] = None,
    claim: Annotated[str | None, Option(help="An existing volume claim; default: a new one.")] = None,
    claim_size: Annotated[str | None, Option(help="Size of a new claim.")] = None,
    storage_class: Annotated[str | None, Option(help="Storage class of a new claim.")] = None,
    mount: Annotated[str | None, Option(help="Mount path of the claim; default: checkpoint.storage.")] = None,
    secret: Annotated[str | None, Option(help="A secret whose keys become environment variables.")] = None,
    service_account: Annotated[str | None, Option(help="An existing service account.")] = None,
    network_policy: Annotated[bool, Option(help="Limit the pods' network traffic.")] = True,
    operator_namespace: Annotated[str | None, Option(help="Namespace of KubeRay's operator.")] = None,
    egress_ports: Annotated[
        list[int] | None, Option("--egress-port", help="A port that the pods may reach at any address.")
    ] = None,
    worker_cpus: Annotated[int | None, Option(help="CPUs of a worker if scale.cpus_per_worker is not set.")] = None,
    worker_memory: Annotated[str | None, Option(help="Memory of a worker.")] = None,
    head_cpus: Annotated[int | None, Option(help="CPUs of the head.")] = None,
    head_memory: Annotated[str | None, Option(help="Memory of the head.")] = None,
    shm: Annotated[str | None, Option(help="Size of /dev/shm, part of the memory.")] = None,
    spot: Annotated[bool, Option("--spot", help="Run workers on spot nodes only.")] = False,
    fallback: Annotated[
        bool, Option("--fallback", help="With --spot: use other nodes if no spot node is available.")
    ] = False,
    fallback_after_s: Annotated[int | None, Option(help="Seconds to wait for a spot node.")] = None,
    head_nodes: Annotated[Texts, Option("--head-node", metavar="KEY=VALUE", help="A node label for the head.")] = None,
    worker_nodes: Annotated[
        Texts, Option("--worker-node", metavar="KEY=VALUE", help="A node label for workers.")
    ] = None,
    worker_taints: Annotated[
        Texts, Option("--worker-taint", metavar="KEY=VALUE:EFFECT", help="A taint that workers tolerate.")
    ] = None,
    backoff_limit: Annotated[int | None, Option(help="How often a failed job is started again.")] = None,
    grace_s: Annotated[int | None, Option(help="Seconds from a pod's SIGTERM to its SIGKILL.")] = None,
    notice_s: Annotated[int | None, Option(help="Seconds until a spot node's end, as announced to Ray.")] = None,
    output: Annotated[
        Path | None, Option("--output", metavar="FILE", help="Write to this file; default: stdout.")
    ] = None,
    into: Annotated[
        Path | None, Option("--into", metavar="DIR", help="Write a folder for `kubectl apply -k` instead.")
    ] = None,
    components: Annotated[
        Texts,
        Option(
            "--with", metavar="COMPONENT", help="With --into: dev, gpu, kueue, monitoring, nfs or spot; repeatable."
        ),
    ] = None,
) -> None:
    """Print the RayJob and what it needs, for kubectl or `apply`."""
    given = {key: value for key, value in locals().items() if key not in ("run_file", "output", "into", "components")}
    from outlast.cluster.config.run_file import load_run
    from outlast.cluster.kubernetes.kustomize import write_folder
    from outlast.cluster.kubernetes.render import render, to_yaml, warnings_for
    from outlast.cluster.kubernetes.settings import k8s_settings

    if components and into is None:
        raise ConfigError("--with needs a folder", hint="give --into DIR")
    settings = k8s_settings(**given)
    config, declared = load_run(str(run_file))  # not at_home(): the paths are the pods'
    objects = render(config, declared, settings)
    for warning in warnings_for(config, declared, settings, os.environ):
        print_line(f"outlast: {warning}", to_stderr=True)
    if into is not None:
        with writing(into):
            written = write_folder(into, objects, components or [])
        for path in written:
            print_line(path)
    elif output is None:
        print_document(to_yaml(objects))
    else:
        with writing(output):
            output.write_text(to_yaml(objects), encoding="utf-8")


@k8s.command()
def lint(
    files: Annotated[list[str], Argument(metavar="FILE…", help="Manifests; - for stdin.")],
    as_json: AsJson = False,
    kuberay: KubeRay = None,
) -> None:
    """Check manifests: what the API server or KubeRay refuses (exit code 2), and what makes the loss of a node
    expensive (warnings)."""
    _, findings = _read_and_lint(files, kuberay)
    if as_json:
        print_json([{**asdict(finding), "level": finding.level.value} for finding in findings], indent=None)
    else:
        for finding in findings:
            print_line(_line(finding))
    raise Exit(_worst(findings))


@k8s.command()
def apply(
    file: Objects,
    context: Context = None,
    namespace: Namespace = None,
    force: Annotated[bool, Option("--force", help="Take over fields that another field manager set.")] = False,
    kuberay: KubeRay = None,
) -> None:
    """Lint manifests, then apply them on the server's side. Failed ones are not applied: exit code 2."""
    objects, findings = _read_and_lint([file], kuberay)
    for finding in findings:
        if finding.level is not Level.OK:
            print_line(_line(finding), to_stderr=True)
    if code := _worst(findings):
        raise Exit(code)
    for line in _cluster(context, namespace).apply(objects, force=force):
        print_line(line)


@k8s.command()
def status(run: RunName, context: Context = None, namespace: Namespace = None, as_json: AsJson = False) -> None:
    """Show a run's RayJobs, pods and warnings. `outlast status` shows the training's progress."""
    identity = _identity(run)
    body = _cluster(context, namespace).status(identity)
    if as_json:
        print_json(body, indent=None)
        return
    for job in body["jobs"]:
        state = " ".join(str(job[key]) for key in ("deployment", "job", "reason") if job[key])
        print_line(f"rayjob/{job['name']}  {job['phase']}: {state}")
        attempts = f"{job['tries_failed']} of {job['backoff_limit'] + 1} job attempts failed"
        workers = f"workers {job['workers_ready']} of {job['workers_wanted']}"
        print_line(f"  cluster {job['cluster'] or '-'}, {workers}; {attempts}")
        if job["message"]:
            print_line(f"  {job['message']}")
    for pod in body["pods"]:
        more = [counted(pod["restarts"], "restart")] if pod["restarts"] else []
        more += [str(pod[key]) for key in ("waits_for", "last_end") if pod[key]]
        print_line(f"  {pod['role']:9} {pod['name']}  {pod['phase']}  {pod['node'] or '-'}  {', '.join(more)}".rstrip())
    for row in body["warnings"]:
        print_line(f"  warning: {row['of']}: {row['reason']}: {row['message']}")


@k8s.command()
def suspend(run: RunName, context: Context = None, namespace: Namespace = None) -> None:
    """Commit a checkpoint, then free the run's nodes."""
    identity = _identity(run)
    print_line(_cluster(context, namespace).suspend(identity))


@k8s.command()
def resume(run: RunName, context: Context = None, namespace: Namespace = None) -> None:
    """Resume a suspended run, or one whose RayJob has ended: a new RayJob then resumes from storage."""
    identity = _identity(run)
    print_line(_cluster(context, namespace).resume(identity))


@k8s.command()
def delete(
    run: RunName,
    context: Context = None,
    namespace: Namespace = None,
    storage: Annotated[bool, Option("--storage", help="Delete the volume claim too, with all checkpoints.")] = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Only print what would be deleted, and what is left.")] = False,
    yes: Annotated[
        bool, Option("--yes", help="Do not ask on a terminal. Without a terminal, nothing is asked.")
    ] = False,
) -> None:
    """Delete the objects that outlast made for a run, by their annotation. A running run commits a checkpoint first."""
    from outlast.cluster.kubernetes.ownership import object_name

    identity = _identity(run)
    cluster = _cluster(context, namespace)
    plan = cluster.plan_deletion(identity, storage=storage)
    asks = bool(plan.to_delete) and not (dry_run or yes) and is_terminal()
    for item in plan.to_delete if dry_run or asks else ():
        print_line(f"{object_name(item)} would be deleted", to_stderr=asks)
    if asks and not confirm(f"Delete these from namespace {plan.namespace}?", err=True):
        print_line("nothing was deleted", to_stderr=True)
        raise Exit(1)
    for line in cluster.delete(plan) if not dry_run else ():
        print_line(line)
    for line in plan.remaining:
        print_line(line)
    if plan.is_incomplete:
        raise PreflightError(
            f"run {plan.run.name} has objects that were not deleted, because nothing proves that outlast made them for "
            "it; older releases rendered no proof",
            hint=plan.kubectl,
        )


def is_terminal() -> bool:
    """Return whether a question can be answered here."""
    return sys.stdin.isatty() and sys.stderr.isatty()


def _identity(run: str) -> RunIdentity:
    """Return the run's identity; a run file gives its id too, which tells runs of the same name apart."""
    from outlast.cluster.config.run_file import load_run
    from outlast.cluster.kubernetes.ownership import RunIdentity
    from outlast.cluster.kubernetes.render import declared_identity

    return declared_identity(*load_run(run)) if run.endswith(RUN_FILES) else RunIdentity(run_name(run))


def _cluster(context: str | None, namespace: str | None) -> KubernetesNamespace:
    from outlast.cluster.kubernetes.client import KubernetesNamespace

    return KubernetesNamespace(context, namespace)


def _read(file: str) -> list[dict[str, Any]]:
    from outlast.cluster.kubernetes.lint.linter import read_objects

    hint = "give a file that `outlast k8s render` wrote"
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
    except IsADirectoryError as error:
        hint = f"`kubectl kustomize {file}` prints what it makes; pipe that to this command, with - as FILE"
        raise ConfigError(f"{file} is a folder", hint=hint) from error
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}", hint=hint) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not a text file: {error.reason}", hint=hint) from error
    try:
        return read_objects(text)
    except ConfigError as error:
        raise ConfigError(f"{'stdin' if file == '-' else file}: {error.message}", hint=error.hint) from error


def _read_and_lint(files: list[str], kuberay: str | None) -> tuple[list[dict[str, Any]], list[Finding]]:
    """Read and lint objects; report the release of the rules, and the objects that have none: lint's silence is no
    approval of them."""
    from outlast.cluster.kubernetes.lint.linter import is_known_release, lint, unchecked_objects
    from outlast.cluster.kubernetes.lint.operator_rules import KUBERAY

    objects = [item for file in files for item in _read(file)]
    findings = lint(objects, kuberay or KUBERAY)
    is_known = kuberay is None or is_known_release(kuberay)
    differs = "" if is_known else f"; what they refuse is a warning, because the cluster has {kuberay}"
    print_line(f"outlast: rules of KubeRay {KUBERAY}{differs}", to_stderr=True)
    if names := unchecked_objects(objects):
        print_line(f"outlast: not checked, no rules for: {', '.join(names)}", to_stderr=True)
    return objects, findings


def _line(finding: Finding) -> str:
    return f"{finding.level.value:8} {finding.check}  {finding.text}"


def _worst(findings: list[Finding]) -> int:
    """Return 2 if KubeRay would refuse an object, else 0; warnings do not count."""
    return 2 if any(finding.level is Level.FAILED for finding in findings) else 0
