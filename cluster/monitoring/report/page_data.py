"""The values that a report shows, as plain JSON: thinned series, tables, the wall time by category.

Pure apart from numpy. The size of the result hardly depends on the length of the run: of each stretch of a series, the
smallest and the largest value remain, so that no spike is lost.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from math import inf, isfinite, nan
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import yaml

from outlast.checkpointing.format.layout import AttemptId, CheckpointRef
from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.run_store import events
from outlast.checkpointing.run_store.attempt_history import REGROUPED, AttemptEnd
from outlast.checkpointing.run_store.catalog import Catalog
from outlast.checkpointing.tools.query import VerificationResult
from outlast.cluster.formatting import duration
from outlast.cluster.monitoring.goodput import GoodputReport, TimeCategory, TimeSpan
from outlast.cluster.monitoring.regroupings import Regrouping
from outlast.cluster.monitoring.status import RunSnapshot, verified_checkpoints
from outlast.cluster.monitoring.timeline import Timeline
from outlast.cluster.monitoring.timeline_records import AttemptTimeline, NoteworthyEvent

MAX_POINTS = 2000
MAX_EVALUATIONS = 600
MAX_SCORES = 6
MAX_SPANS = 1200
MAX_ROWS = 500
MAX_FILES = 200

T = TypeVar("T")
Numbers = npt.NDArray[np.float64]


def thin(values: Numbers, limit: int = MAX_POINTS) -> npt.NDArray[np.int64]:
    """Return the indices of about `limit` values: both ends, and the extremes of each of equal stretches."""
    if len(values) <= limit:
        return np.arange(len(values))
    bounds = np.linspace(0, len(values), max(1, limit // 2 - 1) + 1).astype(np.int64)
    kept = {
        int(begin + index)
        for begin, end in pairwise(bounds)
        for index in (np.argmin(values[begin:end]), np.argmax(values[begin:end]))
    }
    return np.array(sorted(kept | {0, len(values) - 1}))


def rounded(values: Iterable[float], digits: int = 6) -> list[float]:
    """Round to significant digits."""
    return [float(f"{value:.{digits}g}") for value in values]


def page_data(
    timeline: Timeline,
    summary: RunSnapshot,
    catalog: Catalog | None,
    pinned: set[CheckpointRef],
    verdicts: Sequence[VerificationResult] | None,
    urls: Mapping[CheckpointRef, str],
) -> dict[str, Any]:
    """Return everything that the page shows.

    `catalog` is None if no worker has claimed the run yet, `verdicts` if reading every byte was not requested.
    """
    report, attempts = summary.goodput, timeline.claimed_attempts
    begin = report.spans[0].begin if report.spans else attempts[0].claimed_at if attempts else summary.now
    save, redo = summary.save, (span for span in report.spans if span.category is TimeCategory.REDO)
    settings = next((item.claim["settings"] for item in reversed(attempts) if item.claim.get("settings")), None)
    redone_time = [[round(span.begin - begin, 2), round(span.end - begin, 2)] for span in redo]
    return {
        **summary.as_values(),
        "now": summary.now,
        "attempt": summary.attempt,
        "num_lost_steps": summary.num_lost_steps,
        "wall_s": report.wall_s,
        "save": {"commit_s": save.commit_s, "blocked_s": save.blocked_s} if save else None,
        "begin": begin,
        "by_step": _by_step(attempts),
        "by_time": _by_time(timeline, begin),
        "scores_by_step": _score_series(attempts),
        "speed": _speed(timeline, begin),
        "workers": _workers(timeline, summary, begin),
        "markers": list(_markers(timeline, summary, begin)),
        "redone": {"steps": timeline.redone_ranges[-MAX_ROWS:], "time": redone_time[-MAX_ROWS:]},
        "categories": [
            {"name": item.label, "description": item.description, "seconds": report.seconds[item]}
            for item in TimeCategory
        ],
        "spans": _spans(report, begin),
        "num_regroupings": len(summary.regroupings),
        "regroupings": [_regrouping_row(item) for item in summary.regroupings[-MAX_ROWS:]],
        **_attempts(timeline),
        "checkpoints": _checkpoints(timeline, catalog, pinned, verdicts, urls),
        "is_verified": verdicts is not None,
        "settings": yaml.safe_dump(settings, sort_keys=False, allow_unicode=True) if settings else "",
        "changes": list(_changes(attempts))[-MAX_ROWS:],
    }


# -- series ------------------------------------------------------------------------------------------------------------


def _column(values: Any) -> Numbers:
    return np.array(values, dtype=np.float64)


def _thinned(items: Sequence[T], value: Callable[[T], float]) -> list[T]:
    return [items[index] for index in thin(_column([value(item) for item in items]), MAX_EVALUATIONS)]


def _rising(seconds: Iterable[float]) -> list[float]:
    """Round to 10 ms, and move what hosts' clocks put before the beginning or before its predecessor."""
    return [float(at) for at in np.maximum.accumulate([0.0, *seconds]).round(2)[1:]]


