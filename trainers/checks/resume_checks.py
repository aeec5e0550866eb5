"""Checks of a resume: which settings, data and model may not change between attempts, and a record of what did.

A resumed run must compute what an uninterrupted one computes; whatever would change its numbers is refused here. So is
a model that the ranks of one attempt build differently.
"""

import json
from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import xxhash
from pydantic import TypeAdapter
from torch import nn

from outlast.checkpointing.checkpointer import Checkpointer
from outlast.checkpointing.errors import ConfigError, DamagedError
from outlast.checkpointing.json_input import parse_json
from outlast.checkpointing.restore.reader import read_verified
from outlast.checkpointing.run_store.events import ChangedEvent
from outlast.checkpointing.run_store.typed_json import section
from outlast.checkpointing.state.rank_group import RankGroup
from outlast.trainers.config.base import Settings
from outlast.trainers.config.train import Exactness
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.models.canonical import describe_layout, layout_differences, layout_fingerprint
from outlast.trainers.models.lora import base_digest

#: Lines of a list of differences in an error.
MAX_SHOWN = 5


def check_unchanged(base: Mapping[str, Any], config: TrainingConfig, fingerprint: str | None) -> None:
    """Compare the settings with those that a run was started with.

    Settings that the older release did not have count as their defaults: the default of a new setting is the behaviour
    before it existed.

    Args:
        base: The declaration of the newest checkpoint; empty on a fresh start.
        config: The current settings.
        fingerprint: The data's fingerprint; None to skip that comparison.

    Raises:
        ConfigError: A setting that determines the run's numbers has changed.
    """
    if changed := changed_settings(base, config, fingerprint):
        hint = "restore them, or start a new run with another `name:`"
        if changed.keys() <= {"train.steps", "train.epochs"}:
            model = f"{config.checkpoint.storage}/{config.name}/model"
            hint = "restore them to resume; to train the finished model further, start a run with another `name:` "
            hint += f"and `model: {{path: {model}}}`"
        raise ConfigError(
            f"run {config.name!r} was started with other settings, and cannot resume with these:\n"
            + "\n".join(f"  {line}" for line in changed.values()),
            hint=hint,
        )


def changed_settings(base: Mapping[str, Any], config: TrainingConfig, fingerprint: str | None) -> dict[str, str]:
    """Return what differs from the settings that a run was started with, as `check_unchanged`: key to text."""
    if not base:
        return {}
    numerics_settings = config.numerics_settings()
    before, now = (
        flatten(_with_defaults(section(base, "mathematics"), numerics_settings, config)),
        flatten(numerics_settings),
    )
    keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    texts = {key.rstrip("_"): f"was {_shown(before, key)}, is {_shown(now, key)}" for key in keys}
    changed = {key: f"{key} {text}" for key, text in texts.items()}
    if fingerprint is not None and base.get("data") != fingerprint:
        changed["data"] = "the data is not the same (the files, or the settings under data: or model.tokenizer)"
    return changed


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return "not set" if settings.get(key) is None else repr(settings[key])


