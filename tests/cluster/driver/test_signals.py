"""SIGINT and SIGTERM in the driver's process, answered by a thread."""

from __future__ import annotations

import queue
import signal

import pytest

from outlast.cluster.driver.signals import handle_signals, respond_to_signals


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_the_first_two_signals_are_answered_once_each(signum: signal.Signals) -> None:
    answers: queue.Queue[str] = queue.Queue()
    with (
        handle_signals(lambda number, frame: None),
        respond_to_signals(lambda: answers.put("first"), lambda: answers.put("second")),
    ):
        signal.raise_signal(signum)
        assert answers.get(timeout=10) == "first"
        signal.raise_signal(signum)
        assert answers.get(timeout=10) == "second"
        signal.raise_signal(signum)
    with handle_signals(lambda number, frame: None):
        signal.raise_signal(signum)
    assert answers.empty()
    assert signal.set_wakeup_fd(-1) == -1


def test_other_signals_are_not_answered() -> None:
    answers: queue.Queue[str] = queue.Queue()
    before = signal.signal(signal.SIGUSR1, lambda number, frame: None)
    try:
        with (
            handle_signals(lambda number, frame: None),
            respond_to_signals(lambda: answers.put("first"), lambda: answers.put("second")),
        ):
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGINT)
            assert answers.get(timeout=10) == "first"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert answers.empty()
