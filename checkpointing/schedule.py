"""When to save: every N steps, every M minutes, every epoch. Pure; the clock is passed in."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum

_TEXT = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|epochs?|steps?)?")


class Unit(Enum):
    """What `every:` counts."""

    STEPS = "steps"
    SECONDS = "s"
    EPOCHS = "epochs"


@dataclass(frozen=True, slots=True)
class Every:
    """A saving interval.

    Attributes:
        amount: Positive; whole for steps and epochs.
        unit: What `amount` counts.
    """

    amount: float
    unit: Unit

    @classmethod
    def parse(cls, text: str | int) -> Every:
        """`200` and `"200 steps"`, `"90s"`, `"10m"`, `"2h"`, `"1 epoch"`.

        Raises:
            ValueError: None of these.
        """
        match = _TEXT.fullmatch(str(text).strip())
        amount = float(match[1]) if match else 0.0
        word = (match[2] or "steps") if match else ""
        if word in ("s", "m", "h"):
            parsed = cls(amount * {"s": 1, "m": 60, "h": 3600}[word], Unit.SECONDS)
        else:
            parsed = cls(amount, Unit.EPOCHS if word.startswith("epoch") else Unit.STEPS)
        if amount <= 0 or (parsed.unit is not Unit.SECONDS and amount != int(amount)):
            raise ValueError(f"{text!r} is not an interval: write 200 (steps), 10m (or s, h), or 1 epoch")
        return parsed

    def due_at_step(self, step: int, batch: int, num_samples: int) -> bool:
        """True if the state after `step` steps is to be saved. Always False for time: see `due_at_time`.

        Args:
            step: Steps done.
            batch: Samples a step consumes.
            num_samples: Samples in an epoch.
        """
        if self.unit is Unit.STEPS:
            return step % int(self.amount) == 0
        if self.unit is Unit.EPOCHS:
            every = int(self.amount) * num_samples
            return step * batch // every > (step - 1) * batch // every
        return False

    def due_at_time(self, seconds_since_save: float) -> bool:
        """True if the interval has passed. Only rank 0 asks, and the others follow it."""
        return self.unit is Unit.SECONDS and seconds_since_save >= self.amount
