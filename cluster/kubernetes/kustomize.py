"""A folder for `kubectl apply -k`: what is rendered, with parts of `k8s/components` upon it.

Rendering again replaces `rendered.yaml` alone; whatever else lies in the folder is its owner's to change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.kubernetes.accessors import autoscales, mapping
from outlast.cluster.kubernetes.render import to_yaml

RENDERED = "rendered.yaml"


def known_components() -> list[str]:
    """The parts that there are."""
    return sorted(item.name for item in _components().iterdir() if item.is_dir())


def write_folder(folder: Path, objects: list[dict[str, Any]], components: Sequence[str]) -> list[Path]:
    """Writes or renews the folder. Components that it has keep what was changed in them.

    Args:
        folder: Made if it is not there.
        objects: What was rendered.
        components: Parts to lay upon it, by name.

    Returns:
        What was written.

    Raises:
        ConfigError: There is no such part, it does not go with this run, or the folder's kustomization.yaml is not one.
    """
    for name in components:
        if name not in known_components():
            raise ConfigError(f"there is no part {name!r}", hint=f"there are: {', '.join(known_components())}")
    _check_fit(objects, components)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RENDERED).write_text(to_yaml(objects), encoding="utf-8")
    written = [folder / RENDERED]
    for name in components:
        target = folder / "components" / name
        if not target.exists():
            _copy(_components() / name, target)
            written.append(target)
    index = folder / "kustomization.yaml"
    body = _body(index)
    for key, item in [("resources", RENDERED), *(("components", f"components/{name}") for name in components)]:
        if item not in body.setdefault(key, []):
            body[key].append(item)
    index.write_text(yaml.safe_dump(body, sort_keys=False), encoding="utf-8")
    return [*written, index]


def _check_fit(objects: Sequence[Mapping[str, Any]], components: Sequence[str]) -> None:
    """Raises ConfigError if a part would not go with what was rendered, or take away what it needs."""
    if "s3" in components:
        raise ConfigError(
            "part s3 is for the overlays alone: what is rendered already follows the run file",
            hint="set checkpoint.storage to s3://bucket/prefix, and give --secret NAME in place of --with s3",
        )
    if "nfs" in components and not any(item["kind"] == "PersistentVolumeClaim" for item in objects):
        raise ConfigError(
            "part nfs is a volume for the claim that a run makes, and this one makes none",
            hint="leave out --with nfs, or set checkpoint.storage to a path and leave out --claim",
        )
    if "kueue" in components and any(autoscales(mapping(item, "spec", "rayClusterSpec")) for item in objects):
        raise ConfigError(
            "Kueue admits a RayJob with all its pods, and none whose number changes",
            hint="give scale.workers as one number and leave out --fallback, or leave out --with kueue",
        )


def _body(index: Path) -> dict[str, Any]:
    if not index.exists():
        return {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    body = yaml.safe_load(index.read_text(encoding="utf-8"))
    if not isinstance(body, dict) or body.get("kind") != "Kustomization":
        raise ConfigError(f"{index} is no Kustomization", hint="give another folder")
    return body


def _components() -> Traversable:
    return files("outlast.k8s") / "components"


def _copy(source: Traversable, target: Path) -> None:
    target.mkdir(parents=True)
    for item in source.iterdir():
        (target / item.name).write_bytes(item.read_bytes())
