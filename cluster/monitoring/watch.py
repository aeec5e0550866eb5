"""Following a run that works elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.text import Text

from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.run_store.claims import list_launches
from outlast.checkpointing.run_store.journal import FLUSH_S
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.tools.query import load_catalog
from outlast.cluster.monitoring.console_progress import PLAIN_PERIOD_S, is_live
from outlast.cluster.monitoring.run_panel import panel, plain
from outlast.cluster.monitoring.run_summary import RunSummary, summarize
from outlast.cluster.monitoring.terminal_footer import LiveDisplay
from outlast.cluster.monitoring.timeline import State
from outlast.cluster.monitoring.timeline_reader import TimelineReader

WATCH_PERIOD_S = FLUSH_S / 2  # a journal says nothing new more often


LOST_TIMEOUT_S = 600.0  # a supervisor stops a job that is silent for 180 s, and waits up to 300 s before the next


class _RunWatch:
    """Looks at a run's storage again and again, no more often than once in `WATCH_PERIOD_S`."""

    def __init__(self, store: RunStore) -> None:
        self._follower = TimelineReader(store)
        self._looked_at = 0.0
        self._trouble = ""

    def poll(self) -> RunSummary:
        """The run as it is now, or as it was when the storage last answered."""
        if time.monotonic() - self._looked_at >= WATCH_PERIOD_S:
            try:
                self._follower.look()
                self._trouble = ""
            except (StorageError, OSError):
                self._trouble = "the storage does not answer"
            self._looked_at = time.monotonic()
        return summarize(self._follower.story, time.time(), self._trouble)


@contextmanager
def watching(store: RunStore, console: Console, *, keep: bool = False) -> Iterator[Callable[[], RunSummary]]:
    """A panel of a run at the foot of a terminal, read from its storage. Yields what looks at it once more.

    Whatever else is printed meanwhile scrolls by above. Where there is no terminal nothing is shown.
    """
    watch, lock = _RunWatch(store), threading.Lock()

    def seen() -> RunSummary:
        with lock:
            return watch.poll()

    def lines(width: int) -> list[Text]:
        found = seen()
        return panel(found, width) if found.num_attempts or found.state is not State.UNATTENDED else []

    if not is_live(console):
        yield seen
        return
    with LiveDisplay(console, lines, keep=keep):
        yield seen


def watch(store: RunStore, console: Console) -> RunSummary:
    """Shows a run until it has ended. Returns how it was then.

    One that is lost is waited for as long as a supervisor may take to start it again. A loop of one's own has nobody to
    tell of its end, so it is shown for ever.

    Raises:
        ConfigError: There is no such run.
        StorageError: The storage could not be read at the beginning.
    """
    if not list_launches(store):
        load_catalog(store)
    said_at = 0.0
    with watching(store, console, keep=True) as seen:
        while True:
            found = seen()
            if not is_live(console) and time.monotonic() - said_at >= PLAIN_PERIOD_S:
                said_at = time.monotonic()
                console.print(f"{store.run}: {found.doing}, {plain(found)}", markup=False, soft_wrap=True)
            is_lost = found.state is State.LOST and found.now - found.heard_at >= LOST_TIMEOUT_S
            if is_lost or found.state in (State.DONE, State.FAILED, State.STOPPED):
                return found
            time.sleep(WATCH_PERIOD_S)
