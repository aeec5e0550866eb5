"""Building and loading of models: transformers or the user's class constructs them, this module chooses how.

Errors of transformers become one ConfigError each. Nothing here may read pretrained weights that a checkpoint replaces.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from outlast.checkpointing.errors import ConfigError, OutlastError
from outlast.checkpointing.state.named_weights import WeightNaming
from outlast.trainers.config.adapter_directory import with_base
from outlast.trainers.config.model import ModelSettings
from outlast.trainers.data.tokenizer import Tokenizer, read_folder, tokenizer_files
from outlast.trainers.distributed.determinism import seed_everything
from outlast.trainers.models.canonical import align_memory, match_constructor, untied_pair
from outlast.trainers.models.custom_model import build_plain, is_like_transformers, load_class, load_plain
from outlast.trainers.models.embedding import grow_embedding
from outlast.trainers.models.lora import adapter_files, adapter_naming, attach_lora, is_adapted
from outlast.trainers.models.model_config import (
    check_decoder,
    check_kernels,
    default_config,
    make_config,
    read_config,
    token_settings,
    trust_arguments,
)
from outlast.trainers.models.model_directory import check_model_directory
from outlast.trainers.models.pretrained import LoadReport, find_uninitialized, load_pretrained
from outlast.trainers.models.tensor_checks import check_tensors
from outlast.trainers.models.transformers_internals import (
    custom_object_save,
    model_mapping,
    no_init_weights,
    quiet_transformers,
)
from outlast.trainers.models.weight_names import file_naming, initialize_not_saved
from outlast.trainers.tasks.base import Task
from outlast.trainers.user_code import describe_error


def build_model(
    settings: ModelSettings, task: Task, tokenizer: Tokenizer, seed: int, *, fresh: bool
) -> tuple[nn.Module, dict[str, bytes]]:
    """Build the model. Returns it, and the small files that make its checkpoints Hugging Face directories.

    Args:
        settings: The settings under `model:`.
        task: Determines the class, and configures the head.
        tokenizer: Determines a new model's vocabulary size and special tokens.
        seed: Seed of new weights.
        fresh: False when a checkpoint is about to replace the weights, so that pretrained ones are not read.

    Raises:
        ConfigError: The model cannot be found or built, or cannot be saved under the names it is loaded by.
    """
    settings = with_base(settings)
    own = check_names(settings)
    seed_everything(seed)
    if own is not None and not is_like_transformers(own):
        plain, files = build_plain(own, settings.config or {}, token_settings(tokenizer))
        check_tensors(plain)
        align_memory(plain)
        return plain, {**files, **tokenizer_files(tokenizer)}
    with (
        _as_config_error("the model cannot be built", "check `model:`", "set model.trust_remote_code: true"),
        quiet_transformers(),
    ):
        config = make_config(settings, own, tokenizer)
        task.configure(config)
        builder = own or model_class(task, config)
        model, new = _build(settings, builder, config, seed, fresh)
        if settings.resize or settings.add_tokens:
            has_weights = fresh or settings.lora is not None
            new += grow_embedding(model, len(tokenizer), seed, has_weights=has_weights)
    if own is None and task.auto_class == "AutoModelForCausalLM":
        check_decoder(model)
    if getattr(model, "generation_config", None) is not None:
        task.configure_generation(model.generation_config)
    files = {**_config_files(model, tokenizer), **tokenizer_files(tokenizer)}
    _use_full_attention(model, task.settings.max_length)
    if settings.lora is not None:
        model = attach_lora(model, settings.lora, task.auto_class, new, fresh=fresh)
        files |= adapter_files(model)
    check_tensors(model)
    align_memory(model)
    return model, files


def check_names(settings: ModelSettings) -> Any:
    """Check what can be checked without a tokenizer. Returns the user's own class, or None if none is named.

    Raises:
        ConfigError: The class or architecture does not exist, or has no such setting.
    """
    tokenizer, lora = settings.tokenizer and settings.tokenizer.path, settings.lora and settings.lora.path
    for key, path in (("model.path", settings.path), ("model.tokenizer.path", tokenizer), ("model.lora.path", lora)):
        if path and Path(path).is_dir():
            check_model_directory(key, Path(path))
    if settings.path and (Path(settings.path) / "attempts").is_dir():
        raise ConfigError(
            f"model.path {settings.path} is the directory of a run",
            hint=f"name its model, {settings.path}/model; or a checkpoint: outlast checkpoints path {settings.path}",
        )
    own = load_class(settings.class_) if settings.class_ else None
    if own is not None and not is_like_transformers(own) and settings.path is not None:
        raise ConfigError(f"{settings.class_} has no from_pretrained", hint="give model.config instead of model.path")
    if own is None and settings.config is not None:
        default_config(settings.config)
    return own


def check_head(settings: ModelSettings, task: type[Task]) -> None:
    """Raise ConfigError if transformers has no head for the task on the architecture of `model:`."""
    settings = with_base(settings)
    with _as_config_error("the model cannot be built", "check `model:`", "set model.trust_remote_code: true"):
        if settings.path is not None:
            config = read_config(transformers.AutoConfig, settings)
        else:
            config = transformers.AutoConfig.for_model((settings.config or {})["model_type"])
        builder = model_class(task, config)
        supported = model_mapping(builder) or {type(config): None}
        if type(config) not in supported and not getattr(config, "auto_map", None):
            raise ConfigError(
                f"model.task {settings.task} is not supported for {config.model_type} models: transformers has no "
                f"{task.auto_class} class of this architecture",
                hint="set model.path or model.config to another architecture, or model.task to another task",
            )


def load_report(settings: ModelSettings, task: Task, tokenizer: Tokenizer) -> LoadReport:
    """Compare the files in `model.path` with the model, by names and sizes only.

    Raises:
        ConfigError: They lack weights, or hold them in other sizes.
    """
    with _as_config_error("the model cannot be loaded", "check `model:`", ""), quiet_transformers():
        config = make_config(settings, None, tokenizer)
        task.configure(config)
        builder, trusted = model_class(task, config), trust_arguments(settings)
        return load_pretrained(
            builder, str(settings.path), config, new_head=settings.new_head, on_meta=True, **trusted
        )[1]


def load_saved(
    folder: Path, task: type[Task], class_: str | None, *, base: str | None = None, trusted: bool = False
) -> Any:
    """Load the model of a checkpoint's files, in float32.

    Args:
        folder: Directory of the files.
        task: Determines the class, unless `class_` does.
        class_: The user's own class, `package.module:Class`.
        base: Directory or hub id to take the weights from instead, such as an adapter's base model.
        trusted: Whether code among the files may run.

    Raises:
        ConfigError: The model cannot be loaded.
    """
    own = load_class(class_) if class_ else None
    if own is not None and not is_like_transformers(own):
        return load_plain(own, folder)
    what, hint = "the model cannot be loaded", "check that model.class is the class that was trained"
    if base is not None:
        what, hint = f"the adapter's base model cannot be loaded from {base!r}", "name its directory with --base"
    trust = {} if own else {"trust_remote_code": trusted}
    with _as_config_error(what, hint, "give --trust-remote-code"), quiet_transformers():
        config = (own.config_class if own else transformers.AutoConfig).from_pretrained(folder, **trust)
        if not trusted:
            check_kernels(config, "--trust-remote-code")
        builder = own or model_class(task, config)
        return builder.from_pretrained(base or folder, config=config, dtype=torch.float32, **trust)


@contextmanager
def _as_config_error(what: str, hint: str, trusting: str) -> Iterator[None]:
    """Convert any error of transformers or a user's class to a ConfigError."""
    try:
        yield
    except OutlastError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            hint = f"read that code; if you trust it, {trusting}"
        raise ConfigError(f"{what}: {describe_error(error)}", hint=hint) from error


