"""Models and tokenizers: transformers does the work, outlast decides what is asked of it."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from outlast.checkpointing.errors import ConfigError, OutlastError
from outlast.checkpointing.state.model_weights import WeightNaming
from outlast.trainers.config.model import ModelSettings
from outlast.trainers.data.tokenizer import Tokenizer, _read_all, files_of
from outlast.trainers.distributed.determinism import seed_everything
from outlast.trainers.models.custom_model import build_plain, is_like_transformers, load_class, load_plain
from outlast.trainers.models.lora import adapter_files, adapter_naming, attach_lora, is_adapted
from outlast.trainers.models.weight_names import file_naming
from outlast.trainers.tasks.base import Task
from outlast.trainers.user_code import describe_error


def build_model(
    settings: ModelSettings, task: Task, tokenizer: Tokenizer, seed: int, *, fresh: bool
) -> tuple[nn.Module, dict[str, bytes]]:
    """The model, and the small files that make a checkpoint of it a Hugging Face directory.

    Args:
        settings: Which model.
        task: Names the class, and says what of the configuration its head follows from.
        tokenizer: Gives a new model its vocabulary size and special tokens.
        seed: New weights follow from it.
        fresh: False when the weights are about to be replaced by a checkpoint's, so that pretrained ones are not read.

    Raises:
        ConfigError: There is no such model, or it cannot be saved under the names it is loaded by.
    """
    own = check_names(settings)
    seed_everything(seed)
    if own is not None and not is_like_transformers(own):
        plain, files = build_plain(own, settings.config or {}, _special(tokenizer))
        return plain, {**files, **files_of(tokenizer)}
    with (
        _explained("the model cannot be built", "check `model:`", "set model.trust_remote_code: true"),
        _without_progress_bars(),
    ):
        config = _given_config(settings, own, tokenizer)
        task.configure(config)
        model, new = _build(settings, own or model_class(task, config), config, fresh)
    if own is None and task.auto_class == "AutoModelForCausalLM":
        _check_is_causal(model)
    files = {**_config_files(model), **files_of(tokenizer)}
    if settings.lora is not None:
        model = attach_lora(model, settings.lora, task.auto_class, new)
        files |= adapter_files(model)
    return model, files


def check_names(settings: ModelSettings) -> Any:
    """Looks for mistakes that show before there is a tokenizer. Returns the user's own class, if one is named.

    Raises:
        ConfigError: There is no such class or architecture, or it has no such setting.
    """
    own = load_class(settings.class_) if settings.class_ else None
    if own is not None and not is_like_transformers(own) and settings.path is not None:
        raise ConfigError(f"{settings.class_} has no from_pretrained", hint="give model.config instead of model.path")
    if own is None and settings.config is not None:
        _default_config(settings.config)
    return own


def check_head(settings: ModelSettings, task: type[Task]) -> None:
    """Raises ConfigError if transformers has no head for the task on this architecture, a directory's or a new one."""
    with _explained("the model cannot be built", "check `model:`", "set model.trust_remote_code: true"):
        if settings.path is not None:
            config = transformers.AutoConfig.from_pretrained(settings.path, **_trusted(settings))
        else:
            config = transformers.AutoConfig.for_model((settings.config or {})["model_type"])
        builder = model_class(task, config)
        known = getattr(builder, "_model_mapping", {type(config): None})
        if type(config) not in known and not getattr(config, "auto_map", None):
            raise ConfigError(
                f"model.task {settings.task}: no {config.model_type} model does it; transformers has no class of this "
                f"architecture for {task.auto_class}",
                hint="set model.path or model.config to another architecture, or model.task to another task",
            )


def load_saved(
    folder: Path, task: type[Task], class_: str | None, *, base: str | None = None, trusted: bool = False
) -> Any:
    """The model that a checkpoint's files hold, in float32.

    Args:
        folder: Where they lie.
        task: Names the class, unless `class_` does.
        class_: The user's own, `package.module:Class`.
        base: Where the weights lie instead, such as those beneath an adapter.
        trusted: Whether code that lies among the files may run.

    Raises:
        ConfigError: It cannot be loaded.
    """
    own = load_class(class_) if class_ else None
    if own is not None and not is_like_transformers(own):
        return load_plain(own, folder)
    what, hint = "the model cannot be loaded", "check that model.class is the class that was trained"
    if base is not None:
        what, hint = f"the model beneath the adapter cannot be loaded from {base!r}", "name its place with --base"
    trust = {} if own else {"trust_remote_code": trusted}
    with _explained(what, hint, "give --trust-remote-code"), _without_progress_bars():
        config = (own.config_class if own else transformers.AutoConfig).from_pretrained(folder, **trust)
        builder = own or model_class(task, config)
        return builder.from_pretrained(base or folder, config=config, dtype=torch.float32, **trust)


@contextmanager
def _explained(what: str, hint: str, trusting: str) -> Iterator[None]:
    """Makes one message of whatever transformers says of a model that cannot be had."""
    try:
        yield
    except OutlastError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            hint = f"read that code; if you trust it, {trusting}"
        raise ConfigError(f"{what}: {describe_error(error)}", hint=hint) from error


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """transformers draws a bar on stderr while it loads, across the lines that are there."""
    if not transformers.logging.is_progress_bar_enabled():
        yield
        return
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.enable_progress_bar()


