"""Interface between the step loop and its environment: stop and save requests in, progress out.

The loop must never import Ray; a cluster implements this protocol.
"""

from typing import Any, Protocol

from outlast.trainers.loop.rank_activity import StepPhase


class Control(Protocol):
    """Connection of the step loop to its environment. Its methods must return at once."""

    def stop_requested(self) -> bool:
        """Return whether this rank should end at the next step. One rank is enough."""

    def save_requested(self) -> str | None:
        """Return why to save after this step, or None. Called once per step on rank 0."""

    def claimed(self, attempt: str) -> None:
        """Receive the attempt's name, once."""

    def at(self, phase: StepPhase, step: int) -> None:
        """Receive the rank's phase, on every rank; `step` steps are done."""

    def worked(self, seconds: float) -> None:
        """Receive, on every rank, the seconds of a micro-batch without waiting for others: data and forward pass."""

    def progress(self, event: dict[str, Any]) -> None:
        """Receive an event (rank 0 only)."""
