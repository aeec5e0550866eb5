"""What a namespace under the restricted Pod Security standard refuses in a pod. Pure.

A pod's own security context counts for each of its containers, as far as a container says nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from outlast.cluster.kubernetes.accessors import LintComplaint, containers, mapping, pod_templates, rows, words

_PROFILES = ("RuntimeDefault", "Localhost")
_MAY_BE_ADDED = "NET_BIND_SERVICE"


def security_complaints(job: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """Pods and containers that a restricted namespace refuses."""
    for role, pod in pod_templates(job):
        spec = mapping(pod, "spec")
        for flag in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(flag):
                yield role, f"{flag} is not for a restricted namespace"
        if any("hostPath" in volume for volume in rows(spec, "volumes")):
            yield role, "a hostPath volume is not for a restricted namespace"
    for where, pod, container in containers(job):
        whole, own = _said(pod), _said(container)
        for verb, found in (("lacks", _lacks({**whole, **own}, own)), ("has", [*_wrong(whole), *_wrong(own)])):
            if found:
                named = ", ".join(dict.fromkeys(found))
                yield where, f"securityContext {verb} {named}: a restricted namespace refuses the pod"


def _said(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in mapping(value, "securityContext").items() if item is not None}


def _lacks(merged: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    holds = {
        "runAsNonRoot: true": merged.get("runAsNonRoot") is True,
        "allowPrivilegeEscalation: false": own.get("allowPrivilegeEscalation") is False,
        "capabilities: {drop: [ALL]}": "ALL" in words(mapping(own, "capabilities"), "drop"),
        "seccompProfile": bool(mapping(merged, "seccompProfile").get("type")),
    }
    return [name for name, is_there in holds.items() if not is_there]


def _wrong(context: Mapping[str, Any]) -> Iterator[str]:
    profile, user = mapping(context, "seccompProfile").get("type"), context.get("runAsUser")
    if profile and profile not in _PROFILES:
        yield f"seccompProfile {profile}"
    if user == 0 and user is not False:
        yield "runAsUser 0"
    if context.get("privileged"):
        yield "privileged: true"
    added = [name for name in words(mapping(context, "capabilities"), "add") if name != _MAY_BE_ADDED]
    if added:
        yield f"capabilities.add [{', '.join(added)}]"
