"""`outlast k8s lint`: problems of manifests, found before they are applied. It does not check their schemas: for that,
`kubectl apply --server-side --dry-run=server --validate=strict` has the cluster check them. Pure.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import yaml

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.kubernetes.accessors import LintComplaint, mapping
from outlast.cluster.kubernetes.lint.api_rules import job_complaints, metadata_complaints
from outlast.cluster.kubernetes.lint.cron_rules import cron_complaints, cron_risks, job_of
from outlast.cluster.kubernetes.lint.operator_rules import KUBERAY, operator_complaints
from outlast.cluster.kubernetes.lint.pod_security_rules import security_complaints
from outlast.cluster.kubernetes.lint.reliability_rules import budget_complaints, claim_complaints, reliability_risks
from outlast.cluster.kubernetes.lint.run_file_rules import missing_config_maps, run_file_mismatches
from outlast.cluster.kubernetes.lint.secret_rules import config_map_complaints, inline_secrets
from outlast.cluster.preflight.finding import Finding, Level

_Rule = Callable[[Mapping[str, Any]], Iterator[LintComplaint]]
_RULES: dict[str, list[tuple[Level, _Rule]]] = {
    "RayJob": [
        (Level.FAILED, job_complaints),
        (Level.FAILED, operator_complaints),
        (Level.FAILED, inline_secrets),
        (Level.WARNING, reliability_risks),
        (Level.WARNING, security_complaints),
    ],
    "RayCronJob": [(Level.FAILED, cron_complaints), (Level.WARNING, cron_risks)],
    "ConfigMap": [(Level.WARNING, config_map_complaints)],
    "PersistentVolumeClaim": [(Level.WARNING, claim_complaints)],
    "PodDisruptionBudget": [(Level.WARNING, budget_complaints)],
    "NetworkPolicy": [],  # needs no rule
    "ServiceAccount": [],
}
_JOBS = ("RayJob", "RayCronJob")
#: Rules of one release of KubeRay; of another, their findings are warnings.
_KUBERAY_RULES: tuple[_Rule, ...] = (operator_complaints, cron_complaints)

_HINT = "give what `outlast k8s render` prints"


def read_objects(text: str) -> list[dict[str, Any]]:
    """Return the objects of a YAML stream, those in a `List` included. Raises ConfigError if it holds anything else."""
    try:
        objects = [item for document in _documents(text) for item in _objects_in(document)]
    except RecursionError as error:
        raise ConfigError("a document contains itself, or is nested too deeply", hint=_HINT) from error
    if not objects:
        raise ConfigError("the input holds no objects", hint=_HINT)
    return objects


def _documents(text: str) -> list[Any]:
    try:
        return [item for item in yaml.safe_load_all(text) if item is not None]
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}", hint=_HINT) from error


def _objects_in(document: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(document, dict) or not document.get("kind") or not document.get("apiVersion"):
        raise ConfigError("a document is not a Kubernetes object: apiVersion or kind is missing", hint=_HINT)
    for key in ("apiVersion", "kind"):
        if not isinstance(document[key], str):
            raise ConfigError(f"{key} {document[key]!r} of an object is not a text", hint=_HINT)
    if document["kind"] != "List":
        yield document
        return
    items = document.get("items")
    for item in items if isinstance(items, list) else []:
        yield from _objects_in(item)


def unchecked_objects(objects: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the objects of kinds that have no rules, as `kind/name`."""
    return [_name(item) for item in objects if str(item.get("kind")) not in _RULES]


def is_known_release(kuberay: str) -> bool:
    """Return whether the rules are those of a release of KubeRay, such as 1.7.2. Raises ConfigError if it is none."""
    if not (match := re.fullmatch(r"v?(\d+\.\d+)(\.\d+)?(-[\w.]+)?", kuberay)):
        raise ConfigError(f"{kuberay!r} is not a release of KubeRay", hint=f"write --kuberay {KUBERAY}")
    return match[1] == KUBERAY


def lint(objects: Sequence[Mapping[str, Any]], kuberay: str = KUBERAY) -> list[Finding]:
    """Return all findings, and `OK` for each RayJob without one.

    `FAILED` means that the API server or KubeRay refuses an object. For a release of KubeRay other than the rules',
    what KubeRay would refuse is a warning.
    """
    config_maps = {
        str(mapping(item, "metadata").get("name")): mapping(item, "data")
        for item in objects
        if item.get("kind") == "ConfigMap"
    }
    is_known, findings = is_known_release(kuberay), []
    has_others = any(item.get("kind") not in _JOBS for item in objects)  # else they may be in the cluster already
    for item in objects:
        kind, name = str(item.get("kind")), _name(item)
        own = [*_findings(Level.FAILED, name, metadata_complaints(item)), *_apply(kind, item, name, is_known)]
        if kind in _JOBS:
            job = item if kind == "RayJob" else job_of(item)
            found = [*_apply("RayJob", job, name, is_known)] if kind != "RayJob" else []
            found += _findings(Level.FAILED, name, run_file_mismatches(job, config_maps))
            if has_others:
                found += _findings(Level.WARNING, name, missing_config_maps(job, config_maps))
            own += found if kind == "RayJob" else [_in_template(finding) for finding in found]
            own = own or [Finding(Level.OK, name, "no problems found")]
        findings += own
    return findings


def _in_template(finding: Finding) -> Finding:
    """Return a finding on the RayJob of a RayCronJob, with its path there."""
    return replace(finding, text=re.sub(r"^spec\.", "spec.jobTemplate.", finding.text))


def _apply(kind: str, item: Mapping[str, Any], name: str, is_known: bool) -> list[Finding]:
    """Apply the rules of a kind."""
    return [
        finding
        for level, rule in _RULES.get(kind, [])
        for finding in _findings(level if is_known or rule not in _KUBERAY_RULES else Level.WARNING, name, rule(item))
    ]


def _name(item: Mapping[str, Any]) -> str:
    meta = mapping(item, "metadata")
    return f"{item.get('kind')}/{meta.get('name') or meta.get('generateName')}".lower()


def _findings(level: Level, name: str, complaints: Iterable[LintComplaint]) -> list[Finding]:
    return [Finding(level, name, f"{where}: {text}") for where, text in complaints]
