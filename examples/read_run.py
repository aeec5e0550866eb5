"""Reads a run without outlast: finds the checkpoint to resume from, verifies it, and loads its tensors.

    python examples/read_run.py runs/my-run

Written from docs/reference/checkpoint-format.md alone, to show that the format is all there is. Needs numpy and xxhash.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

ATTEMPT = re.compile(r"(\d{4,})-([0-9a-f]{4,})")
CHECKPOINT = re.compile(r"checkpoint-(0|[1-9]\d*)")
BLOCK = 16 * 2**20
DTYPES = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "u2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1"}
DTYPES |= {"U8": "u1", "BOOL": "?"}

Manifest = dict[str, Any]


def attempts(run: Path) -> list[str]:
    """The attempts, highest first."""
    matches = [ATTEMPT.fullmatch(path.name) for path in (run / "attempts").iterdir()]
    found = sorted(((int(match[1]), match[2], match[0]) for match in matches if match), reverse=True)
    return [name for _, _, name in found]


def read_manifest(run: Path, attempt: str, step: int) -> Manifest | None:
    """A checkpoint's manifest; None if it is missing or damaged."""
    try:
        body = json.loads((run / "attempts" / attempt / f"checkpoint-{step}" / "manifest.json").read_bytes())
        digest = body.pop("digest")
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    whole = digest == xxhash.xxh3_128(text.encode()).hexdigest() and body["format"] == 1
    return body if whole and (body["attempt"], body["step"]) == (attempt, step) else None


def accepted(run: Path) -> list[Manifest]:
    """The checkpoints that count, newest first."""
    for attempt in attempts(run):
        names = [CHECKPOINT.fullmatch(path.name) for path in (run / "attempts" / attempt).iterdir()]
        own = [read_manifest(run, attempt, int(match[1])) for match in names if match]
        valid = sorted((manifest for manifest in own if manifest), key=lambda manifest: -manifest["step"])
        if valid:
            older = [read_manifest(run, item["attempt"], item["step"]) for item in valid[0]["lineage"]]
            return [*valid, *sorted((item for item in older if item), key=lambda item: -item["step"])]
    return []


def directory(run: Path, manifest: Manifest) -> Path:
    return run / "attempts" / manifest["attempt"] / f"checkpoint-{manifest['step']}"


def faults(run: Path, manifest: Manifest) -> list[str]:
    """What is wrong with a checkpoint; nothing if it is whole."""
    place = directory(run, manifest)
    lying = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    known = {entry["path"]: entry for entry in manifest["files"]}
    strange = {name for name in lying - known.keys() - {"manifest.json"} if not Path(name).name.startswith(".nfs")}
    found = [f"{name}: missing" for name in known.keys() - lying] + [f"{name}: extra" for name in strange]
    for name in known.keys() & lying:
        data = (place / name).read_bytes()
        blocks = [xxhash.xxh3_64(data[at : at + BLOCK]).hexdigest() for at in range(0, len(data), BLOCK)]
        said = known[name]
        if (len(data), xxhash.xxh3_128(data).hexdigest(), blocks) != tuple(
            said[key] for key in ("num_bytes", "xxh3_128", "blocks")
        ):
            found.append(f"{name}: changed")
    return sorted(found)


def load(run: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """Every tensor, whole, by name: weights and optimizer state. bfloat16 comes as its 16 bits (uint16)."""
    tensors: dict[str, np.ndarray] = {}
    for entry in manifest["files"]:
        if not entry["path"].endswith(".safetensors"):
            continue
        data = (directory(run, manifest) / entry["path"]).read_bytes()
        begin = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:begin])
        shards = json.loads(header.pop("__metadata__", {}).get("shards", "{}"))
        for name, item in header.items():
            first, last = (begin + offset for offset in item["data_offsets"])
            part = np.frombuffer(data[first:last], DTYPES[item["dtype"]]).reshape(item["shape"])
            shape, offset = shards.get(name, (item["shape"], [0] * part.ndim))
            whole = tensors.setdefault(name, np.zeros(shape, part.dtype))
            whole[tuple(slice(at, at + length) for at, length in zip(offset, part.shape, strict=True))] = part
    return tensors


def resume_point(run: Path) -> tuple[Manifest | None, list[str]]:
    """The checkpoint that a next attempt resumes from, and what was wrong with newer ones."""
    rejected: list[str] = []
    for manifest in accepted(run):
        if not (found := faults(run, manifest)):
            return manifest, rejected
        rejected += [f"{manifest['attempt']}/checkpoint-{manifest['step']}: {'; '.join(found)}"]
    return None, rejected


if __name__ == "__main__":
    run = Path(sys.argv[1])
    manifest, rejected = resume_point(run)
    print("\n".join(rejected), file=sys.stderr)
    if manifest is None:
        sys.exit("no whole checkpoint")
    print(f"{directory(run, manifest)}: step {manifest['step']}, {len(load(run, manifest))} tensors")
