"""One save after another, from the ranks' shares to an acknowledged commit, and the deletions that follow.

The protocol's second half (`claims`, `catalog` and `checkpointer` claim and choose): every rank's files are durable,
then the manifest, then a look at the claims; only then is the commit acknowledged, and only after the second
acknowledged commit may anything be deleted. Runs in the caller's thread or in the background, on ranks of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypeVar

from outlast.checkpointing.errors import ConfigError, StorageError
from outlast.checkpointing.fault_injection import FaultPoint, fault_point
from outlast.checkpointing.format import layout
from outlast.checkpointing.format.layout import AttemptId, CheckpointRef
from outlast.checkpointing.format.manifest import Manifest
from outlast.checkpointing.run_store import claims, events, pins
from outlast.checkpointing.run_store.catalog import delete_checkpoint
from outlast.checkpointing.run_store.journal import COMMITS, Journal
from outlast.checkpointing.run_store.retention import Retention, RetentionCandidate
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.save.writer import RankPayload, write_payload
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.storage.multipart_uploads import abort_uploads
from outlast.checkpointing.storage.retry import retry

T = TypeVar("T")
Tell = Callable[[events.Event], None]


class Committer:
    """The commits of one attempt.

    Args:
        store: The run.
        attempt: The attempt, which is claimed.
        launch: Its launch.
        ranks: The ranks; nobody else may use this group while a save is under way.
        retention: What to keep.
        tell: Takes events for the journal (rank 0).
        flush: Makes the journal durable.

    Attributes:
        commits: This attempt's acknowledged commits that are still kept.
        lineage: The checkpoint that the attempt resumed from and the older ones it stands on, as far as they are kept.
    """

    def __init__(
        self,
        store: RunStore,
        attempt: AttemptId,
        launch: str,
        ranks: RankGroup,
        retention: Retention,
        tell: Tell,
        flush: Callable[[], None],
    ) -> None:
        self._store, self._attempt, self._launch = store, attempt, launch
        self._ranks, self._retention, self._tell, self._flush = ranks, retention, tell, flush
        self.commits: list[Manifest] = []
        self.lineage: list[Manifest] = []
        self._num_acknowledged = 0
        self._pending_deletions: list[CheckpointRef] = []
        self._orphans_collected = False
        self._begun: set[int] = set()
        if ranks.rank == 0:
            self._journal = Journal(store.storage, store.attempt_dir(attempt), 0, stream=COMMITS, flush_s=0)

    def note(self, event: events.Event) -> None:
        """Writes an event that must be known whatever happens next; durable when this returns (rank 0 only)."""
        if self._ranks.rank == 0:
            self._journal.write(event)

    def commit(
        self, share: RankPayload, metrics: Mapping[str, float], declaration: Mapping[str, Any], began: float
    ) -> bool:
        """Writes, commits, acknowledges and lets go. Every rank calls it.

        Args:
            share: What this rank writes.
            metrics: What is known of the model at this step.
            declaration: What the manifest says of the run.
            began: When the save began, by the monotonic clock.

        Returns:
            True when the commit is acknowledged, False when this attempt is superseded.

        Raises:
            StorageError: A rank could not write. Earlier checkpoints are untouched.
        """
        if share.step in self._begun:  # what lies there may be a commit of which only the answer was lost
            raise ConfigError(
                f"step {share.step} was saved before by attempt {self._attempt}, and is not written twice",
                hint="go on to the next step and save that",
            )
        self._begun.add(share.step)
        ref = CheckpointRef(share.step, self._attempt)
        directory = self._store.checkpoint_dir(ref)
        written = self._ranks.everybody(lambda: write_payload(self._store.storage, directory, self._ranks, share))
        fault_point(FaultPoint.BEFORE_MANIFEST, share.step)
        manifest = Manifest(
            ref=ref,
            lineage=tuple(item.ref for item in self.lineage),
            files=tuple(sorted((entry for entries in written for entry in entries), key=lambda entry: entry.path)),
            world_size=self._ranks.size,
            metrics=dict(metrics),
            committed_at=time.time(),
            launch=self._launch,
            extra={"declaration": dict(declaration)},
        )
        acknowledged = self._ranks.run_on_rank_0(lambda: self._publish(manifest, began))
        if self._ranks.rank:
            fault_point(FaultPoint.AFTER_MANIFEST, share.step)
        if not acknowledged:
            return False
        self.commits.append(manifest)
        self._num_acknowledged += 1
        if self._num_acknowledged >= 2:
            self.commits, self.lineage = self._ranks.run_on_rank_0(self._apply_retention)
        fault_point(FaultPoint.AFTER_RETENTION, share.step)
        return True

    def _publish(self, manifest: Manifest, began: float) -> bool:
        """Rank 0: the commit, then the acknowledgement. False when superseded; then nothing may be deleted."""
        ref, data = manifest.ref, manifest.to_json()
        self._flush()  # what led to a commit is told before it
        # Once more with the same bytes is harmless, also when the first time was a success that nobody heard of.
        retry(lambda: self._store.storage.put(f"{self._store.checkpoint_dir(ref)}/{layout.MANIFEST}", [data]))
        fault_point(FaultPoint.AFTER_MANIFEST, ref.step)
        if higher := claims.higher_claim(self._store, self._attempt):
            self._tell(events.SupersededEvent(step=ref.step, by=str(higher)))
            self._flush()
            return False
        event = events.CommitEvent(step=ref.step, digest=manifest.digest, num_bytes=manifest.num_bytes)
        self._journal.write(event)
        self._tell(replace(event, seconds=round(time.monotonic() - began, 4)))
        self._flush()
        return True

    def _apply_retention(self) -> tuple[list[Manifest], list[Manifest]]:
        """Rank 0, after the second acknowledged commit: deletes what nothing keeps. Returns what is left of both.

        The commit stands, and a deletion that failed is no reason to end: it is tried again after the next one.
        """
        kept = self.commits, self.lineage
        try:
            pinned = pins.list_pins(self._store.fresh())
            kept = self._retain(pinned)
            if self._orphans_collected:
                self._delete_pending()
            else:
                with suppress(StorageError):  # tried again below
                    self._delete_pending()
                self._abort_uploads()
                strays = list(self._find_orphans({item.ref for item in kept[1]} | pinned))
                self._pending_deletions = list(dict.fromkeys([*self._pending_deletions, *strays]))
                self._orphans_collected = True
                self._delete_pending()
        except StorageError as error:
            self._tell(events.DeleteFailedEvent(doomed=tuple(map(str, self._pending_deletions)), error=error.message))
        return kept

    def _delete_pending(self) -> None:
        """Deletes what it can; the rest stays doomed. Raises the last failure."""
        doomed, self._pending_deletions, failure = self._pending_deletions, [], None
        for ref in doomed:
            try:
                self._delete(ref)
            except StorageError as error:
                self._pending_deletions.append(ref)
                failure = error
        if failure is not None:
            raise failure

    def _retain(self, pinned: set[CheckpointRef]) -> tuple[list[Manifest], list[Manifest]]:
        """Dooms what nothing keeps; returns what is left of both.

        Deletable are my own commits and my lineage as far as the policy lets them go, and in lower attempts whatever
        lies outside my lineage: torn, disowned or rejected. Never anything in a higher attempt, or pinned.
        """
        accepted = [*self.commits, *self.lineage]
        keep = self._retention.keep([RetentionCandidate(item.ref, item.metrics) for item in accepted], pinned)
        doomed = [item.ref for item in accepted if item.ref not in keep]
        doomed, spared = pins.exempt_pinned(self._store, self._journal, doomed)
        keep |= spared
        mine = [item for item in self.commits if item.ref in keep]
        left = [item for item in self.lineage if item.ref in keep]
        self._pending_deletions += doomed
        return mine, left

    def _abort_uploads(self) -> None:
        try:
            count = abort_orphans(self._store, self._attempt)
        except StorageError as error:  # they count for nothing and only cost money: not worth another try
            self._tell(events.UploadsNotAbortedEvent(error=error.message))
        else:
            if count:
                self._tell(events.UploadsAbortedEvent(count=count))

    def _find_orphans(self, kept: set[CheckpointRef]) -> Iterator[CheckpointRef]:
        for attempt in claims.list_attempts(self._store.fresh()):
            if attempt >= self._attempt:
                return
            for entry in self._store.storage.list(self._store.attempt_dir(attempt)):
                step = layout.parse_checkpoint(entry.name) if entry.num_bytes is None else None
                if step is not None and CheckpointRef(step, attempt) not in kept:
                    yield CheckpointRef(step, attempt)

    def _delete(self, ref: CheckpointRef) -> None:
        event = events.DeleteEvent(step=ref.step, attempt=str(ref.attempt))
        self._journal.write(event)
        self._tell(event)
        delete_checkpoint(self._store, ref)


def abort_orphans(store: RunStore, below: AttemptId) -> int:
    """Aborts what attempts lower than `below` left unfinished, and returns how many uploads that were.

    A superseded attempt that is still at work loses its save by it, which could not have been acknowledged.

    Raises:
        StorageError: The store refused or did not answer.
    """

    def is_orphan(path: str) -> bool:
        attempt = AttemptId.parse(path.split("/")[0])
        return attempt is not None and attempt < below

    return abort_uploads(store.storage, store.attempts_dir, is_orphan)
