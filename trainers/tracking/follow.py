"""Experiment tracking: on rank 0, one thread for each tracker sends the run's events to it.

The journal is the source of truth, a tracker is a copy. So a tracker that fails or is slow must never delay training:
what it cannot take in time is dropped, and that is reported once. A restart continues the same tracker run: steps that
it has are not sent again, and steps that a killed attempt did not send are taken from the journal. Where rank 0's
process goes on in another attempt, so do its trackers.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from outlast.checkpointing.error_hints import first_line
from outlast.checkpointing.errors import ConfigError, StorageError
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store import events
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.run_store.journal import read_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.retry import call_with_retries
from outlast.trainers.config.tracking import Name, TrackSettings

if TYPE_CHECKING:
    from outlast.checkpointing.checkpointer import Checkpointer
    from outlast.checkpointing.run_store.journal import Journal
    from outlast.trainers.tracking.backends import TrackerBackend, Watermark

T = TypeVar("T")
TrackedEvent = events.StepEvent | events.EvalEvent | events.SaveEvent | events.UnderWayEvent

QUEUE_EVENTS = 10_000
CLOSE_S = 10.0
_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0
_MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow",), "wandb": ("wandb",)}


def is_installed(name: str) -> bool:
    """Check whether a tracker is installed here."""
    return any(find_spec(module) is not None for module in _MODULES[name])


def check_trackers(settings: TrackSettings) -> None:
    """Raise ConfigError if a tracker that the settings name is not installed."""
    for name in settings.to or ():
        if not is_installed(name):
            hint = f"pip install 'outlast[{name}]', here and on the workers"
            raise ConfigError(f"track.to names {name}, which is not installed", hint=hint)


def metric_values(event: TrackedEvent) -> dict[str, float]:
    """Return the metrics of an event by name; an empty dict for an event without metrics."""
    values: dict[str, float | None] = {}
    match event:
        case events.StepEvent():
            values = {"train/loss": event.loss, "train/lr": event.lr, "train/grad_norm": event.grad_norm}
            values["train/tokens_per_s"] = event.num_tokens / event.seconds if event.seconds else None
        case events.EvalEvent():
            values = {f"eval/{name.removeprefix('eval_')}": value for name, value in event.scores.items()}
        case events.SaveEvent():
            values = {"save/waited_s": event.blocked_s, "save/commit_s": event.commit_s}
    return {name: float(value) for name, value in values.items() if value is not None}


class _BackendUnavailable(Exception):
    """The attempt has ended, or the tracker cannot work here at all."""


@dataclass(eq=False)
class Follower:
    """The thread of one tracker. It starts after the first step, which must not wait for the tracker's imports."""

    make_backend: Callable[[], TrackerBackend]  #: called in the thread
    #: Returns events of earlier attempts that the run builds on, given the newest step that the tracker has.
    past: Callable[[int], Iterable[TrackedEvent]]
    report: Callable[[str], None]  #: reports a problem to the user

    def __post_init__(self) -> None:
        self._queue: queue.Queue[TrackedEvent | None] = queue.Queue(QUEUE_EVENTS)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._closing = threading.Event()
        self._error_reported = False
        self._is_dropping = False
        self._step = 0

    def apply(self, event: TrackedEvent) -> None:
        """Queue an event without blocking."""
        if self._thread.ident is not None and not self._thread.is_alive():
            return  # the thread has given up, and has reported it
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            if not self._is_dropping:
                self._is_dropping = True
                self.report(f"too slow or unreachable: its queue is full, steps from {event.step} on are dropped")
        if isinstance(event, events.UnderWayEvent):
            self.start()

    def start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def close(self, deadline: float) -> None:
        """Wait until the tracker has the queued events, at most until `deadline` (of `time.monotonic`)."""
        self.start()
        self._closing.set()
        with suppress(queue.Full):
            self._queue.put(None, timeout=max(0.0, deadline - time.monotonic()))
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self.report("did not take all events in time; the journal has all of them")

    def _run(self) -> None:
        with suppress(_BackendUnavailable):
            backend = self._retry(self.make_backend)
            watermark = self._retry(backend.open)
            newest = watermark.by_name.get("train/loss", watermark.floor)
            for event in self._retry(lambda: list(self.past(newest))):
                self._send(backend, watermark, event)
            while (event_or_end := self._queue.get()) is not None:
                self._send(backend, watermark, event_or_end)
            self._retry(backend.close)

    def _send(self, backend: TrackerBackend, watermark: Watermark, event: TrackedEvent) -> None:
        if isinstance(event, events.StepEvent):
            self._step = event.step
        # A save ends some steps after its own step.
        step = self._step if isinstance(event, events.SaveEvent) else event.step
        at = (event.ended_at if isinstance(event, events.StepEvent) else None) or event.t
        if fresh := watermark.news(metric_values(event), step):
            self._retry(lambda: backend.log(fresh, step, at))

    def _retry(self, action: Callable[[], T]) -> T:
        """Retry an action with increasing pauses until the attempt ends."""
        try:
            return call_with_retries(action, self._pauses(), self._is_transient)
        except Exception as error:  # training continues, whatever a tracker raises
            raise _BackendUnavailable from error

    def _is_transient(self, error: Exception) -> bool:
        if not self._error_reported:
            self._error_reported = True
            self.report(f"{type(error).__name__}: {first_line(error)}")
        return not isinstance(error, ImportError | ConfigError)

    def _pauses(self) -> Iterator[float]:
        pause_s = _PAUSE_S
        while not self._closing.wait(pause_s):
            yield 0.0
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


