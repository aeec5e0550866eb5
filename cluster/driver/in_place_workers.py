"""Ray Train's worker group, whose lost workers are replaced one by one while the others go on in memory.

Ray Train ends the whole group when a worker is lost. This group hides a loss from Ray's controller, starts another
worker in its place, and hosts the roster through which the workers regroup (`trainers.regrouping`). It passes an error
on, and Ray Train then restarts the group from the newest checkpoint, when going on in memory is no help: an error that
outlast raised, no worker left, or a worker whose replacements end again and again. The roster lives here, in the
controller's process, because no worker outlives that.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import ray
from ray.exceptions import RayActorError, RayError
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from outlast.cluster.driver.in_place_invitation import Invitation, accept
from outlast.cluster.fault_tolerance.failure_callback import FailureRecorder
from outlast.cluster.fault_tolerance.failure_cause import RankError, SilentWorker, unwrap_error
from outlast.cluster.ray_internals import (
    PreemptionCallback,
    TrainController,
    WorkerGroup,
    WorkerStatus,
    loopback_rendezvous,
)
from outlast.trainers.regrouping.roster import Roster
from outlast.trainers.regrouping.roster_server import Loss, RosterServer

#: Replacements of one worker that end within `_EARLY_S` of their start, after which the group is restarted instead.
MAX_EARLY_ENDS = 3
_EARLY_S = 30.0
_RETRY_S = 1.0
_KILL_S = 5.0


@dataclass
class InPlaceGroup(TorchConfig):  # type: ignore[misc]
    """Settings of a group that goes on in memory.

    Attributes:
        num_spares: Workers beyond the ranks.
        is_elastic: Whether fewer workers may go on.
        min_workers: The fewest with which they go on.
    """

    num_spares: int = 0
    is_elastic: bool = False
    min_workers: int = 1

    @property
    def backend_cls(self) -> Any:
        """The class that connects the workers: none does, because they connect themselves, by generation."""
        return Backend


@dataclass
class _Slot:
    """One of Ray's ranks, and what runs there."""

    name: str = ""
    started_at: float = field(default_factory=time.monotonic)
    num_early_ends: int = 0
    is_replaced: bool = False  #: a replacement is on its way
    replacement: Any = None  #: a worker that is ready to take the place of the lost one
    ended: Any = None  #: the status with which the lost one ended


