"""How Ray Train's controller tells a worker's process which roster to join, and as what."""

from __future__ import annotations

import os
from dataclasses import dataclass

from outlast.cluster.ray_internals import loopback_variables


@dataclass(frozen=True, slots=True)
class Invitation:
    """A place in a group that goes on in memory.

    Attributes:
        address: The roster's server.
        key: Its key.
        name: Name of the process in the roster.
        rank: Its rank in the first generation; None for a spare.
        backend: Of the gradients' process group.
        is_loopback: Whether the group's connections must listen on the loopback only.
    """

    address: tuple[str, int]
    key: bytes
    name: str
    rank: int | None
    backend: str
    is_loopback: bool


_accepted: list[Invitation] = []


def accept(invitation: Invitation) -> None:
    """Keep this process' invitation, and apply what the group's connections need. The controller calls it remotely."""
    _accepted[:] = [invitation]
    if invitation.is_loopback:
        os.environ |= loopback_variables()


def accepted() -> Invitation | None:
    """Return this process' invitation; None in a group that does not go on in memory."""
    return _accepted[0] if _accepted else None
