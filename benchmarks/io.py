"""What outlast's bytes cost beside the bare disk or store, and how costs grow with ranks, attempts and checkpoints.

    python -m benchmarks.io [--quick] [--json FILE]

Each size is written and read by outlast and bare, in turns: on the local disk with fsync, reads after the file has left
the page cache; and on an S3 server of this machine, where bare is boto3. `over_raw` is the rounds' median ratio.
The growth rows run the real code on what it would find: rank 0 commits what 1,024 ranks with eight files each sent it
(simulated: their entries, not their files); a run with 1,000 attempts of ten checkpoints each lies on the disk, claims,
manifests and journals, though no tensors.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import torch
from torch import nn

from benchmarks.command import command
from benchmarks.training import drop_cache, sync
from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.format import layout
from outlast.checkpointing.format.layout import AttemptId, CheckpointRef
from outlast.checkpointing.format.manifest import FileEntry, Manifest
from outlast.checkpointing.format.safetensors import bytes_view
from outlast.checkpointing.restore.reader import read_verified
from outlast.checkpointing.run_store import catalog as lineage
from outlast.checkpointing.run_store import claims
from outlast.checkpointing.run_store.events import CommitEvent
from outlast.checkpointing.run_store.journal import COMMITS, Journal
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.save.writer import write_file
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.storage.base import Buffer
from outlast.checkpointing.storage.factory import open_storage
from outlast.checkpointing.storage.local import LocalStorage
from tests.support.s3_server import BUCKET, s3_server

MIB = 2**20
NUM_RANKS, FILES_PER_RANK = 1024, 8
NUM_ATTEMPTS, COMMITS_PER_ATTEMPT = 1000, 10
Work = Callable[[], Any]


def timed(work: Work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def row(name: str, seconds: list[float], **more: Any) -> dict[str, Any]:
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"name": name, "seconds": middle, "seconds_quartiles": [low, high], **more}


def against(name: str, num_bytes: int, ours: list[float], raw: list[float]) -> dict[str, Any]:
    """A row that stands beside the bare thing."""
    ratio = statistics.median(a / b for a, b in zip(ours, raw, strict=True))
    return row(
        name, ours, over_raw=ratio, raw_s=statistics.median(raw), gb_per_s=num_bytes / 1e9 / statistics.median(ours)
    )


def raw_write(path: Path, view: memoryview) -> None:
    with open(path, "wb", buffering=0) as file:
        while view:
            view = view[os.write(file.fileno(), view) :]
        os.fsync(file.fileno())
    sync(path.parent)


def raw_read(path: Path, view: memoryview) -> None:
    with open(path, "rb", buffering=0) as file:
        while view:
            view = view[file.readinto(view) :]


def local(folder: Path, num_mib: int, rounds: int) -> list[dict[str, Any]]:
    """Files and whole commits of one size on the local disk."""
    data = torch.randint(0, 256, (num_mib * MIB,), dtype=torch.uint8)
    into = bytes_view(torch.zeros_like(data))
    model = nn.ParameterDict({"weight": nn.Parameter(data.view(torch.float32).nan_to_num(), requires_grad=False)})
    storage, made = LocalStorage(folder), folder / "files"

    def once(run: str) -> dict[str, float]:
        seconds: dict[str, float] = {}
        entries: list[FileEntry] = []
        saver = Checkpointer(storage, run)
        saver.resume(model)
        made.mkdir()
        works: dict[str, Work] = {
            "raw write": lambda: raw_write(made / "raw", bytes_view(data)),
            "write": lambda: entries.append(write_file(storage, "files", "ours", [bytes_view(data)])),
            "commit": lambda: saver.save(1, model, None, {}),
            "raw read": lambda: raw_read(made / "raw", into),
            "read": lambda: read_verified(storage, "files", entries[0]),
            "load": lambda: Checkpointer(storage, run).resume(model),
        }
        for name, work in works.items():
            drop_cache(folder)
            seconds[name] = timed(work)
        shutil.rmtree(made)
        shutil.rmtree(folder / run)
        return seconds

    samples = [once(f"run-{number}") for number in range(rounds + 1)][1:]
    names = {"write": "write_file", "commit": "commit", "read": "read_verified", "load": "claim and verified load"}
    rows = []
    for name, title in names.items():
        raw = "raw write" if name in ("write", "commit") else "raw read"
        found = [sample[name] for sample in samples]
        rows.append(against(f"{title}, {num_mib} MiB", data.nbytes, found, [sample[raw] for sample in samples]))
    return rows


def remote(url: str, num_mib: int, rounds: int) -> list[dict[str, Any]]:
    """Files of one size on the S3 server."""
    data = torch.randint(0, 256, (num_mib * MIB,), dtype=torch.uint8)
    storage, client, body = open_storage(url), boto3.client("s3"), data.numpy().tobytes()
    entry = write_file(storage, "io", "ours", [bytes_view(data)])
    works: dict[str, Work] = {
        "raw write": lambda: client.put_object(Bucket=BUCKET, Key="raw", Body=body),
        "write": lambda: write_file(storage, "io", "ours", [bytes_view(data)]),
        "raw read": lambda: client.get_object(Bucket=BUCKET, Key="raw")["Body"].read(),
        "read": lambda: read_verified(storage, "io", entry),
    }
    samples = [{name: timed(work) for name, work in works.items()} for _ in range(rounds)]
    found = {name: [sample[name] for sample in samples] for name in works}
    return [
        against(f"write_file, S3, {num_mib} MiB", data.nbytes, found["write"], found["raw write"]),
        against(f"read_verified, S3, {num_mib} MiB", data.nbytes, found["read"], found["raw read"]),
    ]


class ManyRanks(RankGroup):
    """Rank 0 of many: every other rank sends as many files as it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.size = NUM_RANKS

    def duplicate(self) -> RankGroup:
        return ManyRanks()

    def gather(self, item: Any) -> list[Any]:
        if not (isinstance(item, tuple) and isinstance(item[0], list) and isinstance(item[0][0], FileEntry)):
            return [item] * self.size
        return [item] + [(self._files(rank), None) for rank in range(1, self.size)]

    def _files(self, rank: int) -> list[FileEntry]:
        paths = (f"{layout.STATE_DIR}/part-{number}-{rank:05d}.safetensors" for number in range(FILES_PER_RANK))
        return [FileEntry(path, 64 * MIB, "0" * 32, ("0" * 16,) * 4) for path in paths]


