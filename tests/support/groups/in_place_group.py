"""A training group without Ray that goes on in memory: ranks, spares, and the roster in the test's own process.

`run_in_place_group` never ends a rank; what kills one is a `Strike`, a control that does so at a phase of a step.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.fault_injection import InjectedFault, write_record
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.factory import open_storage
from outlast.trainers import in_place
from outlast.trainers.attempt import Assignment
from outlast.trainers.distributed import process_group
from outlast.trainers.distributed.world import World
from outlast.trainers.in_place import Environment, run_in_place
from outlast.trainers.loop.rank_activity import StepPhase
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.regrouping import peer_state
from outlast.trainers.regrouping.membership import Member
from outlast.trainers.regrouping.roster import Roster
from outlast.trainers.regrouping.roster_server import RosterServer
from tests.support.groups.worker_group import Ended, Quiet, _context

LIMIT_S = 60.0


class Place(Enum):
    """Where in a step a process is struck."""

    DATA = "data"
    FORWARD = "forward"
    BACKWARD = "backward"  #: once the last backward pass is about to begin
    COLLECTIVE = "in the collective"  #: as it enters the exchange of gradients, while the others are in it
    BEFORE_UPDATE = "between collective and optimizer step"
    OPTIMIZER = "in the optimizer step"
    APPLIED = "after the optimizer step"
    EVALUATION = "evaluation"
    SAVE = "save"
    REFORMING = "while re-forming"  #: as the second generation connects
    COPYING = "while the state is copied"

    @property
    def phase(self) -> StepPhase | None:
        """The phase of the step loop; None for places between two generations."""
        return {
            Place.DATA: StepPhase.DATA,
            Place.FORWARD: StepPhase.COMPUTE,
            Place.BACKWARD: StepPhase.EXCHANGE,
            Place.COLLECTIVE: StepPhase.EXCHANGE,
            Place.BEFORE_UPDATE: StepPhase.UPDATE,
            Place.OPTIMIZER: StepPhase.UPDATE,
            Place.APPLIED: StepPhase.UPDATE,
            Place.EVALUATION: StepPhase.EVALUATE,
            Place.SAVE: StepPhase.SAVE,
        }.get(self)


@dataclass(frozen=True)
class Strike:
    """What befalls the process that first comes to a place of a step as a rank. `record` shows that it did.

    Without a signal it is an exception.
    """

    place: Place
    step: int  #: steps done
    rank: int
    record: str
    signal: signal.Signals | None = signal.SIGKILL

    def here(self) -> None:
        if not write_record(self.record, {"rank": self.rank}):
            return
        if self.signal is None:
            raise InjectedFault("struck")
        os.kill(os.getpid(), self.signal)


@dataclass
class Striking(Quiet):
    """A control that strikes its own process."""

    strikes: Sequence[Strike] = ()
    seen: list[dict[str, Any]] = field(default_factory=list)

    def at(self, phase: StepPhase, step: int) -> None:
        rank = dist.get_rank() if dist.is_initialized() else 0
        for strike in self.strikes:
            if (strike.rank, strike.step, strike.place.phase) != (rank, step, phase) or Path(strike.record).exists():
                continue
            if strike.place is Place.COLLECTIVE:
                _strike_in(strike, "all_to_all_single", "all_reduce")
            elif strike.place is Place.OPTIMIZER:
                register_optimizer_step_pre_hook(lambda *_, strike=strike: strike.here())
            elif strike.place is Place.APPLIED:
                register_optimizer_step_post_hook(lambda *_, strike=strike: strike.here())
            else:
                strike.here()


def _arm_regrouping(strikes: Sequence[Strike]) -> None:
    """Arm the strikes at places between two generations."""
    send_piece, connect = peer_state._send_piece, process_group.connect
    for strike in strikes:
        if strike.place is Place.COPYING:

            def send(world: World, *rest: Any, strike: Strike = strike) -> None:
                if world.rank == strike.rank:
                    strike.here()
                send_piece(world, *rest)

            setattr(peer_state, "_send_piece", send)  # noqa: B010 - mypy refuses another signature
        if strike.place is Place.REFORMING:

            def form(
                connections: Any, meeting: str, number: int, rank: int, *rest: Any, strike: Strike = strike
            ) -> None:
                if (number, rank) == (1, strike.rank):
                    strike.here()
                connect(connections, meeting, number, rank, *rest)

            setattr(in_place, "connect", form)  # noqa: B010


def _strike_in(strike: Strike, *names: str) -> None:
    def struck(*_: object, **__: object) -> None:
        strike.here()

    for name in names:
        setattr(dist, name, struck)


@dataclass
class InPlaceGroup:
    """A running group.

    Attributes:
        processes: Ranks of the first generation, then spares.
    """

    processes: Sequence[BaseProcess]
    pipes: list[Any]
    server: RosterServer

    def ended(self, limit_s: float = LIMIT_S, *, is_left: bool = False) -> list[Ended | None]:
        """How each process ended; None for one that has not, such as the one that is left stopped."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and sum(process.is_alive() for process in self.processes) > is_left:
            time.sleep(0.02)
        return [self._end(process, pipe) for process, pipe in zip(self.processes, self.pipes, strict=True)]

    def _end(self, process: BaseProcess, pipe: Any) -> Ended | None:
        if process.is_alive():
            return None
        said = Ended(0)
        with contextlib.suppress(EOFError):
            said = pipe.recv() if pipe.poll() else said
        return Ended(process.exitcode or 0, said.outcome, said.error)


