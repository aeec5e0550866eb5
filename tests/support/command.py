"""Runs `outlast …` as a process of its own, forked from one that has done the imports, which take most of its time.

Several may run at a time.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

OUTLAST = str(Path(sys.executable).with_name("outlast"))
LIMIT_S = 100


class Command:
    """`command("train", "run.yaml", cwd=…)` runs the entry point of the command line and returns how it ended."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="outlast-command-"))
        self._folder.chmod(0o755)
        home = Path(__file__).parents[2]
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.support.command"], stdin=subprocess.PIPE, text=True, cwd=home
        )
        self._lock, self._numbers = threading.Lock(), count()

    def __call__(
        self,
        *arguments: str,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        user: int | None = None,
        memory_bytes: int | None = None,
        fresh: bool = False,
        before: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """
        Args:
            arguments: What stands after `outlast`.
            cwd: Where.
            env: More variables.
            user: A number; root runs it as somebody else.
            memory_bytes: So much address space may be added to what the imports took.
            fresh: Run the installed script, not forked, for what is read while importing.
            before: Python that it runs first.
        """
        environment = {**os.environ, **(env or {})}
        if fresh:
            return subprocess.run(
                [OUTLAST, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=LIMIT_S
            )
        folder = self._folder / str(next(self._numbers))
        folder.mkdir()
        asked = [arguments, str(cwd), environment, user, memory_bytes, before, str(folder)]
        assert self._server.stdin is not None
        with self._lock:
            print(json.dumps(asked), file=self._server.stdin, flush=True)
        done = folder / "code"
        while not done.exists():
            assert self._server.poll() is None, "the server died"
            time.sleep(0.01)
        said = [(folder / name).read_text() for name in ("out", "err")]
        return subprocess.CompletedProcess(["outlast", *arguments], int(done.read_text()), *said)

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(10)
        shutil.rmtree(self._folder)


def _serve() -> None:
    import boto3  # noqa: F401
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel  # noqa: F401

    import outlast.checkpointing.storage.object_store
    import outlast.cluster.drills.drill
    import outlast.cluster.driver.launch
    import outlast.cluster.jobs.supervisor
    import outlast.cluster.kubernetes.render
    import outlast.cluster.monitoring.report.report
    import outlast.trainers.predict  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait
    for line in sys.stdin:
        if not os.fork():
            _wait(*json.loads(line))


def _wait(*asked: Any) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    folder = Path(asked[-1])
    pid = os.fork()
    if not pid:
        _run(*asked)
    _, status = os.waitpid(pid, 0)
    (folder / "ended").write_text(str(os.waitstatus_to_exitcode(status)))
    (folder / "ended").rename(folder / "code")
    os._exit(0)


def _run(
    arguments: list[str],
    cwd: str,
    env: dict[str, str],
    user: int | None,
    memory_bytes: int | None,
    before: str,
    folder: str,
) -> Any:
    from outlast.cluster.cli.main import main

    signal.alarm(LIMIT_S)
    exec(before)
    for number, name in enumerate(("out", "err"), 1):
        os.dup2(os.open(f"{folder}/{name}", os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    if memory_bytes is not None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_bytes,) * 2)
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    sys.argv = ["outlast", *arguments]
    code: Any = 0
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    _serve()
