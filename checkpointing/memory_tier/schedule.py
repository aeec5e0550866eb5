"""How often to take a snapshot: so that it costs at most one percent of the time of the steps."""

import math
from collections import deque
from statistics import median

MAX_SHARE = 0.01
#: Steps without a snapshot that are timed before the first one.
_NUM_BEFORE = 3


class SnapshotSchedule:
    """Decides when a snapshot is due.

    Args:
        every: Steps from one to the next; None to derive them from the measured costs.

    Attributes:
        interval: Steps from one to the next, as far as they are known.
    """

    def __init__(self, every: int | None = None) -> None:
        self._every = every
        self._undisturbed = deque[float](maxlen=50)
        self._direct, self._excess = deque[float](maxlen=5), deque[float](maxlen=5)
        self._disturbed: list[float] = []
        self._num_since = 0
        self.interval = every or _NUM_BEFORE

    def step_done(self, seconds: float, *, is_disturbed: bool) -> None:
        """Record the duration of a step; it is disturbed if a snapshot was in flight."""
        self._num_since += 1
        (self._disturbed if is_disturbed else self._undisturbed).append(seconds)

    def is_due(self) -> bool:
        """Return whether a snapshot is due after the step that has begun."""
        return self._num_since + 1 >= self.interval

    def begun(self) -> None:
        """Record that a snapshot has begun."""
        self._num_since = 0
        self._disturbed.clear()

    def ended(self, blocked_s: float, within_s: float) -> None:
        """Record the costs of a snapshot that has ended.

        Args:
            blocked_s: Seconds that training waited for it between two steps.
            within_s: Seconds that it took from the steps, as far as it is known directly.
        """
        usual = median(self._undisturbed) if self._undisturbed else 0.0
        self._direct.append(blocked_s + within_s)
        # Steps differ by more than a snapshot takes, so a single difference proves nothing.
        self._excess.append(blocked_s + sum(seconds - usual for seconds in self._disturbed))
        cost_s = max(median(self._direct), median(self._excess) if len(self._excess) >= _NUM_BEFORE else 0.0)
        if self._every is None and usual:
            self.interval = max(1, math.ceil(cost_s / (MAX_SHARE * usual)))
