"""Progress on the console: a live panel on a terminal, else one plain line every few seconds.

`ProgressReporter` shows a launch in this process by its events; `watch` and `live_panel` show a run from any machine by
reading its storage (`status --watch`, `submit --follow`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console
from rich.text import Text

from outlast.checkpointing.errors import OutlastError, StorageError
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store import events
from outlast.checkpointing.run_store.claims import list_launches
from outlast.checkpointing.run_store.journal import FLUSH_S
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.tools.query import load_catalog
from outlast.cluster.formatting import counted, duration
from outlast.cluster.monitoring.live_panel import panel, plain_line
from outlast.cluster.monitoring.regroupings import Regrouping, regroupings
from outlast.cluster.monitoring.status import RunSnapshot, take_snapshot
from outlast.cluster.monitoring.terminal_footer import LiveDisplay
from outlast.cluster.monitoring.timeline import State, Timeline, TimelineReader
from outlast.cluster.output import make_console, safe_line, safe_lines

PLAIN_PERIOD_S = 10.0
WATCH_PERIOD_S = FLUSH_S / 2  # journals are written once in FLUSH_S
LOST_TIMEOUT_S = 600.0  # a supervisor stops a job that is silent for 180 s, and waits up to 300 s before the next
_PHASES = {
    "data": "preparing data",
    "dry_step": "trying the first step",
    "ray": "starting workers",
    "attached": "attached to the running launch",
}
#: What the driver does after an event; empty after the plan, when the run's state says it all.
_ACTIVITIES = {
    events.GroupFailureEvent: "restarting",
    events.NoRoomEvent: "waiting for resources",
    events.StoppingEvent: "stopping",
    events.RegroupedEvent: "regrouping",
    events.PlanEvent: "",
    events.StopEvent: "stopped",
}


def terminal() -> Console:
    """Return the console for progress: stderr."""
    return make_console(stderr=True)


def is_live(console: Console) -> bool:
    """Whether lines can change in place there; rich also takes a log for a terminal if colours are forced."""
    return console.file.isatty() and console.is_terminal and not console.is_dumb_terminal


class ProgressReporter:
    """Shows the events of a launch; a context manager, called with each event.

    Args:
        title: Prefix of each line.
        console: The output; stderr by default.
        store: The run; its earlier attempts are included in the panel.
        keep: Leave the panel on the terminal at the end, if an attempt has begun.
    """

    def __init__(
        self, title: str, console: Console | None = None, store: RunStore | None = None, *, keep: bool = False
    ) -> None:
        self._title, self._console, self._store = title, console or terminal(), store
        live = LiveDisplay(self._console, lambda width: panel(self._summarize(), width))
        self._display = live if is_live(self._console) else None
        self._keep = keep
        self._timeline = Timeline(title)
        self._lock = threading.Lock()
        self._activity = "starting"
        self._launch = ""
        self._printed_at = 0.0
        self._printed_step = -1
        self._excerpts: set[str] = set()
        self._regrouped: set[str] = set()  # attempts whose regrouping is told

    def __enter__(self) -> ProgressReporter:
        if self._display is not None:
            self._display.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._display is not None:
            self._display.keep = self._keep and bool(self._timeline.attempts)
            self._display.__exit__()

    @property
    def has_plan(self) -> bool:
        """Whether the workers have begun to train."""
        return any(attempt.plan is not None for attempt in self._timeline.attempts.values())

    def print_line(self, text: str) -> None:
        """Print a line that stays, above the panel."""
        self._print(safe_line(f"{self._title}: {text}"))

    def _print(self, text: str) -> None:
        (self._display or self._console).print(text, markup=False, soft_wrap=True, emoji=False)

    def _summarize(self) -> RunSnapshot:
        with self._lock:
            now = time.time()
            if self._launch:
                self._timeline.launch(self._launch).alive |= {"t": now}
            return take_snapshot(self._timeline, now, self._activity)

    def __call__(self, body: dict[str, Any]) -> None:
        event = events.parse_event(body)
        with self._lock:
            self._update_timeline(event, body)
            if isinstance(event, events.PhaseEvent):
                self._activity = _PHASES[event.name]
            elif not (isinstance(event, events.GroupFailureEvent) and self._is_survived(event)):
                self._activity = _ACTIVITIES.get(type(event), self._activity)
        if isinstance(event, events.StepEvent):
            if self._display is not None or time.monotonic() - self._printed_at < PLAIN_PERIOD_S:
                return
            self._printed_at = time.monotonic()
        if isinstance(event, events.StepEvent | events.DoneEvent):
            self._print_progress(is_end=isinstance(event, events.DoneEvent))
        for line in [*self._describe_regrouping(event, body), *self._describe(event)]:
            self.print_line(line)
        if isinstance(event, events.GroupFailureEvent) and event.excerpt and event.message not in self._excerpts:
            self._excerpts.add(event.message)
            self._print("\n".join(safe_lines(event.excerpt, indent="  ")))

    def _print_progress(self, *, is_end: bool) -> None:
        """Print the progress as a line; not again at the end, nor where the panel stays and shows it."""
        summary = self._summarize()
        if not (is_end and (summary.step == self._printed_step or (self._display is not None and self._keep))):
            self.print_line(plain_line(summary))
        self._printed_step = summary.step

    def _update_timeline(self, event: events.Event, body: dict[str, Any]) -> None:
        attempt = AttemptId.parse(str(body.get("sender")))
        if isinstance(event, events.PhaseEvent):
            if not self._launch:
                self._launch = str(event.launch)
                self._timeline.launch(self._launch).alive = {"began": event.t, "t": event.t, "ended": False}
            if event.name in ("ray", "attached") and self._store is not None and self._display is not None:
                threading.Thread(target=self._load_history, args=(self._store,), daemon=True).start()
        elif attempt is not None:
            record = self._timeline.attempt(attempt)
            record.claim = record.claim or {"launch": self._launch}
            self._timeline.apply_attempt_events(record, body)
        elif isinstance(event, events.GroupFailureEvent | events.ResizeEvent | events.NoRoomEvent):
            self._timeline.apply_launch_event(self._launch, body)

    def _load_history(self, store: RunStore) -> None:
        """Read the run's earlier launches; in a thread, so that the launch does not wait for the storage."""
        with suppress(OutlastError, OSError):
            past = TimelineReader(store, exclude_launch=self._launch).update()
            with self._lock:
                self._timeline.launches |= {key: item for key, item in past.launches.items() if key != self._launch}
                self._timeline.attempts = past.attempts | self._timeline.attempts

    def _is_survived(self, event: events.GroupFailureEvent) -> bool:
        """Whether training goes on in memory after a loss."""
        regrouped = {attempt.regrouped_from for attempt in list(self._timeline.attempts.values())}
        return bool(event.in_place) or event.attempt in regrouped

    def _describe_regrouping(self, event: events.Event, body: dict[str, Any]) -> list[str]:
        """Return the line of a regrouping, once training has gone on."""
        name = str(body.get("sender"))
        attempt = self._timeline.attempts.get(AttemptId.parse(name) or AttemptId(0, ""))
        has_gone_on = isinstance(event, events.UnderWayEvent | events.EvalEvent | events.DoneEvent)
        if not has_gone_on or name in self._regrouped or attempt is None or attempt.plan is None:
            return []
        self._regrouped.add(name)
        return [f"{item.description}; {item.outcome}" for item in self._told() if item.attempt == name]

    def _told(self) -> list[Regrouping]:
        with self._lock:
            return [item for item in regroupings(self._timeline) if item.attempt in self._regrouped]

    def _describe(self, event: events.Event) -> list[str]:
        """Return the lines that an event is worth."""
        match event:
            case events.PhaseEvent():
                return [] if self._display is not None else [_PHASES[event.name]]
            case events.NoteEvent():
                return [event.text]
            case events.ActiveLaunchEvent():
                return [f"launch {event.launch} is active on this run; exiting without changes"]
            case events.DamagedModelEvent():
                return [f"the finished model is damaged ({'; '.join(event.faults)}); writing it again"]
            case events.GroupFailureEvent():
                limit = -1 if event.limit is None else event.limit
                if self._is_survived(event):
                    is_told = event.attempt in {item.before for item in self._told()}
                    return [f"{event.cause}, {event.where}: {event.message}"] if is_told else []
                count = f"failure {event.number} of {limit}" if limit >= 0 else "no limit is set"
                then = "" if event.ends else f"; restarting ({count})"
                return [f"{event.cause}, {event.where}: {event.message}{then}"]
            case events.NoRoomEvent():
                return ["the cluster has no room for the workers yet; waiting"]
            case events.ResizeEvent():
                return [f"continuing with {counted(event.now, 'worker')} instead of {event.before}"]
            case events.SlowEvent():
                slow = [f"rank {at.rank} ({at.host}) is {at.times} times as slow" for at in event.ranks]
                return ["; ".join(slow) or "no rank is slow any more"]
            case events.UnsavedEvent(newest=newest):
                since = f"the last checkpoint (the newest is of step {newest})"
                since = "its beginning (there is no checkpoint yet)" if newest is None else since
                age = duration(event.unsaved_s)
                return [f"a save failed; training goes on, {age} after {since}: {event.error}"]
            case events.NonFiniteEvent():
                return [f"{event.message} ({event.action})"]
            case events.EarlyStopEvent():
                return [f"stopping early at step {event.step}: {event.reason}"]
            case events.StoppingEvent():
                return ["stop requested; saving a checkpoint first (press Ctrl-C again to quit immediately)"]
            case events.ResumeEvent():
                skipped = [f"skipped {item.checkpoint}: {'; '.join(item.reasons)}" for item in event.rejected]
                skipped += [f"skipped {ref}: the run failed to start from it twice" for ref in event.passed_over]
                memory = f"the workers' memory, after step {event.step}"
                return [*skipped, f"resumed from {memory if event.memory else event.source}"]
            case events.SnapshotsUnusedEvent(reasons=reasons):
                return [f"snapshots in memory were not used: {'; '.join(reasons)}"]
            case events.SnapshotsOffEvent(reason=reason):
                return [f"no snapshots are kept in memory: {reason}"]
            case events.StartEvent():
                return ["workers are ready; starting with step 1"]
        return []


