"""The thin face of the room: claim, resume, save, finish.

    checkpointer = Checkpointer(open_storage("./runs"), "my-run")
    state = checkpointer.resume(model, optimizer)            # None on a fresh start
    for step in range(state["step"] if state else 0, 1000):
        ...
        if not checkpointer.save(step + 1, model, optimizer, {"step": step + 1}):
            break                                            # superseded: somebody newer carries on

Every rank calls every method, in the same order. A checkpoint is a directory of the attempt that wrote it; the manifest
is written last, by rank 0, after every rank's files are durable. A save returns True only when the commit is
acknowledged: durable, and mine still the highest claim. Nothing may be deleted by an attempt that is not sure of that.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from outlast.checkpointing import layout, lineage
from outlast.checkpointing.errors import ConfigError, DamagedError, NoCheckpointError, OutlastError, StorageError
from outlast.checkpointing.faults import Point, reach
from outlast.checkpointing.journal import COMMITS, Journal
from outlast.checkpointing.layout import AttemptId, CheckpointRef
from outlast.checkpointing.manifest import FileEntry, Manifest
from outlast.checkpointing.ranks import Ranks
from outlast.checkpointing.reader import check_listing, read_tensors, read_verified
from outlast.checkpointing.retention import Kept, Retention
from outlast.checkpointing.safetensors import tensor_bytes
from outlast.checkpointing.state import deal, load_optimizer, optimizer_tensors
from outlast.checkpointing.storage import Storage, patiently, walk
from outlast.checkpointing.weights import load_weights, named_weights
from outlast.checkpointing.writer import write_file, write_tensors

T = TypeVar("T")


class Checkpointer:
    """Checkpoints of one attempt of one run.

    Building it claims the run. If a launch that came later holds it already, `superseded` is True and nothing else may
    be called.

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

    Attributes:
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
        ranks: Ranks | None = None,
        launch: str = "",
        declaration: Mapping[str, Any] | None = None,
        notes: Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        retention: Retention | None = None,
    ) -> None:
        self.ranks = ranks or Ranks()
        self.run = layout.check_run_name(run)
        self.storage = storage
        self._launch = launch
        self.files = dict(files or {})
        self._retention = retention or Retention()
        self._num_acknowledged = 0
        self.journal: Journal | None = None
        self.listener: Callable[[dict[str, Any]], None] = lambda event: None
        self.declaration = dict(declaration or {})
        claimed = self._from_rank_0(lambda: self._claim({**self.declaration, **(notes or {})}))
        self.superseded = claimed is None
        if claimed is None:
            return
        self.attempt, self.catalogue = claimed
        self._directory = layout.attempt_dir(run, self.attempt)
        self._commits: list[Manifest] = []
        self._lineage: list[Manifest] = []
        if self.ranks.rank == 0:
            self.journal = Journal(storage, self._directory, 0)
            self._commit_journal = Journal(storage, self._directory, 0, stream=COMMITS, flush_s=0)

    # -- claiming ------------------------------------------------------------------------------------------------------

    def _claim(self, declaration: Mapping[str, Any]) -> tuple[AttemptId, lineage.Catalogue] | None:
        if lineage.launch_is_superseded(self.storage, self.run, self._launch):
            return None
        body = {"launch": self._launch, "world_size": self.ranks.size, "claimed_at": time.time(), **declaration}
        mine = lineage.claim(self.storage, self.run, body)
        if lineage.higher_claim(self.storage, self.run, mine):
            return None
        return mine, patiently(lambda: lineage.catalogue(self.storage, self.run, below=mine))

    # -- resuming ------------------------------------------------------------------------------------------------------

    def resume(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any] | None:
        """Loads the newest checkpoint that is whole on every rank into `model` and `optimizer`.

        Returns:
            The loop state that was saved with it, or None when the run has no commit yet and starts from its beginning.

        Raises:
            NoCheckpointError: There are commits, and none is whole. Nothing was changed.
            ConfigError: The checkpoint is another model's.
            StorageError: The storage could not be read.
        """
        rejected = list(self.catalogue.rejected)
        for index, manifest in enumerate(self.catalogue.accepted):
            content, faults = self._read(manifest)
            if content is None:
                rejected.append(lineage.Rejected(manifest.ref, tuple(faults)))
                continue
            weights, moments, state = content
            if optimizer is not None and not any(_is_optimizer_shard(entry) for entry in manifest.files):
                raise ConfigError(
                    f"{manifest.ref} was saved without an optimizer; going on with an empty one would be another run",
                    hint="resume without an optimizer, or start a new run",
                )
            load_weights(model, weights)
            if optimizer is not None:
                load_optimizer(model, optimizer, moments)
            self._lineage = list(self.catalogue.accepted[index:])
            self._tell("resume", step=manifest.ref.step, source=str(manifest.ref), rejected=_as_json(rejected))
            return state
        if rejected:
            self._refuse(rejected)
        else:
            self._tell("start")
        return None

    def _read(
        self, manifest: Manifest
    ) -> tuple[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, Any]] | None, list[str]]:
        """The checkpoint's content if every rank found it whole, else None and what was wrong, by rank."""
        directory = layout.checkpoint_dir(self.run, manifest.ref)
        weights: dict[str, torch.Tensor] = {}
        moments: dict[str, torch.Tensor] = {}
        state: dict[str, Any] = {}
        faults: list[str] = []
        failure: StorageError | None = None
        try:
            if self.ranks.rank == 0:
                faults += check_listing(self.storage, directory, manifest)
            for entry in manifest.files if not faults else ():
                if _is_optimizer_shard(entry):
                    moments.update(read_tensors(self.storage, directory, entry))
                elif entry.path.endswith(".safetensors"):
                    weights.update(read_tensors(self.storage, directory, entry))
                elif entry.path == layout.LOOP_STATE:
                    state = json.loads(read_verified(self.storage, directory, entry).numpy().tobytes())
                elif self.ranks.rank == 0:
                    read_verified(self.storage, directory, entry)
        except DamagedError as error:
            faults.append(error.message)
        except StorageError as error:
            failure = error
        seen = self.ranks.gather((faults, failure))
        for _, other in seen:
            if other is not None:
                raise other
        merged = sorted({line for lines, _ in seen for line in lines})
        return ((weights, moments, state) if not merged else None), merged

    def _refuse(self, rejected: list[lineage.Rejected]) -> None:
        """Says that nothing whole is left, unless somebody newer has taken over meanwhile."""
        if self._from_rank_0(lambda: lineage.higher_claim(self.storage, self.run, self.attempt)):
            self.superseded = True
            return
        self._tell("no-checkpoint", rejected=_as_json(rejected))
        self.flush()
        lines = "\n".join(f"  {item.ref}: {'; '.join(item.reasons)}" for item in rejected)
        raise NoCheckpointError(
            f"run {self.run!r} has commits, but no checkpoint is whole; nothing was changed\n{lines}",
            hint=f"`outlast checkpoints verify {self.storage.url}/{self.run}` reads every byte again; restore the "
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
        """Commits the state after `step` steps.

        Args:
            step: Steps done; each step is saved once in an attempt.
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
        assert not any(item.ref.step == step for item in self._commits), f"step {step} is committed already"
        began = time.monotonic()
        reach(Point.BEFORE_SNAPSHOT, step)
        ref = CheckpointRef(step, self.attempt)
        small = {**self.files, **(files or {}), layout.LOOP_STATE: _json(state)}
        share = self._all_ranks(lambda: self._write_share(ref, model, optimizer, small))
        reach(Point.BEFORE_MANIFEST, step)
        entries = tuple(sorted((entry for entries in share for entry in entries), key=lambda entry: entry.path))
        manifest = Manifest(
            ref=ref,
            lineage=tuple(item.ref for item in self._lineage),
            files=entries,
            world_size=self.ranks.size,
            metrics=dict(metrics or {}),
            committed_at=time.time(),
            launch=self._launch,
            extra={"declaration": self.declaration},
        )
        acknowledged = self._from_rank_0(lambda: self._commit(manifest, began))
        if self.ranks.rank:
            reach(Point.AFTER_MANIFEST, step)
        if not acknowledged:
            self.superseded = True
            return False
        self._commits.append(manifest)
        self._num_acknowledged += 1
        if self._num_acknowledged >= 2:
            self._commits, self._lineage = self._from_rank_0(self._retain)
        reach(Point.AFTER_RETENTION, step)
        return True

    def _write_share(
        self, ref: CheckpointRef, model: nn.Module, optimizer: torch.optim.Optimizer | None, small: Mapping[str, bytes]
    ) -> list[FileEntry]:
        directory, rank, size = layout.checkpoint_dir(self.run, ref), self.ranks.rank, self.ranks.size
        entries: list[FileEntry] = []
        if rank == 0:
            entries.append(write_tensors(self.storage, directory, layout.WEIGHTS, named_weights(model), ref.step))
            entries += [write_file(self.storage, directory, name, [data]) for name, data in small.items()]
        if optimizer is not None:
            moments = optimizer_tensors(model, optimizer)
            mine = {name: moments[name] for name in deal(moments, size)[rank]}
            name = layout.optimizer_shard(rank, size)
            entries.append(write_tensors(self.storage, directory, name, mine, ref.step))
        return entries

    def _commit(self, manifest: Manifest, began: float) -> bool:
        """Rank 0: the commit, then the acknowledgement. False when superseded; then nothing may be deleted."""
        ref, data = manifest.ref, manifest.to_json()
        self.flush()  # what led to a commit is told before it
        self.storage.put(f"{layout.checkpoint_dir(self.run, ref)}/{layout.MANIFEST}", [data])
        reach(Point.AFTER_MANIFEST, ref.step)
        if higher := lineage.higher_claim(self.storage, self.run, self.attempt):
            self._tell("superseded", step=ref.step, by=str(higher))
            self.flush()
            return False
        digest = json.loads(data)["digest"]
        self._commit_journal.event("commit", step=ref.step, digest=digest, num_bytes=manifest.num_bytes)
        seconds = round(time.monotonic() - began, 4)
        self._tell("commit", step=ref.step, digest=digest, num_bytes=manifest.num_bytes, seconds=seconds)
        self.flush()
        return True

    # -- keeping -------------------------------------------------------------------------------------------------------

    def _retain(self) -> tuple[list[Manifest], list[Manifest]]:
        """Rank 0, after the second acknowledged commit: deletes what nothing keeps. Returns what is left of both.

        Deletable are my own commits and my lineage as far as the policy lets them go, and in lower attempts whatever
        lies outside my lineage: torn, disowned or rejected. Never anything in a higher attempt, or pinned.
        """
        accepted = [*self._commits, *self._lineage]
        pinned = lineage.list_pins(self.storage, self.run)
        keep = self._retention.keep([Kept(item.ref, item.metrics) for item in accepted], pinned)
        doomed = [item.ref for item in accepted if item.ref not in keep]
        doomed, spared = lineage.spare_pinned(self.storage, self.run, self._commit_journal, doomed)
        keep |= spared
        for ref in doomed:
            self._delete(ref)
        mine = [item for item in self._commits if item.ref in keep]
        left = [item for item in self._lineage if item.ref in keep]
        if self._num_acknowledged == 2:
            for ref in self._strays({item.ref for item in left} | pinned):
                self._delete(ref)
        return mine, left

    def _strays(self, kept: set[CheckpointRef]) -> Iterator[CheckpointRef]:
        for attempt in lineage.list_attempts(self.storage, self.run):
            if attempt >= self.attempt:
                return
            for entry in self.storage.list(layout.attempt_dir(self.run, attempt)):
                step = layout.parse_checkpoint(entry.name) if entry.num_bytes is None else None
                if step is not None and CheckpointRef(step, attempt) not in kept:
                    yield CheckpointRef(step, attempt)

    def _delete(self, ref: CheckpointRef) -> None:
        directory = layout.checkpoint_dir(self.run, ref)
        self._commit_journal.event("delete", step=ref.step, attempt=str(ref.attempt))
        self._tell("delete", step=ref.step, attempt=str(ref.attempt))
        self.storage.delete(f"{directory}/{layout.MANIFEST}")
        for entry in list(walk(self.storage, directory)):
            self.storage.delete(f"{directory}/{entry.name}")

    # -- the end -------------------------------------------------------------------------------------------------------

    @property
    def accepted(self) -> list[Manifest]:
        """This attempt's commits and its lineage, newest first."""
        return sorted([*self._commits, *self._lineage], key=lambda item: item.ref, reverse=True)

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
        return self._from_rank_0(lambda: self._publish(source, final_step))

    def _publish(self, source: CheckpointRef, final_step: int) -> str | None:
        manifest = next(item for item in self.accepted if item.ref == source)
        target, directory = layout.model_dir(self.run, self.attempt), layout.checkpoint_dir(self.run, source)
        files = []
        for entry in manifest.files:
            if not entry.path.startswith(layout.STATE_DIR):
                data = read_verified(self.storage, directory, entry)
                files.append(write_file(self.storage, target, entry.path, [tensor_bytes(data)]))
        if lineage.higher_claim(self.storage, self.run, self.attempt):
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
        self.storage.put(f"{target}/{layout.MANIFEST}", [published.to_json()])
        self._tell("done", step=final_step, model=str(source))
        self.flush()
        return target

    # -- talking -------------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Makes the journal durable."""
        if self.journal is not None:
            self.journal.flush()

    def _tell(self, kind: str, /, **fields: Any) -> None:
        if self.journal is not None:
            self.journal.event(kind, **fields)
            self.listener({"event": kind, **fields})

    def _all_ranks(self, work: Callable[[], T]) -> list[T]:
        """Everybody works, everybody learns every result; the first rank's error is raised by all."""
        result: T | None = None
        failure: OutlastError | None = None
        try:
            result = work()
        except OutlastError as error:
            failure = error
        results = []
        for rank, (item, other) in enumerate(self.ranks.gather((result, failure))):
            if other is not None:
                raise type(other)(f"rank {rank}: {other.message}", hint=other.hint) from failure
            results.append(item)
        return results  # type: ignore[return-value]

    def _from_rank_0(self, work: Callable[[], T]) -> T:
        """Rank 0 works, everybody gets its result, or raises its error."""
        result: T | None = None
        failure: OutlastError | None = None
        if self.ranks.rank == 0:
            try:
                result = work()
            except OutlastError as error:
                failure = error
        result, failure = self.ranks.broadcast((result, failure))
        if failure is not None:
            raise failure
        return result  # type: ignore[return-value]


def _is_optimizer_shard(entry: FileEntry) -> bool:
    return entry.path.startswith(f"{layout.STATE_DIR}/optimizer-")


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def _as_json(rejected: list[lineage.Rejected]) -> list[dict[str, Any]]:
    return [{"checkpoint": str(item.ref), "reasons": list(item.reasons)} for item in rejected]
