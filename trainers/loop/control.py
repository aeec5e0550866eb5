"""The step loop's line to the outside: whether to stop or save, and whom to tell. The loop knows nothing of Ray."""

from __future__ import annotations

from typing import Any, Protocol

from outlast.trainers.loop.rank_activity import StepPhase


class Control(Protocol):
    """The loop's line to the outside. Its methods must return at once."""

    def stop_requested(self) -> bool:
        """True once this rank was asked to end at the next step. Ranks need not agree: one is enough."""

    def save_requested(self) -> str | None:
        """Why to save after this step, asked once a step on rank 0; None for no reason."""

    def claimed(self, attempt: str) -> None:
        """Learns the attempt's name, once."""

    def at(self, phase: StepPhase, step: int) -> None:
        """Learns, on every rank, what it is at; `step` steps are done."""

    def worked(self, seconds: float) -> None:
        """Learns, on every rank, what a micro-batch took it without waiting for others: its data and forward pass."""

    def progress(self, event: dict[str, Any]) -> None:
        """Takes note of an event (rank 0 only)."""
