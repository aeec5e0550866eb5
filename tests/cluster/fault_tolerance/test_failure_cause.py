"""Tables: the cause among the ranks' errors, and when to save before an announced loss."""

from __future__ import annotations

import json
import pickle
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckFailedError

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.format.layout import launch_dir
from outlast.checkpointing.run_store.attempt_history import AttemptOutcome, read_attempt_history
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.local import LocalStorage
from outlast.cluster.driver.coordinator_client import CoordinatorClient
from outlast.cluster.fault_tolerance import coordinator as coordinator_module
from outlast.cluster.fault_tolerance import failure_callback as failure_recorder
from outlast.cluster.fault_tolerance import failure_cause as failures
from outlast.cluster.fault_tolerance.coordinator import CoordinatorHandle
from outlast.cluster.fault_tolerance.failure_callback import FailureRecorder, own_log
from outlast.cluster.fault_tolerance.failure_cause import (
    Cause,
    Death,
    Failure,
    RankError,
    classify,
    explain_death,
)
from outlast.cluster.fault_tolerance.preemption_saves import PreemptionWatch
from outlast.cluster.fault_tolerance.restart_policy import RestartLimits
from outlast.trainers.host_info import death_evidence, num_oom_kills

RESET = RuntimeError("[pair.cc:537] Read error [127.0.0.1]:37608: Connection reset by peer. gloo")
BUG = ValueError("the user's own\nlabels are wrong")
DIED = Death(1, "The actor is dead because its worker process has died")
NODE = Death(1, "The actor died because its node has died")
CUDA = RuntimeError("Traceback …\ntorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has …")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to …")
ENDED = Death(1, "Memory on the node (IP: 10.0.0.4, ID: 7f) was 15.21GB used / 16.00GB limit (0.950625)")


@pytest.mark.parametrize(
    ("errors", "deaths", "drained", "expected"),
    [
        ({0: RESET}, [], False, None),
        ({0: RESET}, [DIED], False, (Cause.WORKER_DIED, 1)),
        ({0: RESET}, [NODE], False, (Cause.NODE_LOST, 1)),
        ({0: RESET}, [NODE], True, (Cause.PREEMPTED, 1)),
        ({0: RESET}, [DIED], True, (Cause.PREEMPTED, 1)),
        ({0: RESET, 2: BUG}, [], False, (Cause.ERROR, 2)),
        ({0: BUG}, [], True, (Cause.ERROR, 0)),
        ({0: BUG, 1: BUG}, [], False, (Cause.ERROR, 0)),
        ({0: BUG}, [DIED], False, (Cause.WORKER_DIED, 1)),
        ({3: RESET}, [DIED, NODE], False, (Cause.NODE_LOST, 1)),
        ({0: RESET, 3: CUDA, 5: CUDA}, [DIED], False, (Cause.OUT_OF_DEVICE_MEMORY, 3)),
        ({0: RESET, 2: HOST}, [DIED], False, (Cause.OUT_OF_HOST_MEMORY, 2)),
        ({0: RESET}, [ENDED], False, (Cause.OUT_OF_HOST_MEMORY, 1)),
        ({0: CUDA}, [NODE], False, (Cause.NODE_LOST, 1)),
        ({0: CUDA}, [], True, (Cause.OUT_OF_DEVICE_MEMORY, 0)),
    ],
)
def test_the_cause_is_found_among_its_echoes(
    errors: dict[int, BaseException], deaths: list[Death], drained: bool, expected: tuple[Cause, int] | None
) -> None:
    found = classify(errors, deaths, drained=drained)
    assert (found and (found.cause, found.rank)) == expected


def test_the_message_is_kept() -> None:
    assert classify({2: BUG}, [], drained=False) == Failure(Cause.ERROR, 2, "labels are wrong")


def raised(text: str, step: int) -> RankError:
    """Return a worker's report of an error that this file raised, through a library, after `step` steps."""
    try:
        json.loads(text)
    except ValueError as error:
        error.add_note(f"after step {step}")
        return RankError.of(error)
    raise AssertionError("it is no JSON")


def test_an_error_of_the_users_code_shows_its_lines() -> None:
    error = UserExceptionWithTraceback(raised("{", 7), traceback_str="Ray's own\nwords")
    found = classify({0: RESET, 1: pickle.loads(pickle.dumps(error))}, [], drained=False)
    assert found is not None
    assert (found.cause, found.rank) == (Cause.ERROR, 1)
    assert re.fullmatch(rf"JSONDecodeError: Expecting .* \({__file__}, line \d+\) \(after step 7\)", found.message)
    assert found.excerpt.splitlines()[-1].strip() == "json.loads(text)"
    assert "json/decoder.py" not in found.excerpt
    assert "json/decoder.py" in raised("{", 7).traceback_text


