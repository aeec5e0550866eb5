"""The second half of the protocol: commit of the ranks' files, acknowledgement, and the deletions that follow.

`claims`, `catalog` and `checkpointer` are the first half. First every rank's files are durable, then the manifest is
written, then the claims are listed; only then is the commit acknowledged, and nothing may be deleted before the second
acknowledged commit. Runs in the caller's thread or in the background, on a rank group of its own.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from outlast.checkpointing.errors import ConfigError, NotAFileError, StorageError
from outlast.checkpointing.fault_injection import FaultPoint, fault_point
from outlast.checkpointing.format import layout
from outlast.checkpointing.format.layout import AttemptId, CheckpointRef
from outlast.checkpointing.format.manifest import FileEntry, Manifest
from outlast.checkpointing.run_store import claims, deletion, events
from outlast.checkpointing.run_store.deletion import delete_checkpoint
from outlast.checkpointing.run_store.journal import COMMITS, Journal
from outlast.checkpointing.run_store.retention_policy import Retention, RetentionCandidate
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.save.read_back import check_read_back
from outlast.checkpointing.save.writer import RankPayload, write_payload
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.storage.orphaned_uploads import abort_uploads
from outlast.checkpointing.storage.retry import retry

EventSink = Callable[[events.Event], None]


class Committer:
    """The commits of one claimed attempt.

    No other thread may use `ranks` during a save. On rank 0, `emit` writes an event to the journal, and `flush` makes
    the journal durable.

    Attributes:
        ranks: The rank group of commits.
        commits: This attempt's acknowledged commits that are still kept.
        lineage: The checkpoint that the attempt resumed from and the older ones kept with it.
        unread: Checkpoints that could not be read, and may be intact.
    """

    def __init__(
        self,
        store: RunStore,
        attempt: AttemptId,
        launch: str,
        ranks: RankGroup,
        retention: Retention,
        emit: EventSink,
        flush: Callable[[], None],
    ) -> None:
        self._store, self._attempt, self._launch = store, attempt, launch
        self.ranks, self._retention, self._emit, self._flush = ranks, retention, emit, flush
        self.commits: list[Manifest] = []
        self.lineage: list[Manifest] = []
        self.unread: set[CheckpointRef] = set()
        self._num_acknowledged = 0
        self._pending_deletions: list[CheckpointRef] = []
        self._orphans_collected = False
        self._begun: set[int] = set()
        if ranks.rank == 0:
            self._journal = Journal(store.storage, store.attempt_dir(attempt), 0, stream=COMMITS, flush_s=0)

    def note(self, event: events.Event) -> None:
        """Write an event durably to the stream `commits`, on rank 0."""
        self._journal.write(event)

    def commit(
        self, payload: RankPayload, metrics: Mapping[str, float], declaration: Mapping[str, Any], began: float
    ) -> bool:
        """Write, commit and acknowledge a checkpoint, and apply retention. Every rank calls it.

        `began` is when the save began, by the monotonic clock. Returns False when this attempt is superseded. Raises
        ConfigError if a save of the step was begun before, and StorageError if a rank could not write: what was saved
        is intact.
        """
        if payload.step in self._begun:  # it may be committed, and only the response was lost
            raise ConfigError(
                f"a save of step {payload.step} was begun before by attempt {self._attempt}, and is not begun again",
                hint="it may be committed, or have failed; continue to the next step and save that",
            )
        self._begun.add(payload.step)
        ref = CheckpointRef(payload.step, self._attempt)
        directory = self._store.checkpoint_dir(ref)
        try:
            written = self.ranks.run_on_all(lambda: self._write(directory, payload))
        except StorageError:
            self.ranks.run_on_rank_0(lambda: self._discard(ref))
            raise
        fault_point(FaultPoint.BEFORE_MANIFEST, payload.step)
        manifest = Manifest(
            ref=ref,
            lineage=tuple(item.ref for item in self.lineage),
            files=tuple(sorted((entry for entries in written for entry in entries), key=lambda entry: entry.path)),
            world_size=self.ranks.size,
            metrics=dict(metrics),
            committed_at=time.time(),
            launch=self._launch,
            extra={"declaration": dict(declaration)},
        )
        acknowledged = self.ranks.run_on_rank_0(lambda: self._publish(manifest, began))
        if self.ranks.rank:
            fault_point(FaultPoint.AFTER_MANIFEST, payload.step)
        if not acknowledged:
            return False
        self.commits.append(manifest)
        self._num_acknowledged += 1
        if self._num_acknowledged >= 2:
            self.commits, self.lineage = self.ranks.run_on_rank_0(self._apply_retention)
        fault_point(FaultPoint.AFTER_RETENTION, payload.step)
        return True

    def _write(self, directory: str, payload: RankPayload) -> list[FileEntry]:
        entries = write_payload(self._store.storage, directory, self.ranks, payload)
        check_read_back(self._store.storage, directory, entries, is_first=not self._num_acknowledged)
        return entries

    def _discard(self, ref: CheckpointRef) -> None:
        """Delete what was written of a checkpoint whose manifest was not: it may fill the storage. On rank 0."""
        try:
            delete_checkpoint(self._store, ref)
        except StorageError:
            self._pending_deletions.append(ref)

    def _publish(self, manifest: Manifest, began: float) -> bool:
        """Commit and acknowledge on rank 0. False when superseded; then nothing may be deleted."""
        ref, data = manifest.ref, manifest.to_json()
        self._flush()  # events that precede a commit are durable before it
        # Repeating it with the same bytes is harmless, even if only the response was lost.
        retry(lambda: self._store.storage.put(f"{self._store.checkpoint_dir(ref)}/{layout.MANIFEST}", [data]))
        fault_point(FaultPoint.AFTER_MANIFEST, ref.step)
        if higher := claims.higher_claim(self._store, self._attempt):
            self._emit(events.SupersededEvent(step=ref.step, by=str(higher)))
            self._flush()
            return False
        event = events.CommitEvent(step=ref.step, digest=manifest.digest, num_bytes=manifest.num_bytes)
        self._journal.write(event)
        self._emit(replace(event, seconds=round(time.monotonic() - began, 4)))
        with suppress(StorageError):  # the commit is acknowledged; its event is written by the next flush
            self._flush()
        return True

    def _apply_retention(self) -> tuple[list[Manifest], list[Manifest]]:
        """Delete what the policy does not keep, on rank 0; return the remaining commits and lineage.

        Only after the second acknowledged commit. A failed deletion never fails the save: it is retried after the next.
        """
        kept = self.commits, self.lineage
        try:
            pinned = deletion.list_pins(self._store.fresh())
            kept = self._retain(pinned)
            if not self._orphans_collected:
                with suppress(StorageError):  # retried below
                    self._delete_pending()
                self._abort_uploads()
                orphans = self._find_orphans({item.ref for item in kept[1]} | pinned | self.unread)
                self._pending_deletions = list(dict.fromkeys([*self._pending_deletions, *orphans]))
                self._orphans_collected = True
            self._delete_pending()
        except StorageError as error:
            self._emit(events.DeleteFailedEvent(doomed=tuple(map(str, self._pending_deletions)), error=error.message))
        return kept

    def _delete_pending(self) -> None:
        """Delete what is possible; the rest stays pending. Raises the last failure."""
        doomed, self._pending_deletions = self._pending_deletions, []
        failure: StorageError | None = None
        for ref in doomed:
            try:
                event = events.DeleteEvent(step=ref.step, attempt=str(ref.attempt))
                self._journal.write(event)
                self._emit(event)
                delete_checkpoint(self._store, ref)
            except NotAFileError as error:  # they stay: nothing is left to try
                failure = error
            except StorageError as error:
                self._pending_deletions.append(ref)
                failure = error
        if failure is not None:
            raise failure

    def _retain(self, pinned: set[CheckpointRef]) -> tuple[list[Manifest], list[Manifest]]:
        """Queue deletions by the policy; return the remaining commits and lineage.

        Deletable are this attempt's commits and lineage if the policy does not keep them, and in lower attempts
        everything outside the lineage: incomplete, not accepted or rejected. Never a higher attempt's, or a pinned one.
        """
        accepted = [*self.commits, *self.lineage]
        keep = self._retention.keep([RetentionCandidate(item.ref, item.metrics) for item in accepted], pinned)
        doomed = [item.ref for item in accepted if item.ref not in keep]
        doomed, spared = deletion.exempt_pinned(self._store, self._journal, doomed)
        self._pending_deletions += doomed
        keep |= spared
        return [item for item in self.commits if item.ref in keep], [item for item in self.lineage if item.ref in keep]

    def _abort_uploads(self) -> None:
        try:
            count = abort_orphans(self._store, self._attempt)
        except StorageError as error:  # they only cost storage: not worth a retry
            self._emit(events.UploadsNotAbortedEvent(error=error.message))
        else:
            if count:
                self._emit(events.UploadsAbortedEvent(count=count))

    def _find_orphans(self, kept: set[CheckpointRef]) -> Iterator[CheckpointRef]:
        now = self._store.fresh()
        for attempt in claims.list_attempts(now):
            if attempt < self._attempt:
                with suppress(NotAFileError):  # it holds no checkpoint
                    yield from (ref for ref in claims.list_checkpoints_of(now, attempt) if ref not in kept)


def abort_orphans(store: RunStore, below: AttemptId) -> int:
    """Abort unfinished uploads of attempts lower than `below` and return their number. Raises StorageError.

    A superseded attempt that is still running loses a save by this, which could not have been acknowledged anyway.
    """

    def is_orphan(path: str) -> bool:
        attempt = AttemptId.parse(path.split("/")[0])
        return attempt is not None and attempt < below

    return abort_uploads(store.storage, store.attempts_dir, is_orphan)
