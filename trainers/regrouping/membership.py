"""A process' membership in the training group: its connection to the roster, and its seat in the newest generation.

A thread sends heartbeats and receives the roster's decisions, also while the training thread computes or waits in a
collective. When the generation ends it calls `abort` again and again until the training thread takes the next seat,
because a collective that begins after one abort would wait for ever.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from typing import Any

from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.run_store.attempt_history import NOT_IN_MEMORY
from outlast.trainers.regrouping.roster import Generation

BEAT_S = 0.2
#: An error of a collective and the roster's notice of the loss arrive at about the same time, in any order.
CONFIRM_S = 3.0
#: How often a process that waits for a seat asks whether to stop.
_ASK_S = 1.0


class RegroupFailed(OutlastError):
    """The group cannot go on in memory, so the attempt ends, and the next one resumes from the newest checkpoint."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"{NOT_IN_MEMORY}: {reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.message.removeprefix(f"{NOT_IN_MEMORY}: "),)


@dataclass(frozen=True, slots=True)
class Seat:
    """A process' place in a generation, and the URL of the store or folder through which the generation connects."""

    generation: Generation
    rank: int
    meeting: str

    @property
    def size(self) -> int:
        return len(self.generation.members)


class Member:
    """This process, as one of the roster.

    Args:
        address: The roster's server.
        key: Its key.
        name: Name of this process, unique in the group.
        rank: Its rank in the first generation; None for a spare.

    Attributes:
        outcome: How training has ended, once it has.
        abort: Called by the thread while the generation of the newest seat has ended.
        noticed_at: When this process heard that its generation has ended, in seconds since the epoch.
    """

    def __init__(self, address: tuple[str, int], key: bytes, name: str, rank: int | None) -> None:
        self.name = name
        self.abort: Callable[[], None] = lambda: None
        self.noticed_at = 0.0
        self._connection: Connection[Any, Any] = Client(address, family="AF_INET", authkey=key)
        self._changed = threading.Condition()
        self._sending = threading.Lock()
        self._meeting = ""
        self._newest: Generation | None = None
        self._begun = self._interrupted = self._arrived = self._seated = -1
        self._failure: RegroupFailed | None = None
        self.outcome = ""
        self._lost: list[str] = []
        self._step = 0
        self._send({"kind": "join", "name": name, "rank": rank})
        threading.Thread(target=self._listen, name="outlast-member", daemon=True).start()

    def take_seat(self, within_s: float | None = None, is_stopping: Callable[[], bool] = lambda: False) -> Seat | None:
        """Wait for a generation newer than the last one, until all its members have left that one.

        Returns None if training has ended before this process, a spare, was needed, or if `is_stopping` says so.

        Raises:
            RegroupFailed: This process is no longer of the group, the roster is gone, or `within_s` seconds are over.
        """
        deadline = None if within_s is None else time.monotonic() + within_s
        with self._changed:
            while True:
                if self._failure is not None:
                    raise self._failure
                if self.outcome:
                    return None
                newest = self._newest
                if newest is not None and self._arrived < newest.number and self.name in newest.members:
                    self._arrived = newest.number
                    self._send({"kind": "arrive", "number": newest.number})
                if newest is not None and self._begun == newest.number > self._seated:
                    self._seated = newest.number
                    return Seat(newest, newest.members.index(self.name), self._meeting)
                if deadline is not None and time.monotonic() >= deadline:
                    raise RegroupFailed(f"no process replaced {', '.join(self._lost)} within {within_s:g} s")
                if not self._changed.wait(_ASK_S) and is_stopping():
                    return None

    def has_ended(self, number: int, within_s: float = 0.0) -> bool:
        """Return whether generation `number` has ended, now or within some seconds. True if the roster is gone."""
        with self._changed:
            return self._changed.wait_for(lambda: self._is_over(number), within_s)

    def at_step(self, step: int) -> None:
        """Pass on, with the next heartbeat, that `step` steps are done."""
        self._step = step

    def finish(self, outcome: str) -> None:
        """Tell the roster that training has ended as it should, and how. Every rank calls it before it leaves."""
        self.outcome = outcome
        self._send({"kind": "done", "outcome": outcome})

    def fail(self, error: BaseException) -> None:
        """Tell the roster that an error ends this process' part, which it reports itself."""
        self._send({"kind": "raised", "error": type(error).__name__, "step": self._step})

    def give_up(self, error: BaseException) -> None:
        """Tell the roster that going on in memory is no help against an error."""
        self._send({"kind": "give-up", "error": type(error).__name__})

    def leave(self) -> None:
        """End the membership; unless training has ended, the others then go on without this process."""
        with self._sending:
            self._connection.close()

    def _is_over(self, number: int) -> bool:
        is_newer = self._newest is not None and self._newest.number > number
        return self._interrupted >= number or is_newer or self._failure is not None

    def _listen(self) -> None:
        beat_at = 0.0
        try:
            while True:
                is_over = self._seated >= 0 and self._is_over(self._seated)
                if self._connection.poll(BEAT_S / 10 if is_over else BEAT_S):
                    self._apply(json.loads(self._connection.recv_bytes()))
                if time.monotonic() - beat_at >= BEAT_S:
                    beat_at = time.monotonic()
                    self._send({"kind": "beat", "step": self._step})
                if self._seated >= 0 and self._is_over(self._seated):
                    self.abort()
        except (EOFError, OSError, ValueError) as error:
            with self._changed:
                self._failure = self._failure or RegroupFailed(f"the roster is gone ({type(error).__name__}: {error})")
                self._changed.notify_all()

    def _apply(self, message: Mapping[str, Any]) -> None:
        with self._changed:
            match message["kind"]:
                case "meeting":
                    self._meeting = message["url"]
                case "generation":
                    lost = tuple(message["lost"])
                    self._newest = Generation(message["number"], tuple(message["members"]), lost)
                    self._lost.clear()
                    self._end(message["number"] - 1)
                case "begin":
                    self._begun = message["number"]
                case "done":
                    self.outcome = message["outcome"]
                case "interrupt":
                    self._lost.append(message["lost"])
                    self._end(message["number"])
                case "expelled":
                    self._failure = RegroupFailed(f"{self.name} is no longer of the group: {message['reason']}")
            self._changed.notify_all()

    def _end(self, number: int) -> None:
        if number > self._interrupted:
            self._interrupted = number
            self.noticed_at = time.time()

    def _send(self, body: Mapping[str, Any]) -> None:
        with self._sending, suppress(OSError):  # the thread notices it when it receives
            self._connection.send_bytes(json.dumps(body).encode())
