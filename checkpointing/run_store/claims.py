"""Claims: an attempt's directory and `claim.json`, by which attempts fence each other."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from outlast.checkpointing.format.layout import CLAIM, AttemptId
from outlast.checkpointing.run_store.store import RunStore
from outlast.checkpointing.storage.base import read_bytes
from outlast.checkpointing.storage.retry import retry


def list_attempts(store: RunStore) -> list[AttemptId]:
    """Every claim of the run, lowest first."""
    found = retry(lambda: store.list(store.attempts_dir))
    names = (AttemptId.parse(entry.name) for entry in found if entry.num_bytes is None)
    return sorted(attempt for attempt in names if attempt is not None)


def list_launches(store: RunStore) -> list[str]:
    """The run's launches, by name."""
    return [entry.name for entry in store.list(f"{store.run}/launches") if entry.num_bytes is None]


def claim(store: RunStore, body: Mapping[str, Any]) -> AttemptId:
    """Creates the next claim, durably. `body` says who claims and with which settings; it must be JSON."""
    attempts = list_attempts(store.fresh())
    number = attempts[-1].number + 1 if attempts else 1
    mine = AttemptId(number, secrets.token_hex(4))
    store.storage.put(f"{store.attempt_dir(mine)}/{CLAIM}", [json.dumps(body, indent=1).encode() + b"\n"])
    return mine


def read_claim(store: RunStore, attempt: AttemptId) -> dict[str, Any]:
    """What an attempt declared; empty if the claim was never finished or is damaged."""
    try:
        body = json.loads(read_bytes(store, f"{store.attempt_dir(attempt)}/{CLAIM}"))
    except (FileNotFoundError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def higher_claim(store: RunStore, mine: AttemptId) -> AttemptId | None:
    """The highest claim above mine now, which supersedes it, or None."""
    highest = list_attempts(store.fresh())[-1:]
    return highest[0] if highest and highest[0] > mine else None


def launch_is_superseded(store: RunStore, launch: str) -> bool:
    """True if this launch has claimed before and the highest claim is now another launch's.

    A launch's first claim takes over from everyone; a later one (after a failure) only from itself. So the newest
    launch wins, and two launches never take over from each other in turn.
    """
    now = store.fresh()

    def launch_of(attempt: AttemptId) -> str | None:
        return read_claim(now, attempt).get("launch")

    # A claim that was never finished says nothing, and counts for nobody; newest first, so that one read is the rule.
    claims = reversed(list_attempts(now))
    if next((name for name in map(launch_of, claims) if name is not None), launch) == launch:
        return False
    with ThreadPoolExecutor(16) as pool:
        return launch in pool.map(launch_of, claims)
