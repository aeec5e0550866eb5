"""Restart policy: when a run gives up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from outlast.checkpointing.run_store.attempt_history import AttemptOutcome, AttemptRecord


@dataclass(frozen=True, slots=True)
class RestartLimits:
    """How much a run survives since its last progress; -1 for no limit.

    Attributes:
        max_failures: Failures.
        max_preemptions: Announced losses.
        max_same_step: So many failures at one and the same step end it.
    """

    max_failures: int = 3
    max_preemptions: int = -1
    max_same_step: int = 3


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Why a run is not tried again.

    Attributes:
        reason: Which limit was reached.
        tries: What was counted, oldest first.
    """

    reason: str
    tries: tuple[AttemptRecord, ...]

    @property
    def diagnosis(self) -> str:
        """The reason, and what happened how often."""
        told = Counter(map(_what_and_message, self.tries))
        last = {_what_and_message(item): item.end.where for item in self.tries}
        lines = (
            f"\n  {count} × {what}: {message}" + (f" (last: {last[what, message]})" if last[what, message] else "")
            for (what, message), count in told.items()
        )
        return self.reason + "".join(lines)


def _what(item: AttemptRecord) -> str:
    return item.end.cause + (f" at step {item.failed_step}" if item.failed_step is not None else "")


def _what_and_message(item: AttemptRecord) -> tuple[str, str]:
    return _what(item), item.end.message.strip() or "no error message"


def count_failures(tries: Iterable[AttemptRecord], settings: str) -> list[AttemptRecord]:
    """The failures and preemptions that count against a run with these settings: those since its last progress."""
    found: list[AttemptRecord] = []
    newest_step = -1
    for item in tries:
        top = max(item.commits, default=-1)
        if top > newest_step or item.settings != settings:
            found.clear()
        newest_step = max(newest_step, top)
        if item.settings == settings and (item.end.outcome.is_failure or item.end.outcome is AttemptOutcome.PREEMPTED):
            found.append(item)
    return found


def decide_give_up(tries: Iterable[AttemptRecord], limits: RestartLimits, settings: str) -> GiveUp | None:
    """Whether to give the run up.

    Args:
        tries: What it has been through, oldest first, from its last progress on or from before that.
        limits: What it may survive.
        settings: Which settings it would go on with.
    """
    found = count_failures(tries, settings)
    failures = [item for item in found if item.end.outcome.is_failure]
    preempted = [item for item in found if not item.end.outcome.is_failure]
    for item in failures[-1:]:
        if item.is_final:
            return GiveUp(f"{_what(item)}, and the same settings would lead there again", (item,))
    if len(failures) > 1 and failures[-1].raised and failures[-1].raised == failures[-2].raised:
        return GiveUp("the same error twice, and no step in between", tuple(failures[-2:]))
    steps = Counter(item.failed_step for item in failures if item.failed_step is not None)
    for step, number in steps.most_common(1):
        if number >= limits.max_same_step >= 0:
            same = tuple(item for item in failures if item.failed_step == step)
            return GiveUp(f"step {step} failed {number} times (failure.max_same_step: {limits.max_same_step})", same)
    for kind, items, limit in (
        ("failures", failures, limits.max_failures),
        ("preemptions", preempted, limits.max_preemptions),
    ):
        if len(items) > limit >= 0:
            return GiveUp(f"{len(items)} {kind} without a new checkpoint (failure.max_{kind}: {limit})", tuple(items))
    return None
