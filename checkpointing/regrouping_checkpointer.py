"""`RegroupingCheckpointer`: a checkpointer whose attempt may continue what the one before it held in memory.

Such an attempt claims the run in the background, on rank 0, while steps go on: its first commit waits for the claim,
and its journal stays in memory until then. Every rank learns the result with the first save, or earlier if training
has to end because of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from typing import Any

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import StorageError
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store.attempt_claim import Continuation, Origin, OvertakenError, claim_generation
from outlast.checkpointing.run_store.catalog import Catalog, check_unread
from outlast.checkpointing.run_store.claims import list_attempts
from outlast.checkpointing.run_store.events import EvalEvent, Event, StepEvent, parse_event
from outlast.checkpointing.run_store.journal import Journal, parse_lines, read_events
from outlast.checkpointing.save.writer import RankPayload
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.checkpointing.storage.retry import wait_until_responsive

_POLL_S = 0.05


class RegroupingCheckpointer(Checkpointer):
    """Checkpoints of one generation of a group that goes on in memory. Each generation is an attempt of its own.

    Args:
        continues: What the attempt continues in memory; None for one that resumes from the storage.
        has_ended: Whether the generation has ended, so that nothing is waited for.
        options: As of `Checkpointer`.

    Attributes:
        origin: The attempt with which the group resumed from the storage.
    """

    def __init__(
        self,
        *args: Any,
        continues: Continuation | None = None,
        has_ended: Callable[[], bool] = lambda: False,
        **options: Any,
    ) -> None:
        self._continues, self._has_ended = continues, has_ended
        self._is_settled = continues is None
        self._claimed: Future[Catalog | None] = Future()
        self._before: Journal | None = None
        self._earlier: list[bytes] = []
        super().__init__(*args, **options)
        if continues is not None:
            self.origin = continues.origin
        elif not self.superseded:
            self.origin = Origin(self.attempt)

    def _claim(self, body: Mapping[str, Any]) -> tuple[AttemptId, Catalog] | None:
        if self._continues is None:
            return super()._claim(body)
        self._body = body
        return self.ranks.broadcast(self._continues.new_attempt()), Catalog(None, (), ())

    @property
    def _continuation(self) -> Continuation:
        if self._continues is None:
            raise RuntimeError("this attempt resumes from the storage")
        return self._continues

    def continue_in_memory(self, step: int) -> None:
        """Continue from a snapshot of the state after `step` steps, in place of `resume`. Every rank calls it.

        Raises:
            StorageError: What cannot be read may be newer than the checkpoints that count.
        """
        newest = self.catalogue.accepted[0].ref if self.catalogue.accepted else None
        check_unread(self._store, self.catalogue, newest)
        if newest is not None and newest.step > step:
            raise StorageError(f"{newest} is newer than the state in memory, after {step} steps")
        self._has_resumed = True
        self._take_lineage()
        self._newest_begun = max(self._newest_begun, newest.step if newest is not None else -1)

    def _take_lineage(self) -> None:
        """A step is a pure function, so the state in memory descends from each checkpoint that counts."""
        self._committer.lineage = list(self.catalogue.accepted)
        self._committer.unread = self.catalogue.unread_refs

    # -- going on in memory --------------------------------------------------------------------------------------------

    def go_on_in_memory(
        self,
        began: Event,
        kept: Sequence[StepEvent | EvalEvent],
        before: Journal | None,
        on_claimed: Callable[[AttemptId], None],
    ) -> None:
        """Begin to claim the run, in place of `resume`. Every rank calls it.

        Args:
            began: The attempt's first event.
            kept: Events that may not be durable. The journal gets those that no earlier one has.
            before: This process' journal of an earlier attempt in memory, which ends.
            on_claimed: Called on rank 0, in another thread, once the run is claimed, with the attempt continued.
        """
        self._has_resumed = True
        self._newest_begun = self._continuation.step - 1
        if self.journal is not None:
            self._before, self._kept, self._on_claimed = before, kept, on_claimed
            self.journal.hold()
            self.journal.write(began)
            self._claim_in_background()

    def _claim_in_background(self) -> None:
        """Claim in a thread. A daemon, because a storage may never respond."""
        claimed: Future[Catalog | None] = Future()
        self._claimed = claimed

        def work() -> None:
            try:
                claimed.set_result(self._claim_now())
            except BaseException as error:  # noqa: BLE001 - raised again by those who wait
                claimed.set_exception(error)

        threading.Thread(target=work, name="outlast-claim", daemon=True).start()

    def _claim_now(self) -> Catalog | None:
        """Claim the run and complete the journal; may be called again after a failure. None when superseded."""
        if self.journal is None:
            raise RuntimeError("rank 0 claims for all")
        if self._before is not None:
            self._earlier, self._before = self._before.end(), None
        wait_until_responsive(self._store.storage, self._store.attempts_dir)
        if self._has_ended():
            raise StorageError("the generation has ended before its claim")
        claimed = claim_generation(self.store, self.attempt, self._continuation, self._body, self._settle_s)
        if claimed is None:
            return None
        before, catalog = claimed
        if not self._has_ended():
            self.journal.release(self._earlier, self._missed(catalog))
            self._on_claimed(before)
        return catalog

    def _missed(self, catalog: Catalog) -> list[Event]:
        """Return the kept events that no journal has. What precedes a commit is in the journals."""
        newest = catalog.accepted[0].ref if catalog.accepted else None
        store = self.store
        bodies = list(parse_lines(self._earlier))
        for attempt in list_attempts(store):
            if attempt < self.attempt and (newest is None or attempt >= newest.attempt):
                bodies += read_events(store, store.attempt_dir(attempt))
        known = {
            (event.kind, event.step) for event in map(parse_event, bodies) if isinstance(event, StepEvent | EvalEvent)
        }
        after = -1 if newest is None else newest.step
        return [event for event in self._kept if event.step > after and (event.kind, event.step) not in known]

    def settle(self, ranks: RankGroup | None = None) -> None:
        """Wait for the claim, and tell every rank its result. Every rank calls it, in the same thread.

        Raises:
            OvertakenError: The state in memory is not the run's newest.
            StorageError: The storage failed; the next call tries again.
        """
        if self._is_settled:
            return
        catalog = (ranks or self.ranks).run_on_rank_0(self._wait_for_claim)
        if catalog is None:
            self.superseded = self._is_settled = True
            return
        self.catalogue = catalog
        self._take_lineage()
        self._is_settled = True

    def _wait_for_claim(self) -> Catalog | None:
        if self._claimed.done() and isinstance(self._claimed.exception(), StorageError):
            self._claim_in_background()
        while not futures.wait([self._claimed], _POLL_S).done:
            if self._has_ended():
                raise RuntimeError("the generation has ended")
        return self._claimed.result()

    def abandon(self) -> None:
        """Give up the save in flight, whose group is gone: nothing more of this attempt is waited for.

        Its thread ends by itself; what it may still commit counts only if no later attempt has claimed the run.
        """
        self._is_closed = True
        self._in_flight.abandon()

    # -- what waits for the claim --------------------------------------------------------------------------------------

    def _commit(self, payload: RankPayload, metrics: Mapping[str, float], began: float) -> bool:
        self.settle(self._committer.ranks)
        return not self.superseded and super()._commit(payload, metrics, began)

    def _is_to_write(self, step: int, model: Any) -> bool:
        if self._continues is not None and step == self._continues.step and self.wait():
            with self._failure_recorded(step):
                self.settle()  # the state may be committed already
        return super()._is_to_write(step, model)

    def note(self, event: Event) -> None:
        if not self._is_settled:
            self.ranks.run_on_rank_0(self._wait_for_claim)
        super().note(event)

    @property
    def has_failed_or_superseded(self) -> bool:
        return super().has_failed_or_superseded or self._must_end

    @property
    def _must_end(self) -> bool:
        """Whether the claim, on rank 0, has shown that training cannot go on."""
        if self._is_settled or not self._claimed.done():
            return False
        error = self._claimed.exception()
        return isinstance(error, OvertakenError) if error else self._claimed.result() is None

    def wait(self) -> bool:
        if super().wait() and not self._is_settled and self.ranks.broadcast(self._must_end):
            self.settle()
        return not self.superseded
