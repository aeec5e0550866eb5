"""`Checkpointer`: the public interface to claim, resume, save and finish a run.

    with Checkpointer(open_storage("./runs"), "my-run") as checkpointer:
        state = checkpointer.resume(model, optimizer)            # None on a fresh start
        for step in range(state["step"] if state else 0, 1000):
            ...
            if not checkpointer.async_save(step + 1, model, optimizer, {"step": step + 1}):
                break                                            # superseded: a newer attempt continues
        checkpointer.save(1000, model, optimizer, {"step": 1000})    # waits, also for the save in flight

Every rank calls every method, in the same order. A checkpoint is a directory of the attempt that wrote it. Rank 0
writes the manifest last, after every rank's files are durable. `save` returns True only when the commit is
acknowledged: durable, and this attempt's claim is still the highest. `async_save` returns at once: the state is copied
to the host while the next step computes its gradients, and written in the background, one save at a time. A save that
was begun is committed before the interpreter ends, or standard error names what is lost.
"""

import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import nn

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.fault_injection import FaultPoint, fault_point
from outlast.checkpointing.format import layout
from outlast.checkpointing.format.layout import AttemptId, CheckpointRef
from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.restore.load import restore
from outlast.checkpointing.run_store import claims, events
from outlast.checkpointing.run_store.attempt_claim import claim_run
from outlast.checkpointing.run_store.catalog import Catalog, RejectedCheckpoint, check_unread, none_intact
from outlast.checkpointing.run_store.journal import Journal
from outlast.checkpointing.run_store.retention_policy import Retention
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.save.arguments import checked_files, checked_metrics, checked_step
from outlast.checkpointing.save.background_save import BackgroundSave, SaveState
from outlast.checkpointing.save.commit import Committer
from outlast.checkpointing.save.in_flight import SaveInFlight
from outlast.checkpointing.save.publish import publish
from outlast.checkpointing.save.same_state import check_same_weights
from outlast.checkpointing.save.staging import HostCopy, StagingBuffer
from outlast.checkpointing.save.writer import RankPayload
from outlast.checkpointing.state.loop_state import encode_state
from outlast.checkpointing.state.named_weights import ALL, WeightNaming
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.state.train_state import TrainState
from outlast.checkpointing.storage.base import Storage
from outlast.checkpointing.storage.location import Location