class InPlaceWorkerGroup(WorkerGroup):  # type: ignore[misc]
    """Ray Train's worker group with a roster."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._settings: InPlaceGroup = self._train_run_context.backend_config
        self._slots: list[_Slot] = []
        self._server: RosterServer | None = None
        self._changing = threading.RLock()
        self._num_names: Counter[int] = Counter()
        self._is_closing = False
        self._host = ""
        self._folder: Path | None = None

    def _init_train_context(self, workers: list[Any], sync_actor: Any) -> None:
        """Prepare workers for training, and invite them to the roster."""
        super()._init_train_context(workers, sync_actor)
        if self._server is None:
            self._open_roster(len(workers))
        ray.get([worker.execute_async(accept, self._invite(worker)) for worker in workers])

    def _open_roster(self, num_workers: int) -> None:
        settings, rendezvous = self._settings, loopback_rendezvous()
        self._folder = Path(unquote(urlsplit(rendezvous).path)).parent if rendezvous else None
        self._slots = [_Slot() for _ in range(num_workers)]
        size, least = num_workers - settings.num_spares, settings.min_workers
        roster = Roster(size, is_elastic=settings.is_elastic, min_size=least)
        self._server = RosterServer(
            roster, ray.util.get_node_ip_address(), meeting_folder=self._folder, on_loss=self._on_loss
        )

    def _invite(self, worker: Any) -> Invitation:
        assert self._server is not None
        rank = worker.distributed_context.world_rank
        is_first = rank < len(self._slots) - self._settings.num_spares and not self._server.has_begun
        self._num_names[rank] += 1
        name = f"worker-{rank}" + (f"-{self._num_names[rank]}" if self._num_names[rank] > 1 else "")
        self._slots[rank].name = name
        return Invitation(
            self._server.address, self._server.key, name, rank if is_first else None, self._folder is not None
        )

    # -- losses --------------------------------------------------------------------------------------------------------

    def _on_loss(self, loss: Loss) -> None:
        """Replace a worker as soon as the roster has lost it. One that raised an error reports that to Ray first."""
        rank = next((rank for rank, slot in enumerate(self._slots) if slot.name == loss.name), None)
        if rank is not None and not loss.has_raised:
            self._replace(
                rank, SilentWorker(f"its process was {loss.reason}") if "silent" in loss.reason else RayActorError()
            )

    def _poll_workers_and_collect_errors(self, timeout: float | None) -> list[Any]:
        """Return the workers' statuses, as Ray Train's controller is to see them."""
        self._take_replacements()
        statuses = super()._poll_workers_and_collect_errors(timeout)
        ended = next((each for each in statuses if not each.running and each.error is None), None)
        if ended is not None:  # the run has ended as it should: a worker that was lost before has no part in it
            return [ended if each.error is not None else each for each in statuses]
        lost = [
            rank
            for rank, status in enumerate(statuses)
            if status.error is not None and not self._slots[rank].is_replaced
        ]
        for rank in lost:
            self._slots[rank].ended = statuses[rank]
        if lost and not self._may_go_on(lost, statuses):
            return self._passed_on(statuses)
        for rank in lost:
            self._replace(rank, unwrap_error(statuses[rank].error))
        return [
            WorkerStatus(running=True) if self._slots[rank].is_replaced else status
            for rank, status in enumerate(statuses)
        ]

    def _may_go_on(self, lost: list[int], statuses: list[Any]) -> bool:
        """Return whether the other workers may go on in memory without those that were lost just now."""
        assert self._server is not None
        is_left = any(status.error is None for rank, status in enumerate(statuses) if not self._slots[rank].is_replaced)
        are_losses = all(_is_loss(statuses[rank].error) for rank in lost)
        too_early = [rank for rank in lost if self._ends_early(rank)]
        return is_left and are_losses and not too_early and not self._server.has_given_up

    def _passed_on(self, statuses: list[Any]) -> list[Any]:
        """Return the errors that were hidden so far, too: the group is about to be restarted."""
        return [
            slot.ended if slot.is_replaced and slot.ended else status
            for slot, status in zip(self._slots, statuses, strict=True)
        ]

    def _ends_early(self, rank: int) -> bool:
        """Count a replacement that has ended soon. Returns whether it is one too many."""
        slot = self._slots[rank]
        is_early = self._num_names[rank] > 1 and time.monotonic() - slot.started_at < _EARLY_S
        slot.num_early_ends = slot.num_early_ends + 1 if is_early else 0
        return slot.num_early_ends >= MAX_EARLY_ENDS

    def _replace(self, rank: int, error: BaseException) -> None:
        with self._changing:
            if self._slots[rank].is_replaced or self._is_closing:
                return
            self._slots[rank].is_replaced = True
        lost = self.get_workers()[rank]
        for callback in self._callbacks:
            if isinstance(callback, FailureRecorder):
                callback.worker_lost(lost.metadata, error)
        is_silent = isinstance(error, SilentWorker)
        threading.Thread(
            target=self._start_replacement, args=(rank, lost), kwargs={"is_silent": is_silent}, daemon=True
        ).start()

    def _start_replacement(self, rank: int, lost: Any, *, is_silent: bool) -> None:
        """Start another worker in the place of a lost one; until there is room, this waits."""
        # Ray's table shows why a process died, unless it was told to kill it before.
        killing = threading.Timer(_KILL_S * (not is_silent), _kill, (lost.actor,))
        killing.daemon = True
        killing.start()
        while not self._is_closing:
            with suppress(RayError, RuntimeError):  # it is lost, too: the next one
                [worker] = self._create_workers(
                    1,
                    self._worker_group_state.placement_group_handle.placement_group,
                    self._worker_group_context.resources_per_worker,
                    placement_group_bundle_indices=[lost.placement_group_bundle_index],
                    starting_world_rank=rank,
                    world_size=len(self._slots),
                    replica_group_size=1,
                )
                self._init_train_context([worker], self._worker_group_state.sync_actor)
                ray.get(worker.actor.run_train_fn.remote(self._worker_group_context.train_fn_ref))
                with self._changing:
                    self._slots[rank].replacement = worker
                    if self._is_closing:
                        ray.kill(worker.actor)
                return
            time.sleep(_RETRY_S)

    def _take_replacements(self) -> None:
        """Poll the replacements from now on, in place of the workers that were lost."""
        with self._changing:
            for rank, slot in enumerate(self._slots):
                if slot.replacement is not None:
                    lost = self.get_workers()[rank]
                    self._worker_group_state = self._worker_group_state.replace_workers([lost], [slot.replacement])
                    self._world_rank_to_ongoing_poll.pop(rank, None)
                    slot.replacement, slot.ended, slot.is_replaced = None, None, False
                    slot.started_at = time.monotonic()

    # -- the end -------------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """End all workers."""
        self._close()
        super().shutdown()

    def abort(self) -> None:
        """End all workers at once."""
        self._close()
        super().abort()

    def _close(self) -> None:
        with self._changing:
            self._is_closing = True
            for slot in self._slots:
                if slot.replacement is not None:
                    ray.kill(slot.replacement.actor)
        if self._server is not None:
            self._server.close()


def _kill(actor: Any) -> None:
    with suppress(RayError):
        ray.kill(actor)


def _is_loss(error: BaseException) -> bool:
    """Return whether an error ends one worker only: its process died, or its code raised what outlast did not."""
    return isinstance(unwrap_error(error), RayActorError | RankError)


class InPlaceController(TrainController):  # type: ignore[misc]
    """Ray Train's controller of such a group. The group itself handles announced losses."""

    worker_group_cls = InPlaceWorkerGroup

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._worker_group_callbacks_to_propagate = [
            each for each in self._worker_group_callbacks_to_propagate if not isinstance(each, PreemptionCallback)
        ]
