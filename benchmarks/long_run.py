"""What a look at a long run costs: CPU, memory and pages of the commands that read its journals.

    python -m benchmarks.long_run [--quick] [--json FILE]

A run of 1,000,000 steps (50,000 with --quick) on four attempts, three of which lost a worker, with an evaluation, a
commit and a deletion at each of 1,000 checkpoints. Its events go through the real journal writer, once as it works
today, which compacts finished segments as it goes on, and once without compaction, which is the form of 0.1.0. Clocks
are simulated, and files are written without fsync. What the columns say:

`cpu_s`         CPU seconds of the whole command, start of Python and imports included; medians of several calls
`rss_mb`        its peak resident memory
`files`         files of all journals together
`journal_mb`    their size
`page_kb`       the report's size
`drawn_s`       from opening the report until a headless Chromium has painted it
`writer_us`     what an event costs its writer, in microseconds of CPU, compaction included
"""

from __future__ import annotations

import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.command import command
from outlast.checkpointing.format import layout
from outlast.checkpointing.format.layout import AttemptId, CheckpointRef
from outlast.checkpointing.format.manifest import FileEntry, Manifest
from outlast.checkpointing.run_store import journal as journal_module
from outlast.checkpointing.run_store.events import CommitEvent, DeleteEvent, DeletingEvent, parse_event
from outlast.checkpointing.run_store.journal import COMMITS, Journal
from outlast.checkpointing.storage.base import Buffer
from outlast.checkpointing.storage.local import LocalStorage
from tests.support.browser import CHROMIUM, Page, chromium

RUN, LAUNCH = "long", "20260101-000000-abcdef"
NUM_STEPS, NUM_CHECKPOINTS, NUM_ATTEMPTS = 1_000_000, 1_000, 4
BEGAN = 1_767_225_600.0
STEP_S, NOTICE_S = 0.28, 3.0
BATCH, TOKENS = 64, 65_536
STEPS_PER_FLUSH = 100
MIB = 2**20
#: Starts a command from a process that is small itself: a child begins with its parent's peak.
_METER = """
import json, resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"code": code, "cpu_s": used.ru_utime + used.ru_stime, "rss_mb": used.ru_maxrss / 1024}))
"""


class _Unsynced(LocalStorage):
    """Writes without fsync: for building a long run, not for keeping one."""

    def put(self, path: str, chunks: Iterable[Buffer]) -> None:
        target = self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"".join(chunks))

    def delete(self, path: str) -> None:
        self.path(path).unlink(missing_ok=True)


class _Clock:
    """The simulated time of day."""

    def __init__(self) -> None:
        self.now = BEGAN

    def __call__(self) -> float:
        return self.now


