"""Claims: an attempt's directory and `claim.json`, by which attempts fence each other."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from outlast.checkpointing.format.layout import (
    CLAIM,
    AttemptId,
    attempt_dir,
    attempts_dir,
)
from outlast.checkpointing.storage.base import Storage, read_bytes
from outlast.checkpointing.storage.retry import retry


def list_attempts(storage: Storage, run: str) -> list[AttemptId]:
    """Every claim of the run, lowest first."""
    found = retry(lambda: storage.list(attempts_dir(run)))
    names = (AttemptId.parse(entry.name) for entry in found if entry.num_bytes is None)
    return sorted(attempt for attempt in names if attempt is not None)


def claim(storage: Storage, run: str, body: Mapping[str, Any]) -> AttemptId:
    """Creates the next claim, durably. `body` says who claims and with which settings; it must be JSON."""
    attempts = list_attempts(storage, run)
    number = attempts[-1].number + 1 if attempts else 1
    mine = AttemptId(number, secrets.token_hex(4))
    storage.put(f"{attempt_dir(run, mine)}/{CLAIM}", [json.dumps(body, indent=1).encode() + b"\n"])
    return mine


def read_claim(storage: Storage, run: str, attempt: AttemptId) -> dict[str, Any]:
    """What an attempt declared; empty if the claim was never finished or is damaged."""
    try:
        body = json.loads(read_bytes(storage, f"{attempt_dir(run, attempt)}/{CLAIM}"))
    except (FileNotFoundError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}


def higher_claim(storage: Storage, run: str, mine: AttemptId) -> AttemptId | None:
    """The highest claim above mine, which supersedes it, or None."""
    highest = list_attempts(storage, run)[-1:]
    return highest[0] if highest and highest[0] > mine else None


def launch_is_superseded(storage: Storage, run: str, launch: str) -> bool:
    """True if this launch has claimed before and the highest claim is now another launch's.

    A launch's first claim takes over from everyone; a later one (after a failure) only from itself. So the newest
    launch wins, and two launches never take over from each other in turn.
    """

    def launch_of(attempt: AttemptId) -> str | None:
        return read_claim(storage, run, attempt).get("launch")

    # A claim that was never finished says nothing, and counts for nobody; newest first, so that one read is the rule.
    claims = reversed(list_attempts(storage, run))
    if next((name for name in map(launch_of, claims) if name is not None), launch) == launch:
        return False
    with ThreadPoolExecutor(16) as pool:
        return launch in pool.map(launch_of, claims)
