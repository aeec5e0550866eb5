"""What a report says of a run, as plain JSON: series thinned to what a screen can show, tables, the account of time.

Pure but for numpy. However long a run was, what comes out has about the same size: of each stretch of a series the
least and the greatest value stay, so that no spike is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import isfinite, nan
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import yaml

from outlast.checkpointing.format.layout import CheckpointRef
from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.run_store import events
from outlast.checkpointing.run_store.attempt_history import AttemptEnd
from outlast.checkpointing.run_store.catalog import Catalog
from outlast.checkpointing.tools.verify_run import VerificationResult
from outlast.cluster.monitoring.goodput import GoodputReport, TimeCategory, TimeSpan
from outlast.cluster.monitoring.run_summary import RunSummary, interruptions, verified
from outlast.cluster.monitoring.timeline import Timeline
from outlast.cluster.monitoring.timeline_records import AttemptTimeline, EvaluationRecord, NoteworthyEvent

MOST_POINTS = 2000
MOST_EVALS = 600
MOST_SPANS = 1200
MOST_ROWS = 500
MOST_FILES = 200

T = TypeVar("T")
Numbers = npt.NDArray[np.float64]


def thin(values: Numbers, most: int = MOST_POINTS) -> npt.NDArray[np.int64]:
    """Indices of about `most` of the values: the ends, and of so many neighbours each the least and the greatest."""
    if len(values) <= most:
        return np.arange(len(values))
    bounds = np.linspace(0, len(values), max(1, most // 2 - 1) + 1).astype(np.int64)
    kept = {
        int(begin + index)
        for begin, end in pairwise(bounds)
        for index in (np.argmin(values[begin:end]), np.argmax(values[begin:end]))
    }
    return np.array(sorted(kept | {0, len(values) - 1}))


def rounded(values: Iterable[float], digits: int = 6) -> list[float]:
    """So many figures of each: a page has no use for more."""
    return [float(f"{value:.{digits}g}") for value in values]


def page_data(
    story: Timeline,
    seen: RunSummary,
    catalogue: Catalog | None,
    pinned: set[CheckpointRef],
    verdicts: Sequence[VerificationResult] | None,
    names: Mapping[CheckpointRef, str],
) -> dict[str, Any]:
    """Everything that the page shows.

    Args:
        story: The run.
        seen: The same at a glance.
        catalogue: Its checkpoints; None for a run that nobody has claimed yet.
        pinned: Those that are pinned.
        verdicts: What reading every byte found just now; None if nobody did.
        names: Where each checkpoint lies.
    """
    ledger, attempts = seen.ledger, story.in_order
    begin = ledger.spans[0].begin if ledger.spans else attempts[0].claimed_at if attempts else seen.now
    return {
        **_glance(seen),
        "begin": begin,
        "by_step": _by_step(attempts),
        "by_time": _by_time(story, begin),
        "speed": _speed(story, begin),
        "workers": _workers(story, begin, seen.now),
        "marks": list(_marks(story, begin)),
        "redone": {"steps": _redone_steps(story), "time": _redone_time(ledger, begin)},
        "kinds": [
            {"name": kind.words, "meaning": kind.meaning, "seconds": ledger.seconds[kind] if ledger.spans else 0.0}
            for kind in TimeCategory
        ],
        "spans": _spans(ledger, begin),
        **_attempts(story),
        "checkpoints": _checkpoints(story, catalogue, pinned, verdicts, names),
        "is_verified": verdicts is not None,
        "settings": _settings(attempts),
        "changes": list(_changes(attempts))[-MOST_ROWS:],
    }


def _glance(seen: RunSummary) -> dict[str, Any]:
    return {
        "run": seen.run,
        "now": seen.now,
        "state": seen.state.value,
        "is_live": seen.state.is_live,
        "attempt": seen.attempt,
        "world_size": seen.world_size,
        "step": seen.step,
        "num_steps": seen.num_steps,
        "left_s": seen.left_s,
        "loss": seen.loss,
        "lr": seen.lr,
        "scores": dict(seen.scores),
        "tokens_per_s": seen.tokens_per_s,
        "samples_per_s": seen.samples_per_s,
        "seconds_per_step": seen.seconds_per_step,
        "num_lost": seen.num_lost,
        "goodput": seen.ledger.goodput,
        "wall_s": seen.ledger.wall_s,
        "save": {"commit_s": seen.save.commit_s, "blocked_s": seen.save.blocked_s} if seen.save else None,
    }


# -- series ------------------------------------------------------------------------------------------------------------


def _column(values: Any) -> Numbers:
    return np.array(values, dtype=np.float64)


def _thinned(items: Sequence[T], value: Callable[[T], float]) -> list[T]:
    return [items[index] for index in thin(_column([value(item) for item in items]), MOST_EVALS)]


def _eval_losses(attempts: Iterable[AttemptTimeline]) -> Iterator[tuple[EvaluationRecord, float]]:
    """Each evaluation whose loss is finite."""
    for found in (found for item in attempts for found in item.evaluations):
        if isfinite(loss := found.scores.get("eval_loss", nan)):
            yield found, loss


def _by_step(attempts: Sequence[AttemptTimeline]) -> dict[str, Any]:
    """The loss and the learning rate of each step, as it was made last; and the evaluations."""
    numbers = np.concatenate([_column(item.steps.number) for item in attempts] or [_column([])])
    columns = {
        name: np.concatenate([_column(getattr(item.steps, name)) for item in attempts] or [_column([])])
        for name in ("loss", "lr")
    }
    _, last = np.unique(numbers[::-1], return_index=True)
    order = len(numbers) - 1 - last
    order = order[np.isfinite(columns["loss"][order])]
    kept = order[thin(columns["loss"][order])]
    evals = {found.step: loss for found, loss in _eval_losses(attempts)}
    scored = _thinned(sorted(evals), evals.__getitem__)
    return {
        "x": [int(number) for number in numbers[kept]],
        "loss": rounded(columns["loss"][kept]),
        "lr": rounded(np.nan_to_num(columns["lr"][kept]), 4),
        "eval": {"x": scored, "loss": rounded(evals[step] for step in scored)},
    }


def _in_time(story: Timeline) -> Iterator[tuple[AttemptTimeline, slice]]:
    """Each attempt with those of its steps that were made before the next one claimed."""
    for attempt, following in story.in_pairs:
        ended = _column(attempt.steps.ended_at)
        end = len(ended) if following is None else int(np.searchsorted(ended, following.claimed_at))
        if end:
            yield attempt, slice(0, end)


def _by_time(story: Timeline, begin: float) -> dict[str, Any]:
    """The loss by seconds since the beginning; null between two attempts."""
    total = sum(len(item.steps) for item in story.in_order) or 1
    x: list[float] = []
    loss: list[float | None] = []
    step: list[int] = []
    for attempt, mine in _in_time(story):
        losses, at = _column(attempt.steps.loss)[mine], _column(attempt.steps.ended_at)[mine] - begin
        finite = np.flatnonzero(np.isfinite(losses))
        kept = finite[thin(losses[finite], max(16, MOST_POINTS * len(finite) // total))]
        if x and len(kept):
            x.append(x[-1])
            loss.append(None)
            step.append(step[-1])
        x += np.maximum(at[kept], x[-1] if x else 0.0).round(2).tolist()
        loss += rounded(losses[kept])
        step += [int(number) for number in np.array(attempt.steps.number)[mine][kept]]
    scores = sorted((max(0.0, found.ended_at - begin), loss) for found, loss in _eval_losses(story.in_order))
    evals = _thinned(scores, lambda score: score[1])
    return {
        "x": x,
        "loss": loss,
        "step": step,
        "eval": {"x": [round(at, 2) for at, _ in evals], "loss": rounded(value for _, value in evals)},
    }


def _speed(story: Timeline, begin: float) -> dict[str, Any]:
    """Tokens in a second, or steps where nobody counts tokens: the mean of each stretch."""
    total = sum(len(item.steps) for item in story.in_order) or 1
    tells_tokens = any(any(item.steps.tokens[-64:]) for item in story.in_order)
    x: list[float] = []
    y: list[float | None] = []
    for attempt, mine in _in_time(story):
        at, seconds = _column(attempt.steps.ended_at)[mine] - begin, _column(attempt.steps.seconds)[mine]
        amount = _column(attempt.steps.tokens)[mine] if tells_tokens else np.ones(len(at))
        parts = max(1, min(len(at), max(8, 400 * len(at) // total)))
        bounds = np.linspace(0, len(at), parts + 1).astype(np.int64)
        if x:
            x.append(x[-1])
            y.append(None)
        for first, end in pairwise(bounds):
            spent = seconds[first:end].sum()
            x.append(max(round(float(at[end - 1]), 2), x[-1] if x else 0.0))
            y.append(float(f"{amount[first:end].sum() / spent:.4g}") if spent > 0 else None)
    return {"x": x, "y": y, "unit": "tokens/s" if tells_tokens else "steps/s"}


def _workers(story: Timeline, begin: float, now: float) -> dict[str, Any]:
    """How many workers were at work, by seconds since the beginning: each value holds until the next."""
    x: list[float] = []
    y: list[int] = []

    def put(at: float, size: int) -> None:
        x.append(max(round(at - begin, 2), x[-1] if x else 0.0))
        y.append(size)

    put(begin, 0)
    ends = story.ends
    for attempt, following in story.in_pairs:
        put(attempt.claimed_at, attempt.world_size or 0)
        end = ends[attempt.id]
        if end.is_over:
            at = end.at or attempt.last_step_at or attempt.heard_at
            put(min(at, following.claimed_at) if following else at, 0)
        else:
            put(now, attempt.world_size or 0)
    return {"x": x, "y": y}


def _marks(story: Timeline, begin: float) -> Iterator[dict[str, Any]]:
    """Where attempts ended, and where the next ones went on."""
    by_name, ends = {str(item.id): item for item in story.in_order}, story.ends
    for item in interruptions(story):
        attempt = by_name.get(item.attempt)
        end = ends[attempt.id] if attempt else None
        yield {
            "kind": "end" if end is not None and end.is_planned else "failure",
            "t": round(item.at - begin, 2),
            "step": attempt.last_step if attempt and attempt.start else None,
            "attempt": item.attempt,
            "cause": item.cause,
            "rank": item.rank,
            "message": item.message[:1000],
        }
    for attempt in story.in_order:
        if attempt.start is not None and attempt.base is not None:
            at, said = round(attempt.start.t - begin, 2), f"attempt {attempt.id.number} goes on"
            yield {"kind": "restore", "t": at, "step": attempt.base_step, "attempt": str(attempt.id), "cause": said}


def _redone_steps(story: Timeline) -> list[list[int]]:
    """Ranges of steps that were made more than once."""
    ranges: list[list[int]] = []
    position = 0
    for attempt, following in story.in_pairs:
        if attempt.start is None:
            continue
        if position > attempt.base_step:
            ranges.append([attempt.base_step, position])
        position = attempt.last_step_by(following.claimed_at) if following else attempt.last_step
    return ranges[-MOST_ROWS:]


def _redone_time(ledger: GoodputReport, begin: float) -> list[list[float]]:
    found = [span for span in ledger.spans if span.kind is TimeCategory.REDO]
    return [[round(span.begin - begin, 2), round(span.end - begin, 2)] for span in found[-MOST_ROWS:]]


def _spans(ledger: GoodputReport, begin: float) -> list[list[float]]:
    """The time line: from when to when, and which kind. In long ones what is too short to be seen is left out."""
    spans: Sequence[TimeSpan] = ledger.spans
    if len(spans) > MOST_SPANS:
        spans = _coarse(ledger)
    kinds = list(TimeCategory)
    return [[round(span.begin - begin, 2), round(span.end - begin, 2), kinds.index(span.kind)] for span in spans]


def _coarse(ledger: GoodputReport) -> list[TimeSpan]:
    """The time line in equal parts, each of the kind that has most of it; neighbours of a kind are one."""
    first, width = ledger.spans[0].begin, ledger.wall_s / MOST_SPANS
    shares = np.zeros((MOST_SPANS, len(TimeCategory)))
    kinds = list(TimeCategory)
    for span in ledger.spans:
        begin, end = (span.begin - first) / width, (span.end - first) / width
        for part in range(int(begin), min(MOST_SPANS, int(end) + 1)):
            shares[part, kinds.index(span.kind)] += max(0.0, min(end, part + 1) - max(begin, part))
    most = shares.argmax(axis=1)
    cuts = [0, *(np.flatnonzero(np.diff(most)) + 1), MOST_SPANS]
    return [TimeSpan(first + a * width, first + b * width, kinds[most[a]]) for a, b in pairwise(cuts)]


# -- tables ------------------------------------------------------------------------------------------------------------


def _attempts(story: Timeline) -> dict[str, Any]:
    """The newest attempts, and what they said."""
    attempts, ends = story.in_order, story.ends
    rows = [_attempt_row(item, ends[item.id]) for item in attempts[-MOST_ROWS:]]
    notes = [_note(item, note) for item in attempts for note in item.notes if _is_news(note, ends[item.id])]
    return {"attempts": rows, "notes": notes[-MOST_ROWS:]}


def _attempt_row(attempt: AttemptTimeline, end: AttemptEnd) -> dict[str, Any]:
    claim = attempt.claim
    made = (attempt.steps.number[0], attempt.steps.number[-1]) if attempt.steps else None
    return {
        "number": attempt.id.number,
        "id": str(attempt.id),
        "launch": attempt.launch,
        "claimed_at": attempt.claimed_at,
        "ended_at": (end.at or attempt.last_step_at or attempt.heard_at) if end.is_over else None,
        "hosts": sorted({str(worker.get("host", "")) for worker in claim.get("workers", [])}),
        "world_size": attempt.world_size,
        "device": claim.get("device"),
        "parallel": claim.get("parallel"),
        "versions": claim.get("versions", {}),
        "from": attempt.base_step if attempt.base else None,
        "has_begun": attempt.start is not None,
        "steps": made,
        "cause": end.cause,
        "is_planned": end.is_planned,
        "message": end.message[:1000],
        "where": end.where,
    }


def _checkpoints(
    story: Timeline,
    catalogue: Catalog | None,
    pinned: set[CheckpointRef],
    verdicts: Sequence[VerificationResult] | None,
    names: Mapping[CheckpointRef, str],
) -> dict[str, Any]:
    """Those that count, newest first, with what is known of their bytes; those that do not; how many there were."""
    if catalogue is None:
        return {"rows": [], "num_committed": 0}
    resumed = verified(story)
    found = {verdict.path: verdict for verdict in verdicts or ()}
    rows = [
        {**_row(item, item.ref in pinned), **_health(found.get(names[item.ref]), resumed.get(item.ref))}
        for item in catalogue.accepted
    ]
    for item in catalogue.rejected:
        rows.append({"step": item.ref.step, "attempt": str(item.ref.attempt), "health": "damaged"})
        rows[-1]["said"] = "; ".join(item.reasons)
    committed = sum(save.committed_at is not None for attempt in story.in_order for save in attempt.saves.values())
    return {"rows": rows[:MOST_ROWS], "num_committed": committed}


def _row(manifest: Manifest, pinned: bool) -> dict[str, Any]:
    files = [{"path": entry.path, "bytes": entry.num_bytes, "xxh3_128": entry.xxh3_128} for entry in manifest.files]
    return {
        "step": manifest.ref.step,
        "attempt": str(manifest.ref.attempt),
        "committed_at": manifest.committed_at,
        "bytes": manifest.num_bytes,
        "digest": manifest.digest,
        "metrics": dict(manifest.metrics),
        "pinned": pinned,
        "files": files[:MOST_FILES],
        "num_files": len(files),
    }


def _health(verdict: VerificationResult | None, resumed_at: float | None) -> dict[str, Any]:
    """What is known of a checkpoint's bytes, and since when."""
    if verdict is not None:
        said = "; ".join(verdict.faults) or "every byte was read for this report"
        return {"health": "damaged" if verdict.faults else "whole", "said": said}
    if resumed_at is not None:
        return {"health": "whole", "said": "every byte was read when an attempt resumed from it", "at": resumed_at}
    return {"health": "unread", "said": "digests were computed while it was written; nobody has read it back yet"}


