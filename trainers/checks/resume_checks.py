"""Checks of a resume: what may change between attempts, and what may not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_jsonable_python
from torch import nn

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError, DamagedError
from outlast.checkpointing.restore.reader import read_verified
from outlast.trainers.config.base import Settings
from outlast.trainers.config.train import Exactness
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.models.lora import base_digest


def check_unchanged(base: Mapping[str, Any], config: TrainingConfig, fingerprint: str | None) -> None:
    """Compares the settings with those that a run was started with. One that an older release did not know was at its
    default: a new setting's default is what was done before there was the setting.

    Args:
        base: The declaration in the newest checkpoint; empty on a fresh start.
        config: The settings now.
        fingerprint: The data's, or None when it is not to be compared.

    Raises:
        ConfigError: A setting that decides the run's numbers has changed.
    """
    if not base:
        return
    numerics_settings = config.numerics_settings()
    before, now = _flat(_completed(base["mathematics"], numerics_settings, config)), _flat(numerics_settings)
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    changed = [f"{key.rstrip('_')} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys]
    if fingerprint is not None and base["data"] != fingerprint:
        changed.append("the data is not the same (the files, or the settings under data: or model.tokenizer)")
    if changed:
        hint = "put them back, or start a new run with another `name:`"
        if {line.split()[0] for line in changed} <= {"train.steps", "train.epochs"}:
            model = f"{config.checkpoint.storage}/{config.name}/model"
            hint = "put them back to go on; to train its finished model further, start a run with another `name:` "
            hint += f"and `model: {{path: {model}}}`"
        raise ConfigError(
            f"run {config.name!r} was started with other settings, and going on with these would be another "
            "run:\n" + "\n".join(f"  {line}" for line in changed),
            hint=hint,
        )


def _check_samples(base: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """The same sources and settings can come out otherwise: with another release of a library, or a template that
    writes the date."""
    if base.get("samples", now["samples"]) != now["samples"]:
        raise ConfigError(
            "the data was prepared again, and its samples are not those that the run was started with",
            hint="put the directory .data in the storage back, or start a new run with another `name:`",
        )


def _completed(before: Mapping[str, Any], now: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """What was declared, with the defaults of settings that are declared only now, and without those that say nothing
    now: what silences them is declared itself.
    """
    whole = dict(before)
    for name, setting in type(settings).model_fields.items():
        inner = getattr(settings, name)
        if isinstance(inner, Settings) and isinstance(before.get(name), Mapping):
            whole[name] = _completed(before[name], now[name], inner)
        elif name in now and name not in before and not setting.is_required():
            whole[name] = to_jsonable_python(setting.get_default(call_default_factory=True))
        elif name not in now:
            whole.pop(name, None)
    return whole


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    inner = (_flat(item, f"{prefix}.{name}".strip(".")) for name, item in value.items())
    return {key: item for part in inner for key, item in part.items()}


def _check_architecture(checkpointer: Checkpointer) -> None:
    """A pretrained directory that changed since the run began is found out before its settings are mixed in."""
    for manifest in checkpointer.catalogue.accepted[:1]:
        entry = next((entry for entry in manifest.files if entry.path == "config.json"), None)
        if entry is None:
            return
        directory = checkpointer.store.checkpoint_dir(manifest.ref)
        try:
            before = json.loads(read_verified(checkpointer.store.storage, directory, entry).numpy().tobytes())
        except DamagedError:
            return  # the resume point is verified whole when it is read, and passed over
        now = json.loads(checkpointer.files["config.json"])
        changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
        if changed := changed - {"transformers_version"}:
            raise ConfigError(
                f"the model's configuration is not what run {checkpointer.store.run!r} was started with: "
                f"{', '.join(sorted(changed))}",
                hint="put the model directory back, or start a new run with another `name:`",
            )


def _check_base(checkpointer: Checkpointer, base: Mapping[str, Any], model: nn.Module) -> None:
    """An adapter's checkpoint does not hold the model beneath, so another one under the same name is found out here."""
    checkpointer.declaration["base"] = base_digest(model)
    if base.get("base", checkpointer.declaration["base"]) != checkpointer.declaration["base"]:
        raise ConfigError(
            f"the model beneath the adapter has not the weights that run {checkpointer.store.run!r} was started with",
            hint="put the model directory back, or start a new run with another `name:`",
        )


def _report_changes(checkpointer: Checkpointer, base: Mapping[str, Any], exactness: Exactness) -> None:
    """Puts into the journal what does not forbid going on, and whether the numbers stay the same to the last bit."""
    if checkpointer.journal is None:
        return
    for key in ("world_size", "parallel", "versions", "device"):
        before, now = base.get(key), checkpointer.declaration[key]
        if before not in (None, now):
            same_bits = key == "world_size" and exactness is Exactness.ELASTIC
            checkpointer.journal.event("changed", what=key, before=before, now=now, same_bits=same_bits)
