"""`BackgroundSave`: a save that runs in a thread. One at a time; its owner must `join` it."""

import threading
import time
from collections.abc import Callable
from enum import Enum

from outlast.checkpointing.save.staging import HostCopy


class SaveState(Enum):
    """The state of a save on this rank."""

    ACKNOWLEDGED = "acknowledged"
    IN_FLIGHT = "in flight"
    FAILED_OR_SUPERSEDED = "failed or superseded"


class BackgroundSave:
    """One save in the background.

    `work` returns True when the commit is acknowledged, False when superseded. `began` is by the monotonic clock.

    Attributes:
        blocked_s: Seconds that training waited for it, without those in the fence.
        seconds: Its duration, once it has ended.
    """

    def __init__(self, step: int, copy: HostCopy, began: float, work: Callable[[], bool]) -> None:
        self.step, self.copy = step, copy
        self.blocked_s = self.seconds = 0.0
        self._began, self._work = began, work
        self._acknowledged: bool | None = None
        self._failure: BaseException | None = None
        # Not the thread's own end: CPython 3.11 takes a thread for dead once its `join` was interrupted.
        self._ended = threading.Event()
        # A daemon, because a process whose peers are lost must be able to exit; `SaveInFlight` waits.
        threading.Thread(target=self._run, name=f"save-{step}", daemon=True).start()

    def _run(self) -> None:
        time.sleep(0)  # yield to the training thread, which has the next step to run
        try:
            self._acknowledged = self._work()
            self.seconds = time.monotonic() - self._began
        except BaseException as error:  # noqa: BLE001 - raised again by `join`
            self._failure = error
        finally:
            self._ended.set()

    @property
    def state(self) -> SaveState:
        if not self._ended.is_set():
            return SaveState.IN_FLIGHT
        return SaveState.ACKNOWLEDGED if self._acknowledged else SaveState.FAILED_OR_SUPERSEDED

    def has_ended(self, timeout_s: float | None = None) -> bool:
        """Wait for the end, at most `timeout_s`, and return whether it has come."""
        return self._ended.wait(timeout_s)

    def join(self) -> bool:
        """Wait for the end; return whether the commit is acknowledged, or raise the error of the thread."""
        self._ended.wait()
        self.copy.close()
        if self._failure is not None:
            raise self._failure
        return bool(self._acknowledged)
