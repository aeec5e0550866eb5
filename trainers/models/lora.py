"""Adapters of peft in peft's layout: the adapter's weights and configuration, nothing of the base model.

    checkpointer = Checkpointer(storage, "run", naming=adapter_naming(model), files=adapter_files(model))

`PeftModel.from_pretrained(base, checkpoint)` loads every such checkpoint. No checkpoint holds the base model, so it
must be the same at each start: its digest is compared.
"""

import inspect
import json
import tempfile
import warnings
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import xxhash

from outlast.checkpointing.error_hints import did_you_mean, first_line, shorten_list
from outlast.checkpointing.errors import ConfigError, OutlastError
from outlast.checkpointing.format.safetensors import tensor_bytes
from outlast.checkpointing.state.named_weights import WeightNaming, carried_state, plain_name, unwrap
from outlast.checkpointing.tools.export import ADAPTER_WEIGHTS
from outlast.trainers.config.adapter_directory import ADAPTER_CONFIG, read_adapter_config
from outlast.trainers.config.model import LoraSettings
from outlast.trainers.user_code import describe_error

#: Task types of peft that have a wrapper of their own, by Auto class.
_TASKS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}
_RESTORE = f"restore the files of the adapter, {ADAPTER_CONFIG} among them"
_PREFIX = "base_model.model."  #: of the base model's names in an adapter's file
_GENERATIVE = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def need_peft() -> Any:
    """Import peft. Raises ConfigError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("adapters need peft, which is not installed", hint="pip install 'outlast[lora]'") from error
    return peft


def attach_lora(
    model: Any, settings: LoraSettings, auto_class: str, new: Collection[str] = (), *, fresh: bool = True
) -> Any:
    """Attach a LoRA adapter, the only part that is trained. Torch's seed determines its weights, or its files do.

    Args:
        model: A pretrained model.
        settings: The settings under `model.lora`.
        auto_class: Name of the task's Auto class.
        new: Names of weights that the pretrained files lack, such as those of a new head: trained and saved too.
        fresh: False when a checkpoint is about to replace the adapter's weights, so that its files are not read.

    Raises:
        ConfigError: peft is not installed, or the model has no such modules, or it has state besides its weights.
    """
    peft, carried = need_peft(), carried_state(model)
    wrapper = _TASKS.get(auto_class)
    if wrapper in _GENERATIVE and not hasattr(model, "prepare_inputs_for_generation"):
        wrapper = None  # peft's wrapper requires a model that can generate
    modules = _modules_to_save(model, settings, new)
    try:
        config = (
            _read_config(settings.path, wrapper, modules)
            if settings.path
            else _new_config(model, settings, wrapper, modules)
        )
        with warnings.catch_warnings(action="ignore"):  # of tied embeddings: `_new_config` keeps them tied
            adapted = peft.get_peft_model(model, config)
    except OutlastError:
        raise
    except Exception as error:  # of peft, torch and the packages that a setting needs
        raise _not_adaptable(model, settings, error) from error
    if carried:
        raise ConfigError(
            f"{type(model).__name__} has state besides its weights ({carried[0]}), which checkpoints of an adapter "
            "do not hold",
            hint="train all weights: leave model.lora out",
        )
    if settings.path and fresh:
        _load_adapter(adapted, settings.path)
    return adapted


def _not_adaptable(model: Any, settings: LoraSettings, error: Exception) -> ConfigError:
    """Make the error of settings that peft refuses: those of `model.lora`, or of an adapter's own file."""
    name, modules = type(model).__name__, [item for item, module in model.named_modules() if hasattr(module, "weight")]
    known = f"this model has: {', '.join(sorted({item.rpartition('.')[2] for item in modules}))}"
    reason = first_line(error) if isinstance(error, ValueError) else describe_error(error)
    is_of_modules = "arget" in str(error) and "module" in str(error)
    if settings.path:
        hint = f"correct {ADAPTER_CONFIG}, or use another adapter"
        if is_of_modules:
            hint = f"use the base model of the adapter; {known}"
        return ConfigError(f"{settings.path}/{ADAPTER_CONFIG}: peft cannot adapt {name}: {reason}", hint=hint)
    hint = f"set model.lora.target_modules; {known}" if is_of_modules else "check model.lora"
    return ConfigError(f"peft cannot adapt {name}: {reason}", hint=hint)


