"""What a run has been through, and when enough is enough: one rule, kept in the run's store.

A record stands for one attempt, or for a launch that ended before it claimed any. `read_attempt_history` reads them
from the journals; `restart_policy.decide_give_up` and `checkpoints_to_skip` decide, and are pure. So every
launch, supervisor and pod that reads the same store decides alike, however often each of them was restarted.

- A new acknowledged commit, beyond all earlier ones, is progress: all counts begin anew.
- So do they when the settings change, because somebody has acted.
- Preemptions are counted apart, and what ended on purpose is not counted.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any

import xxhash

from outlast.checkpointing.format.layout import AttemptId, CheckpointRef
from outlast.checkpointing.run_store import events
from outlast.checkpointing.run_store.claims import list_attempts, list_launches, read_claim
from outlast.checkpointing.run_store.journal import COMMITS, read_events, read_first_and_last
from outlast.checkpointing.run_store.liveness import read_liveness
from outlast.checkpointing.run_store.store import RunStore

#: Exit codes of a launch after which the same store may simply be tried again, or the user was told what to do first.
_SETTLED = frozenset({0, 2, 3, 5, 75, 130})
#: Those of a launch that ended as it should, or as somebody wanted.
_ORDERLY = frozenset({0, 75, 130})
_STARTS_BEFORE_SKIPPING = 2


class AttemptOutcome(Enum):
    """How an attempt ended, as far as the restart policy counts it."""

    SETTLED = "settled"  #: done, stopped, superseded, resized, or refused for a reason that was reported
    PREEMPTED = "preempted"  #: by a loss that had been announced
    FAILED = "failed"
    SILENT = "silent"  #: without a reported error: its driver has gone too
    OPEN = "open"  #: at work, as far as its own launch knows

    @property
    def is_failure(self) -> bool:
        return self in (AttemptOutcome.FAILED, AttemptOutcome.SILENT)


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """How an attempt ended.

    Attributes:
        outcome: What it counts as.
        cause: In a word or three.
        message: The error.
        rank: Which rank it was, where that is known.
        where: The same with its log, where that is known.
        at: When that was noticed; None where it was not.
        goes_on: Its launch starts, or has started, another group.
        is_planned: Nothing had failed.
    """

    outcome: AttemptOutcome
    cause: str = ""
    message: str = ""
    rank: int | None = None
    where: str = ""
    at: float | None = None
    goes_on: bool = False
    is_planned: bool = True

    @property
    def is_over(self) -> bool:
        """It is not at work any more."""
        return self.outcome is not AttemptOutcome.OPEN


def end_of_attempt(
    final: events.FinalEvent | None,
    failed: events.FailedEvent | None,
    failure: events.FailureEvent | None,
    resize: events.ResizeEvent | None,
    alive: Mapping[str, Any],
    *,
    goes_on: bool,
    is_open: bool,
) -> AttemptEnd:
    """How an attempt ended, from what it and its launch have left.

    Args:
        final: Its last event, if it ended in order.
        failed: The error that its rank 0 reported.
        failure: What its launch's journal says of its end.
        resize: The change of the number of workers that followed it.
        alive: The launch's liveness file; empty where there is none.
        goes_on: Its launch has started another group since.
        is_open: Otherwise it counts as being at work.
    """
    if failure is not None:
        outcome = AttemptOutcome.PREEMPTED if failure.cause == "preempted" else AttemptOutcome.FAILED
        at, where = failure.noticed_at or failure.t, failure.where or ""
        message, rank = failure.message, failure.rank
        return AttemptEnd(outcome, failure.cause, message, rank, where, at, goes_on=True, is_planned=False)
    if final is not None:
        return AttemptEnd(AttemptOutcome.SETTLED, _ENDS[type(final)], at=final.t)
    if is_open:
        return AttemptEnd(AttemptOutcome.OPEN)
    exit_code = alive.get("exit_code") if alive.get("ended") else None
    # The ranks of a killed driver outlive it by a moment, and report broken connections or nothing.
    is_alone = not goes_on and not alive.get("ended")
    is_settled = exit_code in _SETTLED
    if exit_code in _ORDERLY or (goes_on and (failed is None or is_settled)):
        cause = ("resized" if resize and resize.planned else "restarted") if goes_on else "stopped"
        return AttemptEnd(AttemptOutcome.SETTLED, cause, goes_on=goes_on)
    settled = AttemptOutcome.SETTLED if is_settled else None
    if failed is not None and not (is_alone and is_secondary_error(failed.error)):
        outcome = settled or AttemptOutcome.FAILED
        return AttemptEnd(outcome, "error", failed.error, at=failed.t, goes_on=goes_on, is_planned=False)
    if is_alone:
        message = failed.error if failed else ""
        return AttemptEnd(AttemptOutcome.SILENT, "driver lost", message, is_planned=False)
    return AttemptEnd(settled or AttemptOutcome.SILENT, "failed", str(alive.get("error", "")), is_planned=False)


_ENDS: Mapping[type[events.Event], str] = {
    events.DoneEvent: "done",
    events.StopEvent: "stopped",
    events.SupersededEvent: "taken over",
}


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One attempt, or a launch that claimed none.

    Attributes:
        end: How it ended.
        settings: Which settings it had, see `settings_digest`.
        commits: Steps of its acknowledged commits.
        attempt: The attempt, if it came so far.
        base: The checkpoint that it resumed from.
        passed_over: Checkpoints that it left out on purpose.
        has_begun: It did a step, or reported why it could not.
        failed_step: The step that failed, where that is known.
        is_final: It ended for a reason that only other settings mend.
        raised: What code raised, where, and after which step.
    """

    end: AttemptEnd
    settings: str = ""
    commits: tuple[int, ...] = ()
    attempt: AttemptId | None = None
    base: CheckpointRef | None = None
    passed_over: tuple[CheckpointRef, ...] = ()
    has_begun: bool = False
    failed_step: int | None = None
    is_final: bool = False
    raised: str = ""


