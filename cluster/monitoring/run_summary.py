"""A run at a glance: what `status`, the live panel and the report show of a story. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan

from outlast.checkpointing.format.layout import CheckpointRef
from outlast.checkpointing.run_store.events import SlowRank
from outlast.cluster.monitoring.goodput import GoodputReport, account_time
from outlast.cluster.monitoring.timeline import State, Timeline
from outlast.cluster.monitoring.timeline_records import AttemptTimeline, SaveRecord, StepSeries

#: Speed and the time left are those of the last steps.
WINDOW = 64
#: A sparkline has no use for more.
NUM_LOSSES = 512


@dataclass(frozen=True, slots=True)
class NewestCheckpoint:
    """The newest checkpoint.

    Attributes:
        step: Its step.
        committed_at: When it was committed; None where only its number is known.
        num_bytes: Its size.
        verified_at: When every byte of it was last read and found whole, by an attempt that resumed from it.
    """

    step: int
    committed_at: float | None
    num_bytes: int
    verified_at: float | None


@dataclass(frozen=True, slots=True)
class Interruption:
    """An end of a worker group after which the run went on, or did not.

    Attributes:
        at: When it was noticed, or when the group was last heard of.
        attempt: Which one ended.
        cause: In a word or three.
        rank: Which rank it was, where that is known.
        message: What was said of it.
        resumed_from: The step that the next attempt began from; None while there is none.
    """

    at: float
    attempt: str
    cause: str
    rank: int | None
    message: str
    resumed_from: int | None


@dataclass(frozen=True, slots=True)
class RunSummary:
    """One run at one moment. Times are in seconds since the epoch.

    Attributes:
        run: Its name.
        now: The moment.
        state: What it is doing.
        doing: The same in words, where the driver knows more.
        heard_at: When its newest launch or any attempt last showed a sign of life; 0 if none ever did.
        attempt: The number of the current attempt.
        num_attempts: How many there were.
        world_size: Workers at work.
        step: Steps done.
        num_steps: Steps that it will have.
        loss: The newest.
        losses: The newest ones, oldest first.
        lr: The learning rate.
        scores: Of the newest evaluation.
        tokens_per_s: Of the last steps; None where nobody knows, as are the next two.
        samples_per_s: Of the last steps.
        seconds_per_step: Of the last steps, with all that lies between them.
        left_s: Seconds until the last step, at that pace.
        newest: The newest checkpoint.
        save: The newest save whose costs are known.
        interruptions: Oldest first.
        num_lost: Steps that were made and lost.
        slow: Slow ranks: rank, host, how many times as slow.
        ledger: Where the time went.
    """

    run: str
    now: float
    state: State
    doing: str
    heard_at: float
    attempt: int | None
    num_attempts: int
    world_size: int | None
    step: int
    num_steps: int | None
    loss: float | None
    losses: tuple[float, ...]
    lr: float | None
    scores: Mapping[str, float]
    tokens_per_s: float | None
    samples_per_s: float | None
    seconds_per_step: float | None
    left_s: float | None
    newest: NewestCheckpoint | None
    save: SaveRecord | None
    interruptions: tuple[Interruption, ...]
    num_lost: int
    slow: tuple[SlowRank, ...]
    ledger: GoodputReport


def summarize(story: Timeline, now: float, doing: str = "") -> RunSummary:
    """What a person wants to know of a run at the moment `now` (seconds since the epoch).

    Args:
        story: The run.
        now: The moment.
        doing: What the driver is at, where it knows more than the journals.
    """
    current, attempts, state = story.current, story.in_order, story.state(now)
    is_restarting = state is State.RUNNING and current is not None and _is_between(story, current, now)
    steps = current.steps if current else StepSeries()
    seconds = _seconds_per_step(steps)
    plan = current.plan if current else None
    num_steps = plan.num_steps if plan else None
    step = current.last_step if current else 0
    tokens, batch = _tokens_per_step(steps), plan.batch if plan else None
    scores = next((found.scores for item in reversed(attempts) for found in reversed(item.evaluations)), {})
    saves = (save for item in reversed(attempts) for save in reversed(item.saves.values()))
    return RunSummary(
        run=story.run,
        now=now,
        state=state,
        doing=doing or ("restarting" if is_restarting else state.value),
        heard_at=story.heard_at(now),
        attempt=current.id.number if current else None,
        num_attempts=len(story.attempts),
        world_size=current.world_size if current else None,
        step=step,
        num_steps=num_steps,
        loss=story.loss,
        losses=_newest_losses(story),
        lr=steps.lr[-1] if steps and not isnan(steps.lr[-1]) else None,
        scores=scores,
        tokens_per_s=tokens / seconds if tokens and seconds else None,
        samples_per_s=batch / seconds if batch and seconds else None,
        seconds_per_step=seconds,
        left_s=(num_steps - step) * seconds if num_steps and seconds and state.is_live and not is_restarting else None,
        newest=newest_checkpoint(story),
        save=next((save for save in saves if save.blocked_s is not None), None),
        interruptions=tuple(interruptions(story)),
        num_lost=story.num_lost,
        slow=tuple(current.slow if current and state.is_live else ()),
        ledger=account_time(story, now),
    )


def _is_between(story: Timeline, current: AttemptTimeline, now: float) -> bool:
    """Whether a run's newest group is gone, and the next one is on its way: of the same launch, or of the next."""
    launch = story.newest_launch(now)
    return story.ends[current.id].has_successor or (launch is not None and current.launch != launch.id)


