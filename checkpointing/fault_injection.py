"""Faults on purpose, addressed by named point, step and rank. Inert unless armed.

Tests and `outlast demo` use them to die at the worst moment: the process kills itself with a real SIGKILL at the named
point, after leaving a record, so whoever asked for the fault can prove that it fired.
"""

from __future__ import annotations

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
    """Where a fault can strike, in the order in which a step passes them."""

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
    """What happens."""

    EXCEPTION = "exception"
    SIGKILL = "sigkill"
    HANG = "hang"  #: the thread never goes on
    PAUSE = "pause"  #: the thread goes on after five seconds
    STOP = "stop"  #: SIGSTOP to the process; somebody else may send SIGCONT


class InjectedFault(RuntimeError):
    """Raised by `FaultAction.EXCEPTION`."""


@dataclass(frozen=True, slots=True)
class FaultSpec:
    """One fault, which fires once.

    Attributes:
        point: Where.
        step: At which step: the one being computed, or the one being saved.
        rank: On which rank.
        action: What happens.
        record: A file that must not exist yet, on this machine or, as a URL, in an object store; it is written when
            the fault fires.
    """

    point: FaultPoint
    step: int
    rank: int
    action: FaultAction
    record: str


_armed: list[FaultSpec] = []


def arm(faults: Sequence[FaultSpec], rank: int) -> None:
    """Arms this process with the faults meant for `rank`, in place of any it had."""
    _armed[:] = [fault for fault in faults if fault.rank == rank]


def fault_point(point: FaultPoint, step: int) -> None:
    """Fires the fault that is armed for this place, if it has not fired before.

    Raises:
        InjectedFault: That is what the fault does.
    """
    for fault in _armed:
        if (fault.point, fault.step) == (point, step) and _record(fault):
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


def _record(fault: FaultSpec) -> bool:
    """Leaves the proof; False if it is there already, for then the fault has fired."""
    return write_record(fault.record, {**asdict(fault), "point": fault.point.value, "action": fault.action.value})


def write_record(record: str, body: Mapping[str, Any]) -> bool:
    """Says that a fault strikes now, and what it is; False if one has struck before."""
    text = json.dumps({**body, "t": time.time(), "pid": os.getpid()})
    if "://" in record:
        if read_record(record) is not None:
            return False
        storage, name = _place(record)
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
    """What the fault left when it struck; None if it has not."""
    storage, name = _place(record)
    with suppress(FileNotFoundError):
        return dict(json.loads(read_bytes(storage, name)))
    return None


def _place(record: str) -> tuple[Storage, str]:
    folder, _, name = record.rpartition("/")
    return open_storage(folder or "/"), name
