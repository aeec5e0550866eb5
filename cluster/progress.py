"""What a person sees while a run goes on: a bar where stderr is a terminal, else one plain line every few seconds."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_PERIOD_S = 10.0


class Reporter:
    """Listens to a launch. Use as a context manager; call it with each event.

    Args:
        title: What stands before the bar.
        console: Where to write; stderr by default.
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._title = title
        self._console = console or Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._num_steps = 0
        self._step = 0
        self._eval = ""
        self._said_at = 0.0
        self._explained: set[str] = set()

    def __enter__(self) -> Reporter:
        if self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(30), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console, transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._title, total=None, note="")
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """A line that stays."""
        self._console.print(f"{self._title}: {text}", markup=False, soft_wrap=True)

    def __call__(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "phase":
                self._num_steps = event.get("num_steps", self._num_steps)
                self._note({"data": "preparing data", "ray": "starting workers"}[event["name"]], always=True)
            case "note":
                self.say(event["text"])
            case "rival":
                self.say(f"launch {event['launch']} is at work on this run; leaving it alone")
            case "damaged-model":
                self.say(f"the finished model is damaged ({'; '.join(event['faults'])}); making it again")
            case "failure":
                self._failed(event)
            case "resize":
                self.say(f"going on with {event['now']} workers instead of {event['before']}")
            case "slow":
                slow = [f"rank {at['rank']} ({at['host']}) is {at['times']} times as slow" for at in event["ranks"]]
                self.say("; ".join(slow) or "no rank is slow any more")
            case "non-finite":
                self.say(f"{event['message']} ({event['action']})")
            case "early-stop":
                self.say(f"stopping early at step {event['step']}: {event['reason']}")
            case "done":
                self.say(f"step {self._step}/{self._num_steps}{self._eval}")
            case "stopping":
                self.say("asked to stop; committing a checkpoint first (ask again to leave at once)")
            case "start":
                self._step = 0
            case "resume":
                self._resumed(event)
            case "eval":
                self._eval = f"  eval loss {event['eval_loss']:.3f}"
            case "step":
                back = event["step"] <= self._step
                self._step = event["step"]
                loss = "not finite" if event["loss"] is None else f"{event['loss']:.3f}"
                self._note(f"step {self._step}/{self._num_steps}  loss {loss}{self._eval}", always=back)

    def _failed(self, event: dict[str, Any]) -> None:
        left = f"failure {event['number']} of {event['limit']}" if event["limit"] >= 0 else "no limit is set"
        then = "" if event["ends"] else f"; starting again ({left})"
        self.say(f"{event['cause']}, {event['where']}: {event['message']}{then}")
        if event["excerpt"] and event["message"] not in self._explained:
            self._explained.add(event["message"])
            self._console.print(event["excerpt"], markup=False, soft_wrap=True)

    def _resumed(self, event: dict[str, Any]) -> None:
        for item in event["rejected"]:
            self.say(f"passed over {item['checkpoint']}: {'; '.join(item['reasons'])}")
        for item in event.get("passed_over", ()):
            self.say(f"passed over {item}: the run failed to start from it twice")
        self.say(f"resumed from {event['source']}")
        self._step = event["step"]

    def _note(self, text: str, *, always: bool = False) -> None:
        if self._bar is not None:
            self._bar.update(self._task, total=self._num_steps or None, completed=self._step, note=text)
        elif always or time.monotonic() - self._said_at >= PLAIN_PERIOD_S:
            self._said_at = time.monotonic()
            self.say(text)
