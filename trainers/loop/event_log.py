"""Events of the step loop: rank 0 writes them into the attempt's journal and passes them to live listeners."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.run_store.events import EvalEvent, Event, StepEvent, parse_event
from outlast.checkpointing.run_store.journal import read_events
from outlast.trainers.loop.log_history import LogHistory
from outlast.trainers.loop.step_exchange import DeferredMetrics


class EventLog:
    """The journal of an attempt, and its live listeners.

    Args:
        checkpointer: Owns the journal; its own events go to the same listeners.
        history: Receives each step, on every rank.
        listeners: Called with each event, in this order, on rank 0. They must return at once.
        keeps: Keep, on every rank, the events of steps that may not be durable yet, in case that rank 0 is lost.

    Attributes:
        kept: Those events, oldest first.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        history: LogHistory,
        *listeners: Callable[[dict[str, Any]], None],
        keeps: bool = False,
    ) -> None:
        self._checkpointer, self._history, self._listeners, self._keeps = checkpointer, history, listeners, keeps
        self.kept: deque[StepEvent | EvalEvent] = deque()
        checkpointer.listener = self._publish

    def write(self, event: Event) -> None:
        """Record an event; does nothing on ranks other than 0."""
        if self._checkpointer.journal is not None:
            self._checkpointer.journal.write(event)
            self._publish(event.to_json())

    def write_durably(self, event: Event) -> None:
        """Record an event that later attempts depend on; durable when this returns. Every rank calls it."""
        self._checkpointer.note(event)

    def step(self, done: DeferredMetrics, loss: float) -> None:
        """Record a step, once its losses are added over the ranks. Every rank calls it."""
        self._history.add_step(done, loss)
        if self._checkpointer.journal is None and not self._keeps:
            return  # reading the norm waits for the device
        event = StepEvent(
            step=done.step + 1,
            loss=loss if math.isfinite(loss) else None,
            lr=done.lr,
            grad_norm=done.grad_norm.item() if done.grad_norm is not None else None,
            count=int(done.count),
            tokens=int(done.num_tokens),
            seconds=round(done.seconds, 4),
            ended_at=round(done.ended_at, 4),
        )
        self.keep(event)
        self.write(event)

    def evaluation(self, event: EvalEvent) -> None:
        """Record an evaluation. Every rank calls it."""
        event = replace(event, t=round(time.time(), 4))  # another rank 0 may write it later
        self.keep(event)
        self.write(event)

    def keep(self, event: StepEvent | EvalEvent) -> None:
        """Keep an event; a commit has made those of its step and before durable."""
        if self._keeps:
            accepted = self._checkpointer.accepted
            newest = accepted[0].ref.step if accepted else -1
            while self.kept and self.kept[0].step <= newest:
                self.kept.popleft()
            self.kept.append(event)

    def _publish(self, event: dict[str, Any]) -> None:
        for listener in self._listeners:
            listener(event)


def recorded_events(checkpointer: Checkpointer, kept: Iterable[Mapping[str, Any]]) -> set[tuple[str, int]]:
    """Return kind and step of the events that the journals of earlier attempts have, of `kept` ones and others.

    Raises StorageError.
    """
    newest = checkpointer.accepted[0].ref if checkpointer.accepted else None
    known = {(str(event["event"]), int(event["step"])) for event in kept}
    known = {item for item in known if newest is not None and item[1] <= newest.step}
    store = checkpointer.store
    for attempt in list_attempts(store):
        if attempt < checkpointer.attempt and (newest is None or attempt >= newest.attempt):
            for event in map(parse_event, read_events(store, store.attempt_dir(attempt))):
                if isinstance(event, StepEvent | EvalEvent):
                    known.add((event.kind, event.step))
    return known