def weight_naming(model: nn.Module) -> WeightNaming:
    """Return which of the model's weights a checkpoint holds, and under which names. Call it before sharding.

    Raises:
        ConfigError: The architecture's files hold weights in a form that outlast cannot write.
    """
    return adapter_naming(model) if is_adapted(model) else file_naming(model)


def _build(settings: ModelSettings, builder: Any, config: Any, seed: int, fresh: bool) -> tuple[Any, list[str]]:
    """Construct the model. Returns it, and the names of weights that its pretrained files lack."""
    trusted = trust_arguments(settings)
    is_of_transformers = not settings.class_ and not settings.trust_remote_code
    if settings.path is not None and (fresh or settings.lora):  # an adapter's checkpoint lacks the base weights
        model, report = load_pretrained(builder, settings.path, config, new_head=settings.new_head, **trusted)
        # A class of the user may set buffers in its constructor only, which `from_pretrained` runs without memory.
        with torch.device("meta") if is_of_transformers else torch.random.fork_rng(devices=[]):
            if not is_of_transformers:
                seed_everything(seed)  # as a resume does before it constructs the model
            constructed = _construct(builder, config, trusted)
            match_constructor(model, constructed)
        if unset := find_uninitialized(model, report.new):
            with torch.random.fork_rng(devices=[]), torch.no_grad():
                seed_everything(seed)
                made = _construct(builder, config, trusted).state_dict()
                for name in unset:
                    model.state_dict(keep_vars=True)[name].copy_(made[name])
        if not settings.lora:  # else a resume loads these files too
            if is_of_transformers:
                constructed.tie_weights()
            _check_ties(model, constructed)
        return model, list(report.new)
    # A checkpoint is about to replace the weights. Buffers that no file holds are still created.
    with no_init_weights() if is_of_transformers and not fresh else nullcontext():
        model = _construct(builder, config, trusted)
    if is_of_transformers and not fresh:
        model.tie_weights()
        initialize_not_saved(model)
    if settings.path is not None and hasattr(model, "can_generate") and model.can_generate():
        with suppress(OSError):  # without such a file, `from_pretrained` makes it from the model's configuration too
            model.generation_config = transformers.GenerationConfig.from_pretrained(settings.path)
    return model, []


