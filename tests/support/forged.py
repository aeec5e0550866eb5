"""Forged files of a run: other content, with digests that fit, as only somebody who means it writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

from outlast.checkpointing.format.manifest import Digester


def forge_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the content of a checkpoint's manifest."""
    manifest = folder / "manifest.json"
    body = json.loads(manifest.read_bytes())
    change(body)
    body.pop("digest", None)  # a change may give another one
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=True)
    manifest.unlink()
    manifest.write_text(json.dumps({**body, "digest": xxhash.xxh3_128(text.encode()).hexdigest()}))


def add_file(folder: Path, name: str, data: bytes) -> None:
    """Add or replace a file of a checkpoint as if it were committed; `name` may lead anywhere."""

    def change(body: dict[str, Any]) -> None:
        body["files"] = [item for item in body["files"] if item["path"] != name] + [file_entry(name, data)]

    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.write_bytes(data)
    forge_manifest(folder, change)


def file_entry(name: str, data: bytes) -> dict[str, Any]:
    """Return the entry of a file in a manifest."""
    digester = Digester()
    digester.update(data)
    entry = digester.entry("x")
    return {"path": name, "num_bytes": entry.num_bytes, "xxh3_128": entry.xxh3_128, "blocks": list(entry.blocks)}


def forge_data(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the content of the manifest of prepared data."""
    path = folder / "data.json"
    body = json.loads(path.read_bytes())
    change(body)
    body.pop("digest", None)
    digest = xxhash.xxh3_128(json.dumps(body, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**body, "digest": digest}))


def replace_data_file(folder: Path, name: str, data: bytes) -> None:
    """Replace a file of prepared data as if it were prepared so."""

    def change(body: dict[str, Any]) -> None:
        body["files"] = [item for item in body["files"] if item["path"] != name] + [file_entry(name, data)]

    (folder / name).write_bytes(data)
    forge_data(folder, change)
