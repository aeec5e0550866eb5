"""What the API server refuses: names, labels, numbers, quantities and duplicates, with the path of the field.

A pod template is checked as the pod that KubeRay makes from it: the server refuses that one, hours later perhaps.
Fields that no rule names are not checked: for those, let the server check a dry run. Pure; no rule trusts what it
reads.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from outlast.cluster.kubernetes.accessors import CLUSTER, LintComplaint, mapping, mappings, worker_groups
from outlast.cluster.kubernetes.quantity import quantity_value

_LABEL = r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?"
_SUBDOMAIN = rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*"
_VALUE = r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?"
_KEY = rf"({_SUBDOMAIN.replace('1,253', '1,400')}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?"
_PORT_NAME = r"(?=.*[a-z])(?!.*--)[a-z0-9]([-a-z0-9]{0,13}[a-z0-9])?"
_VARIABLE = r"[^=\x00-\x1f\x7f-\uffff]+"
_IMAGE = r"[\w.:/-]+(@[\w.+-]+:[0-9a-fA-F]+)?"
_MAX_INT = 2**31 - 1
_MAX_ANNOTATIONS = 256 * 1024
#: Fields that are whole numbers, and their smallest value.
_JOB_NUMBERS = {
    "backoffLimit": 0,
    "ttlSecondsAfterFinished": 0,
    "activeDeadlineSeconds": 1,
    "preRunningDeadlineSeconds": 1,
}
_GROUP_NUMBERS = {"replicas": 0, "minReplicas": 0, "maxReplicas": 0, "numOfHosts": 1, "idleTimeoutSeconds": 0}
_POD_NUMBERS = {"terminationGracePeriodSeconds": 0, "activeDeadlineSeconds": 1}
_CONTAINER_NUMBERS = {"containerPort": 1, "hostPort": 1}
_FLAGS = ("suspend", "shutdownAfterJobFinishes")


def metadata_complaints(
    item: Mapping[str, Any], where: str = "metadata", *, is_named: bool = True
) -> Iterator[LintComplaint]:
    """Yield findings on the metadata of an object of any kind, or of a pod template (which needs no name)."""
    meta = mapping(item, "metadata")
    name = meta.get("name")
    if is_named and not name and not meta.get("generateName"):
        yield f"{where}.name", "is missing"
    if name is not None and not _matches(_SUBDOMAIN, name):
        yield f"{where}.name", f"{name!r} is not a name: lower-case letters, digits, dashes and dots, at most 253"
    if "namespace" in meta and not _matches(_LABEL, meta["namespace"]):
        yield f"{where}.namespace", f"{meta['namespace']!r} is not a DNS-1123 label of at most 63 characters"
    yield from _labels(f"{where}.labels", meta.get("labels"))
    annotations = meta.get("annotations")
    yield from _texts(f"{where}.annotations", annotations)
    if sum(len(str(key)) + len(str(value)) for key, value in mapping(annotations).items()) > _MAX_ANNOTATIONS:
        yield f"{where}.annotations", "have more than 256 KiB"


def job_complaints(job: Mapping[str, Any]) -> Iterator[LintComplaint]:
    """Yield findings on a RayJob's spec and on each of its pods."""
    spec = mapping(job, "spec")
    yield from _numbers("spec", spec, _JOB_NUMBERS)
    for key in _FLAGS:
        if not isinstance(spec.get(key, False), bool):
            yield f"spec.{key}", f"{spec[key]!r} is not true or false"
    for key in ("entrypoint", "runtimeEnvYAML", "jobId", "submissionMode"):
        if key in spec and not isinstance(spec[key], str):
            yield f"spec.{key}", f"{spec[key]!r} is not a text"
    if "submitterPodTemplate" in spec:
        yield from _pod("spec.submitterPodTemplate", mapping(spec, "submitterPodTemplate"))
    cluster = mapping(spec, "rayClusterSpec")
    groups = [(f"{CLUSTER}.headGroupSpec", mapping(cluster, "headGroupSpec"))] if cluster else []
    for where, group in (*groups, *worker_groups(job)):
        yield from _numbers(where, group, _GROUP_NUMBERS)
        yield from _texts(f"{where}.rayStartParams", group.get("rayStartParams"))
        yield from _labels(f"{where}.labels", group.get("labels"))
        yield from _pod(f"{where}.template", mapping(group, "template"))
    for where, group in worker_groups(job):
        if not isinstance(group.get("groupName"), str):
            yield f"{where}.groupName", f"{group.get('groupName')!r} is not a text"


def _pod(where: str, pod: Mapping[str, Any]) -> Iterator[LintComplaint]:
    yield from metadata_complaints(pod, f"{where}.metadata", is_named=False)
    spec, inside = mapping(pod, "spec"), f"{where}.spec"
    yield from _numbers(inside, spec, _POD_NUMBERS)
    yield from _labels(f"{inside}.nodeSelector", spec.get("nodeSelector"))
    volumes = mappings(spec, "volumes")
    for number, volume in enumerate(volumes):
        if not _matches(_LABEL, volume.get("name")):
            yield f"{inside}.volumes[{number}].name", f"{volume.get('name')!r} is not a DNS-1123 label"
        limit = mapping(volume, "emptyDir").get("sizeLimit", 0)
        yield from _quantity(f"{inside}.volumes[{number}].emptyDir.sizeLimit", limit)
    yield from _duplicates(f"{inside}.volumes", [volume.get("name") for volume in volumes])
    names: list[Any] = []
    for key in ("initContainers", "containers"):
        for number, container in enumerate(mappings(spec, key)):
            names.append(container.get("name"))
            yield from _container(f"{inside}.{key}[{number}]", container, [volume.get("name") for volume in volumes])
    yield from _duplicates(f"{inside}.containers", names)