def check_samples(base: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ConfigError if equal sources and settings gave other samples: by another library, or a dated template."""
    if base.get("samples", now["samples"]) != now["samples"]:
        raise ConfigError(
            "the data was prepared again, and its samples differ from those that the run was started with",
            hint="restore the directory .data in the storage, or start a new run with another `name:`",
        )


def _with_defaults(before: Mapping[str, Any], now: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """Return the old declaration with defaults for new settings, and without settings that now have no effect.

    The latter are safe to drop, because the setting that disables them is declared itself.
    """
    completed = dict(before)
    for name, setting in type(settings).model_fields.items():
        inner = getattr(settings, name)
        if isinstance(inner, Settings) and isinstance(before.get(name), Mapping):
            completed[name] = _with_defaults(before[name], now[name], inner)
        elif name in now and name not in before and not setting.is_required():
            completed[name] = TypeAdapter(Any).dump_python(setting.get_default(call_default_factory=True), mode="json")
        elif name not in now:
            completed.pop(name, None)
    return completed


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    inner = (flatten(item, f"{prefix}.{name}".strip(".")) for name, item in value.items())
    return {key: item for part in inner for key, item in part.items()}


def check_model_config(checkpointer: Checkpointer) -> None:
    """Raise ConfigError if the model's configuration changed, such as in a pretrained directory since the run began."""
    for manifest in checkpointer.catalogue.accepted[:1]:
        entry = next((entry for entry in manifest.files if entry.path == "config.json"), None)
        if entry is None:
            return
        directory = checkpointer.store.checkpoint_dir(manifest.ref)
        try:
            data = read_verified(checkpointer.store.storage, directory, entry).numpy().tobytes()
        except DamagedError:
            return  # the restore verifies the resume point, and skips a damaged one
        try:
            before = dict(parse_json(data))
        except (ValueError, TypeError) as error:
            hint = "move this checkpoint away to continue from the one before it"
            raise DamagedError(f"{manifest.ref}: {entry.path} is no configuration ({error})", hint=hint) from error
        now = json.loads(checkpointer.files["config.json"])
        changed = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
        if changed := changed - {"transformers_version"}:
            raise ConfigError(
                f"the model's configuration differs from that of the start of run {checkpointer.store.run!r}: "
                f"{', '.join(sorted(changed))}",
                hint="restore the model directory, or start a new run with another `name:`",
            )


def check_layout(checkpointer: Checkpointer, base: Mapping[str, Any], model: nn.Module) -> None:
    """Declare the layout of the model that rank 0 built. Raise ConfigError if the checkpoint's was another.

    With other libraries, or on another processor, it may differ: `record_changes` writes these to the journal.
    """

    def check() -> None:
        layout, mine = describe_layout(model), checkpointer.declaration
        mine["layout"] = layout_fingerprint(layout)
        if "layout" not in base or any(base.get(key) != mine[key] for key in ("versions", "processor")):
            return
        if changed := layout_differences(layout, str(base["layout"])):
            more = [f"… {len(changed) - MAX_SHOWN} more"] if len(changed) > MAX_SHOWN else []
            raise ConfigError(
                f"the model differs from the one that run {checkpointer.store.run!r} was started with, so it would "
                "compute other numbers:\n" + "\n".join(f"  {line}" for line in [*changed[:MAX_SHOWN], *more]),
                hint="restore the model's code and settings, or start a new run with another `name:`",
            )

    checkpointer.ranks.run_on_rank_0(check)


def check_ranks_agree(ranks: RankGroup, model: nn.Module) -> None:
    """Raise ConfigError if ranks built other parameters, or in another order: gradients are added by position.

    Every rank calls it. Buffers may differ, as may the processors of the ranks: rank 0's are used.
    """
    mine = [
        f"{name} {list(parameter.shape)}{'' if parameter.requires_grad else ', not trained'}"
        for name, parameter in model.named_parameters()
    ]
    if len(set(ranks.gather(xxhash.xxh3_128_hexdigest("\n".join(mine).encode())))) == 1:
        return
    first, *others = ranks.gather(mine)
    for rank, theirs in enumerate(others, 1):
        for number, (here, there) in enumerate(zip_longest(first, theirs, fillvalue="none"), 1):
            if here != there:
                raise ConfigError(
                    f"the ranks build different models: parameter {number} is {here} on rank 0, and {there} on rank "
                    f"{rank}",
                    hint="build the model from its settings only: not from a set's order, the rank, host or time",
                )


def check_base_model(checkpointer: Checkpointer, base: Mapping[str, Any], model: nn.Module) -> None:
    """Raise ConfigError if an adapter's base model has other weights: its checkpoints do not hold them."""
    checkpointer.declaration["base"] = base_digest(model)
    if base.get("base", checkpointer.declaration["base"]) != checkpointer.declaration["base"]:
        raise ConfigError(
            f"the base model's weights differ from those that run {checkpointer.store.run!r} was started with",
            hint="restore the model directory, or start a new run with another `name:`",
        )


def record_changes(checkpointer: Checkpointer, base: Mapping[str, Any], exactness: Exactness) -> None:
    """Write to the journal which changes are allowed, and whether the numbers stay the same to the last bit."""
    if checkpointer.journal is None:
        return
    for key in ("world_size", "parallel", "versions", "device", "processor"):
        before, now = base.get(key), checkpointer.declaration[key]
        if before not in (None, now):
            same_bits = key == "world_size" and exactness is Exactness.ELASTIC
            checkpointer.journal.write(ChangedEvent(what=key, before=before, now=now, same_bits=same_bits))
