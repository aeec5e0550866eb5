"""A script that simply ends: the save that it began is committed, or standard error names what is lost. About 60 s."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError, StorageError
from outlast.checkpointing.run_store.catalog import read_catalog
from outlast.checkpointing.storage.local import LocalStorage
from tests.support.small_model import small_model, train_step

PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
import torch
from outlast.checkpointing import Checkpointer, LocalStorage, StorageError
from tests.support.small_model import small_model, train_step

class Slow(LocalStorage):
    seconds, failure = 1.0, None
    def put(self, path, chunks):
        if path.endswith("model.safetensors"):
            time.sleep(self.seconds)
            if self.failure:
                raise self.failure
        super().put(path, chunks)

torch.set_num_threads(1)
storage = Slow(Path(sys.argv[1]))
model, optimizer = small_model()

def begin(checkpointer, step=1):
    train_step(model, optimizer, step)
    assert checkpointer.async_save(step, model, optimizer, {"step": step})
"""


def script(folder: Path, body: str, *arguments: str) -> list[str]:
    path = folder / "script.py"
    path.write_text(PREAMBLE + body)
    return [sys.executable, str(path), str(folder / "runs"), *arguments]


def run(folder: Path, body: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    command = script(folder, body)
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def committed(folder: Path) -> list[int]:
    return sorted(item.ref.step for item in read_catalog(LocalStorage(folder / "runs"), "run").accepted)


IN_A_FUNCTION = "def work():\n    begin(Checkpointer(storage, 'run'))\nwork()\n"
ENDINGS = {
    "the-last-line": (IN_A_FUNCTION, 0),
    "sys.exit": (IN_A_FUNCTION + "sys.exit(3)\n", 3),
    "an-error": (IN_A_FUNCTION + "1 / 0\n", 1),
    "ctrl-c": (IN_A_FUNCTION + "os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n", -signal.SIGINT),
    "ctrl-c-in-wait": (
        "c = Checkpointer(storage, 'run')\nbegin(c)\nsignal.setitimer(signal.ITIMER_REAL, 0.2)\n"
        "signal.signal(signal.SIGALRM, signal.default_int_handler)\nc.wait()\n",
        -signal.SIGINT,
    ),
    "a-forked-child": (IN_A_FUNCTION + "if not os.fork():\n    sys.exit()\nos.wait()\n", 0),
    "a-child-that-leaves": (
        "with Checkpointer(storage, 'run') as c:\n    begin(c)\n    if not os.fork():\n        sys.exit(5)\n"
        "assert os.waitstatus_to_exitcode(os.wait()[1]) == 5\n",
        0,
    ),
}


@pytest.mark.parametrize("name", ENDINGS)
def test_what_was_begun_is_committed_however_the_script_ends(name: str, tmp_path: Path) -> None:
    body, code = ENDINGS[name]
    ended = run(tmp_path, body)
    assert ended.returncode == code, ended.stderr
    assert committed(tmp_path) == [1]
    assert "lost" not in ended.stderr


def test_a_save_that_fails_at_the_end_is_reported(tmp_path: Path) -> None:
    ended = run(tmp_path, "storage.failure = StorageError('the disk is gone')\n" + IN_A_FUNCTION)
    assert "run 'run': the save of step 1 is lost: the disk is gone" in ended.stderr
    assert committed(tmp_path) == []


def test_a_save_that_never_ends_is_waited_for_in_limits_and_reported(tmp_path: Path) -> None:
    ended = run(tmp_path, "storage.seconds = 600\nbegin(Checkpointer(storage, 'run', exit_wait_s=0.5))\n")
    assert ended.returncode == 0
    assert "the save of step 1 is lost: it was not committed within 0.5 s" in ended.stderr


@pytest.mark.parametrize("beginning", ["threading.Thread(target=late).start()", "atexit.register(late)"])
def test_a_save_that_begins_while_the_interpreter_ends_is_reported(beginning: str, tmp_path: Path) -> None:
    body = "import atexit, threading\ndef late():\n    time.sleep(0.5)\n    begin(Checkpointer(storage, 'run'))\n"
    assert "run 'run': the save of step 1 is lost: " in run(tmp_path, f"{body}{beginning}\n").stderr


def test_an_attempt_that_is_superseded_at_the_end_is_reported(tmp_path: Path) -> None:
    body = "begin(Checkpointer(storage, 'run', launch='a'))\nCheckpointer(storage, 'run', launch='b')\n"
    assert "step 1 is lost: a newer attempt has superseded" in run(tmp_path, body).stderr


def test_a_last_step_that_was_skipped_is_reported(tmp_path: Path) -> None:
    ended = run(tmp_path, "c = Checkpointer(storage, 'run')\nbegin(c, 1)\nbegin(c, 2)\nbegin(c, 3)\n")
    assert committed(tmp_path) == [1]
    assert "step 3 was not saved: the save of step 1 was in flight" in ended.stderr


RANKS = """
import torch.distributed as dist
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}-ranks", rank=rank, world_size=2)
storage.seconds = 2.0
checkpointer = Checkpointer(storage, "run", exit_wait_s=20)
begin(checkpointer)
"""


def on_two_ranks(folder: Path, body: str) -> list[tuple[int, str]]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    processes = [
        subprocess.Popen(script(folder, RANKS + body, str(rank)), stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=80)[1] for process in processes]
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def test_several_ranks_commit_together_at_their_ends(tmp_path: Path) -> None:
    ended = on_two_ranks(tmp_path, "if rank:\n    raise SystemExit(4)\n")
    assert [code for code, _ in ended] == [0, 4], ended
    assert committed(tmp_path) == [1]


def test_a_rank_whose_peer_was_killed_ends_and_reports(tmp_path: Path) -> None:
    (code, error), (killed, _) = on_two_ranks(tmp_path, "if rank:\n    os.kill(os.getpid(), signal.SIGKILL)\n")
    assert killed == -signal.SIGKILL
    assert "the save of step 1 is lost" in error
    assert committed(tmp_path) == []
    assert code is not None


# -- close and with ----------------------------------------------------------------------------------------------------


class Failing(LocalStorage):
    """Refuses weights."""

    def put(self, path: str, chunks: object) -> None:
        if path.endswith("model.safetensors"):
            raise StorageError("the disk is gone")
        super().put(path, chunks)  # type: ignore[arg-type]


def stepped() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model, optimizer = small_model()
    train_step(model, optimizer, 1)
    return model, optimizer


def test_close_commits_and_ends_saving(tmp_path: Path) -> None:
    model, optimizer = stepped()
    with Checkpointer(LocalStorage(tmp_path / "runs"), "run") as checkpointer:
        assert checkpointer.async_save(1, model, optimizer, {})
    assert committed(tmp_path) == [1]
    assert checkpointer.close(), "may be called again"
    with pytest.raises(ConfigError, match="step 2 cannot be saved: the checkpointer is closed"):
        checkpointer.save(2, model, optimizer, {})


def test_close_raises_what_is_lost(tmp_path: Path) -> None:
    model, optimizer = stepped()
    checkpointer = Checkpointer(Failing(tmp_path), "run")
    assert checkpointer.async_save(1, model, optimizer, {})
    with pytest.raises(StorageError, match="the disk is gone"):
        checkpointer.close()


@pytest.mark.parametrize("error", [ValueError("mine"), SystemExit(75), SystemExit(0), None])
def test_an_error_in_the_body_stays_and_the_loss_is_reported(
    error: BaseException | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, optimizer = stepped()
    with_code = isinstance(error, ValueError) or (isinstance(error, SystemExit) and error.code)
    expected = type(error) if error is not None and with_code else StorageError
    with pytest.raises(expected), Checkpointer(Failing(tmp_path), "run") as checkpointer:  # noqa: PT012
        checkpointer.async_save(1, model, optimizer, {})
        if error is not None:
            raise error
    reported = "the save of step 1 is lost: the disk is gone" in capsys.readouterr().err
    assert reported is bool(with_code)
