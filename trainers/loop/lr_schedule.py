"""Learning-rate schedules."""

from __future__ import annotations

import math

from outlast.trainers.config.train import Schedule, TrainSettings

#: Timescale of inverse_sqrt without a warm-up, as in transformers.
_TIMESCALE = 10_000


def learning_rate(train: TrainSettings, step: int, num_steps: int) -> float:
    """The learning rate of `step` (from 0): linear warm-up to the peak, then as `schedule` says, down to `min_lr`.

    From the end of the warm-up on it is that of transformers' schedules; the warm-up itself is a step ahead of theirs,
    which spends the first step at a rate of zero.
    """
    warmup = _num_steps(train.warmup, num_steps)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    if train.schedule is Schedule.INVERSE_SQRT:
        timescale = warmup or _TIMESCALE
        return train.lr / math.sqrt((step - warmup + timescale) / timescale)
    begin = warmup
    if train.schedule is Schedule.WSD:
        begin = max(warmup, num_steps - _num_steps(train.decay, num_steps))
    done = min(1.0, max(0.0, (step - begin) / max(1, num_steps - begin)))
    match train.schedule:
        case Schedule.CONSTANT:
            factor = 1.0
        case Schedule.LINEAR:
            factor = 1 - done
        case Schedule.POLYNOMIAL:
            factor = math.pow(1 - done, train.power)
        case _:
            factor = 0.5 * (1 + math.cos(math.pi * done))
    return train.min_lr + (train.lr - train.min_lr) * factor


def _num_steps(given: float, num_steps: int) -> int:
    """Steps, of a number of steps or, below 1, of a share of all."""
    return math.ceil(given * num_steps) if given < 1 else int(given)