def naming_of(model: nn.Module) -> WeightNaming:
    """Which of the model's weights a checkpoint holds, and under which names. To be asked before it is sharded.

    Raises:
        ConfigError: Its files hold them in a form that outlast cannot write.
    """
    return adapter_naming(model) if is_adapted(model) else file_naming(model)


def _build(settings: ModelSettings, builder: Any, config: Any, fresh: bool) -> tuple[Any, list[str]]:
    """The model, and the names of weights that its pretrained files do not hold."""
    trusted = _trusted(settings)
    if settings.path is not None and (fresh or settings.lora):  # an adapter's checkpoint does not hold the rest
        model, found = builder.from_pretrained(
            settings.path, config=config, dtype=torch.float32, output_loading_info=True, **trusted
        )
        return model, sorted(found["missing_keys"])
    its_own = not settings.class_ and not settings.trust_remote_code
    with _no_init() if its_own and not fresh else nullcontext():
        if hasattr(builder, "from_config"):
            model = builder.from_config(config, dtype=torch.float32, **trusted)
        else:
            model = builder(config).float()
    if its_own and not fresh:
        model.tie_weights()
    return model, []


def _no_init() -> Any:
    """No new weights where a checkpoint's are about to replace every one of them; a user's own class might make more.

    Buffers that are in no file are made by the constructors of transformers' models, as ever.
    """
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # earlier releases: weights are made once more
        return nullcontext()
    return no_init_weights()


def _trusted(settings: ModelSettings) -> dict[str, Any]:
    """Said outright: transformers would ask at the terminal. A class that is imported runs anyhow."""
    return {} if settings.class_ else {"trust_remote_code": settings.trust_remote_code}


def _config_files(model: Any) -> dict[str, bytes]:
    model.config.architectures = [type(model).__name__]
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        if getattr(model, "_auto_class", None) is not None:  # its code came with it, and goes with it
            from transformers.dynamic_module_utils import custom_object_save

            custom_object_save(model, folder, config=model.config)
            model.config.save_pretrained(folder)
        if hasattr(model, "can_generate") and model.can_generate():
            model.generation_config.save_pretrained(folder)
        return _read_all(folder)


def model_class(task: Task | type[Task], config: Any) -> Any:
    """The class of transformers that carries the task's head: an Auto class, or a model's own.

    Raises:
        ConfigError: No class of this model type does the task.
    """
    name = task.exact_classes.get(config.model_type, task.auto_class)
    if not name:
        known = ", ".join(task.exact_classes)
        raise ConfigError(f"no {config.model_type} model does this task; those that do: {known}", hint="check `model:`")
    return getattr(transformers, name)


def _special(tokenizer: Tokenizer) -> dict[str, Any]:
    inner = tokenizer.inner
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": inner.bos_token_id,
        "eos_token_id": inner.eos_token_id,
        "pad_token_id": inner.pad_token_id,
    }


def _given_config(settings: ModelSettings, own: Any, tokenizer: Tokenizer) -> Any:
    if settings.path is not None:
        known = own.config_class if own else transformers.AutoConfig
        return known.from_pretrained(settings.path, **_trusted(settings))
    special, given = _special(tokenizer), dict(settings.config or {})
    if own is not None:
        return own.config_class(**{**special, **given})
    default = _default_config(given)
    if getattr(default, "is_encoder_decoder", False):
        starts = [special["bos_token_id"], special["pad_token_id"]]
        special["decoder_start_token_id"] = next((number for number in starts if number is not None), None)
    return transformers.AutoConfig.for_model(given.pop("model_type"), **{**special, **given})


def _default_config(given: Mapping[str, Any]) -> Any:
    """What an architecture is by default. Raises ConfigError if it is not known, or has not all of these settings."""
    kind, kinds = given["model_type"], list(transformers.CONFIG_MAPPING)
    if kind not in kinds:
        raise ConfigError(
            f"model.config.model_type {kind!r} is not known to transformers {transformers.__version__}"
            f"{_meant(kind, kinds)}",
            hint="name one that it knows, or bring a class of your own: model.class",
        )
    default = transformers.AutoConfig.for_model(kind)
    known = ["model_type", *default.to_dict(), *default.attribute_map]
    if getattr(default, "is_encoder_decoder", False):
        known.append("decoder_start_token_id")
    for key in given:
        if key not in known:
            raise ConfigError(
                f"model.config.{key}: a {kind} model has no such setting{_meant(key, known)}", hint="check model.config"
            )
    return default


def _meant(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _check_is_causal(model: Any) -> None:
    """An encoder sees the token that it is to predict, and learns nothing."""
    if getattr(model.config, "is_decoder", None) is False and not model.can_generate():
        raise ConfigError(
            f"{type(model).__name__} is an encoder as configured: it sees the tokens it is to predict",
            hint="set model.config.is_decoder: true, or take a decoder such as gpt2 or llama",
        )