def growth_by_ranks(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """A commit by rank 0 whose manifest names the files of 1,024 ranks."""
    storage, model = LocalStorage(folder), nn.Linear(8, 8)
    alone = Checkpointer(storage, "alone")
    many = Checkpointer(storage, "many", ranks=ManyRanks())
    commits: dict[str, list[float]] = {"one rank": [], "1,024 ranks × 8 files": []}
    for step in range(rounds + 1):
        for saver, found in zip((alone, many), commits.values(), strict=True):
            found.append(timed(partial(saver.save, step, model, None, {})))
    path = folder / layout.checkpoint_dir("many", CheckpointRef(rounds, many.attempt)) / layout.MANIFEST
    data = path.read_bytes()
    assert len(Manifest.parse(data).files) > NUM_RANKS * (FILES_PER_RANK - 1)
    parsing = [timed(partial(Manifest.parse, data)) for _ in range(rounds)]
    rows = [row(f"commit by rank 0, {name}", found[1:]) for name, found in commits.items()]
    return [*rows, row("parsing its manifest", parsing, num_bytes=len(data))]


class _Unsynced(LocalStorage):
    """Writes without fsync: for building a history, not for keeping one."""

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        self.path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path(path).write_bytes(b"".join(chunks))


def build_history(folder: Path, run: str) -> None:
    """A run that was restarted again and again: each attempt stands on the last three commits of the one before."""
    storage, step = _Unsynced(folder), 0
    standing: list[CheckpointRef] = []
    names = ("config.json", "model.safetensors", layout.LOOP_STATE, layout.optimizer_shard(0, 1))
    files = tuple(FileEntry(name, 64 * MIB, "0" * 32, ("0" * 16,) * 4) for name in sorted(names))
    for number in range(1, NUM_ATTEMPTS + 1):
        attempt = AttemptId(number, f"{number:08x}")
        directory = layout.attempt_dir(run, attempt)
        storage.put(f"{directory}/{layout.CLAIM}", [json.dumps({"launch": "one", "world_size": 1}).encode()])
        journal = Journal(storage, directory, 0, stream=COMMITS, flush_s=3600.0)
        lineage_, mine = tuple(reversed(standing)), []
        for _ in range(COMMITS_PER_ATTEMPT):
            step += 1
            ref = CheckpointRef(step, attempt)
            manifest = Manifest(ref, lineage_, files, 1, {"loss": 1.0}, 0.0, "one")
            storage.put(f"{layout.checkpoint_dir(run, ref)}/{layout.MANIFEST}", [manifest.to_json()])
            journal.write(CommitEvent(step=step, digest="0" * 32, num_bytes=manifest.num_bytes))
            mine.append(ref)
        journal.flush()
        standing = mine[-3:]


def growth_by_attempts(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """What a start, a commit and a reader pay in a run with a long history."""
    build_history(folder, "long")
    storage, attempt = LocalStorage(folder), AttemptId(NUM_ATTEMPTS + 1, "ffff")
    store = RunStore(storage, "long")
    works: dict[str, Work] = {
        "catalogue (start, ls)": lambda: lineage.read_catalog(storage, "long"),
        "look for a higher claim (each commit)": lambda: claims.higher_claim(store, attempt),
        "is my launch superseded (start)": lambda: claims.launch_is_superseded(store, "two"),
        "claim (start)": lambda: claims.claim(store, {"launch": "one"}),
    }
    assert len(lineage.read_catalog(storage, "long").accepted) == COMMITS_PER_ATTEMPT + 3
    title = f"{NUM_ATTEMPTS:,} attempts × {COMMITS_PER_ATTEMPT} checkpoints: "
    return [row(title + name, [timed(work) for _ in range(rounds)]) for name, work in works.items()]


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Runs the benchmark."""
    sizes, rounds = ((1, 16, 128), 4) if quick else ((1, 16, 128, 600), 10)
    folder, rows = Path(tempfile.mkdtemp(dir=".", prefix="io-")).absolute(), []
    try:
        for num_mib in sizes:
            rows += local(folder, num_mib, rounds)
        with s3_server() as url:
            rows += remote(url, 16, rounds)
        rows += growth_by_ranks(folder / "ranks", rounds)
        rows += growth_by_attempts(folder / "attempts", rounds)
    finally:
        shutil.rmtree(folder)
    keys = list(dict.fromkeys(key for item in rows for key in item))
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "state_bytes": sizes[-1] * MIB,
        "rounds": rounds,
        "rows": [{key: item.get(key) for key in keys} for item in rows],
    }


if __name__ == "__main__":
    command(measure)
