"""A command on a terminal of its own, where keys such as Ctrl-C have their effect."""

from __future__ import annotations

import fcntl
import os
import pty
import subprocess
import termios
from collections.abc import Mapping, Sequence

_TIMEOUT_S = 60.0


def on_terminal(
    command: Sequence[str], prompt: str = "", keys: str = "", environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Run a command, and press `keys` once the screen shows `prompt`. Return its exit code and all that it wrote."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, **(environment or {})},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    screen = ""
    while True:
        try:
            chunk = os.read(ours, 4096)
        except OSError:  # the terminal is closed once the process has ended
            break
        if not chunk:
            break
        screen += chunk.decode(errors="replace")
        if keys and prompt in screen:
            os.write(ours, keys.encode())
            keys = ""
    os.close(ours)
    return process.wait(_TIMEOUT_S), screen