@contextmanager
def in_place_group(
    assignment: Assignment,
    storage: Storage,
    size: int,
    *,
    num_spares: int = 0,
    control: Quiet | None = None,
    is_elastic: bool = False,
    silence_s: float = 5.0,
    meets_by_files: bool = False,
    device: str = "cpu",
    backend: str = "gloo",
) -> Iterator[InPlaceGroup]:
    """Start a group; at the end whatever still runs is killed."""
    folder = Path(storage.url) / f".in-place-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    meeting_folder = folder if meets_by_files else None
    roster = Roster(size, is_elastic=is_elastic)
    server = RosterServer(roster, silence_s=silence_s, meeting_folder=meeting_folder)
    processes, pipes = [], []
    for number in range(size + num_spares):
        mine, theirs = _context.Pipe(duplex=False)
        rank = number if number < size else None
        place = (f"process-{number}", rank, server.address, server.key, str(folder / f"{number}.log"))
        arguments = (
            *place,
            assignment,
            storage.url,
            control or Quiet(),
            theirs,
            dict(os.environ),
            device.format(number),
            backend,
        )
        processes.append(_context.Process(target=_work, args=arguments, daemon=True))
        pipes.append((mine, theirs))
    for process in processes:
        process.start()
    for _, theirs in pipes:
        theirs.close()
    try:
        yield InPlaceGroup(processes, [mine for mine, _ in pipes], server)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join()
        server.close()


def _work(
    name: str,
    rank: int | None,
    address: tuple[str, int],
    key: bytes,
    log: str,
    assignment: Assignment,
    url: str,
    control: Quiet,
    pipe: Any,
    environment: dict[str, str],
    device: str,
    backend: str,
) -> None:
    os.environ.update(environment)
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), 2)
    torch.set_num_threads(1)
    _arm_regrouping(control.strikes if isinstance(control, Striking) else ())
    answer: Ended
    try:
        outcome: Outcome = run_in_place(
            assignment,
            open_storage(url),
            lambda: Member(address, key, name, rank),
            Environment(control, torch.device(device), backend),
            is_spare=rank is None,
        )
        answer = Ended(0, outcome=outcome)
    except OutlastError as error:
        answer = Ended(0, error=error)
    except InjectedFault:
        answer = Ended(1)
    with contextlib.suppress(OSError):
        pipe.send(answer)
    for thread in threading.enumerate():
        assert thread.daemon or thread is threading.main_thread() or thread.name == "journal compaction", thread