def _container(where: str, container: Mapping[str, Any], volumes: list[Any]) -> Iterator[LintComplaint]:
    if not _matches(_LABEL, container.get("name")):
        yield f"{where}.name", f"{container.get('name')!r} is not a DNS-1123 label of at most 63 characters"
    image = container.get("image")
    if image is not None and not _matches(_IMAGE, image):
        yield f"{where}.image", f"{image!r} is not the name of an image"
    for key in ("command", "args"):
        items = container.get(key)
        if items is not None and not (isinstance(items, list) and all(isinstance(item, str) for item in items)):
            yield f"{where}.{key}", "is not a list of texts"
    yield from _env(f"{where}.env", mappings(container, "env"))
    ports = mappings(container, "ports")
    for number, port in enumerate(ports):
        yield from _numbers(f"{where}.ports[{number}]", port, _CONTAINER_NUMBERS, 65535)
        if "name" in port and not _matches(_PORT_NAME, port["name"]):
            text = f"{port['name']!r} is not a port's name: lower-case letters, digits and dashes, at most 15"
            yield f"{where}.ports[{number}].name", text
    yield from _duplicates(f"{where}.ports", [port["name"] for port in ports if "name" in port])
    numbers = [f"{port.get('containerPort')}/{port.get('protocol', 'TCP')}" for port in ports]
    yield from _duplicates(f"{where}.ports", numbers)
    mounts = mappings(container, "volumeMounts")
    yield from _duplicates(f"{where}.volumeMounts", [mount.get("mountPath") for mount in mounts])
    for number, mount in enumerate(mounts):
        if mount.get("name") not in volumes:
            yield f"{where}.volumeMounts[{number}].name", f"the pod has no volume {mount.get('name')!r}"
    yield from _resources(f"{where}.resources", mapping(container, "resources"))


def _env(where: str, variables: list[Mapping[str, Any]]) -> Iterator[LintComplaint]:
    for number, item in enumerate(variables):
        if not _matches(_VARIABLE, item.get("name")):
            yield f"{where}[{number}].name", f"{item.get('name')!r} is not a variable's name"
        if not isinstance(item.get("value", ""), str | None):
            yield f"{where}[{number}].value", f"of {item.get('name')} is not a text: put it in quotes"
    yield from _duplicates(where, [item.get("name") for item in variables])


def _resources(where: str, resources: Mapping[str, Any]) -> Iterator[LintComplaint]:
    requests, limits = mapping(resources, "requests"), mapping(resources, "limits")
    for kind, values in (("requests", requests), ("limits", limits)):
        for name, value in values.items():
            yield from _quantity(f"{where}.{kind}.{name}", value)
    for name, request in requests.items():
        needed, most = quantity_value(request), quantity_value(limits.get(name))
        if needed is not None and most is not None and needed > most:
            yield f"{where}.requests.{name}", f"{request} exceeds the limit of {limits[name]}"
        if "." in str(name).partition("/")[0] and "/" in str(name) and name not in limits:
            yield f"{where}.limits.{name}", "is missing: the limit of an extended resource must equal its request"


def _quantity(where: str, value: Any) -> Iterator[LintComplaint]:
    if quantity_value(value) is None:
        yield where, f"{value!r} is not a quantity such as 500m or 16Gi, 0 or more"


def _numbers(
    where: str, item: Mapping[str, Any], fields: Mapping[str, int], most: int = _MAX_INT
) -> Iterator[LintComplaint]:
    for key, least in fields.items():
        value = item.get(key)
        if value is None:
            continue
        if type(value) is not int:
            yield f"{where}.{key}", f"{value!r} is not a whole number"
        elif not least <= value <= most:
            yield (
                f"{where}.{key}",
                f"{value} must not be negative" if value < 0 else f"{value} is not in {least}–{most}",
            )


def _labels(where: str, labels: Any) -> Iterator[LintComplaint]:
    yield from _texts(where, labels)
    for key, value in mapping(labels).items():
        if isinstance(value, str) and not re.fullmatch(_VALUE, value):
            text = f"{value!r} is not a label: letters, digits, `-`, `_` and `.`, at most 63 characters"
            yield f"{where}.{key}", text


def _texts(where: str, items: Any) -> Iterator[LintComplaint]:
    """Yield what is not a mapping of qualified names to texts."""
    if items is not None and not isinstance(items, Mapping):
        yield where, "is not a mapping"
    for key, value in mapping(items).items():
        if not _matches(_KEY, key):
            yield f"{where}.{key}", f"{key!r} is not a key: a name of at most 63 characters, with or without a prefix/"
        if not isinstance(value, str):
            yield f"{where}.{key}", f"{value!r} is not a text: put it in quotes"


def _duplicates(where: str, names: list[Any]) -> Iterator[LintComplaint]:
    for name, count in Counter(str(name) for name in names if name is not None).items():
        if count > 1:
            yield where, f"{name} is there {count} times"


def _matches(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None
