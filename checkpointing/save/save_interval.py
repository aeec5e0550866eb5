"""When to save: every N steps, every M minutes, every epoch, or as costs and failures say. Pure; no clock in here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import Enum

FIRST_AUTO_S = 60.0
_TEXT = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|epochs?|steps?)?")


class IntervalUnit(Enum):
    """What `every:` counts."""

    STEPS = "steps"
    SECONDS = "s"
    EPOCHS = "epochs"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class SaveCosts:
    """What the best interval depends on, in seconds.

    Attributes:
        blocked_s: Training time that a save takes.
        commit_s: From the beginning of a save to its commit.
        restart_s: From a failure to the first step after it.
        between_failures_s: Mean time between failures.
    """

    blocked_s: float
    commit_s: float
    restart_s: float
    between_failures_s: float

    @property
    def interval_s(self) -> float:
        """The interval that loses least: `sqrt(2 C (M + R))`, Young's as Daly corrected it (J. T. Daly, "A higher
        order estimate of the optimum checkpoint interval for restart dumps", 2006, equation 13 without its -C).

        Never so short that storage is written to for more than a tenth of the time.
        """
        best = math.sqrt(2 * self.blocked_s * (self.between_failures_s + self.restart_s))
        return max(best, 10 * self.commit_s, 1.0)


@dataclass(frozen=True, slots=True)
class SaveInterval:
    """A saving interval.

    Attributes:
        amount: Positive; whole for steps and epochs.
        unit: What `amount` counts.
        written: What it was parsed from.
    """

    amount: float
    unit: IntervalUnit
    written: str | int = field(default="", compare=False)

    def __str__(self) -> str:
        return str(self.written)

    @classmethod
    def parse(cls, text: str | int) -> SaveInterval:
        """`200` and `"200 steps"`, `"90s"`, `"10m"`, `"2h"`, `"1 epoch"`, `"auto"`.

        Raises:
            ValueError: None of these.
        """
        if text == "auto":
            return cls(1, IntervalUnit.AUTO, text)
        match = _TEXT.fullmatch(str(text).strip())
        amount = float(match[1]) if match else 0.0
        word = (match[2] or "steps") if match else ""
        if word in ("s", "m", "h"):
            parsed = cls(amount * {"s": 1, "m": 60, "h": 3600}[word], IntervalUnit.SECONDS, text)
        else:
            parsed = cls(amount, IntervalUnit.EPOCHS if word.startswith("epoch") else IntervalUnit.STEPS, text)
        if amount <= 0 or (parsed.unit is not IntervalUnit.SECONDS and amount != int(amount)):
            raise ValueError(f"{str(text)!r} is not an interval: write 200 (steps), 10m (or s, h), 1 epoch, or auto")
        return parsed

    def due_at_step(self, step: int, batch: int, num_samples: int) -> bool:
        """True if the state after `step` steps is to be saved. Always False for time: see `due_at_time`.

        Args:
            step: Steps done.
            batch: Samples a step consumes.
            num_samples: Samples in an epoch.
        """
        if self.unit is IntervalUnit.STEPS:
            return step % int(self.amount) == 0
        if self.unit is IntervalUnit.EPOCHS:
            every = int(self.amount) * num_samples
            return step * batch // every > (step - 1) * batch // every
        return False

    def due_at_time(self, seconds_since_save: float, costs: SaveCosts | None = None) -> bool:
        """True if the interval has passed. Only rank 0 asks, and the others follow it.

        Args:
            seconds_since_save: Since the last save began, or since the attempt began.
            costs: For `auto`; None before the first save, which is due after a minute.
        """
        if self.unit is IntervalUnit.AUTO:
            return seconds_since_save >= (costs.interval_s if costs else FIRST_AUTO_S)
        return self.unit is IntervalUnit.SECONDS and seconds_since_save >= self.amount
