"""`outlast k8s lint`: what is wrong with manifests before a cluster takes them. Not what their schemas say: for that,
`kubectl apply --server-side --dry-run=server --validate=strict` asks the cluster itself. Pure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.kubernetes.accessors import LintComplaint, mapping
from outlast.cluster.kubernetes.lint.config_map_rules import disagreements, missing_config_maps
from outlast.cluster.kubernetes.lint.operator_rules import operator_complaints
from outlast.cluster.kubernetes.lint.placement_rules import placement_risks, unworkable
from outlast.cluster.kubernetes.lint.pod_security_rules import security_complaints
from outlast.cluster.kubernetes.lint.reliability_rules import budget_complaints, claim_complaints, risks
from outlast.cluster.kubernetes.lint.secret_rules import config_map_complaints, secrets_written_down
from outlast.cluster.preflight.finding import Finding, Level

_RULES: dict[str, list[tuple[Level, Callable[[Mapping[str, Any]], Iterator[LintComplaint]]]]] = {
    "RayJob": [
        (Level.FAILED, operator_complaints),
        (Level.FAILED, unworkable),
        (Level.FAILED, secrets_written_down),
        (Level.WARNING, risks),
        (Level.WARNING, placement_risks),
        (Level.WARNING, security_complaints),
    ],
    "ConfigMap": [(Level.WARNING, config_map_complaints)],
    "PersistentVolumeClaim": [(Level.WARNING, claim_complaints)],
    "PodDisruptionBudget": [(Level.WARNING, budget_complaints)],
}

#: Kinds with which nothing can be wrong that would be known here.
_HARMLESS = ("NetworkPolicy", "ServiceAccount")

_HINT = "give what `outlast k8s render` prints"


def read_objects(text: str) -> list[dict[str, Any]]:
    """The objects of a YAML stream, and those in a `List` of it.

    Raises:
        ConfigError: It is no YAML, holds something else, or nothing.
    """
    try:
        found = [item for item in yaml.safe_load_all(text) if item is not None]
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"not YAML: {' '.join(str(error).split())}", hint=_HINT) from error
    objects = [item for document in found for item in _unpacked(document)]
    if not objects:
        raise ConfigError("there is no object in it", hint=_HINT)
    return objects


def _unpacked(document: Any) -> Iterator[dict[str, Any]]:
    if not isinstance(document, dict) or not document.get("kind") or not document.get("apiVersion"):
        raise ConfigError("a document is no Kubernetes object: it has no apiVersion, or no kind", hint=_HINT)
    if document["kind"] != "List":
        yield document
        return
    items = document.get("items")
    for item in items if isinstance(items, list) else []:
        yield from _unpacked(item)


def unchecked_objects(objects: Sequence[Mapping[str, Any]]) -> list[str]:
    """Objects of kinds for which there is no rule, as `kind/name`."""
    return [_name(item) for item in objects if str(item.get("kind")) not in (*_RULES, *_HARMLESS)]


def lint(objects: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """What is wrong, or `OK` for each RayJob with nothing wrong. `FAILED` is what the operator refuses."""
    config_maps = {
        str(mapping(item, "metadata").get("name")): mapping(item, "data")
        for item in objects
        if item.get("kind") == "ConfigMap"
    }
    found = []
    for item in objects:
        kind, name = str(item.get("kind")), _name(item)
        said = list(_said(name, item))
        if kind == "RayJob":
            said += _findings(Level.FAILED, name, disagreements(item, config_maps))
            if any(other.get("kind") != "RayJob" for other in objects):  # else it may well be in the cluster
                said += _findings(Level.WARNING, name, missing_config_maps(item, config_maps))
            said = said or [Finding(Level.OK, name, "nothing wrong")]
        found += said
    return found


def _name(item: Mapping[str, Any]) -> str:
    meta = mapping(item, "metadata")
    return f"{item.get('kind')}/{meta.get('name') or meta.get('generateName')}".lower()


def _said(name: str, item: Mapping[str, Any]) -> Iterator[Finding]:
    for level, rule in _RULES.get(str(item.get("kind")), []):
        yield from _findings(level, name, rule(item))


def _findings(level: Level, name: str, complaints: Iterable[LintComplaint]) -> list[Finding]:
    return [Finding(level, name, f"{where}: {text}") for where, text in complaints]
