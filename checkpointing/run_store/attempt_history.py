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
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import xxhash

from outlast.checkpointing.format.layout import AttemptId, CheckpointRef
from outlast.checkpointing.run_store.claims import list_attempts, list_launches, read_claim
from outlast.checkpointing.run_store.journal import COMMITS, read_events, read_first_and_last
from outlast.checkpointing.run_store.liveness import read_liveness
from outlast.checkpointing.run_store.store import RunStore

#: Exit codes of a launch after which the same store may simply be tried again, or the user was told what to do first.
_SETTLED = frozenset({0, 2, 3, 5, 75, 130})
_STARTS_BEFORE_SKIPPING = 2


class AttemptOutcome(Enum):
    """How a try ended."""

    SETTLED = "settled"  #: done, stopped, superseded, or refused for a reason that was told
    PREEMPTED = "preempted"  #: by a loss that had been announced
    FAILED = "failed"
    SILENT = "silent"  #: without a word: its driver has gone too
    OPEN = "open"  #: at work, as far as its own launch knows

    @property
    def is_failure(self) -> bool:
        return self in (AttemptOutcome.FAILED, AttemptOutcome.SILENT)


@dataclass(frozen=True, slots=True)
class AttemptRecord:
    """One try.

    Attributes:
        ending: How it ended.
        settings: Which settings it had, see `settings_digest`.
        commits: Steps of its acknowledged commits.
        attempt: The attempt, if it came so far.
        base: The checkpoint that it resumed from.
        passed_over: Checkpoints that it left out on purpose.
        has_begun: It did a step, or told why it could not.
        failed_step: The step that failed, where that is known.
        is_final: It ended for a reason that only other settings mend.
        raised: What code raised, where, and after which step.
        what: What happened, in a few words.
        message: What was said of it.
        where: Which rank it was, and its log, where that is known.
    """

    ending: AttemptOutcome
    settings: str = ""
    commits: tuple[int, ...] = ()
    attempt: AttemptId | None = None
    base: CheckpointRef | None = None
    passed_over: tuple[CheckpointRef, ...] = ()
    has_begun: bool = False
    failed_step: int | None = None
    is_final: bool = False
    raised: str = ""
    what: str = ""
    message: str = ""
    where: str = ""


def checkpoints_to_skip(tries: Iterable[AttemptRecord]) -> set[CheckpointRef]:
    """Checkpoints from which the run failed to start twice, and has not tried the one before yet.

    Only failures that were seen speak against a checkpoint: not a driver that vanished, nor an announced loss.
    """
    tries = list(tries)
    starts = Counter(
        item.base
        for item in tries
        if item.ending in (AttemptOutcome.FAILED, AttemptOutcome.OPEN) and not item.has_begun and item.base is not None
    )
    passed = {ref for item in tries if item.ending is not AttemptOutcome.PREEMPTED for ref in item.passed_over}
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
        failures = [e for e in read_events(store, store.launch_dir(launch)) if e["event"] == "failure"]
        told = {str(event.get("attempt")): event for event in failures}
        dated: list[tuple[float, AttemptRecord]] = [
            (event["t"], replace(_told(event), settings=alive.get("settings", "")))
            for event in failures
            if event.get("attempt") == "unclaimed" and event["t"] >= began_at
        ]
        mine = attempts_of.get(launch, [])
        for attempt in mine:
            claim, event = claims[attempt], told.get(str(attempt))
            steps = commits[attempts.index(attempt)]
            is_alone = attempt == mine[-1] and not alive.get("ended")
            item = _read_try(store, attempt, claim, steps, event, alive, is_live=launch == live, is_alone=is_alone)
            if item.ending is AttemptOutcome.SILENT and attempt != mine[-1]:  # its driver went on: resized, or drained
                item = replace(item, ending=AttemptOutcome.SETTLED)
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
    events = read_events(store, store.attempt_dir(attempt), COMMITS)
    return tuple(event["step"] for event in events if event.get("event") == "commit")


def _read_try(
    store: RunStore,
    attempt: AttemptId,
    claim: Mapping[str, Any],
    commits: tuple[int, ...],
    failure: Mapping[str, Any] | None,
    alive: Mapping[str, Any],
    *,
    is_live: bool,
    is_alone: bool,
) -> AttemptRecord:
    """What became of an attempt.

    Args:
        failure: What its launch's journal says of its end.
        alive: The launch's sign of life.
        is_live: The launch is at work.
        is_alone: Nothing was heard of the launch later, so connections that broke may be all that its ranks tell.
    """
    events = list(read_first_and_last(store, store.attempt_dir(attempt)))
    kinds = {event["event"] for event in events}
    resume = next((event for event in events if event["event"] == "resume"), {})
    failed: Mapping[str, Any] = next((event for event in reversed(events) if event["event"] == "failed"), {})
    ended = AttemptRecord(AttemptOutcome.SILENT, what="driver lost", message="it ended without a word")
    if failure is not None:
        ended = _told(failure)
    elif kinds & {"done", "stop", "superseded"}:
        ended = AttemptRecord(AttemptOutcome.SETTLED)
    elif is_live:
        ended = AttemptRecord(AttemptOutcome.OPEN)
    elif alive.get("ended") and alive.get("exit_code") in _SETTLED:
        ended = AttemptRecord(AttemptOutcome.SETTLED)
    elif failed and not (is_alone and is_secondary_error(str(failed["error"]))):
        ended = AttemptRecord(AttemptOutcome.FAILED, what="error", message=str(failed["error"]))
    elif failed:
        ended = replace(ended, message=str(failed["error"]))
    return replace(
        ended,
        settings=settings_digest(claim.get("settings", {})),
        commits=commits,
        attempt=attempt,
        base=_ref(resume.get("source")),
        passed_over=tuple(ref for ref in map(_ref, resume.get("passed_over", ())) if ref is not None),
        has_begun=bool(kinds & {"step", "non-finite"}) or bool(commits),
        failed_step=failed.get("step"),
        is_final=bool(failed.get("final")),
        raised=(failure or {}).get("raised", ""),
    )


def _launch_alone(alive: Mapping[str, Any]) -> Iterator[AttemptRecord]:
    """A launch that left nothing but its sign of life."""
    mark = alive.get("settings", "")
    if not alive.get("ended"):
        yield AttemptRecord(AttemptOutcome.SILENT, mark, what="driver lost", message="it ended before any worker began")
    elif alive.get("exit_code") not in _SETTLED:
        yield AttemptRecord(AttemptOutcome.FAILED, mark, what="launch failed", message=alive.get("error") or "no word")


def _told(failure: Mapping[str, Any]) -> AttemptRecord:
    """What a launch's journal says of the end of an attempt."""
    ending = AttemptOutcome.PREEMPTED if failure["cause"] == "preempted" else AttemptOutcome.FAILED
    return AttemptRecord(ending, what=failure["cause"], message=failure["message"], where=failure.get("where", ""))


def _ref(text: str | None) -> CheckpointRef | None:
    """The checkpoint that `str(ref)` stands for."""
    attempt, _, name = (text or "").partition("/checkpoint-")
    return CheckpointRef.parse(f"{name}@{attempt}")
