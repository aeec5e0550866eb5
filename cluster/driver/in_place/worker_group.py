"""Ray Train's worker group, whose lost workers are replaced one by one while the others go on in memory.

Ray Train ends the whole group when a worker is lost. This group hides a loss from Ray's controller, starts another
worker in its place, and hosts the roster through which the workers regroup (`trainers.regrouping`). It passes an error
on, and Ray Train then restarts the group from the newest checkpoint, when going on in memory is no help: an error that
outlast raised, no worker left, or a worker whose replacements end again and again. The roster lives here, in the
controller's process, because no worker outlives that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import ray
from ray.exceptions import RayActorError, RayError
from ray.train.backend import Backend
from ray.train.torch import TorchConfig

from outlast.cluster.driver.in_place.invitation import Invitation, accept
from outlast.cluster.fault_tolerance.failure_callback import FailureRecorder
from outlast.cluster.fault_tolerance.failure_cause import AnnouncedLoss, RankError, SilentWorker, unwrap_error
from outlast.cluster.ray_internals import (
    NoopDecision,
    PreemptionCallback,
    ResizeDecision,
    TrainController,
    Worker,
    WorkerGroup,
    WorkerStatus,
    bundle_to_remote_args,
    draining_nodes,
    loopback_rendezvous,
)
from outlast.trainers.regrouping.roster import Roster
from outlast.trainers.regrouping.roster_server import Loss, RosterServer

logger = logging.getLogger(__name__)
#: Replacements of one worker that end before they join the roster, after which the group is restarted instead.
MAX_EARLY_ENDS = 3
_RETRY_S, _KILL_S, _JOIN_POLL_S = 1.0, 5.0, 0.05
#: Pause before the next start of a spare that ended early so often.
_PAUSE_S = 60.0


@dataclass
class InPlaceGroup(TorchConfig):  # type: ignore[misc]
    """Settings of a group that goes on in memory.

    Attributes:
        num_spares: Workers beyond the ranks.
        is_elastic: Whether fewer workers may go on.
        min_workers: The fewest with which they go on.
        max_workers: The most to which they grow.
    """

    num_spares: int = 0
    is_elastic: bool = False
    min_workers: int = 1
    max_workers: int = 1

    @property
    def backend_cls(self) -> Any:
        """The class that connects the workers: none does, because they connect themselves, by generation."""
        return Backend


@dataclass
class _Slot:
    """One of Ray's ranks, and what runs there."""

    name: str = ""
    num_names: int = 0
    num_early_ends: int = 0
    is_replaced: bool = False  #: what runs there is lost, and a replacement on its way
    is_starting: bool = False  #: a worker is being started for it
    next: Any = None  #: a worker that is ready to take the place, and its name
    ended: Any = None  #: the status with which the lost one ended


