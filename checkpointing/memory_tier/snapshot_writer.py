"""Snapshots of this rank's part of the state, written while training goes on.

The state is copied into shared memory during the next forward and backward pass, as for a save, and a thread computes
the digest, publishes the snapshot and sends a copy to the buddy. Two places are used in turn: a snapshot is begun only
when the one before it is complete on every rank, so that there is always a step that all have. Every rank calls every
method that says so, in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from outlast.checkpointing.errors import OutlastError, StorageError
from outlast.checkpointing.fault_injection import FaultPoint, fault_point
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.memory_tier.snapshot import Snapshot, StoredShard, data_digest
from outlast.checkpointing.memory_tier.snapshot_folder import SharedBuffer, SnapshotFolder
from outlast.checkpointing.save.background_save import BackgroundSave
from outlast.checkpointing.save.staging import HostCopy, begin_copy, bytes_needed, free_bytes, pin
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.state.shards import LocalShard
from outlast.checkpointing.state.train_state import TrainState

_CHUNK_BYTES = 64 * 2**20
NUM_PLACES = 2


@dataclass
class _Place:
    """Memory for one snapshot, and the snapshot in it."""

    file: SharedBuffer | None = None
    snapshot: Snapshot | None = None

    @property
    def memory(self) -> SharedBuffer:
        if self.file is None:
            raise RuntimeError("no memory is reserved for this snapshot")
        return self.file


@dataclass(frozen=True, slots=True)
class SnapshotCosts:
    """What a snapshot took from training.

    Attributes:
        step: The step.
        blocked_s: Seconds that training waited between two steps.
        fenced_s: Seconds that it waited for the copy within the next step.
        processor_s: Seconds of a processor, in another thread.
        num_bytes: Size of this rank's snapshot.
    """

    step: int
    blocked_s: float
    fenced_s: float
    processor_s: float
    num_bytes: int


class SnapshotWriter:
    """Takes this rank's snapshots. Every rank builds one.

    Args:
        folder: Where to keep them.
        ranks: The ranks.
        attempt: This attempt.
        declaration: Digest of what determines the run's numbers.
        shift: Distance to the buddy; 0 for none.
        num_sharing: The ranks on this node, this one included.
    """

    def __init__(
        self,
        folder: SnapshotFolder,
        ranks: RankGroup,
        attempt: AttemptId,
        declaration: str,
        shift: int,
        num_sharing: int,
    ) -> None:
        self._folder, self._ranks, self._attempt, self._declaration = folder, ranks, attempt, declaration
        self._shift, self._num_sharing = shift, num_sharing
        self._group = ranks.duplicate() if shift else None
        self._own, self._others = ([_Place() for _ in range(NUM_PLACES)] for _ in range(2))
        self._buddy_bytes = 0
        self._num_taken = self._num_files = 0
        self._current: BackgroundSave | None = None
        self._processor_s, self._num_bytes = 0.0, 0
        self._is_reserved = False

    # -- memory --------------------------------------------------------------------------------------------------------

    def reserve(self, train_state: TrainState, *, share: float) -> str | None:
        """Reserve the memory, or return why it is too small for that. Every rank calls it.

        Args:
            train_state: The state.
            share: Largest share of the free memory to take.
        """
        own = bytes_needed(_parts(train_state)[0])
        sizes = self._ranks.gather(own)
        self._buddy_bytes = sizes[self._ranks.rank - self._shift] if self._shift else 0
        problem = self._shortage(own, share)
        if problem is None:
            try:
                self._fit(self._own[0], own, is_on_device=train_state.is_on_device)
                self._fit(self._others[0], self._buddy_bytes)
            except OSError as error:
                problem = f"the memory for snapshots cannot be reserved: {error.strerror}"
        problems = [item for item in self._ranks.gather(problem) if item is not None]
        self._is_reserved = not problems
        if problems:
            self._release()
        return problems[0] if problems else None

    def _shortage(self, own: int, share: float) -> str | None:
        needed = NUM_PLACES * (own + self._buddy_bytes) * self._num_sharing
        free = min(self._folder.free_bytes(), free_bytes())
        if needed <= share * free:
            return None
        return f"the snapshots of a node's {self._num_sharing} workers need {needed:,} bytes; {free:,} bytes are free"

    def _fit(self, place: _Place, num_bytes: int, *, is_on_device: bool = False) -> torch.Tensor:
        """Give a place at least so many bytes. Raises OSError."""
        if place.file is None or place.file.buffer.numel() < num_bytes:
            if place.file is not None:
                place.file.remove()
            name = f"{self._attempt}.{self._ranks.rank}-{self._num_files}.data"
            place.file, self._num_files = SharedBuffer(self._folder.path / name, num_bytes), self._num_files + 1
            if is_on_device:
                pin(place.memory.buffer)
        return place.memory.buffer

    def _release(self) -> None:
        for place in (*self._own, *self._others):
            if place.file is not None:
                place.file.remove()
            place.file = place.snapshot = None

    # -- taking --------------------------------------------------------------------------------------------------------

    @property
    def is_idle(self) -> bool:
        """Whether this rank's newest snapshot is complete, its copy included, so that another one may begin."""
        return self._is_reserved and self._current is None

    @property
    def is_in_flight(self) -> bool:
        return self._current is not None

    def take(self, step: int, train_state: TrainState, encode: Callable[[], str], began: float) -> None:
        """Begin the snapshot after `step` steps, of all ranks; every rank is idle.

        Args:
            step: Steps done.
            train_state: The state.
            encode: Returns the loop state; called in a thread, on rank 0.
            began: Since when training waits, by the monotonic clock.

        Raises:
            OSError: The memory cannot be reserved.
        """
        if self._num_taken == 1:  # complete everywhere, so that what earlier attempts left is no longer needed
            self._folder.remove_before(self._attempt)
        number = self._num_taken % NUM_PLACES
        place, other = self._own[number], self._others[number]
        self._num_taken += 1
        self._withdraw(place)
        parts, snapshot = self._describe(step, train_state)
        self._num_bytes = snapshot.num_bytes
        buffer = self._fit(place, snapshot.num_bytes, is_on_device=train_state.is_on_device)
        self._fit(other, self._buddy_bytes)
        snapshot = replace(snapshot, data=place.memory.path.name)
        weights = {f"w/{name}" for name in train_state.changed_by_forward(snapshot.weights)}
        now = weights if train_state.optimizer is not None else parts
        copy = begin_copy(buffer, parts, now)
        work = lambda: self._finish(copy, place, other, snapshot, encode)  # noqa: E731
        self._current = BackgroundSave(step, copy, began, work)
        self._current.blocked_s = time.monotonic() - began

    def _describe(self, step: int, train_state: TrainState) -> tuple[dict[str, LocalShard], Snapshot]:
        parts, weights, moments = _parts(train_state)
        snapshot = Snapshot(
            attempt=self._attempt,
            step=step,
            rank=self._ranks.rank,
            world_size=self._ranks.size,
            holder=self._ranks.rank,
            declaration=self._declaration,
            data="",
            num_bytes=bytes_needed(parts),
            weights=weights,
            moments=moments,
            optimizer=train_state.describe_optimizer() or "",
        )
        return parts, snapshot

    def _finish(
        self, copy: HostCopy, place: _Place, other: _Place, snapshot: Snapshot, encode: Callable[[], str]
    ) -> bool:
        """Complete a snapshot, in its thread."""
        began = time.thread_time()
        copy.run()
        fault_point(FaultPoint.AFTER_SNAPSHOT, snapshot.step)
        state = encode() if self._ranks.rank == 0 else ""
        digest = data_digest(place.memory.buffer[: snapshot.num_bytes])
        place.snapshot = replace(snapshot, state=state, xxh3_128=digest)
        self._folder.publish(place.snapshot)
        if self._group is not None:
            self._exchange(place.snapshot, place.memory.buffer, other)
        self._processor_s = time.thread_time() - began
        return True

    def _exchange(self, mine: Snapshot, data: torch.Tensor, place: _Place) -> None:
        """Send a snapshot to the buddy, and keep that of the rank whose buddy this one is."""
        self._withdraw(place)
        text = torch.frombuffer(bytearray(mine.to_json()), dtype=torch.uint8)
        size = torch.empty(1, dtype=torch.int64)
        self._swap(torch.tensor([text.numel()]), size)
        received = torch.empty(int(size), dtype=torch.uint8)
        self._swap(text, received)
        theirs = Snapshot.parse(received.numpy().tobytes())
        buffer = self._fit(place, theirs.num_bytes)
        for begin in range(0, max(mine.num_bytes, theirs.num_bytes), _CHUNK_BYTES):
            end = begin + _CHUNK_BYTES
            self._swap(data[: mine.num_bytes][begin:end], buffer[: theirs.num_bytes][begin:end])
        theirs.check(buffer)
        place.snapshot = theirs.held_by(self._ranks.rank, place.memory.path.name)
        self._folder.publish(place.snapshot)

    def _swap(self, outgoing: torch.Tensor, incoming: torch.Tensor) -> None:
        if self._group is None:
            raise RuntimeError("there is no buddy")
        rank, size, group = self._ranks.rank, self._ranks.size, self._group.group
        works = []
        if outgoing.numel():
            works.append(dist.isend(outgoing, group=group, group_dst=(rank + self._shift) % size))
        if incoming.numel():
            works.append(dist.irecv(incoming, group=group, group_src=(rank - self._shift) % size))
        for work in works:
            if work is not None:
                work.wait()

    def _withdraw(self, place: _Place) -> None:
        if place.snapshot is not None:
            self._folder.withdraw(place.snapshot)
            place.snapshot = None

    def collect(self, timeout_s: float = 0.0) -> SnapshotCosts | None:
        """Return the costs of the snapshot that has ended, once.

        Raises:
            StorageError: It failed. No other one may begin.
        """
        current = self._current
        if current is None or not current.has_ended(timeout_s):
            return None
        self._current = None
        try:
            current.join()
        except (OSError, RuntimeError, OutlastError) as error:
            self._is_reserved = False
            raise StorageError(f"the snapshot after step {current.step} failed: {error}") from error
        return SnapshotCosts(current.step, current.blocked_s, current.copy.fenced_s, self._processor_s, self._num_bytes)

    def stop(self, timeout_s: float) -> None:
        """Wait for the snapshot in flight, for a while, and take no more."""
        self._is_reserved = False
        if self._current is not None:
            self._current.copy.wait()
            self._current.copy.close()
            self._current.has_ended(timeout_s)


def _parts(
    train_state: TrainState,
) -> tuple[dict[str, LocalShard], dict[str, StoredShard], dict[str, StoredShard]]:
    """Return all that this rank holds, in the order of the data, and where its weights and its moments lie there."""
    parts: dict[str, LocalShard] = {}
    stored: list[dict[str, StoredShard]] = []
    for prefix, shards in (("w", train_state.weights), ("m", train_state.moments())):
        placed = {}
        for name, part in shards.items():
            placed[name] = StoredShard.of(part, bytes_needed(parts))
            parts[f"{prefix}/{name}"] = part
        stored.append(placed)
    return parts, stored[0], stored[1]
