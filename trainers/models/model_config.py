"""Configurations of models: of a new one from `model.config`, of a pretrained one with `model.overrides`.

Entries that an architecture does not have are errors here; transformers would ignore them.
"""

from collections.abc import Mapping
from typing import Any

import transformers

from outlast.checkpointing.error_hints import did_you_mean
from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.model import ModelSettings
from outlast.trainers.data.tokenizer import Tokenizer

#: Entries that the task sets, and the settings that they follow from.
_OF_HEADS = {
    "id2label": "data.labels",
    "label2id": "data.labels",
    "num_labels": "data.labels; model.new_head: true makes a head of another size",
    "problem_type": "data.problem",
}


def make_config(settings: ModelSettings, own: Any, tokenizer: Tokenizer) -> Any:
    """Return the configuration of the model before the task configures its head.

    Args:
        settings: The settings under `model:`.
        own: The user's own class in the style of transformers, or None.
        tokenizer: Determines a new model's vocabulary size and special tokens.

    Raises:
        ConfigError: `model.config` or `model.overrides` has an entry that the architecture does not have.
    """
    if settings.path is not None:
        return read_config(own.config_class if own else transformers.AutoConfig, settings)
    special, given = token_settings(tokenizer), dict(settings.config or {})
    if own is not None:
        return own.config_class(**{**special, **given})
    default = default_config(given)
    if getattr(default, "is_encoder_decoder", False):
        starts = [special["bos_token_id"], special["pad_token_id"]]
        special["decoder_start_token_id"] = next((number for number in starts if number is not None), None)
    return transformers.AutoConfig.for_model(given.pop("model_type"), **{**special, **given})


def read_config(config_class: Any, settings: ModelSettings) -> Any:
    """Read the configuration in `model.path`, with the entries of `model.overrides`. Raises ConfigError for others."""
    config = config_class.from_pretrained(settings.path, **trust_arguments(settings))
    if not settings.trust_remote_code:
        check_kernels(config, "model.trust_remote_code: true")
    if not settings.overrides:
        return config
    entries = config.to_dict()
    fixed = ("model_type", "architectures", "auto_map", "transformers_version", *_OF_HEADS)
    names = [*(name for name in entries if name not in fixed), *config.attribute_map, "rope_scaling"]
    if "rope_theta" in (entries.get("rope_parameters") or {}):
        names.append("rope_theta")
    for key in settings.overrides:
        if key in _OF_HEADS:
            raise ConfigError(
                f"model.overrides.{key} has no effect: the task sets it by the data", hint=f"set {_OF_HEADS[key]}"
            )
        if key not in names:
            raise ConfigError(
                f"model.overrides.{key}: the configuration of {config.model_type} in {settings.path} has no such entry"
                f"{did_you_mean(key, names)}",
                hint="check model.overrides",
            )
    # Made anew, so that the class checks and completes the entries.
    changed = type(config).from_dict({**entries, **_rotary(settings.overrides, entries.get("rope_parameters"))})
    changed.name_or_path = config.name_or_path
    return changed


def _rotary(overrides: Mapping[str, Any], files: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the overrides with all of `rope_parameters`: what they leave out of its base is that of the files.

    transformers would take the architecture's default for it, and ignore `rope_theta` beside `rope_parameters`.
    """
    given, parameters = dict(overrides), dict(files or {})
    if not parameters or not {"rope_scaling", "rope_parameters", "rope_theta"} & given.keys():
        return given
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(given.get(name, 0), Mapping | None):
            parameters = _with_base(given.pop(name) or {"rope_type": "default"}, parameters)
    if "rope_theta" in given:
        parameters["rope_theta"] = given.pop("rope_theta")
    return {"rope_parameters": parameters, **given}


def _with_base(given: Mapping[str, Any], files: Mapping[str, Any]) -> dict[str, Any]:
    """Add the base of the files, for each type of layer if they differ."""
    base = {name: files[name] for name in ("rope_theta", "partial_rotary_factor") if name in files}
    nested = {
        name: _with_base(item, files[name])
        for name, item in given.items()
        if isinstance(item, Mapping) and isinstance(files.get(name), Mapping)
    }
    return {**base, **given, **nested}


def default_config(given: Mapping[str, Any]) -> Any:
    """Return an architecture's default configuration. Raises ConfigError if it or one of these settings is unknown."""
    model_type, known_types = given["model_type"], list(transformers.CONFIG_MAPPING)
    if model_type not in known_types:
        raise ConfigError(
            f"model.config.model_type {model_type!r} is unknown to transformers {transformers.__version__}"
            f"{did_you_mean(model_type, known_types)}",
            hint="name a known one, or use a class of your own: model.class",
        )
    default = transformers.AutoConfig.for_model(model_type)
    known = ["model_type", *default.to_dict(), *default.attribute_map]
    if getattr(default, "is_encoder_decoder", False):
        known.append("decoder_start_token_id")
    for key in given:
        if key not in known:
            raise ConfigError(
                f"model.config.{key}: {model_type} models have no such setting{did_you_mean(key, known)}",
                hint="check model.config",
            )
    return default


def token_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the settings of a new model that follow from its tokenizer."""
    inner = tokenizer.inner
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": inner.bos_token_id,
        "eos_token_id": inner.eos_token_id,
        "pad_token_id": inner.pad_token_id,
    }


def check_kernels(config: Any, trusting: str) -> None:
    """Raise ConfigError for kernels on the hub in a configuration: transformers downloads and imports them unasked."""
    parts = [config, *(item for item in vars(config).values() if isinstance(item, transformers.PreTrainedConfig))]
    for name in ("_attn_implementation", "_experts_implementation"):
        for kernel in (getattr(part, name, None) for part in parts):
            if isinstance(kernel, str) and "/" in kernel:
                raise ConfigError(
                    f"config.json names code on the hub, {name.removeprefix('_')} {kernel!r}",
                    hint=f"remove that entry; or read that code, and if you trust it, set {trusting}",
                )


def trust_arguments(settings: ModelSettings) -> dict[str, Any]:
    """Return `trust_remote_code` explicitly: transformers would prompt for it. An imported class runs in any case."""
    return {} if settings.class_ else {"trust_remote_code": settings.trust_remote_code}


def check_decoder(model: Any) -> None:
    """Raise ConfigError if the model sees the tokens that it predicts: it would only learn to copy them."""
    config = model.config
    is_encoder = getattr(config, "is_decoder", None) is False and not config.model_type.startswith("gpt_neox")
    remedies = {
        "is_decoder: true": is_encoder,  # gpt_neox has the setting, and ignores it
        "causal: true": getattr(config, "causal", None) is False,  # XLM
        "attn_type: uni": getattr(config, "attn_type", None) == "bi",  # XLNet
    }
    for remedy, is_needed in remedies.items():
        if is_needed:
            raise ConfigError(
                f"{type(model).__name__} is configured as an encoder: it sees the tokens that it predicts",
                hint=f"set model.config.{remedy}, or use a decoder such as gpt2 or llama",
            )
