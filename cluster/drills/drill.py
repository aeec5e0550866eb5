"""`outlast drill`: injects faults into scaled-down copies of a user's run, and checks that each resumes exactly.

One copy runs undisturbed; then one copy for each fault is interrupted in the middle and resumes. All must end with the
same bits. The copies are stored beside the run, use its data, and are deleted on success. The run itself is never
touched.
"""

from __future__ import annotations

import multiprocessing
import os
import secrets
import signal
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from outlast.checkpointing.errors import ConfigError, OutlastError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint, FaultSpec, read_record, write_record
from outlast.checkpointing.restore.verify import tensor_digests
from outlast.checkpointing.run_store.catalog import build_catalog, run_events
from outlast.checkpointing.run_store.events import Event, ResumeEvent, StepEvent, parse_event
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import read_bytes, walk
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.config.run_file import load_run
from outlast.cluster.driver.launch import Launch
from outlast.cluster.driver.ray_session import ray_session
from outlast.cluster.formatting import counted
from outlast.cluster.monitoring.console_progress import ProgressReporter
from outlast.trainers.loop.train_loop import Outcome

E = TypeVar("E", bound=Event)

STEPS_MIN = 8


class FaultKind(Enum):
    """A fault to inject, with its description."""

    KILL = "kill", "a worker killed in a step"  #: by SIGKILL, between a step's gradients and its weights
    KILL_IN_SAVE = "kill-in-save", "a worker killed while writing a checkpoint"
    ERROR = "error", "an exception in a worker"
    STOP = "stop", "the driver stopped and restarted"  #: SIGTERM, then the same command again
    DAMAGE = "damage", "stopped, one bit of the newest checkpoint flipped, restarted"
    DRIVER = "driver", "the driver killed and restarted"  #: SIGKILL, then the same command again

    meaning: str

    def __new__(cls, name: str, meaning: str = "") -> FaultKind:
        member = object.__new__(cls)
        member._value_, member.meaning = name, meaning
        return member


@dataclass(frozen=True, slots=True)
class RunCopy:
    """A copy of the run, with a fault or without."""

    config: RunConfig  #: the settings, local paths absolute
    declared: Mapping[str, Any]  #: the settings as written
    at: int  #: the step of the fault; for faults in a save, one that saves
    code: str = ""  #: directory of the user's Python files
    address: str | None = None  #: the Ray cluster; None for a local one

    @property
    def store(self) -> RunStore:
        return self.config.store

    @property
    def record(self) -> str:
        """Path of the fault's record."""
        return f"{self.store.url}/drill.json"

    def launch(self, faults: Sequence[FaultSpec] = (), tell: Any = lambda event: None) -> Outcome:
        launch = Launch(self.config, self.declared, take_over=True, code=self.code, faults=faults, tell=tell)
        return launch.run(self.address).outcome


@dataclass(slots=True)
class DrillResult:
    """Result of one copy."""

    kind: str  #: the fault
    fault: Mapping[str, Any] | None = None  #: the fault's record; None if it never occurred
    resumed_from: int | None = None  #: the step of the checkpoint it resumed from
    redone: int = 0  #: steps that were repeated
    seconds: float | None = None  #: from the fault to the end of the first new step
    seconds_per_step: float | None = None  #: the median of the undisturbed copy
    different: list[str] = field(default_factory=list)  #: tensors and losses that differ from the undisturbed copy's
    error: str = ""  #: why it did not resume

    @property
    def is_good(self) -> bool:
        return self.fault is not None and not self.different and not self.error


@dataclass(frozen=True, slots=True)
class FinalState:
    """SHA-256 of every weight and optimizer tensor, and all losses of each step over all attempts."""

    weights: dict[str, str]
    optimizer: dict[str, str]
    losses: dict[int, set[float | None]]


def events_of(store: RunStore, kind: type[E]) -> list[E]:
    """All events of one kind, lowest attempt first."""
    return [event for _, body in run_events(store) if isinstance(event := parse_event(body), kind)]


def final_state(store: RunStore) -> FinalState:
    """Return the final state of a finished run."""
    newest = build_catalog(store).accepted[0]
    state = FinalState({}, {}, {})
    for name, digest in tensor_digests(store.storage, store.checkpoint_dir(newest.ref), newest).items():
        (state.optimizer if "/" in name else state.weights)[name] = digest
    for event in events_of(store, StepEvent):
        state.losses.setdefault(event.step, set()).add(event.loss)
    return state


