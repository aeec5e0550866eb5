"""When to save: every N steps, every M minutes, every epoch, or by costs and failures. Pure: no clock is read here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import Enum

FIRST_AUTO_S = 60.0
_TEXT = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|epochs?|steps?)?")


class IntervalUnit(Enum):
    """Units of `checkpoint.every`."""

    STEPS = "steps"
    SECONDS = "s"
    EPOCHS = "epochs"
    AUTO = "auto"


@dataclass(frozen=True, slots=True)
class SaveCosts:
    """The inputs of the best interval, in seconds."""

    blocked_s: float  #: training time lost to a save
    commit_s: float  #: from the start of a save to its commit
    restart_s: float  #: from a failure to the first step after it
    between_failures_s: float  #: mean time between failures

    @property
    def interval_s(self) -> float:
        """The interval that loses the least time: `sqrt(2 C (M + R))` (J. T. Daly, "A higher order estimate of the
        optimum checkpoint interval for restart dumps", 2006, equation 13 without its -C).

        At least ten times `commit_s`, so that at most a tenth of the time is spent writing.
        """
        best = math.sqrt(2 * self.blocked_s * (self.between_failures_s + self.restart_s))
        return max(best, 10 * self.commit_s, 1.0)


@dataclass(frozen=True, slots=True)
class SaveInterval:
    """A saving interval."""

    amount: float  #: positive; whole for steps and epochs
    unit: IntervalUnit  #: what `amount` counts
    written: str | int = field(default="", compare=False)  #: the text it was parsed from

    def __str__(self) -> str:
        return str(self.written)

    @classmethod
    def parse(cls, text: str | int) -> SaveInterval:
        """Parse `200`, `"200 steps"`, `"90s"`, `"10m"`, `"2h"`, `"1 epoch"` or `"auto"`. Raises ValueError."""
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
        """Return whether to save after `step` steps of `batch` samples; False for units of time, see `due_at_time`."""
        if self.unit is IntervalUnit.STEPS:
            return step % int(self.amount) == 0
        if self.unit is IntervalUnit.EPOCHS:
            every = int(self.amount) * num_samples
            return step * batch // every > (step - 1) * batch // every
        return False

    def due_at_time(self, seconds_since_save: float, costs: SaveCosts | None = None) -> bool:
        """Return whether the interval has passed since the last save began, or the attempt. Only rank 0 decides.

        `costs` are used by `auto`; None before its first save, which is due after a minute.
        """
        if self.unit is IntervalUnit.AUTO:
            return seconds_since_save >= (costs.interval_s if costs else FIRST_AUTO_S)
        return self.unit is IntervalUnit.SECONDS and seconds_since_save >= self.amount