class Checkpointer:
    """Checkpoints of one attempt of one run.

    Building it claims the run. If a later launch has claimed it already, `superseded` is True: `resume` returns
    None, and nothing is saved.

    Args:
        storage: The storage root; a storage, a path or a URL.
        run: Name of the run.
        ranks: The ranks of this attempt; by default those of torch.distributed.
        launch: The launch of this attempt. Later launches supersede earlier ones, never the reverse.
        declaration: What determines the run's numbers: settings, fingerprints, versions. JSON. Written into the claim
            and, under the manifest's digest, into every checkpoint; may be replaced until the first save.
        notes: More information for the claim. JSON.
        files: Small files of every checkpoint by name, such as `config.json`; may be replaced until the first save.
        retention: What to keep.
        max_shard_bytes: Weights beyond this size continue in another file, with an index as in transformers.
        naming: Which weights are saved, and their names; by default all. May be replaced until the first `resume`.
        settle_s: Seconds by which a listing of this storage may lag behind, as on NFS with its attribute cache. After
            the claim the attempt waits twice as long before it reads: then all attempts see its claim, and it sees
            what was acknowledged by an attempt that did not.
        exit_wait_s: Seconds that the end of the interpreter waits for a save in flight, as one may never end whose
            storage or peers do not respond. `close` waits without a limit.

    Attributes:
        last_save: Of the last save that ended: seconds that training waited for it, and seconds until its commit.
        superseded: Whether another launch has superseded this one.
        attempt: This attempt.
        catalogue: The checkpoints that counted when this attempt began.
        journal: The attempt's journal; None on ranks other than 0.
        listener: Called with each event written to the journal (rank 0 only).

    Raises:
        StorageError: The storage does not respond or refuses.
    """

    def __init__(
        self,
        storage: Storage | Location,
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
        exit_wait_s: float = 600.0,
    ) -> None:
        self.ranks = ranks or RankGroup()
        self._store = RunStore(storage, layout.check_run_name(run))
        storage = self._store.storage
        self._launch, self._settle_s = launch, settle_s
        self.files = dict(files or {})
        self._max_shard_bytes, self.naming = max_shard_bytes, naming
        self.journal: Journal | None = None
        self.listener: Callable[[dict[str, Any]], None] = lambda event: None
        self.declaration = dict(declaration or {})
        body = {"launch": launch, "world_size": self.ranks.size, "claimed_at": time.time()}
        claimed = self._claim({**body, **self.declaration, **(notes or {})})
        self.superseded = claimed is None
        self.catalogue = Catalog(None, (), ())
        self._in_flight = SaveInFlight(run, exit_wait_s, self.close)
        self.last_save: tuple[float, float] | None = None
        self._newest_begun = -1
        self._has_resumed = self._is_closed = False
        if claimed is None:
            return
        self.attempt, self.catalogue = claimed
        self._staging = StagingBuffer()
        self._num_sharing = self.ranks.gather(host := socket.gethostname()).count(host)
        if self.ranks.rank == 0:
            self.journal = Journal(storage, self._store.attempt_dir(self.attempt), 0)
        own, keep = self.ranks.duplicate(), retention or Retention()  # commits and the step loop share no queue
        self._committer = Committer(self._store, self.attempt, launch, own, keep, self._emit, self.flush)

    @property
    def store(self) -> RunStore:
        """The run, with an empty cache."""
        return self._store.fresh()

    def _claim(self, body: Mapping[str, Any]) -> tuple[AttemptId, Catalog] | None:
        """Claim the run; None when superseded. Every rank calls it."""
        return self.ranks.run_on_rank_0(lambda: claim_run(self.store, self._launch, body, self._settle_s))

    # -- resuming ------------------------------------------------------------------------------------------------------

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any] | None:
        """Load the newest checkpoint that is intact on every rank, and not to be skipped, into `model` and `optimizer`.

        Numbers of the optimizer's parameter groups, such as learning rates, are loaded too. Build a torch scheduler
        before this, and load its state after it.

        Returns:
            The loop state saved with it, or None when the run has no commit yet and starts from step 0.

        Raises:
            NoCheckpointError: There are commits, but none is intact. The weights may be a mixture.
            ConfigError: The checkpoint is of another model or optimizer.
            StorageError: The storage could not be read, not even a checkpoint that may be newer than the intact ones.
        """
        if self.superseded:
            return None
        rejected = list(self.catalogue.rejected)
        train_state = TrainState(model, optimizer, self.naming)
        for index, manifest in self.catalogue.candidates:
            check_unread(self._store, self.catalogue, manifest.ref)
            state, faults = restore(self._store, manifest, self.ranks, train_state)
            if state is None:
                rejected.append(RejectedCheckpoint(manifest.ref, tuple(faults)))
                continue
            self.naming, self._has_resumed = train_state.naming, True
            self._committer.lineage = list(self.catalogue.accepted[index:])
            self._committer.unread = self.catalogue.unread_refs
            self._newest_begun = max(self._newest_begun, manifest.ref.step)
            event = events.ResumeEvent(
                step=manifest.ref.step,
                source=manifest.ref,
                committed_at=manifest.committed_at,
                rejected=tuple(item.record for item in rejected),
                passed_over=tuple(ref for ref in self.catalogue.doubtful if ref > manifest.ref),
            )
            self._emit(event)
            return state
        if self.ranks.run_on_rank_0(self._is_superseded_while_waiting):
            self.superseded = True  # a newer attempt may have deleted the checkpoints
        elif self.catalogue.unread:
            check_unread(self._store, self.catalogue, None)
        elif rejected:
            self._refuse(rejected)
        else:
            self._emit(events.StartEvent())
        return None

    def _is_superseded_while_waiting(self) -> bool:
        return claims.higher_claim(self._store, self.attempt) is not None

    def _refuse(self, rejected: list[RejectedCheckpoint]) -> None:
        self._emit(events.NoCheckpointEvent(rejected=tuple(item.record for item in rejected)))
        self.flush()
        raise none_intact(self._store, rejected)

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
        """Commit the state after `step` steps and wait for it, also for a save in flight.

        Nothing is written if the newest checkpoint is of that step and of the same weights.

        Args:
            step: Steps done; higher than any that was saved.
            model: The model, wrapped or not.
            optimizer: Its optimizer, or None.
            state: The loop state, which `resume` returns as it is: JSON, and tuples, sets, dicts with any keys, bytes,
                numbers of numpy, arrays, and tensors on the CPU.
            metrics: Metrics of the model at this step.
            files: Small files for this checkpoint only, by name.

        Returns:
            True when the commit is acknowledged, False when this attempt is superseded.

        Raises:
            ConfigError: The step is no integer, below one that was saved, or saved with other weights; `resume` was not
                called on a run that has checkpoints; the state, a metric or a file cannot be kept; or the ranks differ.
            StorageError: A rank could not write. Earlier checkpoints are unchanged.
        """
        if self.superseded:
            return False
        step, _ = self._agree(step)
        if not self._is_to_write(step, model):
            return not self.superseded
        began = time.monotonic()
        fault_point(FaultPoint.BEFORE_SNAPSHOT, step)
        train_state = TrainState(model, optimizer, self.naming)
        payload, numbers = self._payload(step, train_state, state, metrics, files)
        self._newest_begun = step
        with self._failure_recorded(step):
            self.superseded = not self._commit(payload, numbers, began)
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
        """Begin to save the state after `step` steps. Skipped, with an event, while another save is in flight.

        Arguments are as in `save`. With `lazy` the state is copied during the next forward and backward pass, and the
        next step of any optimizer waits for the copy. Without it the copy is done before this returns, for loops that
        change weights in another way between steps.

        Returns:
            True to continue, False when the previous save found that the attempt is superseded.

        Raises:
            StorageError: The previous save failed.
            ConfigError: The host has too little memory for the copy.
        """
        if self.superseded:
            return False
        step, states = self._agree(step)
        in_flight = self._in_flight.step
        is_busy = SaveState.IN_FLIGHT in states and SaveState.FAILED_OR_SUPERSEDED not in states
        if in_flight not in (None, step) and is_busy:
            self._in_flight.skip(step)
            self._emit(events.SaveSkippedEvent(step=step, in_flight=in_flight))
            return True
        if not self._is_to_write(step, model):
            return not self.superseded
        began = time.monotonic()
        fault_point(FaultPoint.BEFORE_SNAPSHOT, step)
        train_state = TrainState(model, optimizer, self.naming)
        payload, numbers = self._payload(step, train_state, state, metrics, files)
        self.ranks.run_on_all(lambda: self._staging.reserve(payload.parts, self._num_sharing))
        self._newest_begun = step
        is_lazy = lazy and optimizer is not None
        now = train_state.changed_by_forward(payload.weights) if is_lazy else payload.parts
        copy = self._staging.take(payload.parts, now=now)
        save = BackgroundSave(step, copy, began, lambda: self._write(payload, copy, numbers, began))
        save.blocked_s = time.monotonic() - began
        self._in_flight.begin(save)
        return True

    def _agree(self, step: int) -> tuple[int, list[SaveState | None]]:
        """Return the step that all ranks save and the state of each one's save in flight. Raises ConfigError."""
        steps, states = zip(*self.ranks.run_on_all(lambda: (self._checked(step), self._in_flight.state)), strict=True)
        if len({*steps}) > 1:
            raise ConfigError(f"the ranks save different steps: {sorted({*steps})}", hint="save on every rank, in step")
        return steps[0], [*states]

    def _checked(self, step: int) -> int:
        """Return a step that can be saved, as an int. Raises ConfigError."""
        number = checked_step(step, self._newest_begun)
        if self._is_closed:
            raise ConfigError(f"step {number} cannot be saved: the checkpointer is closed")
        if not (self._has_resumed or self.catalogue.is_fresh):
            raise ConfigError(
                f"step {number} cannot be saved: run {self._store.run!r} has checkpoints, and it would replace them",
                hint="call resume(model, optimizer) before the first save, or start a new run under another name",
            )
        return number

    def _is_to_write(self, step: int, model: nn.Module) -> bool:
        """Wait for the save in flight. False when there is nothing to write: superseded, or saved already."""
        if not self.wait():
            return False
        if not (self.accepted and self.accepted[0].ref.step == step):
            return True
        self.superseded = self.ranks.run_on_rank_0(self._is_superseded_while_waiting)
        if not self.superseded:
            check_same_weights(self.accepted[0], model, self.naming, self.ranks, self._max_shard_bytes)
        return False

    def _write(self, payload: RankPayload, copy: HostCopy, metrics: Mapping[str, float], began: float) -> bool:
        """Finish the copy and commit, in the background."""
        copy.run()
        fault_point(FaultPoint.AFTER_SNAPSHOT, payload.step)
        return self._commit(payload.on_host(copy.parts), metrics, began)

    def _commit(self, payload: RankPayload, metrics: Mapping[str, float], began: float) -> bool:
        return self._committer.commit(payload, metrics, self.declaration, began)

    @property
    def is_busy(self) -> bool:
        """Whether this rank has a save in flight."""
        return self._in_flight.state is SaveState.IN_FLIGHT

    @property
    def step_in_flight(self) -> int | None:
        """The step of the save that is to be waited for; the same on all ranks."""
        return self._in_flight.step

    @property
    def has_failed_or_superseded(self) -> bool:
        """Whether the save in flight has failed or is superseded on this rank: time to `wait`."""
        return self._in_flight.state is SaveState.FAILED_OR_SUPERSEDED

    def wait(self) -> bool:
        """Wait for the save in flight, if any, and raise its error. False when it was superseded."""
        current = self._in_flight.take()
        if current is None:
            return not self.superseded
        with self._failure_recorded(current.step):
            self.superseded = not current.join()
        self._record_costs(current.step, current.blocked_s, current.seconds, current.copy.fenced_s)
        return not self.superseded

    @contextmanager
    def _failure_recorded(self, step: int) -> Iterator[None]:
        """Write the error to the journal before it is raised."""
        try:
            yield
        except Exception as error:
            message = getattr(error, "message", f"{type(error).__name__}: {error}")
            self._emit(events.SaveFailedEvent(step=step, error=message))
            raise

    def _record_costs(self, step: int, apart_s: float, commit_s: float, fenced_s: float = 0.0) -> None:
        """Record how long training waited: between two steps (`apart_s`), and in the next one for the copy."""
        blocked_s = apart_s + fenced_s
        self.last_save = (blocked_s, commit_s)
        blocked, fenced, commit = (round(seconds, 4) for seconds in (blocked_s, fenced_s, commit_s))
        self._emit(events.SaveEvent(step=step, blocked_s=blocked, fenced_s=fenced, commit_s=commit))

    def reserve(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Allocate the buffers of `async_save` in advance, best after the first optimizer step. Raises ConfigError."""
        parts = self._payload(0, TrainState(model, optimizer, self.naming))[0].parts
        self.ranks.run_on_all(lambda: self._staging.reserve(parts, self._num_sharing))

    def _payload(
        self,
        step: int,
        train_state: TrainState,
        loop_state: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> tuple[RankPayload, dict[str, float]]:
        """Build this rank's payload from the model's own tensors, and the metrics. Raises any rank's ConfigError."""
        built: list[tuple[RankPayload, dict[str, float]]] = []

        def build() -> None:
            small: dict[str, bytes] = {}
            if self.ranks.rank == 0:
                small = checked_files({**self.files, **(files or {})})
                small[layout.LOOP_STATE] = encode_state({} if loop_state is None else loop_state).encode()
            payload = RankPayload.of(step, train_state, self.ranks, small, self._max_shard_bytes)
            built.append((payload, checked_metrics(metrics)))

        self.ranks.run_on_all(build)
        return built[0]

    # -- the end -------------------------------------------------------------------------------------------------------

    @property
    def accepted(self) -> list[Manifest]:
        """This attempt's commits and its lineage, newest first."""
        return sorted([*self._committer.commits, *self._committer.lineage], key=lambda item: item.ref, reverse=True)

    def close(self) -> bool:
        """Wait for the save in flight, and make the journal durable. Nothing can be saved afterwards.

        With several ranks, before `torch.distributed.destroy_process_group`. A `with` statement calls it at its end.

        Returns:
            True when what was begun is acknowledged, False when this attempt is superseded.

        Raises:
            StorageError: The save in flight failed, or the journal could not be written.
        """
        self._is_closed = True
        acknowledged = self.wait()
        if self.ranks.rank == 0:
            self._in_flight.report_skipped(self._newest_begun)
        self.flush()
        return acknowledged

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Close. An error of the body stays the one that is raised; one of `close` is then reported."""
        step = self._in_flight.step
        try:
            self.close()
        except Exception as failure:
            if error is None or (isinstance(error, SystemExit) and not error.code):
                raise
            lost = "" if step is None else f"the save of step {step} is lost: "
            self._in_flight.report(f"{lost}{failure}")

    def finish(self, source: CheckpointRef, final_step: int) -> str | None:
        """Copy the Hugging Face part of a committed checkpoint to `model/`, verified while copying, manifest last.

        Args:
            source: The checkpoint to publish, one of `accepted`.
            final_step: The last step of the run.

        Returns:
            The directory, relative to the storage root, or None when superseded.

        Raises:
            ConfigError: The source is not in `accepted`.
            DamagedError: The source is damaged.
            StorageError: Reading or writing failed.
        """
        if not self.wait():
            return None
        return self.ranks.run_on_rank_0(lambda: self._publish(source, checked_step(final_step)))

    def _publish(self, source: CheckpointRef, final_step: int) -> str | None:
        manifest = next((item for item in self.accepted if item.ref == source), None)
        if manifest is None:
            raise ConfigError(f"{source} is no accepted checkpoint", hint="pass the `ref` of one of `accepted`")
        target = publish(self._store, self.attempt, self._launch, manifest, final_step)
        if target:
            self._emit(events.DoneEvent(step=final_step, model=str(source)))
            self.flush()
        return target

    # -- events -------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        if self.journal is not None:
            self.journal.flush()

    def note(self, event: events.Event) -> None:
        """Write an event that later attempts must see, durably. Every rank calls it."""
        self.ranks.run_on_rank_0(lambda: self._committer.note(event))

    def _emit(self, event: events.Event) -> None:
        if self.journal is not None:
            self.journal.write(event)
            self.listener(event.to_json())
