"""Fault injection by named point, step and rank, for tests and `outlast demo`.

A fault is a real one, such as SIGKILL to the own process, and leaves a record first, so that a test can prove that it
fired. Unless `arm` was called, nothing here has any effect.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from outlast.checkpointing.storage.base import Storage, read_bytes
from outlast.checkpointing.storage.factory import open_storage

_PAUSE_S = 5.0


class FaultPoint(Enum):
    """Where a fault can fire, in the order in which a step passes the points."""

    ACCUMULATING = "accumulating"  #: after the first micro-batch of several
    STEP = "step"  #: after the gradients are in, before the weights change
    EVALUATING = "evaluating"
    BEFORE_SNAPSHOT = "before-snapshot"
    AFTER_SNAPSHOT = "after-snapshot"  #: of a save in the background
    WHILE_WRITING = "while-writing"
    BEFORE_MANIFEST = "before-manifest"
    AFTER_MANIFEST = "after-manifest"
    AFTER_RETENTION = "after-retention"


class FaultAction(Enum):
    """What a fault does."""

    EXCEPTION = "exception"
    SIGKILL = "sigkill"
    HANG = "hang"  #: the thread blocks forever
    PAUSE = "pause"  #: the thread sleeps for five seconds
    STOP = "stop"  #: SIGSTOP to the process; a test may send SIGCONT


class InjectedFault(RuntimeError):
    """Raised by `FaultAction.EXCEPTION`."""


@dataclass(frozen=True, slots=True)
class FaultSpec:
    """One fault, which fires once.

    `step` is the step being computed or saved. `record` is a file that does not exist yet, on this machine or, as a
    URL, in an object store; it is written when the fault fires.
    """

    point: FaultPoint
    step: int
    rank: int
    action: FaultAction
    record: str


_armed: list[FaultSpec] = []


def arm(faults: Sequence[FaultSpec], rank: int) -> None:
    """Arm the faults for `rank` in this process, replacing earlier ones."""
    _armed[:] = [fault for fault in faults if fault.rank == rank]


def fault_point(point: FaultPoint, step: int) -> None:
    """Fire the fault armed for this point, if it has not fired before. Raises InjectedFault for `EXCEPTION`."""
    for fault in _armed:
        body = {**asdict(fault), "point": point.value, "action": fault.action.value}
        if (fault.point, fault.step) == (point, step) and write_record(fault.record, body):
            if fault.action is FaultAction.SIGKILL:
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault.action is FaultAction.HANG:
                threading.Event().wait()
            elif fault.action is FaultAction.PAUSE:
                time.sleep(_PAUSE_S)
                return
            elif fault.action is FaultAction.STOP:
                os.kill(os.getpid(), signal.SIGSTOP)
                return
            raise InjectedFault(f"injected at {point.value}, step {step}, rank {fault.rank}")


def write_record(record: str, body: Mapping[str, Any]) -> bool:
    """Record that a fault fires now. Returns False if the record exists: the fault has fired before."""
    text = json.dumps({**body, "t": time.time(), "pid": os.getpid()})
    if "://" in record:
        if read_record(record) is not None:
            return False
        storage, name = _open_record(record)
        storage.put(name, [text.encode()])
        return True
    try:
        with Path(record).open("x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True


def read_record(record: str) -> dict[str, Any] | None:
    """Return the record of a fault; None if it has not fired."""
    storage, name = _open_record(record)
    with suppress(FileNotFoundError):
        return dict(json.loads(read_bytes(storage, name)))
    return None


def _open_record(record: str) -> tuple[Storage, str]:
    directory, _, name = record.rpartition("/")
    return open_storage(directory or "/"), name
