"""Metrics in people's own tools, such as TensorBoard. Each tool has a thread on rank 0 that follows the run's events.

The journal is the truth, and a tracker a copy of it. So a tracker that fails or is slow never holds training up: what
it cannot take in time is left out, and that is told once. A restart goes on with the same tracker run: what that has
already is not sent again, and what a killed attempt had no time to send is taken from the journal.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, TypeVar

from outlast.checkpointing.errors import ConfigError, StorageError, first_line
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.run_store.journal import read_events
from outlast.checkpointing.run_store.store import RunStore
from outlast.trainers.config.tracking import Name, TrackSettings
from outlast.trainers.tracking.base import TrackedEvent, TrackerBackend, TrackerContext, Watermark

if TYPE_CHECKING:
    from outlast.checkpointing.checkpointer import Checkpointer

T = TypeVar("T")

QUEUE_EVENTS = 10_000
CLOSE_S = 10.0
_PAUSE_S, _LONGEST_PAUSE_S = 2.0, 60.0
_MODULES = {"tensorboard": ("tensorboard", "tensorboardX"), "mlflow": ("mlflow",), "wandb": ("wandb",)}


def is_installed(name: str) -> bool:
    """Whether a tracker can be used here."""
    return any(find_spec(module) is not None for module in _MODULES[name])


def check_trackers(settings: TrackSettings) -> None:
    """Raises ConfigError if a tracker that was asked for is not installed."""
    for name in settings.to or ():
        if not is_installed(name):
            hint = f"pip install 'outlast[{name}]', here and on the workers"
            raise ConfigError(f"track.to names {name}, which is not installed", hint=hint)


def values_of(event: TrackedEvent) -> dict[str, float]:
    """What an event tells in numbers, by name; nothing for one that tells of other things."""
    found: dict[str, float | None] = {}
    match event["event"]:
        case "step":
            found = {f"train/{name}": event[name] for name in ("loss", "lr", "grad_norm")}
            num_tokens = event.get("tokens", event["count"])  # targets, where the journal does not count tokens
            found["train/tokens_per_s"] = num_tokens / event["seconds"] if event["seconds"] else None
        case "eval":
            names = [name for name in event if name.startswith("eval_")]
            found = {f"eval/{name.removeprefix('eval_')}": event[name] for name in names}
        case "save":
            found = {"save/waited_s": event["blocked_s"], "save/commit_s": event["commit_s"]}
    return {name: float(value) for name, value in found.items() if value is not None}


class _BackendUnavailable(Exception):
    """The attempt has ended, or the tracker can never work here."""


class Follower:
    """One tracker's thread. Events wait in its queue until the first step is done, lest that waits for imports.

    Args:
        sink: Makes the tracker, in the thread.
        past: Events of earlier attempts that the run stands on, given the newest step that the tracker has.
        tell: Tells people something, once.
    """

    def __init__(
        self,
        sink: Callable[[], TrackerBackend],
        past: Callable[[int], Iterable[TrackedEvent]],
        tell: Callable[[str], None],
    ) -> None:
        self._make, self._past, self._tell = sink, past, tell
        self._queue: queue.Queue[TrackedEvent | None] = queue.Queue(QUEUE_EVENTS)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._closing = threading.Event()
        self._told = False
        self._is_behind = False
        self._step = 0

    def apply(self, event: TrackedEvent) -> None:
        """Takes an event; returns at once."""
        if self._thread.ident is not None and not self._thread.is_alive():
            return  # it has given up, and has said so
        try:
            self._queue.put_nowait(event)
        except queue.Full:
            if not self._is_behind:
                self._is_behind = True
                self._tell(f"too slow or down; from step {event.get('step')} on it lacks what its queue cannot hold")
        if event["event"] == "under-way":
            self.start()

    def start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def close(self, deadline: float) -> None:
        """Lets the tracker take what is in the queue, until `deadline` (of `time.monotonic`)."""
        self.start()
        self._closing.set()
        with suppress(queue.Full):
            self._queue.put(None, timeout=max(0.0, deadline - time.monotonic()))
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._tell("has not taken everything in time; the journal has it all")

    def _run(self) -> None:
        with suppress(_BackendUnavailable):
            sink = self._patiently(self._make)
            seen = self._patiently(sink.open)
            newest = seen.by_name.get("train/loss", seen.floor)
            for event in self._patiently(lambda: list(self._past(newest))):
                self._send(sink, seen, event)
            while (event_or_end := self._queue.get()) is not None:
                self._send(sink, seen, event_or_end)
            self._patiently(sink.close)

    def _send(self, sink: TrackerBackend, seen: Watermark, event: TrackedEvent) -> None:
        if event["event"] == "step":
            self._step = event["step"]
        step = self._step if event["event"] == "save" else int(event.get("step", 0))  # a save ends steps later
        if fresh := seen.news(values_of(event), step):
            self._patiently(lambda: sink.log(fresh, step, float(event.get("ended_at", event["t"]))))

    def _patiently(self, act: Callable[[], T]) -> T:
        """Tries again, after longer and longer pauses, for as long as the attempt lasts."""
        pause_s = _PAUSE_S
        while True:
            try:
                return act()
            except Exception as error:  # whatever a tracker raises, training goes on
                if not self._told:
                    self._told = True
                    self._tell(f"{type(error).__name__}: {first_line(error)}")
                if isinstance(error, ImportError | ConfigError) or self._closing.wait(pause_s):
                    raise _BackendUnavailable from error
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


class Tracking:
    """The trackers of an attempt. A context: when it is left without an error, they get a while to take the rest.

    After an error nobody waits for them: the next attempt sends what is missing.
    """

    def __init__(self) -> None:
        self.followers: list[Follower] = []
        self.base: int | None = None  #: the step that the attempt goes on from, once that is known

    def apply(self, event: TrackedEvent) -> None:
        """Takes an event of rank 0; returns at once."""
        if event["event"] in ("start", "resume"):
            self.base = int(event.get("step", 0))
        if event["event"] in ("step", "eval", "save", "under-way"):
            for follower in self.followers:
                follower.apply({"t": time.time(), **event})

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
) -> Tracking:
    """The trackers that the settings ask for; none on ranks other than 0.

    Args:
        settings: Which.
        checkpointer: Holds the claim.
        declared: The run's settings as written, flat.
        progress: Whom to tell what goes wrong, beside the journal.
    """
    tracking, journal = Tracking(), checkpointer.journal
    if journal is None:
        return tracking
    store, attempt = checkpointer.store, checkpointer.attempt

    def make(name: Name) -> TrackerBackend:
        from outlast.trainers.tracking.backends import BACKENDS  # brings accelerate

        first = list_attempts(store)[0]  # never deleted
        options = settings.options.get(name, {})
        return BACKENDS[name](TrackerContext(store, f"{store.run}-{first.nonce}", declared, settings.project, options))

    def tell(name: Name, text: str) -> None:
        with suppress(StorageError):
            journal.event("tracker", name=name, message=text)
        progress({"event": "note", "text": f"{name}: {text}"})

    def past(newest: int) -> Iterator[TrackedEvent]:
        assert tracking.base is not None
        return past_events(store, attempt, tracking.base, newest)

    wanted: list[Name] = ["tensorboard"] if is_installed("tensorboard") else []
    for name in wanted if settings.to is None else settings.to:
        tracking.followers.append(Follower(partial(make, name), past, partial(tell, name)))
    return tracking


def past_events(store: RunStore, attempt: AttemptId, base: int, newest: int) -> Iterator[TrackedEvent]:
    """What earlier attempts told of the steps that an attempt stands on, oldest first, each step once.

    Args:
        store: The run.
        attempt: The attempt.
        base: The step that it goes on from.
        newest: Of steps before this one nothing is wanted.
    """
    parts: list[list[TrackedEvent]] = []
    for lower in reversed([item for item in list_attempts(store) if item < attempt]):
        begin: int | None = None
        part: list[TrackedEvent] = []
        for event in read_events(store, store.attempt_dir(lower)):  # never all of it at once: it may be long
            if begin is None and event["event"] in ("start", "resume"):
                begin = int(event.get("step", -1))
            elif begin is not None and max(begin + 1, newest) <= event.get("step", -1) <= base:
                part.append(event)
        if begin is None:
            continue
        parts.append(part)
        base = min(base, begin)
        if base <= newest:
            break
    return (event for part in reversed(parts) for event in part)
