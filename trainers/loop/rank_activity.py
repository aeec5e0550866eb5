"""Progress of a rank's step loop: its phase, the time in it, and the time of its steps.

The loop writes, a watchdog in another thread reads. Nothing here may decide what is trained.
"""

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
    """Phases of the step loop, in the order of a step."""

    START = "start"  #: claim, build, restore
    EVALUATE = "evaluation"
    SAVE = "save"
    DATA = "data"
    AGREE = "agreement"  #: waits for the other ranks to begin the step
    COMPUTE = "forward and backward"
    EXCHANGE = "exchange of gradients"  #: overlaps the last backward pass
    UPDATE = "update"
    FINISH = "publishing"

    @property
    def order(self) -> int:
        return list(StepPhase).index(self)

    @property
    def is_quick(self) -> bool:
        """Whether the phase takes about equally long in every step."""
        return self in (StepPhase.AGREE, StepPhase.COMPUTE, StepPhase.EXCHANGE, StepPhase.UPDATE)


class RankActivity:
    """One rank's progress. The loop's thread calls `at` and `worked`; another one may read the rest.

    Attributes:
        measures_work: False if the times passed to `worked` depend on other ranks.
    """

    def __init__(self) -> None:
        self.measures_work = True
        self._now = (StepPhase.START, 0, time.monotonic())
        self._began: float | None = None
        self._steps: deque[float] = deque(maxlen=_NUM_STEPS)
        self._work: deque[float] = deque(maxlen=_NUM_WORK)

    def at(self, phase: StepPhase, step: int) -> None:
        """Enter a phase; `step` steps are done."""
        now = time.monotonic()
        if self._now[0] is StepPhase.UPDATE and self._began is not None:
            self._steps.append(now - self._began)
        if phase is StepPhase.DATA:
            self._began = now
        self._now = (phase, step, now)

    def worked(self, seconds: float) -> None:
        """Add the seconds of a micro-batch without waiting for other ranks, the mean of a step."""
        self._work.append(seconds)

    @property
    def now(self) -> tuple[StepPhase, int, float]:
        """The phase, the steps done, and the seconds in the phase so far."""
        phase, step, since = self._now
        return phase, step, time.monotonic() - since

    @property
    def step_s(self) -> float | None:
        """The median seconds of a step; None before three steps."""
        steps = list(self._steps)
        return median(steps) if len(steps) >= 3 else None

    @property
    def work_s(self) -> float | None:
        """The median of the latest times passed to `worked`; None until there are enough."""
        work = list(self._work)
        return median(work) if self.measures_work and len(work) == _NUM_WORK else None


class Stopwatch:
    """Adds up the seconds of a rank's forward passes, on the device's own clock where it has one.

    Args:
        device: The rank's device.
        listener: Called with the seconds of a micro-batch.
    """

    def __init__(self, device: torch.device, listener: Callable[[float], None]) -> None:
        self._listener = listener
        self._is_cuda = device.type == "cuda"
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        if self._is_cuda:
            span = (_cuda_event(), _cuda_event())
            span[0].record()
            yield
            span[1].record()
            self._spans.append(span)
            return
        began = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - began

    def report(self, data_s: float, num_micro: int) -> None:
        """Report the step before. Call it once the device has finished that step; otherwise this waits for it.

        Args:
            data_s: Seconds for reading a step's data.
            num_micro: Micro-batches of this rank in a step.
        """
        seconds, self._seconds = self._seconds, 0.0
        for begin, end in self._spans:
            end.synchronize()
            seconds += begin.elapsed_time(end) / 1000
        self._spans.clear()
        if num_micro and seconds:
            self._listener((data_s + seconds) / num_micro)


def _cuda_event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return event
