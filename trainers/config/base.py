"""What all settings are made of: their base class, and intervals, which are parsed when the settings are built."""

from __future__ import annotations

from contextlib import suppress
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer

from outlast.checkpointing.save.save_interval import IntervalUnit, SaveInterval


class Settings(BaseModel):
    """Base of every block of settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


def _interval(value: Any) -> SaveInterval:
    return value if isinstance(value, SaveInterval) else SaveInterval.parse(value)


def _duration(value: Any) -> SaveInterval:
    with suppress(ValueError):
        if (interval := _interval(value)).unit is IntervalUnit.SECONDS:
            return interval
    raise ValueError(f"{value!r} is no time: write 90s, 2m or 1h")


_AS_WRITTEN = PlainSerializer(lambda interval: interval.written)
#: Steps, epochs, a time, or auto. It is dumped as it was written.
Interval = Annotated[SaveInterval, BeforeValidator(_interval), _AS_WRITTEN]
#: A time alone.
Duration = Annotated[SaveInterval, BeforeValidator(_duration), _AS_WRITTEN]
