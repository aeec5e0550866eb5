"""`outlast try`: predictions of a run's model, by its task. Needs no Ray."""

from __future__ import annotations

import json
from itertools import chain
from typing import Annotated, Any
from unicodedata import category

import typer

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.cli.options import AsJson, Base, Code, Overrides, Root, Run, Trusted, bring_code
from outlast.cluster.config.run_reference import find_run


def try_(
    run: Run,
    texts: Annotated[
        list[str] | None,
        typer.Option("--text", help="What to predict for; JSON that names the inputs, for tasks with several."),
    ] = None,
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="The same, for models that write.")] = None,
    overrides: Overrides = None,
    files: Annotated[list[str] | None, typer.Option("--file", help="Rows to predict for, as in data.train.")] = None,
    checkpoint: Annotated[
        str | None, typer.Option(help="newest, best, a step, step@attempt; default: the finished model, else newest.")
    ] = None,
    base: Base = None,
    code: Code = None,
    trusted: Trusted = False,
    storage: Root = "./runs",
    as_json: AsJson = False,
) -> None:
    """Predict with a run's model: classes, tags, answers, or a text that goes on."""
    from outlast.cluster.config.run_config import settings_of
    from outlast.cluster.config.run_reference import declared_settings
    from outlast.trainers import predict

    bring_code(run, code)
    store, retention = find_run(run, storage)
    found = predict.choose_checkpoint(store, checkpoint, retention)
    config, _ = settings_of(declared_settings(store), run, overrides or ())
    task, model = predict.load(config, found, base, trusted=trusted)
    given = [predict.record_of(task, _parsed(text)) for text in [*(texts or []), *(prompts or [])]]
    rows = chain(given, *(predict.records_in(task, config, file) for file in files or []))
    if not given and not files:
        raise ConfigError("there is nothing to predict for", hint=f"outlast try {run} --text '…', or --file rows.jsonl")
    for answer in predict.predict(task, model, rows):
        print(json.dumps(answer, ensure_ascii=False) if as_json else _shown(answer), flush=True)


def _parsed(text: str) -> Any:
    """An object, if the text is JSON of one; else the text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def _shown(answer: dict[str, Any]) -> str:
    """A line for people: every value by its name, line breaks as \\n."""
    return "  ".join(f"{name}: {_value(value)}" for name, value in answer.items())


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict) and value.keys() == {"token", "score"}:
        return f"{value['token']!r} {_value(value['score'])}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_value(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return "".join(repr(letter)[1:-1] if category(letter) == "Cc" else letter for letter in str(value))