def checkpoints_to_skip(tries: Iterable[AttemptRecord]) -> set[CheckpointRef]:
    """Checkpoints from which the run failed to start twice, and has not tried the one before yet.

    Only failures that were seen speak against a checkpoint: not a driver that vanished, nor an announced loss.
    """
    tries = list(tries)
    starts = Counter(
        item.base
        for item in tries
        if item.end.outcome in (AttemptOutcome.FAILED, AttemptOutcome.OPEN)
        and not item.has_begun
        and item.base is not None
    )
    passed = {ref for item in tries if item.end.outcome is not AttemptOutcome.PREEMPTED for ref in item.passed_over}
    return {ref for ref, number in starts.items() if number >= _STARTS_BEFORE_SKIPPING} - passed


# -- reading -----------------------------------------------------------------------------------------------------------


def settings_digest(declared: Mapping[str, Any]) -> str:
    """A short text that is equal for equal settings, as their user wrote them."""
    return xxhash.xxh3_64_hexdigest(json.dumps(declared, sort_keys=True, default=str).encode())


#: What a rank says when another one has gone.
_SECONDARY = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "gloo", "NCCL", "Socket Timeout")


def is_secondary_error(said: str) -> bool:
    """Whether an error says no more than that somebody else has gone: a connection that broke."""
    return any(word in said for word in _SECONDARY)