class Tracking:
    """The trackers of an attempt. A context: on exit without an error it waits a while for them to send the rest.

    After an error it does not wait: the next attempt sends what is missing.
    """

    def __init__(self, journal: Journal | None) -> None:
        self.followers: list[Follower] = []
        self.journal = journal  #: of the newest attempt
        self.base: int | None = None  #: the step that this process' first attempt begins with, once known

    def apply(self, body: Mapping[str, Any]) -> None:
        """Queue an event of rank 0 for all trackers, without blocking."""
        event = events.parse_event({"t": time.time(), **body})
        if isinstance(event, events.StartEvent | events.ResumeEvent | events.RegroupedEvent) and self.base is None:
            self.base = event.step
        if isinstance(event, TrackedEvent):
            for follower in self.followers:
                follower.apply(event)

    def __enter__(self) -> Tracking:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None and self.base is not None:
            deadline = time.monotonic() + CLOSE_S
            for follower in self.followers:
                follower.close(deadline)


def follow(
    settings: TrackSettings,
    checkpointer: Checkpointer,
    declared: Mapping[str, Any],
    progress: Callable[[dict[str, Any]], None],
    before: Tracking | None = None,
) -> Tracking:
    """Create the trackers of the settings; none on ranks other than 0.

    `declared` are the run's settings as written, flattened; `progress` receives notes about problems, besides the
    journal; `before` are those of the attempt that this process continues in memory.
    """
    if before is not None and before.journal is not None and checkpointer.journal is not None:
        before.journal = checkpointer.journal
        return before
    tracking = Tracking(checkpointer.journal)
    if tracking.journal is None:
        return tracking
    store, attempt = checkpointer.store, checkpointer.attempt

    def make(name: Name) -> TrackerBackend:
        from outlast.trainers.tracking.backends import BACKENDS, TrackerContext  # imports accelerate

        first = list_attempts(store)[0]  # never deleted
        options = settings.options.get(name, {})
        return BACKENDS[name](TrackerContext(store, f"{store.run}-{first.nonce}", declared, settings.project, options))

    def report(name: Name, text: str) -> None:
        assert tracking.journal is not None
        with suppress(StorageError):
            tracking.journal.write(events.TrackerEvent(name=name, message=text))
        progress(events.NoteEvent(text=f"{name}: {text}").to_json())

    def past(newest: int) -> Iterator[TrackedEvent]:
        assert tracking.base is not None
        return past_events(store, attempt, tracking.base, newest)

    default: list[Name] = ["tensorboard"] if is_installed("tensorboard") else []
    for name in default if settings.to is None else settings.to:
        tracking.followers.append(Follower(partial(make, name), past, partial(report, name)))
    return tracking


def past_events(store: RunStore, attempt: AttemptId, base: int, newest: int) -> Iterator[TrackedEvent]:
    """Return the events of earlier attempts for the steps that an attempt builds on, oldest first, each step once.

    `base` is the step that the attempt resumes from; steps before `newest` are left out.
    """
    by_attempt: list[list[TrackedEvent]] = []
    for lower in reversed([item for item in list_attempts(store) if item < attempt]):
        begin: int | None = None
        first = 0
        tracked: list[TrackedEvent] = []
        for body in read_events(store, store.attempt_dir(lower)):  # a journal may be long: never load all of it
            step = body.get("step")
            if begin is None:
                match events.parse_event(body):
                    case events.StartEvent():
                        begin = -1
                    case events.ResumeEvent(step=base_step):
                        begin, first = base_step, base_step + 1
                    case events.RegroupedEvent(step=base_step):
                        begin = base_step  # before it, what a lost rank 0 left out
            elif isinstance(step, int) and max(first, newest) <= step <= base:
                event = events.parse_event(body)
                tracked += [event] if isinstance(event, TrackedEvent) else []
        if begin is None:
            continue
        by_attempt.append(tracked)
        base = min(base, begin)
        if base <= newest:
            break
    return (event for events in reversed(by_attempt) for event in events)
