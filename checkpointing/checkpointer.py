"""The thin face of the room: claim, resume, save, finish.

    checkpointer = Checkpointer(open_storage("./runs"), "my-run")
    state = checkpointer.resume(model, optimizer)            # None on a fresh start
    for step in range(state["step"] if state else 0, 1000):
        ...
        if not checkpointer.async_save(step + 1, model, optimizer, {"step": step + 1}):
            break                                            # superseded: somebody newer carries on
    checkpointer.save(1000, model, optimizer, {"step": 1000})    # waits, also for the one in flight

Every rank calls every method, in the same order. A checkpoint is a directory of the attempt that wrote it; the manifest
is written last, by rank 0, after every rank's files are durable. `save` returns True only when the commit is
acknowledged: durable, and mine still the highest claim. `async_save` returns at once: the state is copied to the host
while the next step computes its gradients, and written in the background, one save at a time.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from outlast.checkpointing.errors import NoCheckpointError, StorageError
from outlast.checkpointing.fault_injection import FaultPoint, fault_point
from outlast.checkpointing.format import layout
from outlast.checkpointing.format.layout import AttemptId, CheckpointRef
from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.restore.load import restore
from outlast.checkpointing.restore.reader import read_blocks
from outlast.checkpointing.run_store import attempt_history as history
from outlast.checkpointing.run_store import claims, events
from outlast.checkpointing.run_store.catalog import Catalog, RejectedCheckpoint, build_catalog
from outlast.checkpointing.run_store.journal import Journal
from outlast.checkpointing.run_store.retention import Retention
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.save.background_save import BackgroundSave, SaveState
from outlast.checkpointing.save.commit import Committer
from outlast.checkpointing.save.staging import HostCopy, StagingBuffer
from outlast.checkpointing.save.writer import RankPayload, write_file
from outlast.checkpointing.state.model_weights import ALL, WeightNaming
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.state.train_state import TrainState
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.retry import retry


class Checkpointer:
    """Checkpoints of one attempt of one run.

    Building it claims the run. If a launch that came later holds it already, `superseded` is True; then `resume`
    returns None, and nothing is saved.

    Args:
        storage: The storage root.
        run: Name of the run.
        ranks: The ranks of this attempt; found out by itself when None.
        launch: Which launch this attempt belongs to. Attempts of one launch follow each other; a later launch takes
            over from an earlier one, never the other way round.
        declaration: What decides the run's numbers: settings, fingerprints, versions. JSON. It stands in the claim and,
            under the manifest's digest, in every checkpoint.
        notes: What else the claim says, for people. JSON.
        files: The attribute of that name, such as `config.json` and the tokenizer, by name.
        retention: What to keep.
        max_shard_bytes: Weights beyond so many bytes go on in another file, with an index, as transformers reads them.
        naming: Which weights are saved, and under which names; all under their own by default.
        settle_s: Seconds by which a listing of this storage may lag behind, as on NFS with its attribute cache. After
            the claim the attempt waits twice as long before it looks: by then everyone sees its claim, and it sees
            whatever was acknowledged by somebody who did not.

    Attributes:
        naming: The argument; may be replaced until the first `resume` or `save`.
        last_save: Of the last save that ended: seconds that training waited for it, and seconds until its commit.
        files: Small files that belong into every checkpoint; may be replaced until the first save.
        declaration: What every manifest says of the run; may be replaced until the first save.
        superseded: True when another launch has taken over.
        attempt: This attempt.
        catalogue: The checkpoints that counted when this attempt began.
        journal: The attempt's journal; None on ranks other than 0.
        listener: Hears the events that the journal gets from here (rank 0 only).

    Raises:
        StorageError: The storage does not answer or refuses.
    """

    def __init__(
        self,
        storage: Storage,
        run: str,
        *,
        ranks: RankGroup | None = None,
        launch: str = "",
        declaration: Mapping[str, Any] | None = None,
        notes: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        retention: Retention | None = None,
        max_shard_bytes: int = 50 * 10**9,
        naming: WeightNaming = ALL,
        settle_s: float = 0.0,
    ) -> None:
        self.ranks = ranks or RankGroup()
        self._store = RunStore(storage, layout.check_run_name(run))
        self._launch, self._settle_s = launch, settle_s
        self.files = dict(files or {})
        self._max_shard_bytes, self.naming = max_shard_bytes, naming
        self.journal: Journal | None = None
        self.listener: Callable[[dict[str, Any]], None] = lambda event: None
        self.declaration = dict(declaration or {})
        claimed = self.ranks.run_on_rank_0(lambda: self._claim({**self.declaration, **(notes or {})}))
        self.superseded = claimed is None
        self.catalogue = Catalog(None, (), ())
        self._flight: BackgroundSave | None = None
        self.last_save: tuple[float, float] | None = None
        if claimed is None:
            return
        self.attempt, self.catalogue = claimed
        self._snapshot = StagingBuffer()
        hosts = self.ranks.gather(socket.gethostname())
        self._num_sharing = hosts.count(hosts[self.ranks.rank])
        if self.ranks.rank == 0:
            self.journal = Journal(storage, self._store.attempt_dir(self.attempt), 0)
        # A group of its own, so that commits in flight and the step loop never wait in one queue.
        background = self.ranks.another()
        self._committer = Committer(
            self._store, self.attempt, launch, background, retention or Retention(), self._tell, self.flush
        )

    @property
    def store(self) -> RunStore:
        """The run as it is now."""
        return self._store.fresh()

    # -- claiming ------------------------------------------------------------------------------------------------------

    def _claim(self, declaration: Mapping[str, Any]) -> tuple[AttemptId, Catalog] | None:
        if claims.launch_is_superseded(self._store, self._launch):
            return None
        body = {"launch": self._launch, "world_size": self.ranks.size, "claimed_at": time.time(), **declaration}
        mine = claims.claim(self._store, body)
        time.sleep(2 * self._settle_s)
        now = self.store  # nothing that was read before the claim counts
        if max(claims.list_attempts(now), default=mine) > mine:
            return None
        tries = retry(lambda: history.read_attempt_history(now, live=self._launch, below=mine))
        return mine, retry(lambda: build_catalog(now, mine, history.checkpoints_to_skip(tries)))

    # -- resuming ------------------------------------------------------------------------------------------------------

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any] | None:
        """Loads the newest checkpoint that is whole on every rank, and not passed over, into `model` and `optimizer`.

        Returns:
            The loop state that was saved with it, or None when the run has no commit yet and starts from its beginning.

        Raises:
            NoCheckpointError: There are commits, and none is whole. Nothing in the storage was changed; the model's
                weights may be a mixture, and are not to be used.
            ConfigError: The checkpoint is another model's.
            StorageError: The storage could not be read.
        """
        if self.superseded:
            return None
        rejected = list(self.catalogue.rejected)
        train_state = TrainState(model, optimizer, self.naming)
        for index, manifest in self.catalogue.candidates:
            state, faults = restore(self._store, manifest, self.ranks, train_state)
            if state is None:
                rejected.append(RejectedCheckpoint(manifest.ref, tuple(faults)))
                continue
            self._committer.lineage = list(self.catalogue.accepted[index:])
            event = events.ResumeEvent(
                step=manifest.ref.step,
                source=manifest.ref,
                committed_at=manifest.committed_at,
                rejected=_as_told(rejected),
                passed_over=tuple(ref for ref in self.catalogue.doubtful if ref > manifest.ref),
            )
            self._tell(event)
            return state
        if self.ranks.run_on_rank_0(self._is_superseded_while_waiting):
            self.superseded = True  # somebody newer may have cleared away what was here
        elif rejected:
            self._refuse(rejected)
        else:
            self._tell(events.StartEvent())
        return None

    def _is_superseded_while_waiting(self) -> bool:
        return claims.higher_claim(self._store, self.attempt) is not None

    def _refuse(self, rejected: list[RejectedCheckpoint]) -> None:
        """Says that nothing whole is left."""
        self._tell(events.NoCheckpointEvent(rejected=_as_told(rejected)))
        self.flush()
        lines = "\n".join(f"  {item.ref}: {'; '.join(item.reasons)}" for item in rejected)
        raise NoCheckpointError(
            f"run {self._store.run!r} has commits, but no checkpoint is whole; nothing was changed\n{lines}",
            hint=f"`outlast checkpoints verify {self._store.url}` reads every byte again; restore the "
            "files from a copy, or start over under another name",
        )

    # -- saving --------------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        state: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> bool:
        """Commits the state after `step` steps, and waits for it. A save in flight is waited for first.

        When the newest checkpoint is that step's there is nothing to write: a state follows from its step.

        Args:
            step: Steps done.
            model: The model, wrapped or not.
            optimizer: Its optimizer, or None.
            state: The loop state, JSON; `resume` returns it.
            metrics: What is known of the model at this step.
            files: Small files for this checkpoint alone, by name.

        Returns:
            True when the commit is acknowledged, False when this attempt is superseded.

        Raises:
            StorageError: A rank could not write. Earlier checkpoints are untouched.
        """
        if not self._is_to_write(step):
            return not self.superseded
        began = time.monotonic()
        fault_point(FaultPoint.BEFORE_SNAPSHOT, step)
        payload = self._payload(step, TrainState(model, optimizer, self.naming), state, files)
        self.superseded = not self._committer.commit(payload, metrics or {}, self.declaration, began)
        seconds = time.monotonic() - began
        self._record_costs(step, seconds, seconds)
        return not self.superseded

    def async_save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None,
        state: Mapping[str, Any],
        *,
        metrics: Mapping[str, float] | None = None,
        files: Mapping[str, bytes] | None = None,
        lazy: bool = True,
    ) -> bool:
        """Begins to save the state after `step` steps, and returns. Skipped, with an event, while another is in flight.

        Args:
            step: As in `save`, as are the others.
            model: The model, wrapped or not.
            optimizer: Its optimizer, or None.
            state: The loop state.
            metrics: What is known of the model at this step.
            files: Small files for this checkpoint alone.
            lazy: Copy the state while the next forward and backward pass run; the next optimizer step, of whatever
                optimizer, waits until the copy is done. For loops that change weights in another way between steps,
                False copies before this returns.

        Returns:
            True to go on, False when the save before this one found that the attempt is superseded.

        Raises:
            StorageError: The save before this one failed.
            ConfigError: The host has no room for the copy.
        """
        if self.superseded:
            return False
        flights = self.ranks.gather(self._flight.state if self._flight else SaveState.ACKNOWLEDGED)
        if self._flight and SaveState.IN_FLIGHT in flights and SaveState.FAILED_OR_SUPERSEDED not in flights:
            self._tell(events.SaveSkippedEvent(step=step, in_flight=self._flight.step))
            return True
        if not self._is_to_write(step):
            return not self.superseded
        began = time.monotonic()
        fault_point(FaultPoint.BEFORE_SNAPSHOT, step)
        train_state = TrainState(model, optimizer, self.naming)
        payload = self._payload(step, train_state, state, files)
        self.ranks.everybody(lambda: self._snapshot.reserve(payload.parts, self._num_sharing))
        is_lazy = lazy and optimizer is not None
        now = train_state.changed_by_forward(payload.weights) if is_lazy else payload.parts
        copy = self._snapshot.take(payload.parts, now=now)
        self._flight = BackgroundSave(step, copy, began, lambda: self._write(payload, copy, metrics or {}, began))
        self._flight.blocked_s = time.monotonic() - began
        return True

    def _is_to_write(self, step: int) -> bool:
        """Waits for the save in flight. False when there is nothing to write: superseded, or saved already."""
        if not self.wait():
            return False
        if not self.accepted or self.accepted[0].ref.step != step:
            return True
        self.superseded = self.ranks.run_on_rank_0(self._is_superseded_while_waiting)
        return False

    def _write(self, payload: RankPayload, copy: HostCopy, metrics: Mapping[str, float], began: float) -> bool:
        """In the background: the rest of the copy, and the commit."""
        copy.run()
        fault_point(FaultPoint.AFTER_SNAPSHOT, payload.step)
        return self._committer.commit(payload.on_host(copy.parts), metrics, self.declaration, began)

    @property
    def is_busy(self) -> bool:
        """True while this rank has a save in flight."""
        return self._flight is not None and self._flight.state is SaveState.IN_FLIGHT

    @property
    def has_failed_or_superseded(self) -> bool:
        """True when the save in flight has failed or found itself superseded on this rank: time to `wait`."""
        return self._flight is not None and self._flight.state is SaveState.FAILED_OR_SUPERSEDED

    def wait(self) -> bool:
        """Waits for the save in flight, if there is one. Raises its error; False when it was superseded."""
        flight, self._flight = self._flight, None
        if flight is None:
            return not self.superseded
        try:
            self.superseded = not flight.join()
        except StorageError as error:
            self._tell(events.SaveFailedEvent(step=flight.step, error=error.message))
            raise
        self._record_costs(flight.step, flight.blocked_s, flight.seconds, flight.copy.fenced_s)
        return not self.superseded

    def _record_costs(self, step: int, apart_s: float, commit_s: float, fenced_s: float = 0.0) -> None:
        """Tells for how long training waited: between two steps, and in the next one for the copy."""
        blocked_s = apart_s + fenced_s
        self.last_save = (blocked_s, commit_s)
        blocked, fenced, commit = (round(seconds, 4) for seconds in (blocked_s, fenced_s, commit_s))
        self._tell(events.SaveEvent(step=step, blocked_s=blocked, fenced_s=fenced, commit_s=commit))

    def reserve(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Allocates the host buffers of `async_save` ahead of the first one, best after the first optimizer step.

        Raises:
            ConfigError: They do not fit into a rank's memory.
        """
        parts = self._payload(0, TrainState(model, optimizer, self.naming)).parts
        self.ranks.everybody(lambda: self._snapshot.reserve(parts, self._num_sharing))

    def _payload(
        self,
        step: int,
        train_state: TrainState,
        loop_state: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> RankPayload:
        """What this rank writes, made of the model's own tensors."""
        small = {**self.files, **(files or {}), layout.LOOP_STATE: _json(loop_state or {})}
        small = small if self.ranks.rank == 0 else {}
        return RankPayload.of(step, train_state, self.ranks, small, self._max_shard_bytes)

    # -- the end -------------------------------------------------------------------------------------------------------

    @property
    def accepted(self) -> list[Manifest]:
        """This attempt's commits and its lineage, newest first."""
        return sorted([*self._committer.commits, *self._committer.lineage], key=lambda item: item.ref, reverse=True)

    def finish(self, source: CheckpointRef, final_step: int) -> str | None:
        """Copies the Hugging Face part of a committed checkpoint to `model/`, verified on the way, manifest last.

        Args:
            source: The checkpoint to publish, one of `accepted`.
            final_step: The step at which the run is done.

        Returns:
            The directory, relative to the storage root, or None when superseded.

        Raises:
            DamagedError: The source is no longer whole.
            StorageError: Reading or writing failed.
        """
        if not self.wait():
            return None
        return self.ranks.run_on_rank_0(lambda: self._publish(source, final_step))

    def _publish(self, source: CheckpointRef, final_step: int) -> str | None:
        manifest = next(item for item in self.accepted if item.ref == source)
        target, directory = self._store.model_dir(self.attempt), self._store.checkpoint_dir(source)
        files = []
        for entry in manifest.files:
            if not entry.path.startswith(layout.STATE_DIR):
                blocks = read_blocks(self._store.storage, directory, entry)
                files.append(write_file(self._store.storage, target, entry.path, blocks))
        if self._is_superseded_while_waiting():
            return None
        published = Manifest(
            ref=source,
            lineage=(),
            files=tuple(files),
            world_size=manifest.world_size,
            metrics=manifest.metrics,
            committed_at=time.time(),
            launch=self._launch,
            extra={"final_step": final_step},
        )
        self._store.storage.put(f"{target}/{layout.MANIFEST}", [published.to_json()])
        self._tell(events.DoneEvent(step=final_step, model=str(source)))
        self.flush()
        return target

    # -- talking -------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Makes the journal durable."""
        if self.journal is not None:
            self.journal.flush()

    def note(self, event: events.Event) -> None:
        """Tells something that later attempts must know: durable when it returns. Every rank calls it."""
        self.ranks.run_on_rank_0(lambda: self._committer.note(event))

    def _tell(self, event: events.Event) -> None:
        if self.journal is not None:
            self.journal.write(event)
            self.listener(event.to_json())


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def _as_told(rejected: list[RejectedCheckpoint]) -> tuple[events.Rejection, ...]:
    return tuple(events.Rejection(str(item.ref), item.reasons) for item in rejected)