def inject(copy: RunCopy, kind: FaultKind, tell: Any = lambda event: None, rank: int = 0) -> None:
    """Run a copy to its end with a fault in worker `rank`. Raises OutlastError if it did not resume."""
    if kind in (FaultKind.KILL, FaultKind.KILL_IN_SAVE, FaultKind.ERROR):
        point = FaultPoint.WHILE_WRITING if kind is FaultKind.KILL_IN_SAVE else FaultPoint.STEP
        action = FaultAction.EXCEPTION if kind is FaultKind.ERROR else FaultAction.SIGKILL
        copy.launch([FaultSpec(point, copy.at, rank, action, copy.record)], tell)
        return
    # The pause keeps the copy from ending before its driver receives the step's event.
    pause = FaultSpec(FaultPoint.STEP, copy.at, rank, FaultAction.PAUSE, f"{copy.record}.pause")
    if kind is FaultKind.DRIVER:
        driver = multiprocessing.get_context("spawn").Process(target=_run_until_killed, args=(copy, pause))
        driver.start()
        driver.join()
    else:
        copy.launch([pause], _interrupter(copy, signal.SIGTERM, tell))
        if kind is FaultKind.DAMAGE:
            _flip_a_bit(copy)
    copy.launch(tell=tell)


def _interrupter(copy: RunCopy, number: signal.Signals, tell: Any) -> Callable[[dict[str, Any]], None]:
    """Return a receiver of a launch's events that sends its own process a signal, once, at the step of the fault."""

    def receive(body: dict[str, Any]) -> None:
        tell(body)
        event = parse_event(body)
        if isinstance(event, StepEvent) and event.step >= copy.at - 1:
            is_first = write_record(copy.record, {"step": event.step, "action": number.name.lower()})
            if is_first:
                os.kill(os.getpid(), number)

    return receive


def _run_until_killed(copy: RunCopy, pause: FaultSpec) -> None:
    copy.launch([pause], _interrupter(copy, signal.SIGKILL, lambda event: None))


