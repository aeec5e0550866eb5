"""`outlast k8s lint`: problems of manifests, found before they are applied. It does not check their schemas: for that,
`kubectl apply --server-side --dry-run=server --validate=strict` has the cluster check them. Pure.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.kubernetes.accessors import LintComplaint, mapping
from outlast.cluster.kubernetes.lint.operator_rules import operator_complaints
from outlast.cluster.kubernetes.lint.pod_security_rules import security_complaints
from outlast.cluster.kubernetes.lint.reliability_rules import budget_complaints, claim_complaints, reliability_risks
from outlast.cluster.kubernetes.lint.run_file_rules import missing_config_maps, run_file_mismatches
from outlast.cluster.kubernetes.lint.secret_rules import config_map_complaints, inline_secrets
from outlast.cluster.preflight.finding import Finding, Level

_RULES: dict[str, list[tuple[Level, Callable[[Mapping[str, Any]], Iterator[LintComplaint]]]]] = {
    "RayJob": [
        (Level.FAILED, operator_complaints),
        (Level.FAILED, inline_secrets),
        (Level.WARNING, reliability_risks),
        (Level.WARNING, security_complaints),
    ],
    "ConfigMap": [(Level.WARNING, config_map_complaints)],
    "PersistentVolumeClaim": [(Level.WARNING, claim_complaints)],
    "PodDisruptionBudget": [(Level.WARNING, budget_complaints)],
    "NetworkPolicy": [],  # needs no rule
    "ServiceAccount": [],
}

_HINT = "give what `outlast k8s render` prints"


def read_objects(text: str) -> list[dict[str, Any]]:
    """Return the objects of a YAML stream, those in a `List` included. Raises ConfigError if it holds anything else."""
    try:
        documents = [item for item in yaml.safe_load_all(text) if item is not None]
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}", hint=_HINT) from error
    objects = [item for document in documents for item in _objects_in(document)]
    if not objects:
        raise ConfigError("the input holds no objects", hint=_HINT)
    return objects


def _objects_in(document: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(document, dict) or not document.get("kind") or not document.get("apiVersion"):
        raise ConfigError("a document is not a Kubernetes object: apiVersion or kind is missing", hint=_HINT)
    if document["kind"] != "List":
        yield document
        return
    items = document.get("items")
    for item in items if isinstance(items, list) else []:
        yield from _objects_in(item)


def unchecked_objects(objects: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the objects of kinds that have no rules, as `kind/name`."""
    return [_name(item) for item in objects if str(item.get("kind")) not in _RULES]


def lint(objects: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """Return all findings, and `OK` for each RayJob without one. `FAILED` means that the operator refuses it."""
    config_maps = {
        str(mapping(item, "metadata").get("name")): mapping(item, "data")
        for item in objects
        if item.get("kind") == "ConfigMap"
    }
    findings = []
    for item in objects:
        kind, name = str(item.get("kind")), _name(item)
        own = [finding for level, rule in _RULES.get(kind, []) for finding in _findings(level, name, rule(item))]
        if kind == "RayJob":
            own += _findings(Level.FAILED, name, run_file_mismatches(item, config_maps))
            if any(other.get("kind") != "RayJob" for other in objects):  # else it may be in the cluster already
                own += _findings(Level.WARNING, name, missing_config_maps(item, config_maps))
            own = own or [Finding(Level.OK, name, "no problems found")]
        findings += own
    return findings


def _name(item: Mapping[str, Any]) -> str:
    meta = mapping(item, "metadata")
    return f"{item.get('kind')}/{meta.get('name') or meta.get('generateName')}".lower()


def _findings(level: Level, name: str, complaints: Iterable[LintComplaint]) -> list[Finding]:
    return [Finding(level, name, f"{where}: {text}") for where, text in complaints]