def test_a_hundred_tracebacks_are_one_message() -> None:
    found = classify({rank: RESET if rank < 3 else CUDA for rank in range(100)}, [], drained=False)
    assert found is not None
    workers = [{"rank": rank, "host": f"gpu-{rank}", "log": f"/logs/worker-{rank}.err"} for rank in range(100)]
    text = found.description
    assert text.startswith("torch.OutOfMemoryError: CUDA out of memory.")
    assert "; to fix it, spread the model" in text
    assert "halve train.micro_batch" in text
    assert found.where(workers) == "rank 3 and 96 more, log gpu-3:/logs/worker-3.err"
    assert "\n" not in text


def test_the_kernels_count_of_processes_killed_for_memory() -> None:
    count = num_oom_kills()
    assert count is None or count >= 0


WORKER = {"rank": 1, "pid": 4711, "host": "gpu-3", "node": "7f", "oom_kills": 2}


@pytest.mark.parametrize(
    ("worker", "evidence", "words", "cause"),
    [
        (
            WORKER,
            (2, ""),
            ["SIGKILL", "no crash report", "the kernel killed nothing there for lack of memory"],
            Cause.WORKER_DIED,
        ),
        (WORKER, (3, ""), ["the kernel killed", "low on memory"], Cause.OUT_OF_HOST_MEMORY),
        (WORKER, (2, "Segmentation fault"), ["crashed in native code: Segmentation fault"], Cause.WORKER_DIED),
        (WORKER, (None, None), ["killed by a signal, crashed in native code, or out of memory"], Cause.WORKER_DIED),
        ({**WORKER, "oom_kills": None}, (2, ""), ["SIGKILL", "whether memory ran out is unknown"], Cause.WORKER_DIED),
    ],
    ids=["sigkill", "out-of-memory", "segmentation-fault", "no-answer", "no-count"],
)
def test_a_silent_death_names_the_process_and_what_its_host_shows(
    worker: dict[str, Any], evidence: tuple[int | None, str | None], words: list[str], cause: Cause
) -> None:
    message = explain_death(worker, *evidence)
    assert "worker process 4711 on gpu-3" in message
    assert all(word in message for word in words)
    found = classify({0: RESET, 1: ActorDiedError()}, [Death(1, message)], drained=False)
    assert found is not None
    assert (found.cause, found.message) == (cause, message)


@pytest.mark.parametrize(
    ("number", "crash"), [(signal.SIGKILL, ""), (signal.SIGSEGV, "Segmentation fault"), (signal.SIGABRT, "Aborted")]
)
def test_the_crash_that_a_process_leaves_in_its_log(number: signal.Signals, crash: str, tmp_path: Path) -> None:
    log = tmp_path / "worker.err"
    code = "import faulthandler, os, sys; faulthandler.enable(); os.kill(os.getpid(), int(sys.argv[1]))"
    with log.open("wb") as file:
        ended = subprocess.run([sys.executable, "-c", code, str(int(number))], stderr=file, check=False)
    assert ended.returncode == -number
    assert death_evidence(str(log)) == (num_oom_kills(), crash)
    assert death_evidence(str(tmp_path / "none")) == (num_oom_kills(), None)


def test_rays_error_of_a_dead_process_names_its_pid() -> None:
    context = ActorDiedErrorContext(actor_id=bytes(16), pid=812, error_message=DIED.message)
    found = classify({1: ActorDiedError(context)}, [], drained=False)
    assert found is not None
    assert found.message.startswith("worker process 812 left no error message")


def test_rays_own_word_for_a_dead_actor() -> None:
    found = classify({1: ActorDiedError()}, [], drained=False)
    assert found is not None
    assert found.cause is Cause.WORKER_DIED


def test_a_worker_that_cannot_be_reached_just_now_is_no_cause_yet() -> None:
    unreachable = ActorUnavailableError("The actor is temporarily unavailable", None)
    for error in (unreachable, WorkerHealthCheckFailedError("failed its health check", failure=unreachable)):
        assert classify({0: RESET, 1: error}, [], drained=False) is None
        found = classify({0: RESET, 1: error}, [NODE], drained=False)
        assert found is not None
        assert found.cause is Cause.NODE_LOST
    died = WorkerHealthCheckFailedError("failed its health check", failure=ActorDiedError())
    found = classify({1: died}, [], drained=False)
    assert found is not None
    assert found.cause is Cause.WORKER_DIED


def test_preemptions_are_no_failures() -> None:
    assert [cause for cause in Cause if not cause.is_failure] == [Cause.PREEMPTED]


def test_a_save_at_the_notice_and_one_at_the_end() -> None:
    watch = PreemptionWatch({"ours"}, margin_s=3)
    asked = [(now, watch.check({"ours": 130.0, "theirs": 101.0} if now >= 100 else {}, now)) for now in range(98, 132)]
    reasons = {now: reason for now, reason in asked if reason}
    assert reasons == {100: "a node is about to be lost", 127: "a node's last seconds"}