def _settings(attempts: Sequence[AttemptTimeline]) -> str:
    """The newest settings, as a run file has them."""
    found = next((item.claim["settings"] for item in reversed(attempts) if item.claim.get("settings")), None)
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True) if found else ""


def _changes(attempts: Sequence[AttemptTimeline]) -> Iterator[dict[str, Any]]:
    """What differs between one attempt's settings and surroundings and the next one's."""
    for before, now in pairwise(item for item in attempts if item.claim.get("settings") is not None):
        old, new = _surroundings(before), _surroundings(now)
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                yield {"attempt": now.id.number, "key": key, "before": old.get(key), "now": new.get(key)}


def _surroundings(attempt: AttemptTimeline) -> dict[str, Any]:
    claim = attempt.claim
    kept = {key: claim.get(key) for key in ("world_size", "device", "parallel", "num_threads", "data", "versions")}
    kept["hosts"] = ", ".join(sorted({str(worker.get("host", "")) for worker in claim.get("workers", [])}))
    return dict(_flat({**kept, **claim["settings"]}))


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}".strip("."))
    else:
        yield prefix, value


def _is_news(note: NoteworthyEvent, end: AttemptEnd) -> bool:
    """Whether it says more than how the attempt ended: the error of a rank that only lost the others does not."""
    return not isinstance(note, events.AttemptErrorEvent) or not end.message


def _note(attempt: AttemptTimeline, note: NoteworthyEvent) -> dict[str, Any]:
    """Something that an attempt said, in words."""
    match note:
        case events.ChangedEvent():
            text = f"{note.what} changed from {note.before} to {note.now}"
        case events.HangEvent():
            text = f"rank {note.rank} gave up waiting for rank {', '.join(map(str, note.missing))}"
        case events.ModelRejectedEvent():
            text = f"{note.checkpoint}: {'; '.join(note.reasons)}"
        case events.EarlyStopEvent():
            text = f"stopped early: {note.reason}"
        case events.NonFiniteEvent():
            text = note.message
        case events.SaveFailedEvent() | events.AttemptErrorEvent():
            text = note.error
    return {"t": note.t, "attempt": attempt.id.number, "event": note.kind, "text": text[:1000]}
