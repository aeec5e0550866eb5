"""How an attempt claims the run: before it reads anything, or as a generation of a group that goes on in memory.

A generation has its state already, so its claim may come after its first steps, but never after its first commit. What
it must learn from the storage is that its state still is the run's newest: since its group resumed from the storage,
nobody else has claimed the run, and no checkpoint counts of a later step than the one at which the generation began.
Its number is the group's first one plus the generations since. So a generation never comes above a later one of its
group, however late it claims.
"""

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from outlast.checkpointing.errors import OutlastError
from outlast.checkpointing.format.layout import AttemptId
from outlast.checkpointing.run_store import attempt_history as history
from outlast.checkpointing.run_store import claims
from outlast.checkpointing.run_store.catalog import Catalog, build_catalog, check_unread
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.retry import retry


class OvertakenError(OutlastError):
    """The state in memory is no longer the run's newest, so the next attempt resumes from the storage."""


@dataclass(frozen=True, slots=True)
class Origin:
    """The attempt with which a group in memory resumed from the storage, and its generation."""

    attempt: AttemptId
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Continuation:
    """What a generation continues: the state after `step` steps."""

    origin: Origin
    generation: int
    step: int

    def new_attempt(self) -> AttemptId:
        number = self.origin.attempt.number + self.generation - self.origin.generation
        return AttemptId(number, secrets.token_hex(4))


def claim_run(
    store: RunStore, launch: str, body: Mapping[str, Any], settle_s: float
) -> tuple[AttemptId, Catalog] | None:
    """Claim the run and read its catalog; None if a later launch or attempt has claimed it. Raises StorageError."""
    if claims.launch_is_superseded(store, launch):
        return None
    mine = claims.claim(store, body)
    time.sleep(2 * settle_s)
    now = store.fresh()  # must not use what was read before the claim
    if max(claims.list_attempts(now), default=mine) > mine:
        return None
    records = retry(lambda: history.read_attempt_history(now, live=launch, below=mine))
    return mine, retry(lambda: build_catalog(now, mine, history.checkpoints_to_skip(records)))


def claim_generation(
    store: RunStore, mine: AttemptId, continues: Continuation, body: Mapping[str, Any], settle_s: float
) -> tuple[AttemptId, Catalog] | None:
    """Claim the run as `mine`; None if a later launch or generation has claimed it.

    May be called again after a failure. `body` names the launch.

    Returns:
        The newest earlier attempt of the group that has claimed the run, which the claim names, and the catalog.

    Raises:
        OvertakenError: Others have gone on from the storage.
        StorageError: The storage failed.
    """
    launch, origin = str(body["launch"]), continues.origin.attempt
    now = store.fresh()
    if _is_superseded(now, mine, origin, launch, has_claimed=False):
        return None
    before = _newest_of_group(now, mine, origin)
    claims.put_claim(store, mine, {**body, claims.CONTINUES: str(origin), claims.REGROUPED_FROM: str(before)})
    time.sleep(2 * settle_s)
    now = store.fresh()  # must not use what was read before the claim
    if _is_superseded(now, mine, origin, launch, has_claimed=True):
        return None
    catalog = retry(lambda: build_catalog(now, mine))
    newest = catalog.accepted[0].ref if catalog.accepted else None
    check_unread(now, catalog, newest)
    committed = [item.ref for item in catalog.accepted[:1]] + [item.ref for item in catalog.rejected]
    if newer := [ref for ref in committed if ref.step > continues.step and ref.attempt >= origin]:
        raise OvertakenError(f"{newer[0]} is newer than the state in memory, after {continues.step} steps")
    return before, catalog


def _newest_of_group(store: RunStore, below: AttemptId, origin: AttemptId) -> AttemptId:
    """Return the newest attempt of a group that has claimed the run: a generation may be lost before its claim."""
    later = (item for item in reversed(claims.list_attempts(store)) if origin < item < below)
    return next((item for item in later if claims.read_for_fence(store, item)[1] == str(origin)), origin)


def _is_superseded(store: RunStore, mine: AttemptId, origin: AttemptId, launch: str, *, has_claimed: bool) -> bool:
    """Return whether a later launch or generation has claimed the run since `origin` did.

    Raises OvertakenError for any other claim since then that is not of an earlier generation.
    """
    for attempt in reversed(claims.list_attempts(store)):
        if attempt <= origin:
            break
        if attempt == mine:
            continue
        name, continued = claims.read_for_fence(store, attempt)
        is_of_group = continued == str(origin)
        # Without content it is being put, so its owner lists the claims after that, and finds this one.
        if attempt < mine and (is_of_group or name is None):
            continue
        if (is_of_group or name not in (None, launch)) and (attempt > mine or not has_claimed):
            return True
        raise OvertakenError(f"{attempt} has claimed the run while {mine} went on in memory")
    return False
