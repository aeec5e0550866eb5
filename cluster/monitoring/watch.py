"""Watches a run from any machine by reading its storage: `status --watch`, and the panel of `submit --follow`."""

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
from outlast.cluster.monitoring.live_panel import panel, plain_line
from outlast.cluster.monitoring.status import RunSnapshot, take_snapshot
from outlast.cluster.monitoring.terminal_footer import LiveDisplay
from outlast.cluster.monitoring.timeline import State, TimelineReader

WATCH_PERIOD_S = FLUSH_S / 2  # journals are written once in FLUSH_S
LOST_TIMEOUT_S = 600.0  # a supervisor stops a job that is silent for 180 s, and waits up to 300 s before the next


@contextmanager
def live_panel(store: RunStore, console: Console, *, keep: bool = False) -> Iterator[Callable[[], RunSnapshot]]:
    """Show a run's panel below a terminal's other output; yield a function that returns the current summary.

    The storage is read at most once in `WATCH_PERIOD_S`; if it does not answer, the last summary stays. Without a
    terminal nothing is shown.
    """
    reader, lock = TimelineReader(store), threading.Lock()
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
        return panel(summary, width) if summary.num_attempts or summary.state is not State.UNATTENDED else []

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
                line = f"{store.run}: {summary.activity}, {plain_line(summary)}"
                console.print(line, markup=False, soft_wrap=True)
            is_lost = summary.state is State.LOST and summary.now - summary.last_seen_at >= LOST_TIMEOUT_S
            if is_lost or summary.state in (State.DONE, State.FAILED, State.STOPPED):
                return summary
            time.sleep(WATCH_PERIOD_S)
