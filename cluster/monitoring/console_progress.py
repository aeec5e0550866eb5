"""What a person sees while a run goes on: a panel at the foot of a terminal, else one plain line every few seconds.

`Reporter` listens to the launch in this process. `watching` reads the run's storage alone, wherever the run may be.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store import events
from outlast.checkpointing.run_store.store import RunStore
from outlast.cluster.formatting import counted
from outlast.cluster.monitoring.run_panel import panel, plain
from outlast.cluster.monitoring.run_summary import RunSummary, summarize
from outlast.cluster.monitoring.terminal_footer import LiveDisplay
from outlast.cluster.monitoring.timeline import Timeline
from outlast.cluster.monitoring.timeline_reader import TimelineReader

PLAIN_PERIOD_S = 10.0
_PHASES = {"data": "preparing data", "ray": "starting workers"}


def terminal() -> Console:
    """Where progress goes."""
    return Console(stderr=True, highlight=False)


def is_live(console: Console) -> bool:
    """Whether lines can change in place there; rich also calls a log a terminal where colours are forced."""
    return console.file.isatty() and console.is_terminal and not console.is_dumb_terminal


class Reporter:
    """Listens to a launch. Use as a context manager; call it with each event.

    Args:
        title: What stands before each line.
        console: Where to write; stderr by default.
        store: The run, whose past the panel counts in; without it only what is heard counts.
        keep: Leave the panel standing in the end, if there is anything to tell.
    """

    def __init__(
        self, title: str, console: Console | None = None, store: RunStore | None = None, *, keep: bool = False
    ) -> None:
        self._title, self._console, self._store = title, console or terminal(), store
        self._foot = LiveDisplay(self._console, self._lines) if is_live(self._console) else None
        self._keep = keep
        self._story = Timeline(title)
        self._lock = threading.Lock()
        self._doing = "starting"
        self._launch = ""
        self._said_at = 0.0
        self._explained: set[str] = set()

    def __enter__(self) -> Reporter:
        if self._foot is not None:
            self._foot.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._foot is not None:
            self._foot.keep = self._keep and bool(self._story.attempts)
            self._foot.__exit__()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._print(f"{self._title}: {text}")

    def _print(self, text: str) -> None:
        (self._foot or self._console).print(text, markup=False, soft_wrap=True)

    def _lines(self, width: int) -> list[Text]:
        return panel(self._seen(), width)

    def _seen(self) -> RunSummary:
        with self._lock:
            now = time.time()
            if self._launch:
                self._story.launch(self._launch).alive |= {"t": now}
            return summarize(self._story, now, self._doing)

    def __call__(self, body: dict[str, Any]) -> None:
        event = events.parse_event(body)
        with self._lock:
            self._hear(event, body)
        match event:
            case events.PhaseEvent():
                if self._foot is None:
                    self.say(_PHASES[event.name])
            case events.NoteEvent():
                self.say(event.text)
            case events.ActiveLaunchEvent():
                self.say(f"launch {event.launch} is at work on this run; leaving it alone")
            case events.DamagedModelEvent():
                self.say(f"the finished model is damaged ({'; '.join(event.faults)}); making it again")
            case events.GroupFailureEvent():
                self._failed(event)
            case events.NoRoomEvent():
                self.say("the cluster has no room for the workers yet; waiting")
            case events.ResizeEvent():
                self.say(f"going on with {counted(event.now, 'worker')} instead of {event.before}")
            case events.SlowEvent():
                slow = [f"rank {at.rank} ({at.host}) is {at.times} times as slow" for at in event.ranks]
                self.say("; ".join(slow) or "no rank is slow any more")
            case events.NonFiniteEvent():
                self.say(f"{event.message} ({event.action})")
            case events.EarlyStopEvent():
                self.say(f"stopping early at step {event.step}: {event.reason}")
            case events.DoneEvent():
                self.say(plain(self._seen()))
            case events.StoppingEvent():
                self.say("asked to stop; committing a checkpoint first (ask again to leave at once)")
            case events.ResumeEvent():
                self._resumed(event)
            case events.StartEvent():
                self.say("the workers are there; beginning with step 1")
            case events.StepEvent() if self._foot is None and time.monotonic() - self._said_at >= PLAIN_PERIOD_S:
                self._said_at = time.monotonic()
                self.say(plain(self._seen()))

    def _hear(self, event: events.Event, body: dict[str, Any]) -> None:
        """Puts an event into the story."""
        attempt = AttemptId.parse(str(body.get("sender")))
        if isinstance(event, events.PhaseEvent):
            if not self._launch:
                self._launch = str(event.launch)
                self._story.launch(self._launch).alive = {"began": event.t, "t": event.t, "ended": False}
            if event.name == "ray" and self._store is not None and self._foot is not None:
                threading.Thread(target=self._remember, args=(self._store,), daemon=True).start()
        elif attempt is not None:
            told = self._story.attempt(attempt)
            told.claim = told.claim or {"launch": self._launch}
            told.apply(body)
        elif isinstance(event, events.GroupFailureEvent | events.ResizeEvent | events.NoRoomEvent):
            self._story.apply_launch(self._launch, body)
        match event:
            case events.PhaseEvent(name=name):
                self._doing = _PHASES[name]
            case events.GroupFailureEvent():
                self._doing = "starting again"
            case events.NoRoomEvent():
                self._doing = "waiting for room"
            case events.StoppingEvent():
                self._doing = "stopping"
            case events.PlanEvent():
                self._doing = ""

    def _remember(self, store: RunStore) -> None:
        """Reads what the run has been through before; beside the launch, which waits for nobody."""
        with suppress(OutlastError, OSError):
            past = TimelineReader(store, but=self._launch).look()
            with self._lock:
                self._story.launches |= {key: item for key, item in past.launches.items() if key != self._launch}
                self._story.attempts = past.attempts | self._story.attempts

    def _failed(self, event: events.GroupFailureEvent) -> None:
        limit = -1 if event.limit is None else event.limit
        left = f"failure {event.number} of {limit}" if limit >= 0 else "no limit is set"
        then = "" if event.ends else f"; starting again ({left})"
        self.say(f"{event.cause}, {event.where}: {event.message}{then}")
        if event.excerpt and event.message not in self._explained:
            self._explained.add(event.message)
            self._print(event.excerpt)

    def _resumed(self, event: events.ResumeEvent) -> None:
        for item in event.rejected:
            self.say(f"passed over {item.checkpoint}: {'; '.join(item.reasons)}")
        for ref in event.passed_over:
            self.say(f"passed over {ref}: the run failed to start from it twice")
        self.say(f"resumed from {event.source}")
