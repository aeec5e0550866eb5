"""Adapters of peft in peft's layout: the adapter's weights and configuration, nothing of the base model.

    checkpointer = Checkpointer(storage, "run", naming=adapter_naming(model), files=adapter_files(model))

`PeftModel.from_pretrained(base, checkpoint)` loads every such checkpoint. No checkpoint holds the base model, so it
must be the same at each start: its digest is compared.
"""

import json
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import xxhash

from outlast.checkpointing.error_hints import first_line
from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.format.safetensors import tensor_bytes
from outlast.checkpointing.state.named_weights import WeightNaming, carried_state, plain_name, unwrap
from outlast.checkpointing.tools.export import ADAPTER_WEIGHTS
from outlast.trainers.config.model import LoraSettings

CONFIG = "adapter_config.json"

#: Task types of peft that have a wrapper of their own, by Auto class.
_TASKS = {
    "AutoModelForCausalLM": "CAUSAL_LM",
    "AutoModelForSeq2SeqLM": "SEQ_2_SEQ_LM",
    "AutoModelForSequenceClassification": "SEQ_CLS",
    "AutoModelForTokenClassification": "TOKEN_CLS",
    "AutoModelForQuestionAnswering": "QUESTION_ANS",
}
_GENERATIVE = ("CAUSAL_LM", "SEQ_2_SEQ_LM")


def need_peft() -> Any:
    """Import peft. Raises ConfigError if it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError("adapters need peft, which is not installed", hint="pip install 'outlast[lora]'") from error
    return peft


def attach_lora(model: Any, settings: LoraSettings, auto_class: str, new: Collection[str] = ()) -> Any:
    """Attach a LoRA adapter, the only part that is trained. Torch's seed determines its weights.

    Args:
        model: A pretrained model.
        settings: The settings under `model.lora`.
        auto_class: Name of the task's Auto class.
        new: Names of weights that the pretrained files lack, such as those of a new head: trained and saved too.

    Raises:
        ConfigError: peft is not installed, or the model has no such modules, or it has state besides its weights.
    """
    peft, carried = need_peft(), carried_state(model)
    modules = sorted({name.rpartition(".")[0] for name in new})
    targets, wrapper = settings.target_modules, _TASKS.get(auto_class)
    if wrapper in _GENERATIVE and not hasattr(model, "prepare_inputs_for_generation"):
        wrapper = None  # peft's wrapper requires a model that can generate
    try:
        config = peft.LoraConfig(
            task_type=wrapper,
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=list(targets) if isinstance(targets, tuple) else targets,
            modules_to_save=modules or None,
        )
        adapted = peft.get_peft_model(model, config)
    except ValueError as error:
        names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")})
        raise ConfigError(
            f"peft cannot adapt {type(model).__name__}: {first_line(error)}",
            hint=f"set model.lora.target_modules; this model has: {', '.join(names)}",
        ) from error
    if carried:
        raise ConfigError(
            f"{type(model).__name__} has state besides its weights ({carried[0]}), which checkpoints of an adapter "
            "do not hold",
            hint="train all weights: leave model.lora out",
        )
    return adapted


def is_adapted(model: Any) -> bool:
    """Check whether this is a peft model, wrapped by DDP or not."""
    return hasattr(unwrap(model), "peft_config") and hasattr(unwrap(model), "get_base_model")


def base_digest(model: Any) -> str:
    """Digest the base model of an adapter, all that is not trained: equal weights, equal digest."""
    inner: Any = unwrap(model)
    trained = adapter_naming(inner).names or {}
    digest = xxhash.xxh3_128()
    for name, tensor in sorted(inner.state_dict().items()):
        if name not in trained and ".original_module." not in name:
            digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
    return str(digest.hexdigest())


def adapter_naming(model: Any) -> WeightNaming:
    """Return which weights of a peft model belong to its adapter, and their names in a file. Call it before sharding.

    Raises:
        ConfigError: The model has several adapters; a checkpoint holds one.
    """
    from peft import get_peft_model_state_dict

    inner: Any = unwrap(model)
    if list(inner.peft_config) != ["default"]:
        raise ConfigError(
            f"the model has the adapters {', '.join(inner.peft_config)}; a checkpoint holds one, called 'default'",
            hint="train one adapter at a time",
        )
    own = {id(tensor): plain_name(name) for name, tensor in inner.state_dict(keep_vars=True).items()}
    saved = get_peft_model_state_dict(inner, state_dict=inner.state_dict(keep_vars=True))
    return WeightNaming(ADAPTER_WEIGHTS, {own[id(tensor)]: name for name, tensor in saved.items()})


def adapter_files(model: Any) -> dict[str, bytes]:
    """Return the adapter's configuration file as peft writes it, by file name, with sorted module names."""
    inner: Any = unwrap(model)
    with tempfile.TemporaryDirectory() as folder:
        inner.peft_config["default"].save_pretrained(folder)
        body = json.loads((Path(folder) / CONFIG).read_bytes())
    for key in ("target_modules", "modules_to_save"):
        if isinstance(body.get(key), list):
            body[key] = sorted(set(body[key]))
    return {CONFIG: json.dumps({**body, "inference_mode": True}, indent=2, sort_keys=True).encode()}
