"""Restore from snapshots in memory: the newest step of which every rank's part is on some node, or nothing.

Each rank takes its part from its own node; else a rank on the node that holds it sends it. Every byte is verified where
it lies, and again where it arrives, before any rank overwrites its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from outlast.checkpointing.errors import DamagedError, OutlastError, StorageError
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.format.safetensors import DTYPES, TensorSpec
from outlast.checkpointing.memory_tier.snapshot import Snapshot
from outlast.checkpointing.memory_tier.snapshot_folder import SnapshotFolder
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.state.train_state import Targets, TrainState

_CHUNK_BYTES = 64 * 2**20
#: Starts from one step that came to no step of their own, beyond which it is not used again.
MAX_STARTS = 2


@dataclass(frozen=True, slots=True)
class FoundSnapshot:
    """A snapshot that a rank sees on its node, as far as the choice depends on it."""

    attempt: AttemptId
    step: int
    rank: int
    world_size: int
    declaration: str
    num_starts: int = 0


@dataclass(frozen=True, slots=True)
class RestorePlan:
    """A step that every rank can restore. `sources`: for each rank, the one that has its part on its node."""

    attempt: AttemptId
    step: int
    sources: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class RestoredSnapshot:
    """What was restored.

    Attributes:
        plan: The step, and where the parts were.
        state: The encoded loop state.
        num_bytes: Bytes of all ranks.
    """

    plan: RestorePlan
    state: str
    num_bytes: int


def plan_restores(
    found: Sequence[Sequence[FoundSnapshot]], declaration: str, above: int
) -> tuple[list[RestorePlan], list[str]]:
    """Return the steps from `above` on that can be restored, the newest first, and why others cannot.

    Args:
        found: For each rank, what lies on its node.
        declaration: Digest of what determines the run's numbers.
        above: Step of the newest checkpoint; -1 for none.
    """
    size = len(found)
    plans, reasons = [], []
    steps = sorted({(item.attempt, item.step) for items in found for item in items}, reverse=True)
    for attempt, step in steps:
        here = [{item.rank: item for item in items if (item.attempt, item.step) == (attempt, step)} for items in found]
        some = next(item for items in here for item in items.values())
        sources = [next((other for other in (rank, *range(size)) if rank in here[other]), None) for rank in range(size)]
        missing = [rank for rank, source in enumerate(sources) if source is None]
        if step < above:
            continue
        if some.world_size != size:
            reasons.append(f"step {step}: taken by {some.world_size} workers, not {size}")
        elif some.declaration != declaration:
            reasons.append(f"step {step}: taken with other settings, versions or hardware")
        elif missing:
            ranks = ", ".join(map(str, missing))
            reasons.append(f"step {step}: no node has the complete part of rank {ranks}")
        elif max(item.num_starts for items in here for item in items.values()) >= MAX_STARTS:
            reasons.append(f"step {step}: {MAX_STARTS} starts from it failed")
        else:
            plans.append(RestorePlan(attempt, step, tuple(source for source in sources if source is not None)))
    return plans, reasons


def restore_snapshot(
    folder: SnapshotFolder, ranks: RankGroup, train_state: TrainState, declaration: str, above: int
) -> tuple[RestoredSnapshot | None, list[str]]:
    """Load the newest step that every rank's part of can be had and verified. Every rank calls it.

    Returns it, or None, and why newer or other steps could not be used. Without one nothing is changed.

    Raises:
        StorageError: A snapshot was overwritten while it was read, and the weights are a mixture.
    """
    held = folder.snapshots()
    found = [
        FoundSnapshot(item.attempt, item.step, item.rank, item.world_size, item.declaration, folder.num_starts(item))
        for item in held
    ]
    plans, reasons = plan_restores(ranks.gather(found), declaration, above)
    for plan in plans:
        restore = _Restore(folder, ranks, train_state, plan, held)
        if (faults := restore.run()) is None:
            return restore.result(), reasons
        reasons += [f"step {plan.step}: {fault}" for fault in faults]
    return None, reasons


@dataclass
class _Restore:
    """One attempt to restore a step."""

    folder: SnapshotFolder
    ranks: RankGroup
    train_state: TrainState
    plan: RestorePlan
    held: Sequence[Snapshot]
    opened: dict[int, tuple[Snapshot, torch.Tensor]] = field(default_factory=dict)  #: by rank whose part it is
    targets: Targets = field(default_factory=dict)

    def run(self) -> list[str] | None:
        """Load the step. Returns what prevents it, the same on every rank; None if nothing does."""
        for work in (self._open, self._exchange, self._check):
            if faults := self._faults(work):
                return faults
        if faults := self._faults(self._load):  # the weights are a mixture now
            raise StorageError("; ".join(faults))
        return None

    @property
    def _mine(self) -> tuple[Snapshot, torch.Tensor]:
        return self.opened[self.ranks.rank]

    def _faults(self, work: Callable[[], None]) -> list[str]:
        """Run `work` on every rank and return all faults."""
        fault = None
        try:
            work()
        except OutlastError as error:
            fault = error.message
        return sorted({item for item in self.ranks.gather(fault) if item is not None})

    def _open(self) -> None:
        """Open and verify what this rank takes or sends."""
        for rank, source in enumerate(self.plan.sources):
            if source != self.ranks.rank:
                continue
            key = (self.plan.attempt, self.plan.step, rank)
            fault = DamagedError(f"the snapshot of rank {rank} is gone")
            for snapshot in (item for item in self.held if (item.attempt, item.step, item.rank) == key):
                try:
                    self.opened[rank] = (snapshot, self.folder.open(snapshot))
                    break
                except DamagedError as error:
                    fault = error
            else:
                raise fault

    def _exchange(self) -> None:
        """Send each rank the part that lies on another node."""
        moved = [rank for rank, source in enumerate(self.plan.sources) if source != rank]
        if not moved:
            return
        sent = {rank: self.opened[rank][0] for rank in moved if rank in self.opened}
        described = {rank: item for items in self.ranks.gather(sent) for rank, item in items.items()}
        for rank in moved:
            source, snapshot = self.plan.sources[rank], described[rank]
            if self.ranks.rank not in (rank, source):
                continue
            is_source = self.ranks.rank == source
            data = self.opened[rank][1] if is_source else torch.empty(snapshot.num_bytes, dtype=torch.uint8)
            for piece in torch.split(data, _CHUNK_BYTES) if data.numel() else ():
                if is_source:
                    dist.send(piece, group=self.ranks.group, group_dst=rank)
                else:
                    dist.recv(piece, group=self.ranks.group, group_src=source)
            if not is_source:
                self.opened[rank] = (snapshot, data)
        if self.ranks.rank in moved:
            snapshot, data = self._mine
            snapshot.check(data)

    def _check(self) -> None:
        """Raise DamagedError or ConfigError if this rank's part is not of its model and optimizer."""
        snapshot, _ = self._mine
        state, where = self.train_state, f"the snapshot after step {snapshot.step}"
        state.use_naming_of(snapshot.weights)
        own = {name: (part.tensor.dtype, part.shape, part.region) for name, part in state.weights.items()}
        saved = {name: (DTYPES[item.dtype], item.shape, item.region) for name, item in snapshot.weights.items()}
        if own != saved:
            raise DamagedError(f"rank {self.ranks.rank} holds other parts of the weights now")
        state.check_moments(snapshot.moments)
        state.check_optimizer(snapshot.optimizer, where)
        specs = {name: TensorSpec(DTYPES[item.dtype], item.shape) for name, item in snapshot.moments.items()}
        self.targets = state.targets(specs)
        for name, item in snapshot.moments.items():
            if self.targets[name][0] != item.region:
                raise DamagedError(f"rank {self.ranks.rank} holds another part of {name} now")

    @torch.no_grad()
    def _load(self) -> None:
        """Load this rank's part."""
        snapshot, data = self._mine
        for kind in (snapshot.weights, snapshot.moments):
            for name, item in kind.items():
                self.targets[name][1].copy_(item.view(data))
        if not self._is_unchanged():
            raise DamagedError(f"the snapshot of rank {self.ranks.rank} was overwritten while it was read")
        self.train_state.load_moments({name: self.targets[name][1] for name in snapshot.moments})
        self.train_state.load_groups(snapshot.optimizer, "the snapshot")

    def _is_unchanged(self) -> bool:
        """Return whether no process has withdrawn a snapshot of this node since it was opened."""
        return all(self.folder.has(item) for item, _ in self.opened.values() if item in self.held)

    def result(self) -> RestoredSnapshot:
        """Describe what was restored. Every rank calls it."""
        snapshot, _ = self._mine
        total = sum(self.ranks.gather(snapshot.num_bytes))
        return RestoredSnapshot(self.plan, self.ranks.broadcast(snapshot.state), total)
