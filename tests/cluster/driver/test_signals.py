"""SIGINT and SIGTERM in the driver's process, answered by a thread."""

from __future__ import annotations

import queue
import signal
import subprocess
import sys

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


def test_a_signal_within_the_handler_of_another_does_not_wait_for_it() -> None:
    """Another process sends them without a pause: many arrive while the handler of one before is at work."""
    script = (
        "import os, signal\n"
        "from outlast.cluster.driver.signals import StopFlag, handle_signals\n"
        "flag = StopFlag()\n"
        "with handle_signals(lambda *_: flag.set()):\n"
        "    if not (sender := os.fork()):\n"
        "        for count in range(50_000):\n"
        "            os.kill(os.getppid(), (signal.SIGTERM, signal.SIGINT)[count % 2])\n"
        "        os._exit(0)\n"
        "    os.waitpid(sender, 0)\n"
        "print(flag.is_set())\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "True\n", done.stderr