class _Attempt:
    """Writes what one attempt of the run leaves behind."""

    def __init__(self, storage: LocalStorage, number: int, clock: _Clock, num_steps: int, draw: random.Random) -> None:
        self.id = AttemptId(number, f"{number:08x}")
        self._storage, self._clock, self._num_steps, self._draw = storage, clock, num_steps, draw
        directory = layout.attempt_dir(RUN, self.id)
        claim = {
            "launch": LAUNCH,
            "world_size": 8,
            "claimed_at": clock.now,
            "device": "cuda",
            "settings": {"name": RUN},
        }
        storage.put(f"{directory}/{layout.CLAIM}", [json.dumps(claim).encode()])
        self._journal = Journal(storage, directory, 0, flush_s=math.inf)
        self._commits = Journal(storage, directory, 0, stream=COMMITS, flush_s=math.inf)
        self.num_events = 0

    def tell(self, kind: str, **fields: Any) -> None:
        self.num_events += 1
        self._journal.write(parse_event({"event": kind, **fields}))

    def begin(self, base: CheckpointRef | None) -> None:
        if base is None:
            self.tell("start")
        else:
            self.tell("resume", step=base.step, source=str(base), rejected=[], passed_over=[])
        marks = {"actor": self._clock.now, "claim": self._clock.now + 1.0, "restore": self._clock.now + 4.0}
        self.tell("plan", num_steps=self._num_steps, batch=BATCH, world_size=8, step=base.step if base else 0)
        self._clock.now += 5.0
        self.tell("under-way", step=(base.step if base else 0) + 1, marks=marks)

    def step(self, number: int) -> None:
        seconds = max(0.01, self._draw.gauss(STEP_S, 0.01))
        self._clock.now += seconds
        ended_at, done = self._clock.now, number / self._num_steps
        self._clock.now += 0.02  # the loss is added up in the step after
        norm = array("f", [self._draw.lognormvariate(0.0, 0.3)])[0]
        self.tell(
            "step",
            step=number,
            loss=None if number % 99_991 == 0 else 2 + 8 / math.sqrt(number) + self._draw.gauss(0.0, 0.05),
            lr=1e-4 * (1 + math.cos(math.pi * done)),
            grad_norm=norm,
            count=TOKENS - self._draw.randrange(4096),
            tokens=TOKENS,
            seconds=round(seconds, 4),
            ended_at=round(ended_at, 4),
        )
        if number % STEPS_PER_FLUSH == 0:
            self._journal.flush()

    def checkpoint(self, ref: CheckpointRef, dropped: CheckpointRef | None) -> None:
        began = self._clock.now
        self._clock.now += 2.0
        self.tell("eval", step=ref.step, eval_loss=2 + 8 / math.sqrt(ref.step), seconds=2.0)
        digest, num_bytes = f"{self._draw.getrandbits(128):032x}", 4 * 64 * MIB
        self._commits.write(CommitEvent(step=ref.step, digest=digest, num_bytes=num_bytes))
        self.tell(
            "commit", step=ref.step, digest=digest, num_bytes=num_bytes, seconds=round(self._clock.now - began, 4)
        )
        self.tell("save", step=ref.step, blocked_s=0.01, fenced_s=0.005, commit_s=1.5)
        if dropped is not None:
            self._commits.write(DeletingEvent(checkpoints=(dropped.name,)))
            self._commits.write(DeleteEvent(step=dropped.step, attempt=str(dropped.attempt)))
            self.tell("delete", step=dropped.step, attempt=str(dropped.attempt))
        self._journal.flush()
        self._commits.flush()

    def finish(self) -> None:
        self._journal.flush()
        self._commits.flush()
        self._journal.wait()


def build(folder: Path, num_steps: int) -> int:
    """Writes the run. Returns the number of its events."""
    storage, clock, draw = _Unsynced(folder), _Clock(), random.Random(0)
    driver = Journal(storage, layout.launch_dir(RUN, LAUNCH), 0, flush_s=0)
    interval, num_events = num_steps // NUM_CHECKPOINTS, 0
    kept: list[CheckpointRef] = []
    with mock.patch("time.time", clock):
        for number in range(1, NUM_ATTEMPTS + 1):
            clock.now += 20.0
            attempt = _Attempt(storage, number, clock, num_steps, draw)
            attempt.begin(kept[-1] if kept else None)
            lineage = tuple(reversed(kept[-3:]))
            last = num_steps * number // NUM_ATTEMPTS
            last += interval // 2 if number < NUM_ATTEMPTS else 0
            for step in range((kept[-1].step if kept else 0) + 1, last + 1):
                attempt.step(step)
                if step % interval == 0:
                    kept.append(CheckpointRef(step, attempt.id))
                    attempt.checkpoint(kept[-1], kept[-4] if len(kept) > 3 else None)
            if number < NUM_ATTEMPTS:
                body = {
                    "event": "failure",
                    "attempt": str(attempt.id),
                    "cause": "worker died",
                    "rank": 1,
                    "message": "it was killed by signal 9",
                    "where": "rank 1 on node-3",
                }
                driver.write(parse_event({**body, "noticed_at": clock.now + 1}))
                clock.now += NOTICE_S
            else:
                attempt.tell("done", step=last, model=str(kept[-1]))
            attempt.finish()
            num_events += attempt.num_events
        _commit(storage, kept[-3:], lineage)
        alive = {"beat": 1, "began": BEGAN, "t": clock.now, "ended": True, "exit_code": 0, "error": "", "settings": ""}
    storage.put(f"{layout.launch_dir(RUN, LAUNCH)}/alive.json", [json.dumps(alive).encode()])
    return num_events


