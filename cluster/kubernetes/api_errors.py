"""Errors of a Kubernetes API server in outlast's words: what was refused, which field, and what to do about it.

The decision is a table: the first row that fits an answer gives the class and the hint. The server's own sentence is
kept, because admission webhooks and quotas explain themselves in it.
"""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from outlast.checkpointing.error_hints import first_line
from outlast.checkpointing.errors import ConfigError, OutlastError, PreflightError

#: A field and the complaint in a message of the server's typed patch, which comes with status 500.
_TYPED = re.compile(r"(?m)^\s*\.?(?P<field>[\w.\[\]=\"/-]+): (?P<problem>expected .+|field not declared in schema)$")
_TYPED_PATCH = re.compile(r"failed to create typed patch object \([^)]*\): (?:errors:\s*)?", re.DOTALL)
_UNKNOWN = re.compile(r"unknown field \"(?P<field>[^\"]+)\"")


class ObjectNotFound(PreflightError):
    """The object or the namespace does not exist."""


class KindUnknown(PreflightError):
    """The cluster has no such kind of object: its operator is not installed."""


class AccessForbidden(PreflightError):
    """The credentials may not do this."""


class ObjectChanged(ConfigError):
    """Another object or field manager is in the way; `delete` meets it if an object was replaced."""


@dataclass(frozen=True)
class Refusal:
    """A refusal of the API server."""

    status: int
    message: str
    name: str = ""  #: kind/name of the object, or the kind
    namespace: str = ""

    @property
    def kind(self) -> str:
        return self.name.partition("/")[0]


@contextmanager
def api_errors(name: str = "", namespace: str = "") -> Iterator[None]:
    """Translate errors of the API server into outlast's; `name` is the object's, as kind/name."""
    from kubernetes.client.exceptions import ApiException
    from kubernetes.dynamic.exceptions import ResourceNotFoundError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ResourceNotFoundError as error:
        raise KindUnknown(
            f"the cluster has no such kind of object: {first_line(error)}",
            hint="install KubeRay 1.7 (or the operator that defines the kind); see k8s/README.md",
        ) from error
    except ApiException as error:
        raise error_for(Refusal(int(error.status or 0), _message(error), name, namespace)) from error
    except HTTPError as error:
        message = f"the cluster does not answer: {first_line(error)}"
        hint = "kubectl cluster-info"
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            message = f"the cluster's certificate is not trusted: {first_line(error)}"
            hint = "set certificate-authority of the cluster in the kubeconfig, or update the kubeconfig"
        raise PreflightError(message, hint=hint) from error


def error_for(refusal: Refusal) -> OutlastError:
    """Return outlast's error for a refusal."""
    if fields := _refused_fields(refusal.message):
        path = re.sub(r"\[[^\]]*\]", "", fields[0].partition(":")[0])
        hint = f"correct the manifest; kubectl explain {refusal.kind or 'KIND'}.{path} shows the field"
        return ConfigError(_prefixed(refusal, "; ".join(fields)), hint=hint)
    refused = "the cluster does not accept the credentials: " if refusal.status == 401 else ""
    for fits, kind, hint in _RULES:
        if fits(refusal):
            names = {"kind": refusal.kind or "objects", "namespace": refusal.namespace or "NAMESPACE"}
            return kind(_prefixed(refusal, refused + refusal.message), hint=hint.format(**names))
    hint = "kubectl get --raw /readyz?verbose shows the API server's state; then try again"
    return PreflightError(_prefixed(refusal, refusal.message), hint=hint)


def _refused_fields(message: str) -> list[str]:
    """Return the fields that the schema refuses, each with the complaint."""
    if match := _TYPED_PATCH.search(message):
        found = [f"{item['field']}: {item['problem']}" for item in _TYPED.finditer(message[match.end() :])]
        return found or [message[match.end() :].strip()]
    return [f"{item['field']}: unknown field" for item in _UNKNOWN.finditer(message)]


def _prefixed(refusal: Refusal, text: str) -> str:
    return f"{refusal.name}: {text}".removeprefix(": ")


def _message(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"


def _says(*texts: str) -> Callable[[Refusal], bool]:
    return lambda refusal: any(text in refusal.message for text in texts)


def _has(*statuses: int) -> Callable[[Refusal], bool]:
    return lambda refusal: refusal.status in statuses


def _is_fixed_claim(refusal: Refusal) -> bool:
    texts = ("immutable", "field can not be less than", "can be resized", "may not be less than")
    return refusal.kind == "persistentvolumeclaim" and any(text in refusal.message for text in texts)


_RULES: tuple[tuple[Callable[[Refusal], bool], type[OutlastError], str], ...] = (
    (
        _has(401),
        PreflightError,
        "the credentials in the kubeconfig are missing, wrong or expired: log in again as your cluster's provider "
        "says; `kubectl auth whoami` shows whether they are accepted",
    ),
    (_has(404), ObjectNotFound, "kubectl get namespaces; give an existing one with --namespace"),
    (
        _says("exceeded quota", "must specify limits", "must specify requests", "maximum memory usage per"),
        PreflightError,
        "kubectl describe quota,limitrange --namespace {namespace} shows what is used; render with smaller values, or "
        "ask for a larger quota",
    ),
    (
        _says("failed calling webhook", "failed to call webhook"),
        PreflightError,
        "the webhook's own service does not work: kubectl get validatingwebhookconfigurations,"
        "mutatingwebhookconfigurations names it; its operator must run",
    ),
    (
        lambda refusal: "denied the request" in refusal.message or "denied request" in refusal.message,
        ConfigError,
        "an admission policy of this cluster refuses the object: change the manifest as it says, or ask its owner",
    ),
    (
        _says("because it is being terminated"),
        PreflightError,
        "namespace {namespace} is being deleted: wait, or give another --namespace",
    ),
    (
        _is_fixed_claim,
        ConfigError,
        "a claim that exists keeps its class, access modes and volume, and can at most grow: render with its own "
        "values, with --claim NAME for a claim as it is, or with another --name for a new one",
    ),
    (
        _says("immutable"),
        ConfigError,
        "this field cannot change: delete the object and apply again, or render with another --name",
    ),
    (
        _says("Apply failed with", "conflict with"),
        ObjectChanged,
        "another field manager set these fields; --force takes over",
    ),
    (_has(409), ObjectChanged, "the object was changed at the same time; try again"),
    (_has(400, 413, 415, 422), ConfigError, "outlast k8s lint FILE"),
    (
        _has(403),
        AccessForbidden,
        "kubectl auth can-i --list --namespace {namespace} shows your permissions",
    ),
    (_has(429, 503, 504), PreflightError, "the API server is overloaded or not ready; try again in a moment"),
)
