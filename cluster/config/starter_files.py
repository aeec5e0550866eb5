"""Starter run files, one for each task. Comments must come from the settings' docstrings, so that they stay correct."""

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.config.run_config import RunConfig
from outlast.trainers.config.task_table import TASKS, check_task_name
from outlast.trainers.config.validation_errors import model_at

_WIDTH, _COLUMN = 100, 34


@dataclass(frozen=True, slots=True)
class Example:
    """The task's own part of a starter file."""

    path: str  #: a pretrained model for it
    columns: tuple[str, ...]  #: the columns it reads
    lr: float = 2e-5  #: a usual peak learning rate
    more: tuple[str, ...] = ()  #: other settings under `data:` that it uses
    #: A model from scratch.
    new: str = "{model_type: bert, num_hidden_layers: 4, num_attention_heads: 4, hidden_size: 128}"


_GPT2 = "{model_type: gpt2, n_layer: 4, n_head: 4, n_embd: 128}"
_DISTILBERT = "distilbert/distilbert-base-cased"
_T5 = "{model_type: t5, num_layers: 2, num_heads: 4, d_model: 128, d_ff: 256, d_kv: 32}"
EXAMPLES = {
    "causal-lm": Example("openai-community/gpt2", ("text",), 5e-5, new=_GPT2),
    "chat": Example("Qwen/Qwen3-0.6B", ("messages",), 1e-5, ("chat_template",), _GPT2),
    "masked-lm": Example("distilbert/distilroberta-base", ("text",), 5e-5, ("mask_share",)),
    "sequence-classification": Example("distilbert/distilbert-base-uncased", ("text", "label"), more=("problem",)),
    "token-classification": Example(_DISTILBERT, ("tokens", "tags")),
    "question-answering": Example(_DISTILBERT, ("question", "context", "answers"), more=("stride",)),
    "seq2seq-lm": Example("google-t5/t5-small", ("source", "target"), 1e-4, ("max_target_length",), _T5),
    "multiple-choice": Example("google-bert/bert-base-uncased", ("text", "choices", "label")),
    "double-heads": Example("openai-community/gpt2", ("text", "choices", "label"), new=_GPT2),
}


def template(task: str, file: str = "run.yaml") -> str:
    """Return a commented run file for a task; `file` is its future name. ConfigError for a task without an example."""
    if task not in EXAMPLES:
        hint = f"begin with one of these: {', '.join(TASKS)}"
        try:
            check_task_name(task)
        except ValueError as error:
            raise ConfigError(str(error), hint=hint) from error
        raise ConfigError(f"{task} is a task of your own, which has no starter file", hint=hint)
    return "\n".join(_lines(task, EXAMPLES[task], file)) + "\n"


def _lines(task: str, example: Example, file: str) -> Iterator[str]:
    yield f"# A run of outlast for task {task}. Settings behind a # are optional, shown with their defaults."
    yield f"#   outlast validate {file}    check it"
    yield f"#   outlast plan {file}        estimate steps, memory and checkpoints"
    yield f"#   outlast train {file}       start, or resume"
    yield ""
    yield from _setting("", "name", f"my-{task}")
    yield from _setting("", "seed", 7)
    yield from _block("model", {"path": example.path, "task": task}, ("lora", "trust_remote_code"))
    yield "  # Or a new model, instead of path:"
    yield f"  # config: {example.new}"
    yield "  # tokenizer: {train_bpe: 4096}"
    columns = {name: name for name in example.columns}
    data = {"train": "rows.jsonl", "eval": "2%", **columns, "max_length": 512}
    yield from _block("data", data, (*example.more, "max_bad_rows", "prepare"))
    train = {"epochs": 3, "batch": 32, "micro_batch": 4, "lr": example.lr, "schedule": "cosine", "warmup": 0.03}
    more = ("steps", "optimizer", "weight_decay", "clip", "gradient_checkpointing", "compile")
    yield from _block("train", {**train, "precision": "fp32", "eval_every": 200}, more)
    yield from _block("scale", {"workers": 1, "gpus_per_worker": 0}, ("parallel", "cpus_per_worker"))
    saving = {"storage": "./runs", "every": "10m", "keep_last": 3, "keep_best": 1, "load_best": True}
    yield from _block("checkpoint", saving, ("metric", "metric_mode", "keep_every", "overlap"))
    yield from _block("failure", {"max_failures": 3}, ("max_same_step", "non_finite", "hang_after"))
    yield from _block("track", {"project": "outlast"}, ("to",))


def _block(name: str, given: dict[str, Any], more: tuple[str, ...]) -> Iterator[str]:
    yield ""
    yield f"{name}:"
    for key, value in given.items():
        yield from _setting(name, key, value)
    defaults = _model(name).model_construct().model_dump(mode="json")
    for key in more:
        yield from _setting(name, key, defaults[key], is_off=True)


def _setting(block: str, key: str, value: Any, *, is_off: bool = False) -> Iterator[str]:
    """Yield a setting with its docstring's first sentence, behind it or, if it is long, above it."""
    indent = "  " if block else ""
    shown = yaml.safe_dump(value, default_flow_style=True, sort_keys=False).removesuffix("...\n").strip()
    text = f"{indent}{'# ' if is_off else ''}{key}: {shown}"
    description = " ".join((_model(block).model_fields[key].description or "").split())
    comment = re.split(r"(?<=[.])\s", description)[0]
    if len(text) < _COLUMN and _COLUMN + len(comment) + 2 <= _WIDTH + 20:
        yield f"{text:{_COLUMN}}# {comment}"
        return
    yield from textwrap.wrap(comment, _WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
    yield text


def _model(block: str) -> type[BaseModel]:
    model = model_at(RunConfig, (block,) if block else ())
    assert model is not None, block
    return model