def _flip_a_bit(copy: RunCopy) -> None:
    store = copy.store
    newest = build_catalog(store).accepted[0]
    largest = max(newest.files, key=lambda entry: entry.num_bytes)
    path = f"{store.checkpoint_dir(newest.ref)}/{largest.path}"
    body = bytearray(read_bytes(store.storage, path))
    body[len(body) // 2] ^= 1
    store.storage.put(path, [bytes(body)])


def compare_with_reference(copy: RunCopy, kind: FaultKind, undisturbed: FinalState) -> DrillResult:
    """Compare a copy that has ended with the undisturbed one."""
    fault = read_record(copy.record)
    finding = DrillResult(kind.value, fault)
    steps = sorted((event.ended_at or event.t, event.step) for event in events_of(copy.store, StepEvent))
    resumes = [event.step for event in events_of(copy.store, ResumeEvent)]
    if fault is not None:
        finding.resumed_from = resumes[0] if resumes else 0
        reached = max((step for ended_at, step in steps if ended_at <= fault["t"]), default=0)
        finding.redone = max(0, reached - finding.resumed_from)
        new = [ended_at for ended_at, step in steps if ended_at > fault["t"] and step > reached]
        finding.seconds = round(min(new) - fault["t"], 2) if new else None
    finding.different = differences(final_state(copy.store), undisturbed)
    return finding


def differences(one: FinalState, other: FinalState) -> list[str]:
    """Return the names of the tensors, and the steps of the losses, that differ."""
    tensors, expected = one.weights | one.optimizer, other.weights | other.optimizer
    names = sorted(name for name in tensors.keys() | expected.keys() if tensors.get(name) != expected.get(name))
    steps = sorted(one.losses.keys() | other.losses.keys())
    return names + [f"loss of step {step}" for step in steps if one.losses.get(step) != other.losses.get(step)]


def parse_faults(names: Sequence[str] | None) -> tuple[FaultKind, ...]:
    """Return the faults that a user named; all if none is named. ConfigError if one is unknown."""
    known = {kind.value: kind for kind in FaultKind}
    for name in names or ():
        if name not in known:
            raise ConfigError(f"unknown fault {name!r}", hint=f"give --fault one of: {', '.join(known)}")
    return tuple(known[name] for name in names) if names else tuple(FaultKind)


# -- a drill of a user's run -------------------------------------------------------------------------------------------


def run_drill(
    run_file: Path,
    overrides: Sequence[str] = (),
    *,
    kinds: Sequence[FaultKind] = tuple(FaultKind),
    num_steps: int = 12,
    address: str | None = None,
    keep: bool = False,
) -> list[DrillResult]:
    """Drill a run, each fault in a copy of its own, and print a table. The copies are kept after a failure."""
    if num_steps < STEPS_MIN:
        raise ConfigError(f"{num_steps} steps are too few for a drill", hint=f"give --steps {STEPS_MIN} or more")
    console = Console(stderr=True, highlight=False)
    stamp = f"{time.strftime('%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
    copies: list[RunCopy] = []
    every, name = num_steps // 4, load_run(str(run_file), overrides)[0].name

    def make_copy(suffix: str, at: int = 0) -> RunCopy:
        suffix = f"{stamp}-{suffix}"
        scaled_down = [f"name={name[: 62 - len(suffix)]}-{suffix}", f"train.steps={num_steps}", "train.epochs=null"]
        config, declared = load_run(str(run_file), [*overrides, *scaled_down, f"checkpoint.every={every}"])
        folder = run_file.parent
        copies.append(RunCopy(config.at_home(folder), declared, at, str(folder.absolute()), address))
        return copies[-1]

    findings = []
    with ray_session(address):
        reference = make_copy("undisturbed")
        with ProgressReporter("undisturbed") as reporter:
            reference.launch(tell=reporter)
        undisturbed = final_state(reference.store)
        seconds_per_step = _seconds_per_step(reference)
        for kind in kinds:
            disturbed = make_copy(kind.value, 2 * every if kind is FaultKind.KILL_IN_SAVE else 2 * every + 1)
            finding = DrillResult(kind.value)
            try:
                with ProgressReporter(kind.value) as reporter:
                    inject(disturbed, kind, reporter, rank=disturbed.config.scale.min_workers - 1)
                finding = compare_with_reference(disturbed, kind, undisturbed)
            except OutlastError as error:
                finding.error, finding.fault = error.message, read_record(disturbed.record)
            finding.seconds_per_step = seconds_per_step
            findings.append(finding)
    _show(console, findings, len(undisturbed.weights) + len(undisturbed.optimizer), num_steps)
    if keep or not all(finding.is_good for finding in findings):
        names = ", ".join(copy.config.name for copy in copies)
        console.print(f"\nThe copies are kept in {reference.store.storage.url}: {names}")
    else:
        for done in copies:
            _remove(done)
    return findings


def _seconds_per_step(copy: RunCopy) -> float:
    ends = sorted(event.ended_at or event.t for event in events_of(copy.store, StepEvent))
    return float(statistics.median(later - earlier for earlier, later in pairwise(ends)))


def _remove(copy: RunCopy) -> None:
    storage, run = copy.store.storage, copy.config.name
    storage.delete(f"{run}/model")  # the link, before its target
    for entry in list(walk(storage, run)):
        storage.delete(f"{run}/{entry.name}")


def _show(console: Console, findings: Sequence[DrillResult], num_tensors: int, num_steps: int) -> None:
    console.print()
    for finding in findings:
        if finding.error:
            ended = f"[bold red]did not resume[/]: {finding.error}"
        elif finding.fault is None:
            ended = "[bold red]the fault never occurred[/]"
        elif finding.different:
            more = f" and {len(finding.different) - 3} more" if len(finding.different) > 3 else ""
            ended = f"[bold red]DIFFERENT[/]: {', '.join(finding.different[:3])}{more}"
        else:
            source = f"step {finding.resumed_from}" if finding.resumed_from else "the beginning"
            ended = f"resumed from {source}, {counted(finding.redone, 'step')} repeated, "
            ended += f"next new step after {finding.seconds:.1f} s: [green]the same bits[/]"
        console.print(f"  {FaultKind(finding.kind).meaning}: {ended}", soft_wrap=True)
    if all(finding.is_good for finding in findings):
        proof = f"all {num_tensors} tensors and {num_steps} losses agree"
        console.print(f"\n[bold green]This run resumes exactly[/]: {len(findings)} of {len(findings)}, {proof}.")