def read_attempt_history(store: RunStore, *, live: str = "", below: AttemptId | None = None) -> list[AttemptRecord]:
    """The tries of a run from its last progress on, oldest first.

    Args:
        store: The run.
        live: A launch that is at work, whose attempts have not ended until it says so.
        below: Leave out this attempt and higher ones.

    Raises:
        StorageError: A read failed.
    """
    attempts = [item for item in list_attempts(store) if below is None or item < below]
    with ThreadPoolExecutor(16) as pool:
        commits = list(pool.map(lambda item: _commits(store, item), attempts))
    first, newest_step = 0, -1
    for number, steps in enumerate(commits):
        if max(steps, default=-1) > newest_step:
            first, newest_step = number, max(steps)
    claims = {item: read_claim(store, item) for item in attempts[first:]}
    since, began_at = "", 0.0
    if newest_step >= 0:  # what was before the progress need not be read
        since = claims[attempts[first]].get("launch", "")
        began_at = claims[attempts[first]].get("claimed_at", 0.0)
    attempts_of: dict[str, list[AttemptId]] = {}
    for attempt, claim in claims.items():
        attempts_of.setdefault(claim.get("launch", ""), []).append(attempt)
    found: list[AttemptRecord] = []
    for launch in launches_in_order(list_launches(store), attempts_of):
        if launch < since and launch not in attempts_of:
            continue
        alive = read_liveness(store, launch)
        told = map(events.parse_event, read_events(store, store.launch_dir(launch)))
        failures = [event for event in told if isinstance(event, events.FailureEvent)]
        failure_of = {event.attempt: event for event in failures}
        mark, mine = alive.get("settings", ""), attempts_of.get(launch, [])
        dated: list[tuple[float, AttemptRecord]] = [
            (event.t, AttemptRecord(end_of_attempt(None, None, event, None, alive, goes_on=True, is_open=False), mark))
            for event in failures
            if event.attempt == "unclaimed" and event.t >= began_at
        ]
        for attempt in mine:
            claim, failure = claims[attempt], failure_of.get(str(attempt))
            steps = commits[attempts.index(attempt)]
            goes_on, is_open = attempt != mine[-1], launch == live
            item = _read_record(store, attempt, claim, steps, failure, alive, goes_on=goes_on, is_open=is_open)
            dated.append((claim.get("claimed_at", 0.0), item))
        if not dated and not failures and launch != live:
            found += _launch_alone(alive)
        found += [item for _, item in sorted(dated, key=lambda pair: pair[0])]
    return found


def launches_in_order(launches: Iterable[str], attempts_of: Mapping[str, Sequence[AttemptId]]) -> list[str]:
    """Launches in the order of their claims, whatever the clocks that named them said; those that claimed nothing
    follow the one that they are named after."""
    latest, keys = AttemptId(0, ""), {}
    for launch in sorted(launches):
        latest = min(attempts_of.get(launch, ()), default=latest)
        keys[launch] = (latest, launch)
    return sorted(keys, key=keys.__getitem__)


def _commits(store: RunStore, attempt: AttemptId) -> tuple[int, ...]:
    found = map(events.parse_event, read_events(store, store.attempt_dir(attempt), COMMITS))
    return tuple(event.step for event in found if isinstance(event, events.CommitEvent))


def _read_record(
    store: RunStore,
    attempt: AttemptId,
    claim: Mapping[str, Any],
    commits: tuple[int, ...],
    failure: events.FailureEvent | None,
    alive: Mapping[str, Any],
    *,
    goes_on: bool,
    is_open: bool,
) -> AttemptRecord:
    """What became of an attempt; the arguments are those of `end_of_attempt`."""
    resume: events.ResumeEvent | None = None
    final: events.FinalEvent | None = None
    failed: events.FailedEvent | None = None
    has_begun = bool(commits)
    for body in read_first_and_last(store, store.attempt_dir(attempt)):
        if body["event"] == events.StepEvent.kind:
            has_begun = True
            continue
        match events.parse_event(body):
            case events.ResumeEvent() as event:
                resume = resume or event
            case events.DoneEvent() | events.StopEvent() | events.SupersededEvent() as event:
                final = event
            case events.FailedEvent() as event:
                failed = event
            case events.NonFiniteEvent():
                has_begun = True
    return AttemptRecord(
        end_of_attempt(final, failed, failure, None, alive, goes_on=goes_on, is_open=is_open),
        settings=settings_digest(claim.get("settings", {})),
        commits=commits,
        attempt=attempt,
        base=resume.source if resume else None,
        passed_over=resume.passed_over if resume else (),
        has_begun=has_begun,
        failed_step=failed.step if failed else None,
        is_final=failed is not None and failed.final,
        raised=(failure and failure.raised) or "",
    )


def _launch_alone(alive: Mapping[str, Any]) -> Iterator[AttemptRecord]:
    """A launch that left nothing but its sign of life."""
    mark = alive.get("settings", "")
    if not alive.get("ended"):
        end = AttemptEnd(AttemptOutcome.SILENT, "driver lost", "it ended before any worker began", is_planned=False)
        yield AttemptRecord(end, mark)
    elif alive.get("exit_code") not in _SETTLED:
        error = alive.get("error") or "no error message"
        yield AttemptRecord(AttemptEnd(AttemptOutcome.FAILED, "launch failed", error, is_planned=False), mark)
