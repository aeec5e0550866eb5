"""The `try` command: predictions of a run's model. It must work without Ray."""

import json
from itertools import chain
from typing import Annotated, Any

from typer import Option

from outlast.checkpointing.errors import ConfigError
from outlast.cluster.cli.options import (
    AsJson,
    Base,
    Code,
    Overrides,
    Run,
    StorageRoot,
    Trusted,
    make_code_importable,
)
from outlast.cluster.config.run_reference import find_run
from outlast.cluster.output import print_json, print_line


def try_(
    run: Run,
    texts: Annotated[
        list[str] | None, Option("--text", help="An input; JSON with names for tasks with several inputs.")
    ] = None,
    prompts: Annotated[list[str] | None, Option("--prompt", help="The same, for generative models.")] = None,
    overrides: Overrides = None,
    files: Annotated[list[str] | None, Option("--file", help="A file of inputs, as in data.train.")] = None,
    checkpoint: Annotated[
        str | None, Option(help="newest, best, a step, step@attempt; default: the finished model, else newest.")
    ] = None,
    base: Base = None,
    code: Code = None,
    trusted: Trusted = False,
    storage: StorageRoot = "./runs",
    as_json: AsJson = False,
) -> None:
    """Predict with a run's model: classes, tags, answers, or a continuation."""
    from outlast.cluster.config.run_file import settings_of
    from outlast.cluster.config.run_reference import declared_settings, user_trust
    from outlast.trainers import predict

    make_code_importable(run, code)
    store, retention = find_run(run, storage)
    resolved = predict.choose_checkpoint(store, checkpoint, retention)
    config, _ = settings_of(declared_settings(store), run, overrides or ())
    task, model = predict.load(config, resolved, base, user_trust(run, overrides or (), trusted))
    inputs = [predict.parse_record(task, _parsed(text)) for text in [*(texts or []), *(prompts or [])]]
    rows = chain(inputs, *(predict.read_records(task, config, file) for file in files or []))
    if not inputs and not files:
        raise ConfigError("no input was given", hint=f"outlast try {run} --text '…', or --file rows.jsonl")
    for answer in predict.predict(task, model, rows):
        if as_json:
            print_json(answer, indent=None, ensure_ascii=False, redacted=False)
        else:
            print_line(_format_answer(answer), redacted=False)


def _parsed(text: str) -> Any:
    """Return the object if the text is a JSON object, else the text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def _format_answer(answer: dict[str, Any]) -> str:
    """Format an answer as one line: names and values, line breaks as \\n."""
    return "  ".join(f"{name}: {_format_value(value)}" for name, value in answer.items())


def _format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, dict) and value.keys() == {"token", "score"}:
        return f"{value['token']!r} {_format_value(value['score'])}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_format_value(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "[" + ", ".join(map(_format_value, value)) + "]"
    return str(value)