def _eval_losses(attempts: Iterable[AttemptTimeline]) -> Iterator[tuple[events.EvalEvent, float]]:
    """Yield each evaluation whose loss is finite."""
    for record in (record for item in attempts for record in item.evaluations):
        if isfinite(loss := record.scores.get("eval_loss", nan)):
            yield record, loss


def _score_series(attempts: Sequence[AttemptTimeline]) -> list[dict[str, Any]]:
    """Return each score of the evaluations but the loss by step, each from the newest attempt that measured it."""
    scores: dict[str, dict[int, float]] = {}
    for record in (record for item in attempts for record in item.evaluations):
        for name, value in record.scores.items():
            if name != "eval_loss" and isfinite(value):
                scores.setdefault(name, {})[record.step] = value
    series = []
    for name, values in list(scores.items())[:MAX_SCORES]:
        steps = _thinned(sorted(values), values.__getitem__)
        label = name.removeprefix("eval_").replace("_", " ")
        series.append({"name": label, "x": steps, "y": rounded(values[step] for step in steps)})
    return series


def _by_step(attempts: Sequence[AttemptTimeline]) -> dict[str, Any]:
    """Return loss and learning rate by step, each from the newest attempt that made the step, and the evaluations."""
    numbers, losses, rates = (
        np.concatenate([_column(getattr(item.steps, name)) for item in attempts] or [_column([])])
        for name in ("step", "loss", "lr")
    )
    _, last = np.unique(numbers[::-1], return_index=True)
    order = len(numbers) - 1 - last
    order = order[np.isfinite(losses[order])]
    kept = order[thin(losses[order])]
    evals = {record.step: loss for record, loss in _eval_losses(attempts)}
    scored = _thinned(sorted(evals), evals.__getitem__)
    return {
        "x": [int(number) for number in numbers[kept]],
        "loss": rounded(losses[kept]),
        "lr": rounded(np.nan_to_num(rates[kept]), 4),
        "eval": {"x": scored, "loss": rounded(evals[step] for step in scored)},
    }


def _owned_steps(timeline: Timeline) -> Iterator[tuple[AttemptTimeline, slice]]:
    """Yield each attempt with those of its steps that it completed before the next claim."""
    for attempt, successor in timeline.attempt_pairs:
        ended = _column(attempt.steps.ended_at)
        end = len(ended) if successor is None else int(np.searchsorted(ended, successor.claimed_at))
        if end:
            yield attempt, slice(0, end)