def _modules_to_save(model: Any, settings: LoraSettings, new: Collection[str]) -> list[str]:
    """Return the modules that are trained in full. Raises ConfigError if the model lacks one of the settings'."""
    names = [name for name, _ in model.named_modules() if name]
    for module in settings.modules_to_save:
        if not any(name == module or name.endswith(f".{module}") for name in names):
            last = {name.rpartition(".")[2] for name in names}
            raise ConfigError(
                f"model.lora.modules_to_save: {type(model).__name__} has no module {module!r}"
                f"{did_you_mean(module, last)}",
                hint="name a module of the model, such as embed_tokens, lm_head or score",
            )
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return sorted({*settings.modules_to_save, *(name.rpartition(".")[0] for name in new if name in parameters)} - {""})


def _new_config(model: Any, settings: LoraSettings, wrapper: str | None, modules: list[str]) -> Any:
    peft, targets = need_peft(), settings.target_modules
    options: dict[str, Any] = {}
    if (tied := _tied_embeddings(model)) and any(tied[0].endswith(module) for module in modules):
        modules = [module for module in modules if not tied[1].endswith(module)]
        if "ensure_weight_tying" in inspect.signature(peft.LoraConfig).parameters:
            options["ensure_weight_tying"] = True
    return peft.LoraConfig(
        task_type=wrapper,
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        modules_to_save=modules or None,
        bias=settings.bias,
        use_rslora=settings.rslora,
        use_dora=settings.dora,
        **options,
    )


def _tied_embeddings(model: Any) -> tuple[str, str] | None:
    """Return the names of the modules of input and output embedding, if they are tied."""
    names = {module: name for name, module in model.named_modules()}
    with suppress(NotImplementedError, AttributeError):
        first, last = model.get_input_embeddings(), model.get_output_embeddings()
        if last is not None and first is not last and first.weight is last.weight:
            return names[first], names[last]
    return None


def _read_config(path: str, wrapper: str | None, modules: list[str]) -> Any:
    """Return the configuration of an adapter that goes on training. Raises ConfigError if it is for another task."""
    read_adapter_config(path)
    config = need_peft().PeftConfig.from_pretrained(path)
    if config.task_type and wrapper and config.task_type != wrapper:
        raise ConfigError(
            f"the adapter {path} was trained for {config.task_type}, and model.task needs {wrapper}",
            hint="set model.task to the adapter's task; or merge it: outlast checkpoints export … --merge",
        )
    saved = list(config.modules_to_save or ())
    lacking = [name for name in modules if not any(name == item or name.endswith(f".{item}") for item in saved)]
    # peft saves an embedding that was resized without naming its modules.
    if lacking and (lacking := [name for name in lacking if f"{_PREFIX}{name}.weight" not in _read_weights(path)]):
        raise ConfigError(
            f"neither the adapter {path} nor its base model has weights of {', '.join(lacking)}",
            hint="use the base model with this head; or train a new adapter on it: model.path, model.lora",
        )
    config.inference_mode = False
    return config


def _load_adapter(adapted: Any, path: str) -> None:
    """Load the weights of an adapter. Raises ConfigError if they are not those of its configuration."""
    from peft import set_peft_model_state_dict

    weights, naming = _read_weights(path), adapter_naming(adapted)
    state = {plain_name(name): tensor for name, tensor in adapted.state_dict().items()}
    sizes = {file: list(state[name].shape) for name, file in (naming.names or {}).items()}
    others = [
        f"{name} is {list(weights[name].shape)} in the file and {size} here"
        for name, size in sorted(sizes.items())
        if name in weights and list(weights[name].shape) != size
    ]
    if others:
        raise ConfigError(
            f"the adapter {path} holds weights in other sizes than its configuration and the base model: "
            f"{shorten_list(others, 3, 'weights')}",
            hint=f"restore its {ADAPTER_CONFIG}; or use its base model, with model.resize: true if its tokenizer grew",
        )
    try:
        with warnings.catch_warnings(action="ignore"):
            result = set_peft_model_state_dict(adapted, weights)
    except Exception as error:  # of torch and peft; the file is the user's
        raise ConfigError(f"the adapter {path} cannot be loaded: {describe_error(error)}", hint=_RESTORE) from error
    missing = sorted(set(result.missing_keys) & set(naming.names or ()))
    for what, names in (("lacks", missing), ("has more than its configuration names:", result.unexpected_keys)):
        if names:
            raise ConfigError(f"the adapter {path} {what} {shorten_list(names, 3, 'weights')}", hint=_RESTORE)


