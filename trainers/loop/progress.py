"""Where a rank is, and how long it has been there: what the step loop says of itself while it goes on.

The loop writes, a watchdog in another thread reads. Nothing here decides what is trained.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from statistics import median

import torch

_NUM_STEPS = 64
_NUM_WORK = 32


class StepPhase(Enum):
    """What a rank is at, in the order in which a step comes by."""

    START = "start"  #: it claims, builds, restores
    EVALUATE = "evaluation"
    SAVE = "save"
    DATA = "data"
    AGREE = "agreement"  #: it waits for the others to begin the step
    COMPUTE = "forward and backward"
    EXCHANGE = "exchange of gradients"  #: and the last backward pass, which goes on meanwhile
    UPDATE = "update"
    FINISH = "publishing"

    @property
    def order(self) -> int:
        return list(StepPhase).index(self)

    @property
    def is_quick(self) -> bool:
        """True for the parts of a step that take about as long every time."""
        return self in (StepPhase.AGREE, StepPhase.COMPUTE, StepPhase.EXCHANGE, StepPhase.UPDATE)


class StepProgress:
    """One rank's. `at` and `worked` belong to the loop's thread; the rest may be asked from another.

    Attributes:
        measures_work: False where what is `worked` says nothing of this rank alone.
    """

    def __init__(self) -> None:
        self.measures_work = True
        self._now = (StepPhase.START, 0, time.monotonic())
        self._began: float | None = None
        self._steps: deque[float] = deque(maxlen=_NUM_STEPS)
        self._work: deque[float] = deque(maxlen=_NUM_WORK)

    def at(self, phase: StepPhase, step: int) -> None:
        """The rank enters a phase; `step` steps are done."""
        now = time.monotonic()
        if self._now[0] is StepPhase.UPDATE and self._began is not None:
            self._steps.append(now - self._began)
        if phase is StepPhase.DATA:
            self._began = now
        self._now = (phase, step, now)

    def worked(self, seconds: float) -> None:
        """What a micro-batch took this rank, without waiting for others: seconds, the mean of a step."""
        self._work.append(seconds)

    @property
    def now(self) -> tuple[StepPhase, int, float]:
        """The phase, the steps done, and how many seconds it has lasted."""
        phase, step, since = self._now
        return phase, step, time.monotonic() - since

    @property
    def step_s(self) -> float | None:
        """The median step; None before there are three."""
        steps = list(self._steps)
        return median(steps) if len(steps) >= 3 else None

    @property
    def work_s(self) -> float | None:
        """The median of what was `worked` lately; None until there is enough of it."""
        work = list(self._work)
        return median(work) if self.measures_work and len(work) == _NUM_WORK else None


class Stopwatch:
    """Adds up the seconds of a rank's forward passes, on the device's own clock where it has one.

    Args:
        device: Where they run.
        listener: Hears what a micro-batch took.
    """

    def __init__(self, device: torch.device, listener: Callable[[float], None]) -> None:
        self._listener = listener
        self._is_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._is_cuda:
            span = (self._mark(), self._mark())
            span[0].record()
            yield
            span[1].record()
            self._spans.append(span)
            return
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    @staticmethod
    def _mark() -> torch.cuda.Event:
        mark: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        return mark

    def tell(self, data_s: float, num_micro: int) -> None:
        """Tells of the step before. To be called when the device has caught up with it; else it waits for that.

        Args:
            data_s: What reading a step's data took.
            num_micro: The micro-batches that this rank does in a step.
        """
        seconds, self._seconds = self._seconds, 0.0
        for begin, end in self._spans:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1000
        self._spans.clear()
        if num_micro and seconds:
            self._listener((data_s + seconds) / num_micro)
