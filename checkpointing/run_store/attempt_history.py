"""The attempts of a run since its last progress, and how each of them ended.

`read_attempt_history` reads one record per attempt, or per launch that claimed none, from the journals.
`restart_policy.decide_give_up` and `checkpoints_to_skip` are pure functions of these records, so every launch,
supervisor and pod that reads the same store decides alike, however often each of them was restarted.

- A new acknowledged commit, beyond all earlier ones, is progress: all counts restart.
- A change of the settings resets them too, because the user has acted.
- Preemptions are counted separately, and intended ends are not counted.
- An attempt that another one continued in memory is not counted: training went on.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any

import xxhash

from outlast.checkpointing.format.layout import AttemptId, CheckpointRef
from outlast.checkpointing.run_store import events
from outlast.checkpointing.run_store.claims import (
    REGROUPED_FROM,
    continued_in_memory,
    list_attempts,
    list_launches,
    read_claim,
)
from outlast.checkpointing.run_store.journal import COMMITS, read_events, read_first_and_last
from outlast.checkpointing.run_store.liveness import read_liveness
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.retry import retry

#: Exit codes of a launch after which the run may be started again, or whose message names what to do first.
_SETTLED = frozenset({0, 2, 3, 5, 75, 130})
#: Those of a launch that ended as intended.
ORDERLY_EXITS = frozenset({0, 75, 130})
#: Cause of the end of an attempt that another one continued in memory.
REGROUPED = "regrouped"
_STARTS_BEFORE_SKIPPING = 2


class AttemptOutcome(Enum):
    """Classes of ends that the restart policy counts."""

    SETTLED = "settled"  #: done, stopped, superseded, resized, regrouped, or refused for a reason that was reported
    PREEMPTED = "preempted"  #: by an announced loss
    FAILED = "failed"
    SILENT = "silent"  #: without a reported error: its driver has ended too
    OPEN = "open"  #: running, according to its launch

    @property
    def is_failure(self) -> bool:
        return self in (AttemptOutcome.FAILED, AttemptOutcome.SILENT)


@dataclass(frozen=True, slots=True)
class AttemptEnd:
    """How an attempt ended."""

    outcome: AttemptOutcome  #: its class
    cause: str = ""  #: one to three words
    message: str = ""  #: the error
    rank: int | None = None  #: the rank that failed, if known
    where: str = ""  #: that rank and its log, if known
    at: float | None = None  #: when the end was noticed, in seconds since the epoch, if it was
    has_successor: bool = False  #: its launch starts, or has started, another group
    is_planned: bool = True  #: nothing had failed

    @property
    def is_over(self) -> bool:
        return self.outcome is not AttemptOutcome.OPEN


def end_of_attempt(
    alive: Mapping[str, Any],
    *,
    final: events.FinalEvent | None = None,
    failed: events.AttemptErrorEvent | None = None,
    failure: events.GroupFailureEvent | None = None,
    resize: events.ResizeEvent | None = None,
    has_successor: bool = False,
    is_open: bool = False,
    is_regrouped: bool = False,
) -> AttemptEnd:
    """Derive how an attempt ended from its own records and those of its launch.

    `alive` is the launch's liveness file, empty if there is none. `has_successor`: the launch has started another group
    since. `is_open`: the attempt counts as running unless a record shows its end. `is_regrouped`: another attempt
    continued it in memory; `failure` then describes the loss, not an end of the group.
    """
    if is_regrouped:
        end = AttemptEnd(AttemptOutcome.SETTLED, REGROUPED, has_successor=True, is_planned=False)
        if failure is None:
            return end
        message = f"{failure.cause}: {failure.message}"
        return replace(end, message=message, rank=failure.rank, where=failure.where or "", at=_noticed_at(failure))
    if failure is not None and failure.in_place and is_open and not has_successor:
        return AttemptEnd(AttemptOutcome.OPEN)  # the others are going on
    if failure is not None:
        outcome = AttemptOutcome.PREEMPTED if failure.cause == "preempted" else AttemptOutcome.FAILED
        at, where = _noticed_at(failure), failure.where or ""
        message, rank = failure.message, failure.rank
        return AttemptEnd(outcome, failure.cause, message, rank, where, at, has_successor=True, is_planned=False)
    if final is not None:
        return AttemptEnd(AttemptOutcome.SETTLED, _ENDS[type(final)], at=final.t)
    if is_open:
        return AttemptEnd(AttemptOutcome.OPEN)
    exit_code = alive.get("exit_code") if alive.get("ended") else None
    # The ranks of a killed driver outlive it by a moment, and report broken connections or nothing.
    is_alone = not has_successor and not alive.get("ended")
    is_settled = exit_code in _SETTLED
    if exit_code in ORDERLY_EXITS or (has_successor and (failed is None or is_settled or (resize and resize.planned))):
        cause = ("resized" if resize and resize.planned else "restarted") if has_successor else "stopped"
        return AttemptEnd(AttemptOutcome.SETTLED, cause, has_successor=has_successor)
    settled = AttemptOutcome.SETTLED if is_settled else None
    if failed is not None and not (is_alone and is_secondary_error(failed.error)):
        outcome = settled or AttemptOutcome.FAILED
        return AttemptEnd(outcome, "error", failed.error, at=failed.t, has_successor=has_successor, is_planned=False)
    if is_alone:
        message = failed.error if failed else ""
        return AttemptEnd(AttemptOutcome.SILENT, "driver lost", message, is_planned=False)
    return AttemptEnd(settled or AttemptOutcome.SILENT, "failed", str(alive.get("error", "")), is_planned=False)


def _noticed_at(failure: events.GroupFailureEvent) -> float:
    return failure.noticed_at or failure.t


_ENDS: Mapping[type[events.Event], str] = {
    events.DoneEvent: "done",
    events.StopEvent: "stopped",
    events.SupersededEvent: "taken over",
}


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One attempt, or a launch that claimed none."""

    end: AttemptEnd  #: how it ended
    settings: str = ""  #: its `settings_digest`
    commits: tuple[int, ...] = ()  #: steps of its acknowledged commits
    attempt: AttemptId | None = None  #: the attempt; None for a launch that claimed none
    base: CheckpointRef | None = None  #: the checkpoint that it resumed from
    passed_over: tuple[CheckpointRef, ...] = ()  #: checkpoints that it skipped on purpose
    has_begun: bool = False  #: it completed a step, or reported why it could not
    failed_step: int | None = None  #: the step that failed, if known
    is_final: bool = False  #: it ended for a reason that only other settings fix
    raised: str = ""  #: the code that raised, and after which step


