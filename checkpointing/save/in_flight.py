"""`SaveInFlight`: the save of a checkpointer that has begun and whose end is not known yet, at most one.

It is kept until its end is known, also when a wait is interrupted or the interpreter ends: then it is waited for, and
standard error names what is lost.
"""

import os
import sys
from collections.abc import Callable

from outlast.checkpointing.escaping import escaped
from outlast.checkpointing.redaction import redact
from outlast.checkpointing.save import exit_hook
from outlast.checkpointing.save.background_save import BackgroundSave, SaveState

_ANNOUNCE_S = 3.0


class SaveInFlight:
    """The save in flight of run `run`.

    `close` waits for it and returns whether it is acknowledged; it is called when the interpreter ends, after at most
    `exit_wait_s` seconds.
    """

    def __init__(self, run: str, exit_wait_s: float, close: Callable[[], bool]) -> None:
        self._run, self._exit_wait_s, self._close = run, exit_wait_s, close
        self._save: BackgroundSave | None = None
        self._skipped: tuple[int, int] | None = None
        self._pid = os.getpid()

    @property
    def step(self) -> int | None:
        """The step that is being saved."""
        return self._save.step if self._save else None

    @property
    def state(self) -> SaveState | None:
        return self._save.state if self._save else None

    def begin(self, save: BackgroundSave) -> None:
        self._save, self._skipped = save, None
        exit_hook.call_at_exit(self, self._finish_at_exit)

    def take(self) -> BackgroundSave | None:
        """Wait for its end and return it, once. A forked process has none: the thread is in its parent."""
        if (save := self._save) is not None:
            if os.getpid() != self._pid:
                save = None
            else:
                save.has_ended()  # an interrupt leaves it in flight
            self._save = None
            exit_hook.release(self)
        return save

    def abandon(self) -> None:
        """Forget it without waiting for its end, only for its copy, which does not depend on others."""
        if (save := self._save) is not None:
            save.copy.wait()
            save.copy.close()
            self._save = None
            exit_hook.release(self)

    def skip(self, step: int) -> None:
        """Remember that `step` was not saved, because of the one in flight."""
        if self._save is not None:
            self._skipped = (step, self._save.step)

    def report_skipped(self, newest: int) -> None:
        """Report a skipped step that no later save follows."""
        if self._skipped is not None and self._skipped[0] > newest:
            step, in_flight = self._skipped
            self.report(f"step {step} was not saved: the save of step {in_flight} was in flight; `save` waits for it")

    def _finish_at_exit(self) -> None:
        if (save := self._save) is None:
            return
        lost = f"the save of step {save.step} is lost"
        try:
            if not save.has_ended(min(_ANNOUNCE_S, self._exit_wait_s)):
                limit = f"up to {self._exit_wait_s:g} s; Ctrl-C abandons it"
                self.report(f"waiting for the save of step {save.step} to be committed ({limit})")
            if not save.has_ended(max(0.0, self._exit_wait_s - _ANNOUNCE_S)):
                self.report(f"{lost}: it was not committed within {self._exit_wait_s:g} s")
            elif not self._close():
                self.report(f"{lost}: a newer attempt has superseded this one")
        except BaseException as error:  # noqa: BLE001 - there is no caller; an interrupt ends the wait
            self.report(f"{lost}: {error or type(error).__name__}")

    def report(self, line: str) -> None:
        print(escaped(redact(f"outlast: run {self._run!r}: {line}")), file=sys.stderr, flush=True)
