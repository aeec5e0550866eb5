"""The panel at several widths, and the live display below other output of a terminal."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from outlast.checkpointing.run_store.events import SlowRank
from outlast.cluster.formatting import clock, duration, share, short, size
from outlast.cluster.monitoring.console_progress import ProgressReporter
from outlast.cluster.monitoring.live_panel import _apportion, panel, plain_line, sparkline
from outlast.cluster.monitoring.status import RunSnapshot, take_snapshot
from outlast.cluster.monitoring.terminal_footer import LiveDisplay
from outlast.cluster.monitoring.timeline import Timeline
from tests.support.timelines import (
    attempt,
    done,
    evaluated,
    failure,
    launch,
    make_timeline,
    plan,
    resume,
    saved,
    start,
    steps,
    stopped,
)

NOW = 300.0
WIDTHS = (30, 40, 60, 79, 80, 120)
ROOT = Path(__file__).parents[3]


def interrupted_run(run: str = "support-bot") -> RunSnapshot:
    """Make a running run that was killed and hung before."""
    timeline = make_timeline(
        launch("a", 0, NOW - 1, None, failure(1, 100), failure(2, 180, "hang")),
        attempt(1, 20, start(21), plan(22, 1000), evaluated(0, 24, 26), steps(1, 90, 26, 0.8), saved(60, 76)),
        attempt(2, 115, resume(117, 60), plan(118, 1000), steps(61, 120, 120, 0.8), saved(90, 146, 0.2)),
        attempt(3, 190, resume(192, 90, 2), plan(193, 1000), steps(91, 220, 195, 0.8), saved(200, 287, 0.1)),
        run=run,
    )
    timeline.claimed_attempts[-1].slow = [SlowRank(1, "node-c", 1.8)]
    return take_snapshot(timeline, NOW)


def shown(seen: RunSnapshot, width: int, *, colour: bool = False) -> str:
    """Return what a terminal of that width shows."""
    file = io.StringIO()
    console = Console(file=file, width=width, force_terminal=True, color_system="standard" if colour else None)
    for line in panel(seen, width):
        console.print(line, soft_wrap=True)
    return file.getvalue()


def test_the_whole_panel_at_eighty_columns() -> None:
    died, hung = clock(100, NOW), clock(180, NOW)
    assert shown(interrupted_run(), 80).splitlines() == [
        "support-bot  running, attempt 3, 2 workers, 5 min total",
        "step     ━━━━━━━━─────────────────────────────  220/1,000 22 %, 10 min 24 s left",
        "loss     0.045  █▃▂▂▂▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁▁  eval loss 2.000  lr 0.001",
        "speed    100 tokens/s, 0.8 s/step",
        "saved    step 200, 13 s ago, 1.0 kB, not verified yet, takes 0.5 s, stall 0.1 s",
        "goodput  59 %  ███████████████████████▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒",
        "         train 2 min 57 s, redo 48 s, restart 25 s, startup 24 s, detect 14 s,",
        "         restore 10 s, evaluate 2 s",
        "lost     60 steps, in 2 interruptions",
        f"         {died}  worker died (rank 1) → from step 60: it was killed",
        f"         {hung}  hang (rank 1) → from step 90: it was killed",
        "slow     rank 1 on node-c, 1.8 times as slow as the others",
    ]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("run", ["a", "a-run-whose-name-is-as-long-as-a-name-may-be-" + 18 * "x"])
def test_no_line_is_wider_than_the_terminal_or_padded(width: int, run: str) -> None:
    lines = panel(interrupted_run(run), width)
    assert all(line.cell_len <= width for line in lines)
    assert all(line.plain == line.plain.rstrip() for line in lines)
    assert shown(interrupted_run(run), width).count("\n") == len(lines)
    for words in ("step", "220/1,000", "loss", "goodput", "59 %", "60 steps"):
        assert words in shown(interrupted_run(run), width)


@pytest.mark.parametrize("width", WIDTHS)
def test_a_run_of_which_little_is_known(width: int) -> None:
    nothing = panel(take_snapshot(Timeline("run"), NOW), width)
    assert [line.plain for line in nothing] == ["run  unattended"]
    begun = shown(take_snapshot(make_timeline(launch("a", NOW - 9, NOW)), NOW, "preparing data"), width)
    assert begun.startswith("run  preparing data")
    assert "nothing yet" in begun
    finished = make_timeline(launch("a", 0, 32, 0), attempt(1, 10, plan(12, 10), steps(1, 10, 15), done(30, 10)))
    assert "done, attempt 1" in shown(take_snapshot(finished, NOW), width)
    assert " left" not in shown(take_snapshot(finished, NOW), width)


def test_a_run_is_restarting_until_the_next_group_has_an_event() -> None:
    lost = attempt(1, 20, start(21), plan(22, 1000), steps(1, 90, 26, 0.8), saved(60, 76))
    failed, killed = launch("a", 0, NOW - 1, None, failure(1, 100)), launch("a", 0, 100)
    for parts in ((failed, lost), (failed, lost, attempt(2, 115)), (killed, launch("b", 110, NOW - 1), lost)):
        text = shown(take_snapshot(make_timeline(*parts), NOW), 120)
        assert "restarting, attempt 1" in text
        assert " left" not in text
    stopping = attempt(1, 20, start(21), plan(22, 1000), steps(1, 90, 26, 0.8), stopped(100, 90))
    assert "running, attempt 1" in shown(take_snapshot(make_timeline(launch("a", 0, NOW - 1), stopping), NOW), 120)


def test_user_text_is_not_markup() -> None:
    timeline = make_timeline(
        launch("a", 0, 290, None, {**failure(1, 100), "message": "[bold red]x[/] :smile:\n\x1b]0;t\x07 y"}),
        attempt(1, 9),
    )
    text = shown(take_snapshot(timeline, NOW), 120, colour=True)
    assert "[bold red]x[/] :smile: " in text
    assert "\x1b]" not in text


def test_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    colours = re.compile(r"\x1b\[[0-9;]*(3\d|9\d)[0-9;]*m")
    assert colours.search(shown(interrupted_run(), 80, colour=True))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colours.search(shown(interrupted_run(), 80, colour=True))


def test_one_plain_line() -> None:
    expected = "step 220/1000  loss 0.045  eval loss 2.000  lr 0.001  100 tokens/s  10 min 24 s left"
    assert plain_line(interrupted_run()) == expected
    assert plain_line(take_snapshot(Timeline("run"), NOW)) == "step 0/?"


@pytest.mark.parametrize(
    ("values", "width", "expected"),
    [
        ([1.0, 2.0, 3.0], 8, "▁▅█"),
        ([5.0] * 9, 3, "▄▄▄"),
        ([8.0, 8.0, 4.0, 4.0, 0.0, 0.0], 3, "█▅▁"),
        ([float(n) for n in range(1000)], 8, "▁▂▃▄▅▆▇█"),
    ],
)
def test_sparkline(values: list[float], width: int, expected: str) -> None:
    assert sparkline(values, width) == expected


@pytest.mark.parametrize(
    ("parts", "room", "expected"),
    [
        ([1.0], 20, [20]),
        ([99.0, 1.0], 20, [19, 1]),
        ([1e6, 1e-6, 1e-6], 16, [14, 1, 1]),
        ([1.0, 1.0, 1.0], 20, [6, 7, 7]),
    ],
)
def test_a_bar_has_a_column_for_each_part(parts: list[float], room: int, expected: list[int]) -> None:
    found = _apportion(parts, room)
    assert sorted(found) == sorted(expected)
    assert sum(found) == room


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([duration(s) for s in (0, 0.04, 3.14159, 41, 59.7, 200, 7500, 3600, 350_000)],
         ["0 s", "0.04 s", "3.1 s", "41 s", "1 min", "3 min 20 s", "2 h 5 min", "1 h", "4 d 1 h"]),
        ([short(n) for n in (3, 950, 999.6, 12_345, 4_560_000, 2e9)], ["3", "950", "1 k", "12.3 k", "4.56 M", "2 G"]),
        ([share(part) for part in (0, 0.0001, 0.0312, 0.4415, 0.99987, 1)],
         ["0.0 %", "<0.1 %", "3.1 %", "44 %", "99.98 %", "100 %"]),
        ([size(n) for n in (12, 12_345, 5e12)], ["12 B", "12.3 kB", "5.0 TB"]),
        ([clock(0, 30), clock(0, 864000)],
         [time.strftime("%H:%M:%S", time.localtime(0)), time.strftime("%Y-%m-%d %H:%M", time.localtime(0))]),
    ],
)  # fmt: skip
def test_numbers_for_people(found: list[str], expected: list[str]) -> None:
    assert found == expected


# -- live display ------------------------------------------------------------------------------------------------------


class Screen:
    """A terminal's screen, with the escape sequences that the display uses. Lines wrap at `columns`."""

    def __init__(self, columns: int) -> None:
        self.columns, self.lines, self.row, self.column = columns, [""], 0, 0

    def feed(self, text: str) -> None:
        for part in re.findall(r"\x1b\[\??[0-9;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
            if part == "\r":
                self.column = 0
            elif part == "\n":
                self.row, self.column = self.row + 1, 0
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif part.startswith("\x1b"):
                self._obey(part[-1], int(re.sub(r"\D", "", part) or 1))
            else:
                for letter in part:
                    self._put(letter)

    def _obey(self, letter: str, number: int) -> None:
        if letter == "A":
            assert self.row >= number, "the cursor moved above the top"
            self.row -= number
        elif letter == "K":
            self.lines[self.row] = self.lines[self.row][: self.column]
        elif letter == "J":
            self.lines[self.row] = self.lines[self.row][: self.column]
            del self.lines[self.row + 1 :]
        else:
            assert letter in "mhl", letter

    def _put(self, letter: str) -> None:
        if self.column == self.columns:
            self.feed("\n")
        line = self.lines[self.row].ljust(self.column)
        self.lines[self.row] = line[: self.column] + letter + line[self.column + 1 :]
        self.column += 1

    def narrow(self, columns: int) -> None:
        """Make the terminal narrower and rewrap its lines."""
        text, wrapped = self.lines, Screen(columns)
        wrapped.feed("\n".join(text))
        self.columns, self.lines, self.row, self.column = columns, wrapped.lines, wrapped.row, wrapped.column


def console_and_screen(columns: int) -> tuple[Console, io.StringIO, Screen]:
    file = io.StringIO()
    return Console(file=file, width=columns, height=20, force_terminal=True), file, Screen(columns)


def flush(file: io.StringIO, screen: Screen) -> list[str]:
    screen.feed(file.getvalue())
    file.seek(0)
    file.truncate()
    return screen.lines


def test_lines_change_in_place_below_other_output() -> None:
    console, file, screen = console_and_screen(40)
    now = ["one", "two"]
    display = LiveDisplay(console, lambda width: [Text(line) for line in now])
    display.refresh()
    assert flush(file, screen) == ["one", "two"]
    display.write("a log line\nand a second one that is so long that it takes two rows\n")
    expected = ["a log line", "and a second one that is so long that it", " takes two rows"]
    assert flush(file, screen) == [*expected, "one", "two"]
    now[:] = ["three", "four", "five"]
    display.refresh()
    display.refresh()
    assert flush(file, screen) == [*expected, "three", "four", "five"]
    now[:] = ["six"]
    display.print("[printed]", markup=False)
    display.refresh()
    assert flush(file, screen) == [*expected, "[printed]", "six"]


def test_nothing_is_written_when_nothing_has_changed() -> None:
    console, file, _ = console_and_screen(40)
    display = LiveDisplay(console, lambda width: [Text("one")])
    display.refresh()
    written = file.getvalue()
    assert "\x1b[2J" not in written
    for _ in range(5):
        display.refresh()
    assert file.getvalue() == written


@pytest.mark.parametrize("columns", [25, 12])
def test_a_terminal_that_is_made_narrower(columns: int) -> None:
    console, file, screen = console_and_screen(60)
    display = LiveDisplay(console, lambda width: [Text("x" * min(width, 50)), Text("y" * min(width, 20))])
    display.write("a log line\n")
    display.refresh()
    assert flush(file, screen) == ["a log line", "x" * 50, "y" * 20]
    screen.narrow(columns)
    console.width = columns
    display.refresh()
    assert flush(file, screen) == ["a log line", "x" * (columns - 1), "y" * min(columns - 1, 20)]


def test_a_terminal_with_few_rows() -> None:
    console, file, screen = console_and_screen(40)
    console.height = 4
    display = LiveDisplay(console, lambda width: [Text(str(number)) for number in range(9)])
    display.refresh()
    assert flush(file, screen) == ["0", "1", "2"]


@pytest.mark.parametrize(("keep", "left"), [(True, ["the end", ""]), (False, [""])])
def test_the_last_lines_are_kept_or_removed(keep: bool, left: list[str]) -> None:
    console, file, screen = console_and_screen(40)
    with LiveDisplay(console, lambda width: [Text("the end")], keep=keep):
        pass
    assert flush(file, screen) == left


NOISY = """
import logging, os, subprocess, sys, threading, time
from rich.console import Console
from rich.text import Text
from outlast.cluster.monitoring.terminal_footer import LiveDisplay
logging.basicConfig(format="%(message)s")  # its handler holds the stream as it is now
count = 0
def lines(width):
    global count
    count += 1
    return [Text(f"line {count}"), Text("=" * 10)]
def out(text):
    sys.stdout.write(text)
    print()
writers = {
    "out": out,
    "err": lambda text: sys.stderr.write(text + "\\n"),
    "log": logging.warning,
    "raw": lambda text: os.write(2, text.encode() + b"\\n"),
}
with LiveDisplay(Console(stderr=True), lines, period_s=0.001):
    def talk(name):
        for number in range(100):
            writers[name](f"{name} {number}")
            time.sleep(0.0005)
    threads = [threading.Thread(target=talk, args=(name,)) for name in writers]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    subprocess.run(["echo", "a child"])
    sys.stderr.write("no newline at the end")
print("after")
"""


WITHOUT_TERMINAL = """
import os, signal, sys
from rich.console import Console
from outlast.cluster.monitoring.console_progress import ProgressReporter
signal.signal(signal.SIGHUP, signal.SIG_IGN)
output, go = os.fdopen(int(sys.argv[1]), "w"), os.fdopen(int(sys.argv[2]))
with ProgressReporter("run", Console(stderr=True), keep=True) as reporter:
    reporter.print_line("here")
    go.readline()
    for number in range(2000):
        os.write(2, b"x" * 99 + b"\\n")  # more than a pipe holds
    reporter.print_line("gone")
    reporter({"event": "note", "text": "gone"})
output.write("continued")
output.flush()
os._exit(0)  # Python itself would complain that stderr cannot be flushed
"""


def on_a_terminal(script: str, *pipes: int) -> tuple[int, subprocess.Popen[bytes]]:
    """A script with a terminal of its own, and our end of that."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", script, *map(str, pipes)]
    environment = {**os.environ, "COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, cwd=ROOT, pass_fds=pipes
    )
    os.close(theirs)
    return ours, process


def test_a_process_survives_the_loss_of_its_terminal() -> None:
    """As when ssh drops, under `nohup`."""
    (received_from, report_to), (wait_on, go) = os.pipe(), os.pipe()
    ours, process = on_a_terminal(WITHOUT_TERMINAL, report_to, wait_on)
    os.close(report_to)
    os.close(wait_on)
    received = b""
    while b"here" not in received:
        received += os.read(ours, 65536)
    os.close(ours)
    os.write(go, b"\n")
    try:
        assert process.wait(60) == 0
        assert os.read(received_from, 100) == b"continued"
    finally:
        process.kill()
        process.wait()
        os.close(received_from)
        os.close(go)


def test_whole_lines_from_several_threads_on_a_real_terminal() -> None:
    ours, process = on_a_terminal(NOISY)
    received = bytearray()

    def read() -> None:
        try:
            while part := os.read(ours, 65536):
                received.extend(part)
        except OSError:  # the other end is closed
            return

    reading = threading.Thread(target=read)
    reading.start()
    assert process.wait(60) == 0
    reading.join()
    screen = Screen(80)
    screen.feed(received.decode().replace("\r\n", "\n"))
    names = ("out", "err", "log", "raw")
    for name in names:
        assert [line for line in screen.lines if line.startswith(name)] == [f"{name} {number}" for number in range(100)]
    others = [line for line in screen.lines[:402] if not line.startswith(names)]  # two pipes have no order
    assert sorted(others) == ["a child", "no newline at the end"]
    assert screen.lines[402:] == ["after", ""]


AFTER_THE_PANEL = """
import time
from rich.console import Console
from outlast.cluster.monitoring.console_progress import ProgressReporter
console = Console(stderr=True)
with ProgressReporter("run", console, keep=True) as reporter:
    reporter({"event": "phase", "name": "data", "launch": "a", "t": time.time()})
    reporter({"sender": "0001-0001", "event": "start", "t": time.time()})
    reporter({"sender": "0001-0001", "event": "stop", "step": 3, "t": time.time()})
reporter.print_line("stopped; to resume: outlast train run.yaml")
"""


def test_a_line_printed_after_the_end_stands_below_the_panel_that_was_kept() -> None:
    ours, process = on_a_terminal(AFTER_THE_PANEL)
    received = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while part := os.read(ours, 65536):
            received += part
    assert process.wait(60) == 0
    screen = Screen(80)
    screen.feed(received.decode().replace("\r\n", "\n"))
    assert "run: stopped; to resume: outlast train run.yaml" in screen.lines
    assert any(line.startswith("run  stopped, attempt 1") for line in screen.lines)


# -- progress reporter -------------------------------------------------------------------------------------------------


def test_a_superseded_event_ends_its_attempt_and_not_the_successor() -> None:
    with ProgressReporter("run", Console(file=io.StringIO(), width=200)) as reporter:
        reporter({"event": "phase", "name": "data", "launch": "a", "t": 0.0})
        reporter({"sender": "0001-0001", **start(2)})
        reporter({"sender": "0001-0001", "event": "superseded", "t": 3.0, "step": 4, "by": "0002-0002"})
        [attempt] = reporter._timeline.claimed_attempts
    assert str(attempt.id) == "0001-0001"
    assert attempt.final is not None


def test_plain_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    file = io.StringIO()
    with ProgressReporter("run", Console(file=file, width=200)) as reporter:
        for event in (
            {"event": "phase", "name": "data", "launch": "a", "t": 0.0},
            {"event": "phase", "name": "ray", "launch": "a", "t": 1.0, "num_steps": 9},
            {"sender": "0001-0001", **start(2)},
            {"sender": "0001-0001", **plan(3, 9)},
            *({"sender": "0001-0001", **event} for event in steps(1, 5, 4)),
            {"event": "no-room", "t": 5.0},
            {**failure(1, 9), "number": 1, "limit": 3, "ends": False, "excerpt": ""},
            {"sender": "0002-0002", **resume(12, 3)},
            {"sender": "0002-0002", **done(20, 9)},
        ):
            reporter(event)
    assert re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue()).splitlines() == [
        "run: preparing data",
        "run: starting workers",
        "run: workers are ready; starting with step 1",
        "run: step 1/9  loss 10.000  lr 0.001",
        "run: the cluster has no room for the workers yet; waiting",
        "run: worker died, rank 1: it was killed; restarting (failure 1 of 3)",
        "run: resumed from 0001-0001/checkpoint-3",
        "run: step 3/?  loss 2.000",
    ]


def test_the_last_step_is_printed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outlast.cluster.monitoring.console_progress.PLAIN_PERIOD_S", 0.0)
    file = io.StringIO()
    with ProgressReporter("run", Console(file=file, width=200)) as reporter:
        for event in (start(2), plan(3, 2), *steps(1, 2, 4), done(20, 2)):
            reporter({"sender": "0001-0001", **event})
    assert [line.partition("  ")[0] for line in file.getvalue().splitlines() if "step" in line] == [
        "run: workers are ready; starting with step 1",
        "run: step 1/2",
        "run: step 2/2",
    ]
