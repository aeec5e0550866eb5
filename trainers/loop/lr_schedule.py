"""Learning-rate schedules: a step's rate as a pure function of settings and step, so that no state is saved."""

import math

from outlast.trainers.config.train import Schedule, TrainSettings

#: Timescale of inverse_sqrt without a warm-up, as in transformers.
_TIMESCALE = 10_000


def learning_rate(train: TrainSettings, step: int, num_steps: int) -> float:
    """Return the learning rate of `step` (from 0): linear warm-up to the peak, then `schedule` down to `min_lr`.

    After the warm-up it equals transformers' schedules; the warm-up is a step ahead of theirs, whose first step has a
    rate of zero.
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
    """Return `given` as steps; below 1 it is a fraction of `num_steps`."""
    return math.ceil(given * num_steps) if given < 1 else int(given)