def _read_weights(path: str) -> dict[str, Any]:
    """Read the weights of an adapter by their names in its file. Raises ConfigError if that cannot be read."""
    from peft import load_peft_weights

    names = (ADAPTER_WEIGHTS, "adapter_model.bin")
    name = next((item for item in names if (Path(path) / item).is_file()), None)
    if name is None:
        raise ConfigError(f"the adapter {path} has no {ADAPTER_WEIGHTS}", hint=_RESTORE)
    try:
        return dict(load_peft_weights(path, device="cpu"))
    except Exception as error:  # of torch and safetensors
        raise ConfigError(f"{path}/{name} cannot be read: {describe_error(error)}", hint=_RESTORE) from error


def is_adapted(model: Any) -> bool:
    """Check whether this is a peft model, wrapped by DDP or not."""
    return hasattr(unwrap(model), "peft_config") and hasattr(unwrap(model), "get_base_model")


def base_digest(model: Any) -> str:
    """Digest the base model of an adapter, all that is not trained: equal weights, equal digest."""
    inner: Any = unwrap(model)
    state, trained = inner.state_dict(keep_vars=True), adapter_naming(inner).names or {}
    tensors = {id(tensor) for name, tensor in state.items() if plain_name(name) in trained}
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(inner.state_dict().items()):
        if id(state[name]) not in tensors and ".original_module." not in name:
            digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
    return str(digest.hexdigest())


def adapter_naming(model: Any) -> WeightNaming:
    """Return which weights of a peft model belong to its adapter, and their names in a file. Call it before sharding.

    Raises:
        ConfigError: The model has several adapters; a checkpoint holds one.
    """
    from peft import get_peft_model_state_dict
    from peft.utils import ModulesToSaveWrapper

    inner: Any = unwrap(model)
    if list(inner.peft_config) != ["default"]:
        raise ConfigError(
            f"the model has the adapters {', '.join(inner.peft_config)}; a checkpoint holds one, called 'default'",
            hint="train one adapter at a time",
        )
    # Embeddings that are trained in full are among the saved modules; peft would add their frozen weights.
    embedding = None
    with suppress(NotImplementedError, AttributeError):
        embedding = inner.get_input_embeddings()
    layers: Any = False if isinstance(embedding, ModulesToSaveWrapper) else "auto"
    state = inner.state_dict(keep_vars=True)
    with warnings.catch_warnings(action="ignore"):  # of embeddings that were resized, which are saved
        saved = get_peft_model_state_dict(inner, state_dict=state, save_embedding_layers=layers)
    own: dict[int, str] = {}
    for name, tensor in state.items():
        own.setdefault(id(tensor), plain_name(name))
    files: dict[str, list[str]] = {}
    for name, tensor in saved.items():
        files.setdefault(own[id(tensor)], []).append(name)
    # peft needs tied weights under each of their names.
    cuts = {name: dict.fromkeys(several, ()) for name, several in files.items() if len(several) > 1}
    return WeightNaming(ADAPTER_WEIGHTS, {name: several[0] for name, several in files.items()}, cuts)


def adapter_files(model: Any) -> dict[str, bytes]:
    """Return the adapter's configuration file as peft writes it, by file name, with sorted module names."""
    inner: Any = unwrap(model)
    with tempfile.TemporaryDirectory() as folder:
        inner.peft_config["default"].save_pretrained(folder)
        body = json.loads((Path(folder) / ADAPTER_CONFIG).read_bytes())
    for key in ("target_modules", "modules_to_save"):
        if isinstance(body.get(key), list):
            body[key] = sorted(set(body[key]))
    return {ADAPTER_CONFIG: json.dumps({**body, "inference_mode": True}, indent=2, sort_keys=True).encode()}