def _commit(storage: LocalStorage, kept: Iterable[CheckpointRef], lineage: tuple[CheckpointRef, ...]) -> None:
    names = ("config.json", "model.safetensors", layout.LOOP_STATE, layout.optimizer_shard(0, 1))
    files = tuple(FileEntry(name, 64 * MIB, "0" * 32, ("0" * 16,) * 4) for name in sorted(names))
    for ref in kept:
        manifest = Manifest(ref, lineage, files, 8, {"loss": 2.0}, BEGAN, LAUNCH)
        storage.put(f"{layout.checkpoint_dir(RUN, ref)}/{layout.MANIFEST}", [manifest.to_json()])


@contextmanager
def uncompacted() -> Iterator[None]:
    """The writer as 0.1.0 had it."""
    with mock.patch.object(journal_module, "COMPACTED_SEGMENTS", sys.maxsize):
        yield


def metered(*arguments: str) -> dict[str, float]:
    """One call of the command line: CPU seconds and peak memory."""
    outlast = str(Path(sys.executable).with_name("outlast"))
    call = [sys.executable, "-S", "-c", _METER, outlast, *arguments]
    found = json.loads(subprocess.run(call, check=True, capture_output=True, text=True).stdout)
    assert found.pop("code") == 0, arguments
    return dict(found)


def commands(run: Path, page: Path, rounds: int) -> Iterator[dict[str, Any]]:
    """What each command costs."""
    for name, arguments in {
        "status": ("status", str(run)),
        "checkpoints ls": ("checkpoints", "ls", str(run)),
        "report": ("report", str(run), "-o", str(page)),
    }.items():
        samples = [metered(*arguments) for _ in range(rounds)]
        yield {"name": name, **{key: statistics.median(item[key] for item in samples) for key in samples[0]}}


def drawn(page: Path, rounds: int) -> float | None:
    """Seconds from opening a page until it is painted; None without a browser."""
    if CHROMIUM is None:
        return None

    async def painted(tab: Page) -> float:
        twice = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now()))))"
        milliseconds = float(await tab.evaluate(twice))
        assert not tab.complaints, tab.complaints
        assert await tab.evaluate("document.querySelectorAll('canvas').length") >= 4
        return milliseconds / 1000

    with tempfile.TemporaryDirectory() as profile, chromium(Path(profile)) as browser:
        return statistics.median(browser.open(page.as_uri(), (1440, 900), painted) for _ in range(rounds))


def _rows(folder: Path, form: str, num_steps: int, rounds: int) -> Iterator[dict[str, Any]]:
    began = time.process_time()
    num_events = build(folder, num_steps)
    writer_us = 1e6 * (time.process_time() - began) / num_events
    files = list((folder / RUN).rglob("events-*"))
    size = sum(path.stat().st_size for path in files)
    yield {"name": f"{form}: journals", "files": len(files), "journal_mb": size / 1e6, "writer_us": writer_us}
    page = folder / "report.html"
    for row in commands(folder / RUN, page, rounds):
        row["name"] = f"{form}: outlast {row['name']}"
        if row["name"].endswith("report"):
            row |= {"page_kb": page.stat().st_size / 1000, "drawn_s": drawn(page, rounds)}
        yield row


def measure(*, quick: bool = False) -> dict[str, Any]:
    """Runs the benchmark."""
    num_steps, rounds = (50_000, 3) if quick else (NUM_STEPS, 5)
    folder = Path(tempfile.mkdtemp(dir=".", prefix="long-")).absolute()
    rows: list[dict[str, Any]] = []
    try:
        rows += _rows(folder / "new", "compacted", num_steps, rounds)
        with uncompacted():
            rows += _rows(folder / "old", "as 0.1.0", num_steps, rounds)
    finally:
        shutil.rmtree(folder)
    keys = list(dict.fromkeys(key for item in rows for key in item))
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "steps": num_steps,
        "checkpoints": NUM_CHECKPOINTS,
        "rounds": rounds,
        "rows": [{key: item.get(key) for key in keys} for item in rows],
    }


if __name__ == "__main__":
    command(measure)
