"""Two runs in a storage, with a file of every kind that outlast reads from one.

`own` is of an own loop with the Checkpointer: two attempts, several weights files, a journal that was compacted, a pin
and a prune. `trained` is of the train loop, with prepared data and a finished model. Both have a launch, as a driver
writes it. What differs from time to time is fixed, so that a mutation is the same whenever it is repeated.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from unittest import mock

import torch

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.run_store import events
from outlast.checkpointing.run_store.compacted_segment import compact, to_parquet
from outlast.checkpointing.run_store.journal import Journal
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.run_store.segments import compacted_name, segment_name
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.checkpointing.tools.pin_and_prune import pin, plan_prune, prune
from outlast.trainers.attempt import Assignment, run_attempt
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.distributed.world import World
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.preparation.prepare import prepare
from tests.support.groups.worker_group import Quiet, tiny_config
from tests.support.small_model import small_model, train_step

OWN, TRAINED = "own", "trained"
LAUNCH = "20260101-000000-aa"


def make_runs(folder: Path) -> None:
    """Make both runs in `folder/runs`."""
    storage = LocalStorage(folder / "runs")
    text = folder / "text.txt"
    text.write_text("".join(f"line {number} of a text of a few words\n" for number in range(60)))
    with _same_each_time():
        _make_own(storage)
        assert train(folder, storage) is Outcome.DONE
        for run in (OWN, TRAINED):
            _add_launch(storage, run)
    for claim in storage.path("").glob("*/attempts/*/claim.json"):
        body = json.loads(claim.read_bytes())
        claim.write_text(json.dumps({**body, "workers": [_WORKER]}, indent=1))


@contextmanager
def _same_each_time() -> Iterator[None]:
    """Let clocks and names be functions of how often they were asked for."""
    names = count(1)
    with (
        mock.patch.object(secrets, "token_hex", lambda size: f"{next(names):0{2 * size}x}"),
        mock.patch.object(time, "time", _ticks(2e8)),
        mock.patch.object(time, "monotonic", _ticks(0.0)),
        mock.patch.object(time, "perf_counter", _ticks(0.0)),
    ):
        yield


def _ticks(start: float) -> Callable[[], float]:
    numbers = count()
    return lambda: start + next(numbers) / 8


def train(folder: Path, storage: LocalStorage) -> Outcome:
    """Start or resume the run `trained`, in this process."""
    config = trained_config(folder, storage)
    declared = config.model_dump(mode="json", exclude_defaults=True)
    assignment = Assignment(config, declared, LAUNCH, prepare(config, storage))
    return run_attempt(assignment, storage, World(torch.device("cpu")), Quiet())


def trained_config(folder: Path, storage: LocalStorage) -> TrainingConfig:
    """The settings of the run `trained`."""
    return tiny_config(TRAINED, storage.url, str(folder / "text.txt"), steps=4, eval_every=2)


def _make_own(storage: LocalStorage) -> None:
    for launch, steps in (("20250101-000000-aa", [1, 2]), (LAUNCH, [3, 4, 5])):
        model, optimizer = small_model()
        checkpointer = Checkpointer(
            storage,
            OWN,
            launch=launch,
            declaration={"mathematics": {"train": {"lr": 0.1}}, "data": "x"},
            notes={"settings": {"name": OWN, "checkpoint": {"keep_last": 9}}, "workers": [_WORKER]},
            retention=Retention(keep_last=9),
            max_shard_bytes=64,
            files={"config.json": b'{"model_type": "none"}'},
        )
        state = checkpointer.resume(model, optimizer)
        for step in range(state["step"] if state else 0, steps[-1]):
            train_step(model, optimizer, step)
            if step + 1 in steps:
                state = {
                    "step": step + 1,
                    "scores": (1, 2.5),
                    "by": {1: {"a"}},
                    "weights": next(model.parameters()).detach(),
                }
                assert checkpointer.save(step + 1, model, optimizer, state, metrics={"eval_loss": 1.0 / (step + 1)})
        checkpointer.close()
    store = RunStore(storage, OWN)
    _compact_events(storage, store.attempt_dir(checkpointer.attempt))
    prune(store.fresh(), plan_prune(store.fresh(), Retention(keep_last=4)))
    pin(store.fresh(), "3", Retention())


_WORKER = {"rank": 0, "host": "here", "node": "a", "pid": 1, "log": "/log", "oom_kills": 0}


def _compact_events(storage: LocalStorage, directory: str) -> None:
    """Continue an attempt's journal by a compacted file and a segment."""
    first = storage.path(f"{directory}/{segment_name('events-0', 0)}")
    last = first.read_bytes().splitlines()[-1:]
    steps = [_step(number) for number in range(3, 40)]
    others = [json.dumps({"t": 2.0, **event.to_json()}).encode() for event in _EVENTS]
    parts = [steps[:20], [*steps[20:], *others]]
    storage.put(f"{directory}/{compacted_name('events-0', 1, 2)}", [to_parquet(compact(parts))])
    storage.put(f"{directory}/{segment_name('events-0', 3)}", [line + b"\n" for line in (_step(40), *others, *last)])


def _step(number: int) -> bytes:
    event = events.StepEvent(
        step=number, loss=1.0 / number, lr=0.1, grad_norm=1.0, count=8, tokens=9, seconds=0.5, ended_at=float(number)
    )
    return json.dumps({"t": float(number), **event.to_json()}).encode()


_EVENTS: list[events.Event] = [
    events.PlanEvent(num_steps=50, batch=8, world_size=1),
    events.UnderWayEvent(marks={"claim": 1.0, "model": 2.0, "first step": 3.0}),
    events.EvalEvent(step=20, scores={"eval_loss": 1.0, "eval_accuracy": 0.5}),
    events.NonFiniteEvent(step=21, action="skip", message="loss is nan"),
    events.ChangedEvent(what="world_size", before=1, now=2, same_bits=True),
    events.AttemptErrorEvent(step=22, error="RuntimeError: it broke"),
    events.DoneEvent(step=40),
]


def _add_launch(storage: LocalStorage, run: str) -> None:
    """Write what a driver writes of a launch."""
    store = RunStore(storage, run)
    folder = store.launch_dir(LAUNCH)
    journal = Journal(storage, folder, 0, flush_s=0)
    attempt = storage.list(store.attempts_dir)[-1].name
    journal.write(events.ResizeEvent(attempt=attempt, before=2, now=1))
    failure = events.GroupFailureEvent(attempt=attempt, cause="error", message="it broke", rank=0, where="here: /log")
    journal.write(failure)
    alive = {"beat": 2, "began": 1.0, "t": 3.0, "host": "here", "pid": 1, "started": "1", "ended": True, "exit_code": 1}
    alive |= {"settings": "0" * 16, "error": "it broke", "progress": {"step": 4, "num_steps": 5, "ended_at": 4.0}}
    storage.put(f"{folder}/alive.json", [json.dumps(alive).encode()])
    record = {
        "launch": LAUNCH,
        "code": {"commit": "0" * 40},
        "packages": {"torch": "2"},
        "machine": {"host": "here", "gpus": []},
        "data": {"fingerprint": "0" * 32, "rows": {"train": 5}, "samples": 5},
        "settings": {"model": {"path": "a/b"}, "data": {"train": "rows.txt"}},
    }
    storage.put(f"{folder}/record.json", [json.dumps(record).encode()])
