"""Paths in a run's pods: which settings name them, where the claim is mounted, and what a mount must not hide.

Pods have neither the working directory nor the home of whoever renders, so only an absolute path means anything there.
"""

import posixpath
from pathlib import Path

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.location import parse_location
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.kubernetes.settings import K8sSettings, checked_mount


def pod_path(key: str, location: str) -> str | None:
    """Return the path in the pods that a setting names; None for the URL of a store.

    Raises:
        ConfigError: It is no location, relative, or has `..`, which depends on directories that pods may lack.
    """
    parsed = parse_location(location)
    if not isinstance(parsed, Path):
        return None
    if location.startswith("~") or not parsed.is_absolute():
        raise ConfigError(
            f"{key} {location!r} is relative, but pods need an absolute path",
            hint=f"set {key} to an absolute path such as /data/runs, or to s3://bucket/prefix",
        )
    if ".." in parsed.parts:
        raise ConfigError(
            f"{key} {location!r} has `..`, which fails in pods without the directory before it",
            hint=f"write {posixpath.normpath(parsed)}",
        )
    return str(parsed)


def store_urls(config: RunConfig) -> list[str]:
    """Return the URLs of stores among the settings."""
    parsed = map(parse_location, config.places.values())
    return [url for url in parsed if isinstance(url, str)]


def mount_path(config: RunConfig, settings: K8sSettings) -> str | None:
    """Return the path where head and workers mount the claim; None without a claim.

    Raises:
        ConfigError: The run file names a path that pods cannot have, or one that the claim does not bring.
    """
    paths = {key: pod_path(key, location) for key, location in config.places.items()}
    path = paths["checkpoint.storage"]
    if path is None:
        if (settings.claim is None) != (settings.mount is None):
            raise ConfigError(
                f"storage {config.checkpoint.storage} needs no claim, and a claim for data needs both --claim and "
                "--mount",
                hint="give --claim NAME --mount PATH, or neither",
            )
        return settings.mount
    path = checked_mount(path, "checkpoint.storage")
    if settings.mount and not is_under(path, settings.mount):
        raise ConfigError(
            f"checkpoint.storage {path} is not under {settings.mount}, where the claim is mounted",
            hint=f"give --mount {path}, or a parent of it",
        )
    return settings.mount or path


def is_under(path: str, mount: str | None) -> bool:
    """Return whether a path is a mount's or below it."""
    return mount is not None and f"{path.rstrip('/')}/".startswith(f"{mount.rstrip('/')}/")
