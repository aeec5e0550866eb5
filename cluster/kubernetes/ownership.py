"""Ownership of Kubernetes objects: which of them outlast made for a run, and what deleting a run deletes and leaves.

`render` annotates every object with the run's name and an id. A label is no proof: `--label`, kustomize and other tools
set labels, and pods and selectors share them. Names are none either: kustomize adds prefixes. Pure.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.formatting import counted
from outlast.cluster.kubernetes.accessors import mapping

#: The label of every object and pod of a run; its policies select by it. Also the annotation with the run's name.
RUN_LABEL = "outlast/run"
ID_ANNOTATION = "outlast/run-id"
CLAIM = "PersistentVolumeClaim"
CRON_JOB = "RayCronJob"
#: Kinds of a run's objects, in the order to delete them: first those that create pods.
KINDS = {
    CRON_JOB: "ray.io/v1",
    "RayJob": "ray.io/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
    "PodDisruptionBudget": "policy/v1",
    "ConfigMap": "v1",
    "ServiceAccount": "v1",
    CLAIM: "v1",
}


@dataclass(frozen=True)
class RunIdentity:
    """A run's name, and its id where it is known: that of the name and `checkpoint.storage` as the run file has it."""

    name: str
    id: str | None = None

    @property
    def annotations(self) -> dict[str, str]:
        return {RUN_LABEL: self.name, **({ID_ANNOTATION: self.id} if self.id else {})}


@dataclass(frozen=True)
class Deletion:
    """What deleting a run deletes, and what it leaves."""

    run: RunIdentity
    namespace: str
    to_delete: list[Mapping[str, Any]] = field(default_factory=list)  #: in the order to delete them
    terminating: list[Mapping[str, Any]] = field(default_factory=list)  #: deleted before, but still there
    claims: list[Mapping[str, Any]] = field(default_factory=list)  #: kept, with the checkpoints
    unproven: list[Mapping[str, Any]] = field(default_factory=list)  #: they have the run's label and no proof
    num_pods: int = 0

    @property
    def is_empty(self) -> bool:
        return not (self.to_delete or self.terminating or self.claims or self.unproven or self.num_pods)

    @property
    def is_incomplete(self) -> bool:
        """Whether the run may go on: a RayJob or RayCronJob without proof is left, or nothing else is there."""
        rest = self.to_delete or self.terminating or self.claims
        return bool(self.unproven) and (not rest or any(item["kind"] in ("RayJob", CRON_JOB) for item in self.unproven))

    @property
    def remaining(self) -> list[str]:
        """One line for each thing that stays, with the reason."""
        lines = [f"{object_name(item)} is being deleted{_since(item)}" for item in self.terminating]
        lines += [f"{counted(self.num_pods, 'pod')} of the run not ended yet"] if self.num_pods else []
        for item in self.claims:
            also = "; --storage deletes it too" if owner(item) else ""
            lines.append(f"claim {item['metadata']['name']} kept, with the checkpoints{also}")
        reason = (
            f"kept: it has the run's label, but not the annotation {ID_ANNOTATION} that `outlast k8s render` writes"
        )
        lines += [f"{object_name(item)} {reason}" for item in self.unproven]
        return [*lines, f"if these are yours: {self.kubectl}"] if self.unproven else lines

    @property
    def kubectl(self) -> str:
        """The command that deletes what has no proof."""
        return f"kubectl delete --namespace {self.namespace} {' '.join(map(object_name, self.unproven))}"


def identity_of(name: str, storage: str) -> RunIdentity:
    """Return the identity of the run `name` in `storage`, as the run file has it, `${env:…}` unexpanded."""
    text = json.dumps([name, storage.rstrip("/")])
    return RunIdentity(name, hashlib.sha256(text.encode()).hexdigest()[:16])


def owner(item: Mapping[str, Any]) -> RunIdentity | None:
    """Return the run that an object was made for, by its annotations; None without proof."""
    annotations = mapping(item, "metadata", "annotations")
    name, its_id = annotations.get(RUN_LABEL), annotations.get(ID_ANNOTATION)
    return RunIdentity(name, its_id) if isinstance(name, str) and name and isinstance(its_id, str) and its_id else None


def labelled_run(item: Mapping[str, Any]) -> str | None:
    return mapping(item, "metadata", "labels").get(RUN_LABEL)


def run_of(item: Mapping[str, Any]) -> str | None:
    """Return the name of an object's run; by its label if it was rendered by a release that wrote no annotations."""
    its_owner = owner(item)
    return its_owner.name if its_owner else labelled_run(item)


def of_run(items: Sequence[Mapping[str, Any]], run: RunIdentity) -> list[Mapping[str, Any]]:
    """Return those of `items` that are the run's, or may be: objects of older releases count by their label.

    Raises ConfigError if they are of several runs of this name and `run` has no id, or if none has its id.
    """
    found = [item for item in items if run_of(item) == run.name]
    by_id: dict[str, list[str]] = {}
    for item in found:
        if its_owner := owner(item):
            by_id.setdefault(str(its_owner.id), []).append(object_name(item))
    rows = "; ".join(f"{key}: {', '.join(names)}" for key, names in sorted(by_id.items()))
    if run.id is None and len(by_id) > 1:
        raise ConfigError(
            f"objects of {len(by_id)} runs named {run.name} are here, by their annotation {ID_ANNOTATION}: {rows}",
            hint="give the run file instead of the name; its checkpoint.storage tells the runs apart",
        )
    mine = [item for item in found if (its_owner := owner(item)) is None or run.id in (None, its_owner.id)]
    if found and not mine:
        raise ConfigError(
            f"the objects of run {run.name} were rendered with another checkpoint.storage than this file's ({rows}; "
            f"this file: {run.id})",
            hint=f"if they are yours, give the run's name instead of the file: {run.name}",
        )
    return mine


def plan_deletion(
    items: Sequence[Mapping[str, Any]], run: RunIdentity, namespace: str, *, storage: bool, num_pods: int
) -> Deletion:
    """Return what deleting the run deletes of a namespace's objects, which are in the order of `KINDS`."""
    plan = Deletion(run, namespace, num_pods=num_pods)
    for item in of_run(items, run):
        if mapping(item, "metadata").get("deletionTimestamp"):
            plan.terminating.append(item)
        elif item["kind"] == CLAIM and not storage:
            plan.claims.append(item)
        elif owner(item) is None:
            plan.unproven.append(item)
        else:
            plan.to_delete.append(item)
    return plan


def check_owner(existing: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise ConfigError if `ours` would replace an object that outlast did not make for the same run."""
    run = run_of(ours)
    if not run:
        return
    its_run = run_of(existing)
    if its_run != run:
        whose = f"belongs to run {its_run}" if its_run else "was not made by outlast"
        raise ConfigError(f"{object_name(ours)} already exists and {whose}", hint="render with another --name")
    theirs, mine = owner(existing), owner(ours)
    if theirs and mine and theirs != mine:
        raise ConfigError(
            f"{object_name(ours)} already exists and belongs to another run named {run}, with another "
            f"checkpoint.storage ({ID_ANNOTATION} {theirs.id}, not {mine.id})",
            hint=f"render with another --name; if it is yours and its storage moved: outlast k8s delete {run}",
        )


def object_name(item: Mapping[str, Any]) -> str:
    return f"{item['kind']}/{item['metadata']['name']}".lower()


def _since(item: Mapping[str, Any]) -> str:
    meta = mapping(item, "metadata")
    waits_for = ", ".join(map(str, meta.get("finalizers") or ()))
    return f" since {meta['deletionTimestamp']}" + (f"; it waits for {waits_for}" if waits_for else "")