def _check_ties(model: nn.Module, constructed: nn.Module) -> None:
    """Raise ConfigError if a model that was loaded ties other weights than one that a resume constructs."""
    name = type(model).__name__
    if pair := untied_pair(model, constructed):
        raise ConfigError(
            f"the files of {name} hold two values for the tied weights {pair[0]} and {pair[1]}",
            hint="remove one of them from the files; or, if they are meant to differ, set tie_word_embeddings: false "
            "in its config.json",
        )
    if pair := untied_pair(constructed, model):
        raise ConfigError(
            f"the from_pretrained of {name} ties {pair[0]} and {pair[1]}, and its constructor does not: a resumed run "
            "could not repeat that",
            hint="tie them in the constructor, such as by self.post_init()",
        )


def _construct(builder: Any, config: Any, trusted: Mapping[str, Any]) -> Any:
    if hasattr(builder, "from_config"):
        return builder.from_config(config, dtype=torch.float32, **trusted)
    return builder(config).float()


def _config_files(model: Any, tokenizer: Tokenizer) -> dict[str, bytes]:
    model.config.architectures = [type(model).__name__]
    _stop_at_end_token(model, tokenizer.inner.eos_token_id)
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        if getattr(model, "_auto_class", None) is not None:  # remote code is saved with the model
            custom_object_save(model, folder, config=model.config)
            model.config.save_pretrained(folder)
        if hasattr(model, "can_generate") and model.can_generate():
            model.generation_config.save_pretrained(folder)
        return read_folder(folder)


def _stop_at_end_token(model: Any, token_id: int | None) -> None:
    """Add the tokenizer's end token to those at which generation stops, as the Trainer of transformers does."""
    generation = getattr(model, "generation_config", None)
    if token_id is None or generation is None or generation.eos_token_id is None:
        return
    known = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    if token_id not in known:
        generation.eos_token_id = [token_id, *known]


def model_class(task: Task | type[Task], config: Any) -> Any:
    """Return the transformers class with the task's head: an Auto class or a model class.

    Raises:
        ConfigError: The task does not support this model type.
    """
    name = task.exact_classes.get(config.model_type, task.auto_class)
    if not name:
        known = ", ".join(task.exact_classes)
        raise ConfigError(f"the task supports {known} models, not {config.model_type}", hint="check `model:`")
    if (reason := task.unsupported_reason(config)) is not None:
        raise ConfigError(
            f"the task does not support {config.model_type} models: {reason}",
            hint="set model.path or model.config to another architecture, or model.task to another task",
        )
    return getattr(transformers, name)


def _use_full_attention(model: Any, max_length: int) -> None:
    """Choose full attention now for a model that would choose it at its first short batch, such as BigBird.

    It would build the modules of full attention in that forward pass, with random numbers of the step, and keep them.

    Raises:
        ConfigError: Some batches may be long enough for sparse attention.
    """
    for module in [item for item in model.modules() if hasattr(item, "set_attention_type")]:
        if module.attention_type != "block_sparse":
            continue
        limit = (5 + 2 * model.config.num_random_blocks) * model.config.block_size
        if max_length > limit:
            raise ConfigError(
                f"{type(model).__name__} changes from block-sparse to full attention at its first batch of {limit} "
                "tokens or less, and a resumed run could not repeat that",
                hint=f'-s data.max_length={limit}, or set "attention_type": "original_full" in its configuration',
            )
        module.set_attention_type("original_full")
