"""Snapshots of a sharded training in the memory of its nodes: when to take one, and the restart from one.

No rank of a sharded training holds what another has lost, so a lost process costs the steps since the newest
checkpoint. Snapshots lie in shared memory, which outlives the process, and their copies on another node. They must
never end a run: where one fails, training goes on without them.
"""

from __future__ import annotations

import copy
import json
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import xxhash
from torch import nn

from outlast.checkpointing.errors import ConfigError, OutlastError, StorageError
from outlast.checkpointing.memory_tier.buddies import buddy_shift
from outlast.checkpointing.memory_tier.schedule import SnapshotSchedule
from outlast.checkpointing.memory_tier.snapshot_folder import SnapshotFolder
from outlast.checkpointing.memory_tier.snapshot_reader import restore_snapshot
from outlast.checkpointing.memory_tier.snapshot_writer import SnapshotWriter
from outlast.checkpointing.regrouping_checkpointer import RegroupingCheckpointer
from outlast.checkpointing.run_store import events
from outlast.checkpointing.state.loop_state import decode_state, encode_state
from outlast.checkpointing.state.train_state import TrainState
from outlast.trainers.config.train import Parallel
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.distributed.world import World

#: Largest share of the free memory that `auto` takes.
_AUTO_SHARE = 0.5
_STOP_S = 60.0


def keeps_snapshots(config: TrainingConfig) -> bool:
    """Return whether a run may keep snapshots in memory."""
    return config.scale.parallel is Parallel.FSDP and config.checkpoint.memory is not False


