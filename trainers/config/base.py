"""Base of all settings: their class, which is frozen and refuses unknown keys, and intervals, parsed at validation."""

import os
from collections.abc import Mapping
from contextlib import suppress
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, model_validator

from outlast.checkpointing.save.save_schedule import IntervalUnit, SaveInterval


class Settings(BaseModel):
    """Base class of a block of settings."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _paths_as_text(cls, body: Any) -> Any:
        """Accept `os.PathLike` wherever the settings take a path."""
        if not isinstance(body, Mapping):
            return body
        return {
            key: list(map(_as_text, item)) if isinstance(item, list) else _as_text(item) for key, item in body.items()
        }


def _as_text(value: Any) -> Any:
    return os.fsdecode(value) if isinstance(value, os.PathLike) else value


def _interval(value: Any) -> SaveInterval:
    return value if isinstance(value, SaveInterval) else SaveInterval.parse(value)


def _duration(value: Any) -> SaveInterval:
    with suppress(ValueError):
        if (interval := _interval(value)).unit is IntervalUnit.SECONDS:
            return interval
    raise ValueError(f"{value!r} is not a duration: write 90s, 2m or 1h")


_AS_WRITTEN = PlainSerializer(lambda interval: interval.written)
#: Steps, epochs, a duration, or auto. It is dumped as it was written.
Interval = Annotated[SaveInterval, BeforeValidator(_interval), _AS_WRITTEN]
#: A duration only.
Duration = Annotated[SaveInterval, BeforeValidator(_duration), _AS_WRITTEN]
