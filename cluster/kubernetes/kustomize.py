"""A folder for `kubectl apply -k`: the rendered objects, with components from `k8s/components`.

Rendering again replaces `rendered.yaml` only; every other file in the folder is the user's and must not be overwritten.
"""

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


def component_names() -> list[str]:
    """Return the names of the components."""
    return sorted(item.name for item in _components().iterdir() if item.is_dir())


def write_folder(folder: Path, objects: list[dict[str, Any]], components: Sequence[str]) -> list[Path]:
    """Write or update the folder; components that are already in it keep their changes. Return the paths written.

    Raises:
        ConfigError: A component is unknown or does not fit this run, or the folder's kustomization.yaml is not one.
    """
    for name in components:
        if name not in component_names():
            raise ConfigError(f"unknown component {name!r}", hint=f"known ones: {', '.join(component_names())}")
    _check_fit(objects, components)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RENDERED).write_text(to_yaml(objects), encoding="utf-8")
    written = [folder / RENDERED]
    for name in components:
        target = folder / "components" / name
        if not target.exists():
            target.mkdir(parents=True)
            for file in (_components() / name).iterdir():
                (target / file.name).write_bytes(file.read_bytes())
            written.append(target)
    index = folder / "kustomization.yaml"
    body = _body(index)
    for key, item in [("resources", RENDERED), *(("components", f"components/{name}") for name in components)]:
        if item not in body.setdefault(key, []):
            body[key].append(item)
    index.write_text(yaml.safe_dump(body, sort_keys=False), encoding="utf-8")
    return [*written, index]


def _check_fit(objects: Sequence[Mapping[str, Any]], components: Sequence[str]) -> None:
    """Raise ConfigError if a component does not fit the rendered objects, or removes one they need."""
    if "s3" in components:
        raise ConfigError(
            "component s3 is only for the overlays: rendered objects already use the run file's storage",
            hint="set checkpoint.storage to s3://bucket/prefix, and give --secret NAME instead of --with s3",
        )
    if "nfs" in components and not any(item["kind"] == "PersistentVolumeClaim" for item in objects):
        raise ConfigError(
            "component nfs is a volume for a run's own claim, and this run creates no claim",
            hint="omit --with nfs, or set checkpoint.storage to a path and omit --claim",
        )
    is_scheduled = any(item["kind"] == "RayCronJob" for item in objects)
    if is_scheduled and (patches := set(components) & {"dev", "gpu", "kueue", "spot"}):
        raise ConfigError(
            f"component {min(patches)} changes a RayJob, and --schedule renders a RayCronJob",
            hint="use the options of render, such as --spot, instead of --with",
        )
    if "kueue" in components and any(autoscales(mapping(item, "spec", "rayClusterSpec")) for item in objects):
        raise ConfigError(
            "Kueue admits only RayJobs with a fixed number of pods",
            hint="give scale.workers as one number and omit --fallback, or omit --with kueue",
        )


def _body(index: Path) -> dict[str, Any]:
    if not index.exists():
        return {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    body = yaml.safe_load(index.read_text(encoding="utf-8"))
    if not isinstance(body, dict) or body.get("kind") != "Kustomization":
        raise ConfigError(f"{index} is not a Kustomization", hint="give another folder")
    return body


def _components() -> Traversable:
    return files("outlast.k8s") / "components"