def checkpoints_to_skip(records: Iterable[AttemptRecord]) -> set[CheckpointRef]:
    """Return checkpoints from which two starts failed, unless an attempt has skipped them since.

    Only observed failures count: not a driver that disappeared, nor an announced loss.
    """
    records = list(records)
    starts = Counter(
        item.base
        for item in records
        if item.end.outcome in (AttemptOutcome.FAILED, AttemptOutcome.OPEN)
        and not item.has_begun
        and item.base is not None
    )
    skipped = {ref for item in records if item.end.outcome is not AttemptOutcome.PREEMPTED for ref in item.passed_over}
    return {ref for ref, number in starts.items() if number >= _STARTS_BEFORE_SKIPPING} - skipped


# -- reading -----------------------------------------------------------------------------------------------------------


def settings_digest(declared: Mapping[str, Any]) -> str:
    """Return the digest of settings as the user wrote them."""
    return xxhash.xxh3_64_hexdigest(json.dumps(declared, sort_keys=True, default=str).encode())


#: Begins the error of a rank that lost its peers while all went on in memory.
NOT_IN_MEMORY = "training cannot go on in memory"
#: In the errors of a rank whose peer has gone.
_SECONDARY = (
    *("Connection reset by peer", "Connection closed by peer", "Broken pipe", "gloo", "NCCL", "Socket Timeout"),
    NOT_IN_MEMORY,
)


def is_secondary_error(message: str) -> bool:
    """Return whether an error only shows that another rank has gone: a broken connection."""
    return any(word in message for word in _SECONDARY)


def read_attempt_history(store: RunStore, *, live: str = "", below: AttemptId | None = None) -> list[AttemptRecord]:
    """Read the attempts of a run since its last progress and lower than `below`, oldest first. Raises StorageError.

    `live` is a launch that is running; its attempts are open until a record shows their end.
    """
    attempts = [item for item in list_attempts(store) if below is None or item < below]
    with ThreadPoolExecutor(16) as pool:
        committed = dict(zip(attempts, pool.map(lambda item: _commits(store, item), attempts), strict=True))
    first, newest_step = 0, -1
    for number, steps in enumerate(committed.values()):
        if max(steps, default=-1) > newest_step:
            first, newest_step = number, max(steps)
    claims = {item: read_claim(store, item) for item in attempts[first:]}
    continued = continued_in_memory(claims)
    since, began_at = "", 0.0
    if newest_step >= 0:  # what precedes the progress need not be read
        since = claims[attempts[first]].get("launch", "")
        began_at = claims[attempts[first]].get("claimed_at", 0.0)
    attempts_of: dict[str, list[AttemptId]] = {}
    for attempt, claim in claims.items():
        attempts_of.setdefault(claim.get("launch", ""), []).append(attempt)
    records: list[AttemptRecord] = []
    for launch in launches_in_order(list_launches(store), attempts_of):
        if launch < since and launch not in attempts_of:
            continue
        alive = read_liveness(store, launch)
        launch_events = map(events.parse_event, _readable(store, store.launch_dir(launch), read_events))
        failures = [event for event in launch_events if isinstance(event, events.GroupFailureEvent)]
        failure_of = {event.attempt: event for event in failures}
        digest, own = alive.get("settings", ""), attempts_of.get(launch, [])
        dated = [
            (event.t, AttemptRecord(end_of_attempt(alive, failure=event), digest))
            for event in failures
            if event.attempt == "unclaimed" and event.t >= began_at
        ]
        begins = {attempt: _read_journal(store, attempt) for attempt in own}
        regrouped = {claims[item].get(REGROUPED_FROM) or begun.regrouped_from for item, begun in begins.items()}
        for attempt in own:
            failure = failure_of.get(str(attempt))
            end = end_of_attempt(
                alive,
                final=begins[attempt].final,
                failed=begins[attempt].failed,
                failure=failure,
                has_successor=attempt != own[-1],
                is_open=launch == live,
                is_regrouped=attempt in continued or str(attempt) in regrouped,
            )
            item = _record(attempt, claims[attempt], committed[attempt], begins[attempt], end)
            item = replace(item, raised=(failure and failure.raised) or "")
            dated.append((claims[attempt].get("claimed_at", 0.0), item))
        if not dated and not failures and launch != live:
            records += _launch_without_attempts(alive)
        records += [item for _, item in sorted(dated, key=lambda pair: pair[0])]
    return records


