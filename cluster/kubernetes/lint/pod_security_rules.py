"""What a namespace under the restricted Pod Security standard refuses in a pod. Pure.

A pod's security context applies to each of its containers, unless the container overrides it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from outlast.cluster.kubernetes.accessors import LintComplaint, containers, mapping, mappings, pod_templates, strings

_PROFILES = ("RuntimeDefault", "Localhost")
_ALLOWED_CAPABILITY = "NET_BIND_SERVICE"


def security_complaints(job: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """Yield pods and containers that a restricted namespace refuses."""
    for role, pod in pod_templates(job):
        spec = mapping(pod, "spec")
        for flag in ("hostNetwork", "hostPID", "hostIPC"):
            if spec.get(flag):
                yield role, f"{flag} is not allowed in a restricted namespace"
        if any("hostPath" in volume for volume in mappings(spec, "volumes")):
            yield role, "a hostPath volume is not allowed in a restricted namespace"
    for where, pod, container in containers(job):
        inherited, own = _security_context(pod), _security_context(container)
        for verb, settings in (
            ("lacks", _missing({**inherited, **own}, own)),
            ("has", [*_forbidden(inherited), *_forbidden(own)]),
        ):
            if settings:
                names = ", ".join(dict.fromkeys(settings))
                yield where, f"securityContext {verb} {names}: a restricted namespace refuses the pod"


def _security_context(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: item for key, item in mapping(value, "securityContext").items() if item is not None}


def _missing(merged: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    requirements = {
        "runAsNonRoot: true": merged.get("runAsNonRoot") is True,
        "allowPrivilegeEscalation: false": own.get("allowPrivilegeEscalation") is False,
        "capabilities: {drop: [ALL]}": "ALL" in strings(mapping(own, "capabilities"), "drop"),
        "seccompProfile": bool(mapping(merged, "seccompProfile").get("type")),
    }
    return [name for name, is_met in requirements.items() if not is_met]


def _forbidden(context: Mapping[str, Any]) -> Iterator[str]:
    profile, user = mapping(context, "seccompProfile").get("type"), context.get("runAsUser")
    if profile and profile not in _PROFILES:
        yield f"seccompProfile {profile}"
    if user == 0 and user is not False:
        yield "runAsUser 0"
    if context.get("privileged"):
        yield "privileged: true"
    if added := [name for name in strings(mapping(context, "capabilities"), "add") if name != _ALLOWED_CAPABILITY]:
        yield f"capabilities.add [{', '.join(added)}]"