def _by_time(timeline: Timeline, begin: float) -> dict[str, Any]:
    """Return the loss by seconds since the beginning, with a null between two attempts."""
    total = sum(len(item.steps) for item in timeline.claimed_attempts) or 1
    x: list[float] = []
    loss: list[float | None] = []
    step: list[int] = []
    for attempt, owned in _owned_steps(timeline):
        losses, at = _column(attempt.steps.loss)[owned], _column(attempt.steps.ended_at)[owned] - begin
        finite = np.flatnonzero(np.isfinite(losses))
        kept = finite[thin(losses[finite], max(16, MAX_POINTS * len(finite) // total))]
        if x and len(kept):
            x, loss, step = [*x, x[-1]], [*loss, None], [*step, step[-1]]
        x += at[kept].tolist()
        loss += rounded(losses[kept])
        step += [int(number) for number in np.array(attempt.steps.step)[owned][kept]]
    evaluated = _eval_losses(timeline.claimed_attempts)
    evals = _thinned(sorted((record.t - begin, value) for record, value in evaluated), lambda score: score[1])
    scores = {"x": _rising(at for at, _ in evals), "loss": rounded(value for _, value in evals)}
    return {"x": _rising(x), "loss": loss, "step": step, "eval": scores}


def _speed(timeline: Timeline, begin: float) -> dict[str, Any]:
    """Return mean tokens per second, or steps per second if tokens are not counted, of stretches of equal length."""
    total = sum(len(item.steps) for item in timeline.claimed_attempts) or 1
    has_tokens = any(any(item.steps.tokens[-64:]) for item in timeline.claimed_attempts)
    x: list[float] = []
    y: list[float | None] = []
    for attempt, owned in _owned_steps(timeline):
        at, seconds = _column(attempt.steps.ended_at)[owned] - begin, _column(attempt.steps.seconds)[owned]
        amount = _column(attempt.steps.tokens)[owned] if has_tokens else np.ones(len(at))
        parts = max(1, min(len(at), max(8, 400 * len(at) // total)))
        bounds = np.linspace(0, len(at), parts + 1).astype(np.int64)
        if x:
            x, y = [*x, x[-1]], [*y, None]
        for first, end in pairwise(bounds):
            spent = seconds[first:end].sum()
            x.append(float(at[end - 1]))
            y.append(float(f"{amount[first:end].sum() / spent:.4g}") if spent > 0 else None)
    return {"x": _rising(x), "y": y, "unit": "tokens/s" if has_tokens else "steps/s"}


def _workers(timeline: Timeline, summary: RunSnapshot, begin: float) -> dict[str, Any]:
    """Return the number of workers by seconds since the beginning; each value holds until the next."""
    changes, ends = [(begin, 0)], timeline.ends
    lost = {item.before: item.ranks or item.lost for item in summary.regroupings}
    for attempt, successor in timeline.attempt_pairs:
        changes.append((attempt.claimed_at, attempt.world_size or 0))
        ended_at = _ended_at(attempt, ends[attempt.id])
        if ends[attempt.id].cause == REGROUPED:  # the others go on
            num_lost = len(lost.get(str(attempt.id), ()))
            changes.append((ended_at or attempt.claimed_at, max(0, (attempt.world_size or 0) - num_lost)))
        elif ended_at is None:
            changes.append((summary.now, attempt.world_size or 0))
        else:
            changes.append((min(ended_at, successor.claimed_at) if successor else ended_at, 0))
    return {"x": _rising(at - begin for at, _ in changes), "y": [size for _, size in changes]}


def _ended_at(attempt: AttemptTimeline, end: AttemptEnd) -> float | None:
    return (end.at or attempt.last_step_at or attempt.last_seen_at) if end.is_over else None


def _markers(timeline: Timeline, summary: RunSnapshot, begin: float) -> Iterator[dict[str, Any]]:
    """Yield the moments at which attempts ended, went on in memory or resumed."""
    by_name, ends = {str(item.id): item for item in timeline.claimed_attempts}, timeline.ends
    last_steps = {item.id: _last_step(item, after) for item, after in timeline.attempt_pairs}
    for end_of in summary.interruptions:
        attempt = by_name.get(end_of.attempt)
        end = ends[attempt.id] if attempt else None
        yield {
            "kind": "end" if end is not None and end.is_planned else "failure",
            "t": round(end_of.at - begin, 2),
            "step": last_steps[attempt.id] if attempt and attempt.start else None,
            "attempt": end_of.attempt,
            "cause": end_of.cause,
            "rank": end_of.rank,
            "message": end_of.message[:1000],
        }
    for item in summary.regroupings:
        yield {
            "kind": "regroup",
            "t": round(item.at - begin, 2),
            "step": item.step,
            "attempt": item.before,
            "cause": item.description[:1000],
            "message": item.outcome,
        }
    for attempt in timeline.claimed_attempts:
        if attempt.start is not None and attempt.has_resumed:
            at, cause = round(attempt.start.t - begin, 2), f"attempt {attempt.id.number} resumed"
            yield {"kind": "restore", "t": at, "step": attempt.start_step, "attempt": str(attempt.id), "cause": cause}


def _last_step(attempt: AttemptTimeline, successor: AttemptTimeline | None) -> int:
    """Return its last step as the lost steps are counted: with what only the coordinator received."""
    return attempt.last_step_by(successor.claimed_at if successor else inf)


def _spans(report: GoodputReport, begin: float) -> list[list[float]]:
    """Return begin, end and index of the category of each span; of many spans, a coarser version."""
    spans: Sequence[TimeSpan] = report.spans if len(report.spans) <= MAX_SPANS else _coarse(report)
    number = {category: index for index, category in enumerate(TimeCategory)}
    return [[round(span.begin - begin, 2), round(span.end - begin, 2), number[span.category]] for span in spans]


def _coarse(report: GoodputReport) -> list[TimeSpan]:
    """Divide the time into equal parts, each of the category with the largest share, and join equal neighbours."""
    first, width = report.spans[0].begin, report.wall_s / MAX_SPANS
    shares = np.zeros((MAX_SPANS, len(TimeCategory)))
    categories = list(TimeCategory)
    for span in report.spans:
        begin, end = (span.begin - first) / width, (span.end - first) / width
        for part in range(int(begin), min(MAX_SPANS, int(end) + 1)):
            shares[part, categories.index(span.category)] += max(0.0, min(end, part + 1) - max(begin, part))
    most = shares.argmax(axis=1)
    cuts = [0, *(np.flatnonzero(np.diff(most)) + 1), MAX_SPANS]
    return [TimeSpan(first + a * width, first + b * width, categories[most[a]]) for a, b in pairwise(cuts)]


# -- tables ------------------------------------------------------------------------------------------------------------


def _attempts(timeline: Timeline) -> dict[str, Any]:
    """Return the newest attempts and their noteworthy events."""
    attempts, ends = timeline.claimed_attempts, timeline.ends
    rows = [_attempt_row(item, ends[item.id], after) for item, after in timeline.attempt_pairs[-MAX_ROWS:]]
    notes = [
        _note(item, note)
        for item in attempts
        for note in item.notes
        if not isinstance(note, events.AttemptErrorEvent) or not ends[item.id].message  # else the end states the cause
    ]
    return {"attempts": rows, "notes": notes[-MAX_ROWS:]}


def _attempt_row(attempt: AttemptTimeline, end: AttemptEnd, successor: AttemptTimeline | None) -> dict[str, Any]:
    claim = attempt.claim
    last_step = _last_step(attempt, successor)
    made = (attempt.start_step + 1, last_step) if last_step > attempt.start_step else None
    return {
        "number": attempt.id.number,
        "id": str(attempt.id),
        "launch": attempt.launch,
        "claimed_at": attempt.claimed_at,
        "ended_at": _ended_at(attempt, end),
        "hosts": sorted({str(worker.get("host", "")) for worker in claim.get("workers", [])}),
        "world_size": attempt.world_size,
        "device": claim.get("device"),
        "parallel": claim.get("parallel"),
        "versions": claim.get("versions", {}),
        "from": attempt.start_step if attempt.has_resumed else None,
        "has_begun": attempt.start is not None,
        "steps": made,
        "cause": end.cause,
        "is_planned": end.is_planned,
        "is_regrouped": end.cause == REGROUPED,
        "in_memory": attempt.regrouped_from is not None,
        "start_step": attempt.start_step,
        "message": end.message[:1000],
        "where": end.where,
    }


def _regrouping_row(item: Regrouping) -> dict[str, Any]:
    return {
        "number": attempt.number if (attempt := AttemptId.parse(item.attempt)) else 0,
        "at": item.at,
        "description": item.description[:1000],
        "outcome": item.outcome,
        "source": item.source,
        "step": item.step,
        "phases": dict(item.phases),
    }


def _checkpoints(
    timeline: Timeline,
    catalog: Catalog | None,
    pinned: set[CheckpointRef],
    verdicts: Sequence[VerificationResult] | None,
    urls: Mapping[CheckpointRef, str],
) -> dict[str, Any]:
    """Return the valid checkpoints, newest first, then the damaged ones, and the number of commits."""
    if catalog is None:
        return {"rows": [], "num_committed": 0}
    resumed = verified_checkpoints(timeline)
    verdict_by_url = {verdict.path: verdict for verdict in verdicts or ()}
    rows = [
        {**_row(item, item.ref in pinned), **_verification(verdict_by_url.get(urls[item.ref]), resumed.get(item.ref))}
        for item in catalog.accepted
    ]
    for item in catalog.rejected:
        row = {"step": item.ref.step, "attempt": str(item.ref.attempt), "verification": "damaged"}
        rows.append({**row, "detail": "; ".join(item.reasons)})
    for unread in catalog.unread:
        row = {"step": unread.step, "attempt": str(unread.attempt), "verification": "unread"}
        rows.append({**row, "detail": unread.reason})
    saves = [save for attempt in timeline.claimed_attempts for save in attempt.saves.values()]
    return {"rows": rows[:MAX_ROWS], "num_committed": sum(save.committed_at is not None for save in saves)}


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
        "files": files[:MAX_FILES],
        "num_files": len(files),
    }


def _verification(verdict: VerificationResult | None, resumed_at: float | None) -> dict[str, Any]:
    if verdict is not None:
        detail = "; ".join(verdict.faults) or verdict.unread or "every byte was read for this report"
        name = "damaged" if verdict.faults else "unread" if verdict.unread else "verified"
        return {"verification": name, "detail": detail}
    if resumed_at is not None:
        detail = "every byte was read when an attempt resumed from it"
        return {"verification": "verified", "detail": detail, "at": resumed_at}
    return {"verification": "unverified", "detail": "digests were computed during the write; no later read is recorded"}


def _changes(attempts: Sequence[AttemptTimeline]) -> Iterator[dict[str, Any]]:
    """Yield changes of settings and environment between successive attempts."""
    for before, now in pairwise(item for item in attempts if item.claim.get("settings") is not None):
        old, new = _environment(before), _environment(now)
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                yield {"attempt": now.id.number, "key": key, "before": old.get(key), "now": new.get(key)}


def _environment(attempt: AttemptTimeline) -> dict[str, Any]:
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


def _note(attempt: AttemptTimeline, note: NoteworthyEvent) -> dict[str, Any]:
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
        case events.UnsavedEvent():
            newest = "no checkpoint" if note.newest is None else f"step {note.newest} as the newest checkpoint"
            text = f"training went on after {duration(note.unsaved_s)} without a save, with {newest}"
        case events.SaveFailedEvent() | events.DeleteFailedEvent() | events.AttemptErrorEvent():
            text = note.error
    return {"t": note.t, "attempt": attempt.id.number, "event": note.kind, "text": text[:1000]}
