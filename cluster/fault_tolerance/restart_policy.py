"""Restart policy: when a run gives up.

A pure function of the attempts and the limits: it must never read a clock or a storage.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from outlast.checkpointing.run_store.attempt_history import AttemptOutcome, AttemptRecord


@dataclass(frozen=True, slots=True)
class RestartLimits:
    """What a run survives since its last progress; -1 for no limit."""

    max_failures: int = 3
    max_preemptions: int = -1  #: announced losses of nodes
    max_same_step: int = 3  #: failures at the same step that end the run


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Why a run is not restarted."""

    reason: str  #: which limit was reached
    attempts: tuple[AttemptRecord, ...]  #: those that were counted, oldest first

    @property
    def diagnosis(self) -> str:
        """The reason, and each kind of failure with its count."""
        counts = Counter(map(_what_and_message, self.attempts))
        last = {_what_and_message(item): item.end.where for item in self.attempts}
        lines = (
            f"\n  {count} × {what}: {message}" + (f" (last: {last[what, message]})" if last[what, message] else "")
            for (what, message), count in counts.items()
        )
        return self.reason + "".join(lines)


def _what(item: AttemptRecord) -> str:
    return item.end.cause + (f" at step {item.failed_step}" if item.failed_step is not None else "")


def _what_and_message(item: AttemptRecord) -> tuple[str, str]:
    return _what(item), item.end.message.strip() or "no error message"


def count_failures(attempts: Iterable[AttemptRecord], settings: str) -> list[AttemptRecord]:
    """Return the failures and preemptions since the run's last progress under these settings."""
    found: list[AttemptRecord] = []
    newest_step = -1
    for item in attempts:
        top = max(item.commits, default=-1)
        if top > newest_step or item.settings != settings:
            found.clear()
        newest_step = max(newest_step, top)
        if item.settings == settings and (item.end.outcome.is_failure or item.end.outcome is AttemptOutcome.PREEMPTED):
            found.append(item)
    return found


def decide_give_up(attempts: Iterable[AttemptRecord], limits: RestartLimits, settings: str) -> GiveUp | None:
    """Decide whether to give the run up.

    `attempts` are its attempts, oldest first, at least those since its last progress; `settings` is the digest of the
    settings that it would continue with.
    """
    found = count_failures(attempts, settings)
    failures = [item for item in found if item.end.outcome.is_failure]
    preempted = [item for item in found if not item.end.outcome.is_failure]
    for item in failures[-1:]:
        if item.is_final:
            return GiveUp(f"{_what(item)}, and the same settings would fail there again", (item,))
    if len(failures) > 1 and failures[-1].raised and failures[-1].raised == failures[-2].raised:
        return GiveUp("the same error twice without a step in between", tuple(failures[-2:]))
    steps = Counter(item.failed_step for item in failures if item.failed_step is not None)
    for step, number in steps.most_common(1):
        if number >= limits.max_same_step >= 0:
            same = tuple(item for item in failures if item.failed_step == step)
            return GiveUp(f"step {step} failed {number} times (failure.max_same_step: {limits.max_same_step})", same)
    for name, items, limit in (
        ("failures", failures, limits.max_failures),
        ("preemptions", preempted, limits.max_preemptions),
    ):
        if len(items) > limit >= 0:
            return GiveUp(f"{len(items)} {name} without a new checkpoint (failure.max_{name}: {limit})", tuple(items))
    return None
