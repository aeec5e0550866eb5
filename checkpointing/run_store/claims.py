"""Claims: the `claim.json` of each attempt, by which attempts fence each other.

Listing claims and comparing them is the run's only mutual exclusion. A claim is never changed, reused or deleted.
"""

import json
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from outlast.checkpointing.errors import NotAFileError, StorageRefused
from outlast.checkpointing.format.layout import (
    CLAIM,
    AttemptId,
    CheckpointRef,
    is_litter,
    parse_checkpoint,
    path_fault,
)
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.run_store.typed_json import Moment, fitting
from outlast.checkpointing.storage.base import list_directories, read_object
from outlast.checkpointing.storage.retry import retry
from outlast.checkpointing.storage.round_trip import check_written

#: Key of a claim: the attempt that this one continues in memory. The journal comes later, and until then a loss would
#: count as a failure.
REGROUPED_FROM = "regrouped_from"
#: Key of a claim: the attempt with which its group in memory resumed from the storage.
CONTINUES = "continues"
#: What readers of a claim rely on; a value of another type counts as missing.
_TYPES = {
    "launch": str,
    "claimed_at": Moment,
    "world_size": int,
    "settings": Mapping[str, Any],
    "versions": Mapping[str, Any],
    "workers": tuple[Mapping[str, Any], ...],
    REGROUPED_FROM: str,
    CONTINUES: str,
}


def list_attempts(store: RunStore) -> list[AttemptId]:
    """Return every claim of the run, lowest first; also one that cannot be read: its name takes the number."""
    names = [entry.name for entry in retry(lambda: store.list(store.attempts_dir))]
    return sorted(filter(None, map(AttemptId.parse, names)))


def list_checkpoints_of(store: RunStore, attempt: AttemptId) -> list[CheckpointRef]:
    """Return the checkpoint directories of an attempt, committed or not."""
    steps = map(parse_checkpoint, list_directories(store, store.attempt_dir(attempt)))
    return [CheckpointRef(step, attempt) for step in steps if step is not None]


def list_launches(store: RunStore) -> list[str]:
    return [name for name in list_directories(store, f"{store.run}/launches") if not is_litter(name)]


def claim(store: RunStore, body: Mapping[str, Any]) -> AttemptId:
    """Create the next claim durably, with a JSON `body` that names the launch and its settings.

    Raises StorageRefused if it does not read back, and StorageError.
    """
    attempts = list_attempts(store.fresh())
    number = attempts[-1].number + 1 if attempts else 1
    mine = AttemptId(number, secrets.token_hex(4))
    put_claim(store, mine, body)
    return mine


def put_claim(store: RunStore, mine: AttemptId, body: Mapping[str, Any]) -> None:
    """Write a claim durably. May be repeated with the same body. Raises as `claim`."""
    path, data = f"{store.attempt_dir(mine)}/{CLAIM}", json.dumps(body, indent=1).encode() + b"\n"
    store.storage.put(path, [data])
    check_written(store.storage, path, data)


def read_claim(store: RunStore, attempt: AttemptId) -> dict[str, Any]:
    """Read a claim; empty if it is missing, damaged, or recorded as unreadable."""
    path, body = f"{store.attempt_dir(attempt)}/{CLAIM}", {}
    with store.going_on(path):
        body = retry(lambda: read_object(store, path))
    body = fitting(body, _TYPES)
    if body.get("launch") and path_fault(body["launch"]):  # it names a directory
        del body["launch"]
    return body


def higher_claim(store: RunStore, mine: AttemptId) -> AttemptId | None:
    """Return the highest claim if it is above `mine`, which is then superseded; else None. Reads the storage."""
    highest = list_attempts(store.fresh())[-1:]
    return highest[0] if highest and highest[0] > mine else None


def continued_in_memory(claims: Mapping[AttemptId, Mapping[str, Any]]) -> set[AttemptId]:
    """Return the attempts that a later one of their group continued in memory. `claims` are those of a run."""
    group_of = {attempt: claim.get(CONTINUES) or str(attempt) for attempt, claim in claims.items()}
    newest = {group: attempt for attempt, group in sorted(group_of.items())}
    return {attempt for attempt, group in group_of.items() if attempt < newest[group]}


def launch_is_superseded(store: RunStore, launch: str) -> bool:
    """Return whether this launch has claimed before and another launch now holds the highest claim.

    A launch's first claim supersedes all launches; a later one (after a failure) only its own earlier claims. So the
    newest launch wins, and two launches never supersede each other in turn.
    """
    now = store.fresh()

    def launch_of(attempt: AttemptId) -> str | None:
        return read_for_fence(now, attempt)[0]

    # A claim without content belongs to no launch. Newest first: one read usually suffices.
    claims = reversed(list_attempts(now))
    if next((name for name in map(launch_of, claims) if name is not None), launch) == launch:
        return False
    with ThreadPoolExecutor(16) as pool:
        return launch in pool.map(launch_of, claims)


def read_for_fence(store: RunStore, attempt: AttemptId) -> tuple[str | None, str | None]:
    """Return the launch of a claim, None if it has no content, and the attempt whose group it is of, if it is of one.

    Raises StorageError.
    """
    path = f"{store.attempt_dir(attempt)}/{CLAIM}"
    try:
        body = retry(lambda: read_object(store, path))
    except NotAFileError:
        return None, None
    except StorageRefused:
        return "", None  # a launch can read its own claims, so this is another one's
    return body.get("launch"), body.get(CONTINUES)