class MemorySnapshots:
    """The snapshots of one attempt. Every rank calls every method, in the same order, unless it says otherwise.

    Args:
        config: The settings.
        launch: The launch.
        world: This rank.
        checkpointer: Holds the claim; its declaration must be complete.
        write: Records an event, on rank 0.

    Raises:
        ConfigError: The settings require snapshots, and there is no memory for them.
    """

    def __init__(
        self,
        config: TrainingConfig,
        launch: str,
        world: World,
        checkpointer: RegroupingCheckpointer,
        write: Callable[[events.Event], None],
    ) -> None:
        self._setting, self._world, self._checkpointer = config.checkpoint.memory, world, checkpointer
        self._write = write
        every = self._setting if type(self._setting) is int else None
        self._schedule = SnapshotSchedule(every)
        self._folder: SnapshotFolder | None = None
        self._writer: SnapshotWriter | None = None
        fault = None
        try:
            self._folder = SnapshotFolder(f"{checkpointer.store.storage.url}/{config.name}", launch)
        except StorageError as error:
            fault = error.message
        nodes = world.gather(world.node or socket.gethostname())
        self._declaration = world.broadcast(_digest(checkpointer.declaration))
        if faults := [item for item in world.gather(fault) if item is not None]:
            self._turn_off(faults[0])
            return
        assert self._folder is not None
        shift, num_sharing = buddy_shift(nodes), nodes.count(nodes[world.rank])
        self._writer = SnapshotWriter(self._folder, world, checkpointer.attempt, self._declaration, shift, num_sharing)

    def _turn_off(self, reason: str) -> None:
        """Go on without snapshots. Raises ConfigError if the settings require them."""
        if self._folder is not None:
            self._folder.close(remove=False)
        self._folder = self._writer = None
        if self._setting != "auto":
            raise ConfigError(f"checkpoint.memory: {reason}", hint="set checkpoint.memory: auto, or false")
        self._write(events.SnapshotsOffEvent(reason=reason))

    # -- restart -------------------------------------------------------------------------------------------------------

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], list[Any]] | None:
        """Restore the newest snapshots of this launch, unless a checkpoint is newer, and continue from them.

        Returns:
            The loop state, and the events that may not be in any journal; None if there are none.

        Raises:
            StorageError: What cannot be read may be newer; or the weights are a mixture now.
        """
        if self._folder is None:
            return None
        began, checkpointer = time.monotonic(), self._checkpointer
        catalogue, attempt = checkpointer.catalogue, checkpointer.attempt
        newest = catalogue.accepted[0].ref if catalogue.accepted else None
        if newest in catalogue.doubtful:
            restored, reasons = None, [f"two starts from {newest} failed, and snapshots continue it"]
        else:
            train_state = TrainState(model, optimizer, checkpointer.naming)
            above = newest.step if newest else -1
            restored, reasons = restore_snapshot(self._folder, self._world, train_state, self._declaration, above)
        if reasons:
            self._write(events.SnapshotsUnusedEvent(reasons=tuple(reasons)))
        if restored is None:
            self._folder.remove_before(attempt)
            return None
        checkpointer.continue_in_memory(restored.plan.step)
        checkpointer.naming = train_state.naming
        self._folder.remove_before(attempt, keep=(restored.plan.attempt, restored.plan.step))
        self._folder.begin_start(restored.plan.attempt, restored.plan.step, attempt)
        memory = events.MemorySource(
            attempt=str(restored.plan.attempt),
            moved=tuple(rank for rank, source in enumerate(restored.plan.sources) if rank != source),
            num_bytes=restored.num_bytes,
            seconds=round(time.monotonic() - began, 4),
        )
        self._write(events.ResumeEvent(step=restored.plan.step, source=None, committed_at=None, memory=memory))
        body = decode_state(restored.state.encode(), "the snapshot")
        return body["loop"], body["kept"]

    # -- taking --------------------------------------------------------------------------------------------------------

    def first_step_done(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Reserve the memory, now that the optimizer has its state. Raises ConfigError as the constructor."""
        if self._writer is None or self._folder is None:
            return
        self._folder.end_starts()
        share = _AUTO_SHARE if self._setting == "auto" else 1.0
        if problem := self._writer.reserve(self._state(model, optimizer), share=share):
            self._turn_off(problem)

    def requests(self) -> tuple[int, bool]:
        """Return whether this rank can begin a snapshot, as a number, and on rank 0 whether one is due."""
        is_idle = self._writer is not None and self._writer.is_idle
        return int(is_idle), is_idle and self._world.rank == 0 and self._schedule.is_due()

    def step_done(self, seconds: float) -> None:
        """Record the duration of a step, and collect the snapshot that has ended. Any rank may call it."""
        writer = self._writer
        if writer is None:
            return
        self._schedule.step_done(seconds, is_disturbed=writer.is_in_flight)
        try:
            costs = writer.collect()
        except StorageError as error:
            self._write(events.SnapshotsOffEvent(reason=error.message))
            return
        if costs is None:
            return
        before = self._schedule.interval
        shares_processor = self._world.device.type == "cpu"
        self._schedule.ended(costs.blocked_s, costs.fenced_s + (costs.processor_s if shares_processor else 0.0))
        if abs(self._schedule.interval - before) > 0.1 * before:
            event = events.SnapshotIntervalEvent(
                steps=self._schedule.interval,
                blocked_s=round(costs.blocked_s, 4),
                fenced_s=round(costs.fenced_s, 4),
                processor_s=round(costs.processor_s, 4),
                num_bytes=costs.num_bytes,
            )
            self._write(event)

    def take(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loop_state: Mapping[str, Any],
        kept: Iterable[events.Event],
        began: float,
    ) -> None:
        """Begin a snapshot after `step` steps. Since `began`, by the monotonic clock, training waits for it."""
        assert self._writer is not None
        state = {name: copy.copy(value) for name, value in loop_state.items()}
        kept = list(kept)

        def encode() -> str:
            return encode_state({"loop": state, "kept": [event.to_json() for event in kept]})

        self._schedule.begun()
        try:
            self._writer.take(step, self._state(model, optimizer), encode, began)
        except (OSError, OutlastError) as error:
            self._writer.stop(0.0)
            self._write(events.SnapshotsOffEvent(reason=f"the snapshot after step {step} failed: {error}"))

    def _state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainState:
        return TrainState(model, optimizer, self._checkpointer.naming)

    def close(self, *, is_over: bool) -> None:
        """Take no more snapshots; remove them if the launch is over."""
        if self._writer is not None:
            self._writer.stop(_STOP_S)
        if is_over:
            self._world.gather(None)  # a rank that still writes would fail
        if self._folder is not None:
            self._folder.close(remove=is_over)
            self._folder = self._writer = None


def _digest(declaration: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(declaration, sort_keys=True, default=str).encode())