def _seconds_per_step(steps: StepSeries) -> float | None:
    """Of the last steps, from end to end."""
    number = min(WINDOW, len(steps) - 1)
    if number < 1:
        return None
    return max(0.0, steps.ended_at[-1] - steps.ended_at[-1 - number]) / number or None


def _tokens_per_step(steps: StepSeries) -> float | None:
    tokens = steps.tokens[-WINDOW:]
    return sum(tokens) / len(tokens) if tokens else None


def _newest_losses(story: Timeline) -> tuple[float, ...]:
    """By step, each as it was made last."""
    found: dict[int, float] = {}
    for attempt in story.in_order[-8:]:
        steps = attempt.steps
        found |= dict(zip(steps.number[-NUM_LOSSES:], steps.loss[-NUM_LOSSES:], strict=True))
    return tuple(found[step] for step in sorted(found)[-NUM_LOSSES:] if not isnan(found[step]))


def verified(story: Timeline) -> dict[CheckpointRef, float]:
    """Checkpoints of which every byte was read and found whole, and when: attempts resumed from them."""
    found: dict[CheckpointRef, float] = {}
    for attempt in story.in_order:
        if attempt.base is not None and attempt.start is not None:
            found[attempt.base] = attempt.start.t
    return found


def newest_checkpoint(story: Timeline) -> NewestCheckpoint | None:
    """The newest commit of the newest attempt that has any or, if one resumed since then, what it stands on."""
    for attempt in reversed(story.in_order):
        committed = [save.step for save in attempt.saves.values() if save.committed_at is not None]
        ref = CheckpointRef(max(committed), attempt.id) if committed else attempt.base
        if ref is not None:
            owner = story.attempts.get(ref.attempt)
            save = (owner.saves.get(ref.step) if owner else None) or SaveRecord(ref.step)
            return NewestCheckpoint(ref.step, save.committed_at, save.num_bytes, verified(story).get(ref))
    return None


def interruptions(story: Timeline) -> list[Interruption]:
    """Every end of an attempt that was not the run's, and every group that died before it had claimed."""
    found, ends = [], story.ends
    for attempt, following in story.in_pairs:
        end = ends[attempt.id]
        if not end.is_over or end.cause == "done":
            continue
        base = following.base_step if following and following.start else None
        at = end.at or attempt.heard_at or attempt.claimed_at
        found.append(Interruption(at, str(attempt.id), end.cause, end.rank, end.message, base))
    known = {str(attempt.id) for attempt in story.in_order}
    for _, failure in story.failures:
        if failure.attempt not in known:
            at = failure.noticed_at or failure.t
            found.append(Interruption(at, failure.attempt, failure.cause, failure.rank, failure.message, None))
    return sorted(found, key=lambda item: item.at)