def test_the_last_save_begins_the_earlier_the_longer_saves_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coordinator_module, "find_coordinator", lambda launch: CoordinatorHandle(None))
    client = CoordinatorClient("no-launch", 0, 1)
    client.watch(["ours"])
    assert client._watch is not None
    client.progress({"event": "commit", "step": 8, "seconds": 80.0})  # before the notice: the storage was slow
    reasons = {}
    for now in range(100, 222):
        if reason := client._watch.check({"ours": 220.0}, now):
            reasons[now] = reason
        if now == 120:
            client.progress({"event": "commit", "step": 9, "seconds": 20.0})
    assert reasons == {100: "a node is about to be lost", 187: "a node's last seconds"}


def test_an_unknown_deadline_and_one_too_near_for_two_saves() -> None:
    assert [PreemptionWatch({"a"}).check({"a": 0.0}, now) for now in (1, 2)] == ["a node is about to be lost"] * 2
    watch = PreemptionWatch({"a", "b"}, margin_s=3)
    assert watch.check({"a": 11.0}, 10) == "a node is about to be lost"
    assert watch.check({"a": 11.0}, 10.5) == "a node's last seconds"
    assert watch.check({"a": 11.0, "b": 99.0}, 10.6) == "a node is about to be lost"
    assert watch.check({"a": 11.0, "b": 99.0}, 10.7) is None


def test_the_log_of_a_rank_is_kept_where_it_would_go_with_its_driver(tmp_path: Path) -> None:
    here = tmp_path / f"{failures.OWN_RAY}x" / "worker.err"
    here.parent.mkdir()
    here.write_text("terminate called after throwing\n")
    mine = [{"rank": 1, "host": "here", "log": str(here)}]
    recorder = FailureRecorder(str(tmp_path), "run", "one", RestartLimits(), "")
    log, others = recorder._write_log("0001-aaaa", {1: ActorDiedError()}, mine, 1)
    assert others == ""
    assert "terminate called" in Path(log).read_text()
    gone = Failure(Cause.WORKER_DIED, 1, "the worker died")
    assert (gone.where(mine, log), gone.where(mine)) == (f"rank 1, log {log}", "rank 1")
    assert own_log([{"rank": 1, "host": "far", "log": "/tmp/ray/worker.err"}], 1) == ""


def test_a_file_without_the_first_rank_is_called_what_it_is(tmp_path: Path) -> None:
    recorder = FailureRecorder(str(tmp_path), "run", "one", RestartLimits(), "")
    errors = {0: raised("nothing", step=3), 1: ActorDiedError()}
    found = classify(errors, [], drained=False)
    assert found is not None
    assert (found.cause, found.rank) == (Cause.WORKER_DIED, 1)
    assert "left no error message: killed by a signal, crashed in native code, or out of memory" in found.message
    log, others = recorder._write_log("0001-aaaa", errors, [], 1)
    assert log == ""
    assert Path(others).read_text().startswith("rank 0\n")
    assert found.where([], log, others) == f"rank 1, errors of the other ranks {others}"
    here = tmp_path / f"{failures.OWN_RAY}x" / "worker.err"
    here.parent.mkdir()
    here.write_text("Fatal Python error: Segmentation fault\n")
    log, others = recorder._write_log("0001-aaaa", errors, [{"rank": 1, "host": "here", "log": str(here)}], 1)
    assert others == ""
    assert Path(log).read_text().startswith("rank 1, the end of its log\nFatal Python error: Segmentation fault\n")
    assert "rank 0\n" in Path(log).read_text()


def test_groups_that_fail_before_their_claim_in_the_same_words_count_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failure_recorder, "find_coordinator", lambda launch: CoordinatorHandle(None))
    monkeypatch.setattr(failure_recorder, "find_deaths", lambda workers: [])
    storage, launch = LocalStorage(tmp_path), "20260101-000000-a"
    storage.put(f"{launch_dir('run', launch)}/alive.json", [b'{"settings": "now"}'])
    recorder = FailureRecorder(storage.url, "run", launch, RestartLimits(), "now")
    for number in range(3):
        recorder.after_worker_group_start(None)
        if number == 0:
            Checkpointer(storage, "run", launch=launch)
        for _ in range(2):
            recorder.after_worker_group_poll_status(SimpleNamespace(errors={0: RuntimeError("no such device")}))
    for thread in threading.enumerate():
        if thread.name.startswith("Thread-") and "_find_cause" in thread.name:
            thread.join()
    attempts = read_attempt_history(RunStore(storage, "run"), live=launch)
    assert [item.end.outcome for item in attempts] == [AttemptOutcome.FAILED] * 3
    assert [item.attempt is not None for item in attempts] == [True, False, False]