class InPlaceWorkerGroup(WorkerGroup):  # type: ignore[misc]
    """Ray Train's worker group with a roster."""

    _worker_group_state: Any

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._settings: InPlaceGroup = self._train_run_context.backend_config
        self._slots: list[_Slot] = []
        self._num_polled = 0
        self._raised: tuple[int, Any] | None = None  # the newest error of code that outlast did not raise
        self._server: RosterServer | None = None
        self._changing = threading.RLock()
        self._ended = threading.Event()
        self._folder: Path | None = None

    def _init_train_context(self, workers: list[Any], sync_actor: Any) -> None:
        """Prepare the first workers for training, and invite them to the roster."""
        super()._init_train_context(workers, sync_actor)
        if self._server is None:
            self._open_roster(len(workers))
            for slot, worker in zip(self._slots, workers, strict=True):
                slot.name = self._invite(worker)

    def _open_roster(self, num_workers: int) -> None:
        settings, rendezvous = self._settings, loopback_rendezvous()
        self._folder = Path(unquote(urlsplit(rendezvous).path)).parent if rendezvous else None
        self._slots, self._num_polled = [_Slot() for _ in range(num_workers)], num_workers
        size = num_workers - settings.num_spares
        roster = Roster(
            size, is_elastic=settings.is_elastic, min_size=settings.min_workers, max_size=settings.max_workers
        )
        address, folder = ray.util.get_node_ip_address(), self._folder
        self._server = RosterServer(roster, address, meeting_folder=folder, on_loss=self._on_loss)

    def _invite(self, worker: Any) -> str:
        """Tell a worker which roster to join. Returns its name there."""
        assert self._server is not None
        rank = worker.distributed_context.world_rank
        slot = self._slots[rank]
        slot.num_names += 1
        name = f"worker-{rank}" + (f"-{slot.num_names}" if slot.num_names > 1 else "")
        is_first = rank < self._num_polled - self._settings.num_spares and not self._server.has_begun
        invitation = Invitation(
            self._server.address,
            self._server.key,
            name,
            rank if is_first else None,
            self._settings.backend,
            is_loopback=self._folder is not None,
        )
        ray.get(worker.execute_async(accept, invitation))
        return name

    # -- losses --------------------------------------------------------------------------------------------------------

    def _on_loss(self, loss: Loss) -> None:
        """Replace a worker as soon as the roster has lost it. One that raised an error reports that to Ray first."""
        rank = next((rank for rank, slot in enumerate(self._slots) if slot.name == loss.name), None)
        if rank is not None and not loss.has_raised:
            error = SilentWorker(f"its process was {loss.reason}") if loss.is_silent else RayActorError()
            self._replace(rank, error)

    def _poll_workers_and_collect_errors(self, timeout: float | None) -> list[Any]:
        """Return the workers' statuses, as Ray Train's controller is to see them."""
        self._take_next()
        self._leave_draining_nodes()
        statuses = super()._poll_workers_and_collect_errors(timeout)
        slots = self._slots[: len(statuses)]
        if ended := [each for each in statuses if not each.running and each.error is None]:
            # The run has ended as it should: a worker that was lost before has no part in it.
            return [
                ended[0] if slot.is_replaced or each.error else each for slot, each in zip(slots, statuses, strict=True)
            ]
        lost = [rank for rank, each in enumerate(statuses) if each.error is not None and not slots[rank].is_replaced]
        for rank in lost:
            slots[rank].ended = statuses[rank]
            if isinstance(unwrap_error(statuses[rank].error), RankError):
                self._raised = rank, statuses[rank]
        if lost and not self._may_go_on(lost, statuses):
            return self._with_hidden_errors(slots, statuses)
        for rank in lost:
            self._replace(rank, unwrap_error(statuses[rank].error))
        return [
            WorkerStatus(running=True) if slot.is_replaced else each for slot, each in zip(slots, statuses, strict=True)
        ]

    def _with_hidden_errors(self, slots: list[_Slot], statuses: list[Any]) -> list[Any]:
        """Return the statuses, with the errors that were hidden from Ray Train so far."""
        assert self._server is not None
        found = [
            slot.ended if slot.is_replaced and slot.ended else each for slot, each in zip(slots, statuses, strict=True)
        ]
        if self._server.raises_again and self._raised is not None:
            rank, status = self._raised
            if found[rank].error is None:  # the others report their consequence before its process ends
                found[rank] = status
        return found

    def _may_go_on(self, lost: list[int], statuses: list[Any]) -> bool:
        """Return whether the other workers may go on in memory without those that were lost just now."""
        assert self._server is not None
        is_left = any(
            each.error is None for slot, each in zip(self._slots, statuses, strict=False) if not slot.is_replaced
        )
        are_losses = all(_is_loss(statuses[rank].error) for rank in lost)
        too_early = [rank for rank in lost if self._ends_early(self._slots[rank])]
        is_in_vain = too_early and self._server.is_waiting  # a spare that cannot start does no harm
        return is_left and are_losses and not is_in_vain and not self._server.has_given_up

    def _ends_early(self, slot: _Slot) -> bool:
        """Count a replacement that did not join the roster. Returns whether it is one too many in a row."""
        assert self._server is not None
        slot.num_early_ends = 0 if self._server.has_joined(slot.name) else slot.num_early_ends + 1
        return slot.num_early_ends >= MAX_EARLY_ENDS

    def _replace(self, rank: int, error: BaseException) -> None:
        """Start another worker in the place of a lost one, if none is being started."""
        with self._changing:
            slot = self._slots[rank]
            if slot.is_replaced or self._ended.is_set():
                return
            slot.is_replaced = True
            lost = self.get_workers()[rank]
            self._record_loss(lost, error)
            # Ray's table shows why a process died, unless it was told to kill it before.
            killing = threading.Timer(0 if isinstance(error, SilentWorker) else _KILL_S, _kill, (lost.actor,))
            killing.daemon = True
            killing.start()
        self._fill(rank, lost.placement_group_bundle_index)

    def _record_loss(self, lost: Any, error: BaseException) -> None:
        for callback in self._callbacks:
            if isinstance(callback, FailureRecorder):
                callback.worker_lost(lost.metadata, error)

    # -- new workers ---------------------------------------------------------------------------------------------------

    def _fill(self, rank: int, bundle: int | None, then: Callable[[], None] = lambda: None) -> None:
        """Start a worker for a slot in a thread, unless one is being started: in a bundle, or where there is room."""
        with self._changing:
            if self._slots[rank].is_starting:
                return
            self._slots[rank].is_starting = True

        pause_s = _PAUSE_S if self._slots[rank].num_early_ends >= MAX_EARLY_ENDS else 0.0

        def start() -> None:
            self._ended.wait(pause_s)
            while not self._ended.is_set():
                try:
                    self._start_worker(rank, bundle)
                except Exception:  # it or its node is lost, too: the next one
                    logger.info("worker %s was not started", rank, exc_info=True)
                else:
                    then()
                    return
                self._ended.wait(_RETRY_S)

        threading.Thread(target=start, name=f"outlast-worker-{rank}", daemon=True).start()

    def _start_worker(self, rank: int, bundle: int | None) -> None:
        """Start a worker and its part in training; until there is room, this waits."""
        resources, state = self._worker_group_context.resources_per_worker, self._worker_group_state
        size = len(self._slots)
        if bundle is not None:
            group, options = state.placement_group_handle.placement_group, {"placement_group_bundle_indices": [bundle]}
            [worker] = self._create_workers(1, group, resources, **options, starting_world_rank=rank, world_size=size)
        else:
            environment = self._get_worker_runtime_env(self._train_run_context.run_config.worker_runtime_env)
            actor = ray.remote(runtime_env=environment, **bundle_to_remote_args(resources))(self._worker_cls).remote()
            bundle = state.workers[rank].placement_group_bundle_index if rank < self._num_polled else None
            metadata = ray.get(actor.get_metadata.remote())
            unranked = Worker(actor, metadata, resources, placement_group_bundle_index=bundle)
            [worker] = self._assign_worker_ranks([unranked], rank, size)
        self._init_train_context([worker], state.sync_actor)
        name = self._invite(worker)
        ray.get(worker.actor.run_train_fn.remote(self._worker_group_context.train_fn_ref))
        with self._changing:
            self._slots[rank].next = (worker, name)
            if self._ended.is_set():
                ray.kill(worker.actor)

    def _take_next(self) -> None:
        """Poll the workers that were started from now on, in place of those that were lost."""
        with self._changing:
            state = self._worker_group_state
            for rank, slot in enumerate(self._slots):
                if slot.next is None or (rank < self._num_polled and not slot.is_replaced) or rank > self._num_polled:
                    continue
                worker, name = slot.next
                workers = [*state.workers[:rank], worker, *state.workers[rank + 1 :]]
                state = replace(state, workers=workers)
                self._num_polled = len(workers)
                self._world_rank_to_ongoing_poll.pop(rank, None)
                slot.name, slot.next, slot.ended, slot.is_replaced, slot.is_starting = name, None, None, False, False
            self._worker_group_state = state

    def _leave_draining_nodes(self) -> None:
        """Start a worker elsewhere for each whose node is about to be lost; once it waits as a spare, it takes over."""
        draining: Collection[str] = ()
        with suppress(RayError, RuntimeError, OSError):  # asked again at the next poll
            draining = draining_nodes()
        if not draining:
            return
        for rank, (slot, worker) in enumerate(zip(self._slots, self.get_workers(), strict=False)):
            if worker.metadata.node_id in draining and not slot.is_starting and not slot.is_replaced:
                self._fill(rank, None, then=partial(self._hand_over, rank))

    def _hand_over(self, rank: int) -> None:
        """Give the seat of a worker to the one that was started for it, once that has joined the roster."""
        assert self._server is not None
        slot = self._slots[rank]
        name = slot.next[1] if slot.next else ""
        while not self._ended.is_set() and slot.next and not self._server.has_joined(name):
            time.sleep(_JOIN_POLL_S)
        with self._changing:
            if self._ended.is_set() or slot.is_replaced or not slot.next:
                return
            slot.is_replaced = True
            lost = self.get_workers()[rank]
        self._record_loss(lost, AnnouncedLoss("its node is about to be lost"))
        self._server.expel(slot.name, "its node is about to be lost")
        _kill(lost.actor)

    def grow(self, num_workers: int) -> None:
        """Start more workers, which join the others in a later generation. Workers that are lost are none fewer."""
        with self._changing:
            first = len(self._slots)
            self._slots += [_Slot() for _ in range(num_workers - first)]
        for rank in range(first, num_workers):
            self._fill(rank, None)

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
            self._ended.set()
            for slot in self._slots:
                if slot.next is not None:
                    _kill(slot.next[0].actor)
        if self._server is not None:
            self._server.close()