def launches_in_order(launches: Iterable[str], attempts_of: Mapping[str, Sequence[AttemptId]]) -> list[str]:
    """Sort launches by their claims, because clocks may differ; one without a claim follows its predecessor by name."""
    latest, keys = AttemptId(0, ""), {}
    for launch in sorted(launches):
        latest = min(attempts_of.get(launch, ()), default=latest)
        keys[launch] = (latest, launch)
    return sorted(keys, key=keys.__getitem__)


def _readable(
    store: RunStore, directory: str, read: Callable[[RunStore, str], Iterable[dict[str, Any]]]
) -> list[dict[str, Any]]:
    """Read the events of a directory; none if that fails, which is recorded."""
    bodies: list[dict[str, Any]] = []
    with store.going_on(directory):
        bodies += retry(lambda: list(read(store, directory)))
    return bodies


def _commits(store: RunStore, attempt: AttemptId) -> tuple[int, ...]:
    bodies = _readable(store, store.attempt_dir(attempt), partial(read_events, stream=COMMITS))
    parsed = map(events.parse_event, bodies)
    return tuple(event.step for event in parsed if isinstance(event, events.CommitEvent))


@dataclass(slots=True)
class _Journal:
    """What the journal of an attempt shows of its beginning and its end."""

    resume: events.ResumeEvent | None = None
    regrouped_from: str | None = None
    final: events.FinalEvent | None = None
    failed: events.AttemptErrorEvent | None = None
    has_begun: bool = False


def _read_journal(store: RunStore, attempt: AttemptId) -> _Journal:
    found = _Journal()
    for body in _readable(store, store.attempt_dir(attempt), read_first_and_last):
        if body["event"] == events.StepEvent.kind:
            found.has_begun = True
            continue
        match events.parse_event(body):
            case events.ResumeEvent() as event:
                found.resume = found.resume or event
            case events.RegroupedEvent() as event:
                found.regrouped_from = found.regrouped_from or event.attempt
            case events.DoneEvent() | events.StopEvent() | events.SupersededEvent() as event:
                found.final = event
            case events.AttemptErrorEvent() as event:
                found.failed = event
            case events.NonFiniteEvent():
                found.has_begun = True
    return found


def _record(
    attempt: AttemptId, claim: Mapping[str, Any], commits: tuple[int, ...], journal: _Journal, end: AttemptEnd
) -> AttemptRecord:
    return AttemptRecord(
        end,
        settings=settings_digest(claim.get("settings", {})),
        commits=commits,
        attempt=attempt,
        base=journal.resume.source if journal.resume else None,
        passed_over=journal.resume.passed_over if journal.resume else (),
        has_begun=journal.has_begun or bool(commits),
        failed_step=journal.failed.step if journal.failed else None,
        is_final=journal.failed is not None and journal.failed.final,
    )


def _launch_without_attempts(alive: Mapping[str, Any]) -> Iterator[AttemptRecord]:
    """Yield the record of a launch of which only the liveness file remains."""
    digest = alive.get("settings", "")
    if not alive.get("ended"):
        end = AttemptEnd(AttemptOutcome.SILENT, "driver lost", "it ended before any worker began", is_planned=False)
        yield AttemptRecord(end, digest)
    elif alive.get("exit_code") not in _SETTLED:
        error = alive.get("error") or "no error message"
        yield AttemptRecord(AttemptEnd(AttemptOutcome.FAILED, "launch failed", error, is_planned=False), digest)
