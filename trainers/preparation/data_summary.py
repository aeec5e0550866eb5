"""Summary of prepared data for the user: columns, guesses, classes, and counts of cut and empty rows.

`preview`, `plan` and `validate --deep` print it. Nothing here formats for a terminal.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from outlast.checkpointing.error_hints import shorten_list
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.columns import choose_columns
from outlast.trainers.preparation.prepare import Prepared
from outlast.trainers.preparation.sample_counts import LIMITS
from outlast.trainers.tasks.base import find_task

_NUM_CLASSES = 20


def summarize_data(config: TrainingConfig, prepared: Prepared) -> dict[str, Any]:
    """Return what was guessed and counted, as JSON."""
    task = find_task(config.model.task)
    chosen = choose_columns(task.columns, config.data, task.forms)
    facts = {name: value for name, value in prepared.facts.items() if name != "notes"}
    return {
        "task": config.model.task,
        "columns": chosen.used,
        "unused_columns": chosen.unused,
        "facts": facts,
        "notes": list(prepared.notes),
        "limits": {name: getattr(config.data, name) for name in ("max_length", *task.options) if name in LIMITS},
        "splits": {
            name: {
                "rows": prepared.num_rows[name],
                "samples": prepared.num_samples if name == "train" else prepared.num_eval_samples,
                "tokens": prepared.num_tokens[name],
                "longest": prepared.longest.get(name),
                "cut": prepared.num_cut.get(name),
                "empty": prepared.num_empty.get(name),
                "dropped_tokens": prepared.num_dropped_tokens[name],
            }
            for name in prepared.num_rows
        },
        "skipped_rows": prepared.num_bad_rows,
    }


def describe_summary(body: Mapping[str, Any]) -> Iterator[str]:
    """Yield `summarize_data` as lines of text, without the notes."""
    columns = ", ".join(role if role == name else f"{role} = {name}" for role, name in body["columns"].items())
    unused = f"; not used: {shorten_list(body['unused_columns'], _NUM_CLASSES)}" if body["unused_columns"] else ""
    yield f"task {body['task']}, columns: {columns}{unused}"
    for name, value in body["facts"].items():
        if isinstance(value, list):
            if value:
                yield f"{name}: {shorten_list([f'{index} {item}' for index, item in enumerate(value)], _NUM_CLASSES)}"
        elif not isinstance(value, dict | bool):  # facts for the task, not for the user
            yield f"{name.replace('_', ' ')}: {value}"
    for split, counts in body["splits"].items():
        yield from _describe_split(split, counts, body["limits"])


def _describe_split(split: str, counts: Mapping[str, Any], limits: Mapping[str, int]) -> Iterator[str]:
    amount = [_counted(counts[noun], noun.removesuffix("s")) for noun in ("rows", "samples", "tokens")]
    longest = [f"at most {counts['longest']:,} in a sample"] if counts["longest"] else []
    yield f"{split}: {', '.join([*amount, *longest])}"
    if counts["cut"] is None:  # data that an earlier release prepared
        return
    cut_at = " and ".join(f"data.{name} {limit}" for name, limit in limits.items())
    rows, dropped = counts["rows"], counts["dropped_tokens"]
    parts = [
        f"{_counted(counts['cut'], 'row')} cut at {cut_at} ({_share(counts['cut'], rows)})",
        f"{_counted(counts['empty'], 'row')} without text ({_share(counts['empty'], rows)})",
    ]
    if dropped:
        parts.append(f"{_counted(dropped, 'token')} dropped at the end ({_share(dropped, counts['tokens'])})")
    yield f"{split}: {', '.join(parts)}"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _share(count: int, total: int) -> str:
    """Format a share; neither a small one as 0 % nor one below 1 as 100 %."""
    percent = 100 * count / max(total, 1)
    if 0 < percent < 0.1:
        return "<0.1 %"
    return ">99.9 %" if 99.95 <= percent < 100 else f"{percent:.3g} %"