def _kill(actor: Any) -> None:
    with suppress(RayError):
        ray.kill(actor)


def _is_loss(error: BaseException) -> bool:
    """Return whether an error ends one worker only: its process died, or its code raised what outlast did not."""
    return isinstance(unwrap_error(error), RayActorError | RankError)


class InPlaceController(TrainController):  # type: ignore[misc]
    """Ray Train's controller of such a group. The group itself handles announced losses and changes of its size."""

    worker_group_cls = InPlaceWorkerGroup
    _worker_group_callbacks_to_propagate: list[Any]
    _scaling_policy: Any

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._worker_group_callbacks_to_propagate = [
            each for each in self._worker_group_callbacks_to_propagate if not isinstance(each, PreemptionCallback)
        ]
        self._scaling_policy = GrowingPolicy(self._scaling_policy, lambda number: self._worker_group.grow(number))


class GrowingPolicy:
    """A scaling policy of Ray Train, under which a running group grows without a restart.

    It never shrinks one: after a loss the group goes on with fewer workers by itself.
    """

    def __init__(self, policy: Any, grow: Callable[[int], None]) -> None:
        self._policy, self._grow = policy, grow

    def __getattr__(self, name: str) -> Any:
        return getattr(self._policy, name)

    def make_decision_for_running_worker_group(self, **state: Any) -> Any:
        """Pass a decision to grow on to the group, and tell Ray Train's controller to do nothing."""
        decision = self._policy.make_decision_for_running_worker_group(**state)
        if isinstance(decision, ResizeDecision):
            self._grow(decision.num_workers)
            return NoopDecision()
        return decision