@contextmanager
def live_panel(store: RunStore, console: Console, *, keep: bool = False) -> Iterator[Callable[[], RunSnapshot]]:
    """Show a run's panel below a terminal's other output; yield a function that returns the current summary.

    The storage is read at most once in `WATCH_PERIOD_S`; if it does not answer, the last summary stays. Without a
    terminal nothing is shown.
    """
    reader, lock, began = TimelineReader(store), threading.Lock(), time.monotonic()
    read_at, trouble = 0.0, ""

    def poll() -> RunSnapshot:
        nonlocal read_at, trouble
        with lock:
            if time.monotonic() - read_at >= WATCH_PERIOD_S:
                try:
                    reader.update()
                    trouble = ""
                except (StorageError, OSError):
                    trouble = "the storage does not answer"
                read_at = time.monotonic()
            return take_snapshot(reader.timeline, time.time(), trouble)

    def lines(width: int) -> list[Text]:
        summary = poll()
        if summary.num_attempts or summary.state is not State.UNATTENDED:
            return panel(summary, width)
        waited = duration(time.monotonic() - began)
        return [Text.assemble((f"{store.run}  ", "bold"), f"waiting {waited} for its driver to start")]

    if not is_live(console):
        yield poll
        return
    with LiveDisplay(console, lines, keep=keep):
        yield poll


def watch(store: RunStore, console: Console) -> RunSnapshot:
    """Show a run until it has ended; return its final summary.

    A lost run counts as ended once a supervisor would have restarted it. A custom loop records no end and is shown
    forever. ConfigError if there is no such run.
    """
    if not list_launches(store):
        load_catalog(store)
    printed_at = 0.0
    with live_panel(store, console, keep=True) as poll:
        while True:
            summary = poll()
            if not is_live(console) and time.monotonic() - printed_at >= PLAIN_PERIOD_S:
                printed_at = time.monotonic()
                line = safe_line(f"{store.run}: {summary.activity}, {plain_line(summary)}")
                console.print(line, markup=False, emoji=False, soft_wrap=True)
            is_lost = summary.state is State.LOST and summary.now - summary.last_seen_at >= LOST_TIMEOUT_S
            if is_lost or summary.state in (State.DONE, State.FAILED, State.STOPPED):
                return summary
            time.sleep(WATCH_PERIOD_S)
