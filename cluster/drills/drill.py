"""`outlast drill`: injects faults into scaled-down copies of a user's run, and checks that each resumes exactly.

One copy runs undisturbed; then one copy for each fault is interrupted in the middle and resumes. All must end with the
same bits. If one does not, the undisturbed copy is repeated, to find out whether the resume is the cause. The copies
are stored beside the run, use its data, and are deleted on success. The run itself is never touched.
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
from typing import Any

from rich.console import Console
from rich.markup import escape

from outlast.checkpointing.errors import ConfigError, OutlastError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint, FaultSpec, read_record, write_record
from outlast.checkpointing.run_store.catalog import build_catalog
from outlast.checkpointing.run_store.events import RegroupedEvent, ResumeEvent, StepEvent, parse_event
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import read_bytes, walk
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.config.run_config import RunConfig
from outlast.cluster.config.run_file import load_run
from outlast.cluster.drills.comparison import (
    DifferenceCause,
    FinalState,
    FirstDifference,
    differences,
    events_of,
    explain,
    final_state,
    first_difference,
    unequal_builds,
    weight_order,
)
from outlast.cluster.driver.launch import Launch
from outlast.cluster.driver.ray_session import ray_session
from outlast.cluster.formatting import counted
from outlast.cluster.monitoring.console_progress import ProgressReporter
from outlast.cluster.output import make_console, safe_line
from outlast.trainers.loop.train_loop import Outcome

STEPS_MIN = 8


class FaultKind(Enum):
    """A fault to inject, with its description."""

    IN_PLACE = "in-place", "a worker killed; the others go on in memory"  #: as in `KILL`; the others restart
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
    pause_at: int | None = None  #: a step, from 0, at which training pauses, so that an earlier save is committed

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
    in_memory_from: int | None = None  #: the step after which it went on in memory
    redone: int = 0  #: steps that were repeated
    seconds: float | None = None  #: from the fault to the end of the first new step
    seconds_per_step: float | None = None  #: the median of the undisturbed copy
    different: list[str] = field(default_factory=list)  #: tensors and losses that differ from the undisturbed copy's
    first: FirstDifference | None = None  #: where the difference begins
    cause: DifferenceCause | None = None  #: why there is one
    error: str = ""  #: why it did not resume

    @property
    def is_good(self) -> bool:
        is_tried = self.in_memory_from if self.kind == FaultKind.IN_PLACE.value else self.resumed_from
        return bool(self.fault and is_tried) and not self.different and not self.error

    def __str__(self) -> str:
        if self.error:
            return f"[bold red]did not resume[/]: {escape(safe_line(self.error))}"
        if self.different:
            num_losses = sum(name.startswith("loss of step ") for name in self.different)
            counts = counted(len(self.different) - num_losses, "tensor")
            counts += f" and the losses of {counted(num_losses, 'step')}" if num_losses else ", but no loss"
            return f"[bold red]DIFFERENT[/]: {counts}; first {escape(safe_line(str(self.first or self.different[0])))}"
        if self.fault is None:
            return "[bold red]the fault never occurred[/]"
        if self.kind == FaultKind.IN_PLACE.value:
            if self.in_memory_from is None:
                return f"[bold red]restarted from step {self.resumed_from}[/] instead: see the run's events"
            ended = f"went on from step {self.in_memory_from}, {counted(self.redone, 'step')} repeated, "
            return ended + f"next new step after {self.seconds:.1f} s: [green]the same bits[/]"
        if not self.resumed_from:
            return "[bold red]no checkpoint was committed before the fault[/], so no resume was tried: add --steps"
        ended = f"resumed from step {self.resumed_from}, {counted(self.redone, 'step')} repeated, "
        return ended + f"next new step after {self.seconds:.1f} s: [green]the same bits[/]"


@dataclass(slots=True)
class DrillReport:
    """Results of all copies."""

    num_tensors: int  #: number of tensors in a checkpoint
    findings: list[DrillResult] = field(default_factory=list)  #: one for each fault
    explanation: str = ""  #: why copies differ; empty if none does

    @property
    def is_good(self) -> bool:
        return all(finding.is_good for finding in self.findings)


def inject(copy: RunCopy, kind: FaultKind, tell: Any = lambda event: None, rank: int = 0) -> None:
    """Run a copy to its end with a fault in worker `rank`. Raises OutlastError if it did not resume."""
    faults = []
    if copy.pause_at is not None:
        faults.append(FaultSpec(FaultPoint.STEP, copy.pause_at, rank, FaultAction.PAUSE, f"{copy.record}.saved"))
    if kind in (FaultKind.IN_PLACE, FaultKind.KILL, FaultKind.KILL_IN_SAVE, FaultKind.ERROR):
        point = FaultPoint.WHILE_WRITING if kind is FaultKind.KILL_IN_SAVE else FaultPoint.STEP
        action = FaultAction.EXCEPTION if kind is FaultKind.ERROR else FaultAction.SIGKILL
        copy.launch([*faults, FaultSpec(point, copy.at, rank, action, copy.record)], tell)
        return
    # The pause keeps the copy from ending before its driver receives the step's event.
    faults.append(FaultSpec(FaultPoint.STEP, copy.at, rank, FaultAction.PAUSE, f"{copy.record}.pause"))
    if kind is FaultKind.DRIVER:
        driver = multiprocessing.get_context("spawn").Process(target=_run_until_killed, args=(copy, faults))
        driver.start()
        driver.join()
    else:
        copy.launch(faults, _interrupter(copy, signal.SIGTERM, tell))
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


def _run_until_killed(copy: RunCopy, pauses: Sequence[FaultSpec]) -> None:
    copy.launch(pauses, _interrupter(copy, signal.SIGKILL, lambda event: None))


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
        finding.in_memory_from = next((event.step for event in events_of(copy.store, RegroupedEvent)), None)
        finding.resumed_from = resumes[0] if resumes else 0
        reached = max((step for ended_at, step in steps if ended_at <= fault["t"]), default=0)
        begins_at = finding.resumed_from if finding.in_memory_from is None else finding.in_memory_from
        finding.redone = max(0, reached - begins_at)
        new = [ended_at for ended_at, step in steps if ended_at > fault["t"] and step > reached]
        finding.seconds = round(min(new) - fault["t"], 2) if new else None
    finding.different = differences(final_state(copy.store), undisturbed)
    return finding


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
    kinds: Sequence[FaultKind] | None = None,
    num_steps: int = 12,
    address: str | None = None,
    keep: bool = False,
) -> list[DrillResult]:
    """Drill a run, each fault in a copy of its own, and print a table. The copies are kept after a failure.

    Without `kinds` it is every fault that the run's settings allow.
    """
    if num_steps < STEPS_MIN:
        raise ConfigError(f"{num_steps} steps are too few for a drill", hint=f"give --steps {STEPS_MIN} or more")
    console = make_console(stderr=True)
    stamp = f"{time.strftime('%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(2)}"
    copies: list[RunCopy] = []
    every, original = num_steps // 4, load_run(str(run_file), overrides)[0]
    name, in_place = original.name, original.goes_on_in_place
    if kinds and FaultKind.IN_PLACE in kinds and not in_place:
        raise ConfigError(
            "this run does not go on in memory when a worker is lost", hint="see failure.in_place, or omit this fault"
        )
    kinds = kinds or [kind for kind in FaultKind if in_place or kind is not FaultKind.IN_PLACE]

    def make_copy(suffix: str, at: int = 0) -> RunCopy:
        restarts = ["failure.in_place=false", "scale.spares=0"] if suffix != FaultKind.IN_PLACE.value else []
        suffix = f"{stamp}-{suffix}"
        scaled_down = [f"name={name[: 62 - len(suffix)]}-{suffix}", f"train.steps={num_steps}", "train.epochs=null"]
        config, declared = load_run(str(run_file), [*overrides, *scaled_down, *restarts, f"checkpoint.every={every}"])
        folder = run_file.parent
        copies.append(RunCopy(config.at_home(folder), declared, at, str(folder.absolute()), address, every + 1))
        return copies[-1]

    with ray_session(address):
        report = drill_copies(make_copy, kinds, num_steps)
    _show(console, report, num_steps)
    if keep or not report.is_good:
        names = ", ".join(copy.config.name for copy in copies)
        console.print(f"\nThe copies are kept in {copies[0].store.storage.url}: {names}")
    else:
        for done in copies:
            _remove(done)
    return report.findings


def drill_copies(new_copy: Callable[..., RunCopy], kinds: Sequence[FaultKind], num_steps: int) -> DrillReport:
    """Run an undisturbed copy and one for each fault, compare them, and diagnose a difference.

    Args:
        new_copy: Makes a copy from a suffix of its name and, for a disturbed one, the step of the fault.
        kinds: The faults.
        num_steps: Steps of a copy.

    Raises:
        OutlastError: The undisturbed copy failed.
    """
    reference = new_copy("undisturbed")
    with ProgressReporter("undisturbed") as reporter:
        reference.launch(tell=reporter)
    undisturbed = final_state(reference.store)
    report = DrillReport(len(undisturbed.weights) + len(undisturbed.optimizer))
    differing = []
    every = num_steps // 4
    for kind in kinds:
        disturbed = new_copy(kind.value, 2 * every if kind is FaultKind.KILL_IN_SAVE else 2 * every + 1)
        finding = DrillResult(kind.value)
        try:
            with ProgressReporter(kind.value) as reporter:
                inject(disturbed, kind, reporter, rank=disturbed.config.scale.min_workers - 1)
            finding = compare_with_reference(disturbed, kind, undisturbed)
        except OutlastError as error:
            finding.error, finding.fault = error.message, read_record(disturbed.record)
        finding.seconds_per_step = _seconds_per_step(reference)
        report.findings.append(finding)
        if finding.different:
            differing.append((finding, disturbed))
    if differing:
        try:
            report.explanation = _diagnose(differing, reference, new_copy)
        except OutlastError as error:
            report.explanation = f"The cause was not found: {error.message}"
    return report


def _diagnose(
    differing: Sequence[tuple[DrillResult, RunCopy]], reference: RunCopy, new_copy: Callable[..., RunCopy]
) -> str:
    """Find where each copy begins to differ, and the cause. Returns the explanation."""
    order = weight_order(reference.config, reference.store, reference.code)
    for finding, disturbed in differing:
        finding.first = first_difference(
            disturbed.store,
            reference.store,
            order,
            fault_at=finding.fault["t"] if finding.fault else None,
            resumed_from=finding.resumed_from,
        )
    first = next((f.first for f, _ in differing if f.first and f.first.before_fault), None)
    if first is None:
        repeated = new_copy("repeated")
        with ProgressReporter("repeated") as reporter:
            repeated.launch(tell=reporter)
        first = first_difference(repeated.store, reference.store, order)
    cause = DifferenceCause.RESUME if first is None else DifferenceCause.NOT_DETERMINISTIC
    for finding, _ in differing:
        finding.cause = cause
    builds = None
    if first is not None and first.step == 1 and reference.address is None:  # the workers' libraries are installed here
        builds = unequal_builds(reference.config, reference.store, reference.code)
    return explain(cause, reference.config, builds)


def _seconds_per_step(copy: RunCopy) -> float:
    ends = sorted(event.ended_at or event.t for event in events_of(copy.store, StepEvent))
    return float(statistics.median(later - earlier for earlier, later in pairwise(ends)))


def _remove(copy: RunCopy) -> None:
    storage, run = copy.store.storage, copy.config.name
    if isinstance(storage, LocalStorage):
        storage.path(f"{run}/model").unlink(missing_ok=True)  # the link, before its target
    for entry in list(walk(storage, run)):
        storage.delete(f"{run}/{entry.name}")


def _show(console: Console, report: DrillReport, num_steps: int) -> None:
    console.print()
    for finding in report.findings:
        console.print(f"  {FaultKind(finding.kind).meaning}: {finding}", markup=True, soft_wrap=True)
    if report.explanation:
        console.print(f"\n{report.explanation}", soft_wrap=True)
    if report.is_good:
        proof = f"all {report.num_tensors} tensors and {num_steps} losses agree"
        num = len(report.findings)
        console.print(f"\n[bold green]This run resumes exactly[/]: {num} of {num}, {proof}.", markup=True)
