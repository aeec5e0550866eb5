"""Rows of published forms as conversations: messages, ShareGPT's turns, Alpaca's columns, prompt and completion.

A conversation is a list of messages as chat templates take them, and the tools of the row. What is not clear
in a row is an error that names the message.
"""

import ast
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.columns import Column, ColumnType, RowForm, begins_as_objects

ASSISTANT = "assistant"
#: A message of a conversation: its role, its content, and what else the row has of it.
Turn = dict[str, Any]

TOOLS = Column("tools", ColumnType.TOOLS, is_sparse=True)
_SYSTEM = Column("system", ColumnType.TEXT, is_sparse=True)
FORMS = (
    RowForm("ShareGPT", (Column("conversations", ColumnType.MESSAGES), _SYSTEM, TOOLS)),
    RowForm(
        "prompt and completion",
        (Column("prompt", ColumnType.TURNS), Column("completion", ColumnType.TURNS, is_target=True), TOOLS),
    ),
    RowForm(
        "Alpaca",
        (
            Column("instruction", ColumnType.TEXT),
            Column("output", ColumnType.TEXT, is_target=True),
            Column("input", ColumnType.TEXT, is_sparse=True),
            _SYSTEM,
        ),
    ),
)
#: Roles that templates know by name.
_STANDARD_ROLES = ("system", "developer", "user", ASSISTANT, "tool", "function", "ipython")
_CALL = "function_call"  # of ShareGPT: its value is the JSON of a call
#: A text that is meant for a list of messages, whether or not it can be read.
_LIKE_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|from|content|value)['"]\s*:""")
_SHAREGPT_ROLES = {"human": "user", "gpt": ASSISTANT, "observation": "tool"}
_SHAREGPT_ROLES |= {role: role for role in ("system", "user", ASSISTANT, "tool")}


def read_conversation(
    record: Mapping[str, Any], settings: DataSettings, template: str
) -> tuple[list[Turn], list[Any] | None]:
    """Read the conversation of a row in any form. Returns its messages and tools.

    Args:
        record: The row, by roles of columns.
        settings: Names of roles.
        template: The chat template's text: a role that it names is known.

    Raises ConfigError if a message has an unknown role or form, or a JSON text cannot be read.
    """
    turns = [_rename_role(turn, number, settings, template) for number, turn in enumerate(_turns(record), 1)]
    if record.get("system") and (not turns or turns[0]["role"] != "system"):
        turns.insert(0, {"role": "system", "content": record["system"]})
    return turns, _read_tools(record.get("tools"))


def _turns(record: Mapping[str, Any]) -> list[Turn]:
    if "instruction" in record:
        texts = [text for text in (record["instruction"], record.get("input")) if text]
        turns = [{"role": "user", "content": "\n".join(texts)}]
        return turns + ([{"role": ASSISTANT, "content": record["output"]}] if "output" in record else [])
    if "prompt" in record:
        prompt = _messages(record["prompt"], "user")
        # The loss is on the completion only.
        prompt = [{**turn, "train": False} if turn.get("role") == ASSISTANT else turn for turn in prompt]
        return prompt + (_messages(record["completion"], ASSISTANT) if "completion" in record else [])
    given = record["messages"] if "messages" in record else record["conversations"]
    if not isinstance(given, str):
        return _messages(given, "user")
    if (objects := _parse_objects(given)) is None and _LIKE_MESSAGES.match(given):
        raise ConfigError("messages are neither the JSON text of a list nor in Python's notation", hint="fix that row")
    return _messages(objects or given, "user")


def _parse_objects(text: str) -> list[Any] | None:
    """Parse a text that is a list of objects in the notation of JSON or Python; None for another text."""
    if not begins_as_objects(text):
        return None
    for parse in (json.loads, ast.literal_eval):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            items = parse(text.strip())
            return items if isinstance(items, list) and all(isinstance(item, dict) for item in items) else None
    return None


def _messages(given: Any, role: str) -> list[Turn]:
    """Return a list of messages, given as such or as its text; another text is one message of the role."""
    if isinstance(given, str):
        text, given = given, _parse_objects(given)
        if not given or not all("role" in item or "from" in item for item in given):
            return [{"role": role, "content": text}]
    if not isinstance(given, Sequence) or not all(isinstance(item, Mapping) for item in given):
        raise ConfigError("messages are not a list of {role, content}", hint="fix that row")
    return [dict(item) for item in given]


def _rename_role(turn: Turn, number: int, settings: DataSettings, template: str) -> Turn:
    """Return a message with the role that templates know; ShareGPT's {from, value} becomes {role, content}."""
    is_sharegpt = "from" in turn and turn.get("role") is None
    names = {**(_SHAREGPT_ROLES if is_sharegpt else {}), **settings.roles}
    given = turn["from"] if is_sharegpt else turn.get("role")
    if not isinstance(given, str):
        raise incomplete_error(turn, number)
    if is_sharegpt and given == _CALL and _CALL not in settings.roles:
        return _read_call(turn, number)
    known = [*names, *((_CALL,) if is_sharegpt else ()), *(() if is_sharegpt else _STANDARD_ROLES)]
    if given not in known and (is_sharegpt or not any(f"{mark}{given}{mark}" in template for mark in "'\"")):
        raise ConfigError(
            f"message {number} has the unknown role {given!r} (known: {', '.join(known)}; others: data.roles)",
            hint="set data.roles",
        )
    if not is_sharegpt:
        return {**turn, "role": names.get(given, given)}
    if "value" not in turn and not turn.get("tool_calls"):
        raise incomplete_error(turn, number)
    return {"role": names[given], "content": turn.get("value"), **_rest(turn)}


def _rest(turn: Turn) -> Turn:
    return {key: value for key, value in turn.items() if key not in ("from", "value", "role")}


def _read_call(turn: Turn, number: int) -> Turn:
    """Return ShareGPT's call of a function, or of a list of them, as a message of the assistant with tool calls."""
    value = turn.get("value")
    calls = parse_json(value, f"the function call in message {number}") if isinstance(value, str) else value
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, Mapping) and isinstance(call.get("name"), str) for call in calls):
        raise ConfigError(f"message {number} calls a function without a name", hint="fix that row")
    functions = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]
    called = [{"type": "function", "function": function} for function in functions]
    return {"role": ASSISTANT, "content": "", "tool_calls": called, **_rest(turn)}


def incomplete_error(turn: Mapping[str, Any], number: int) -> ConfigError:
    """Make the error of a message that lacks its role or its content."""
    keys = ", ".join(f"{key}{' (null)' if value is None else ''}" for key, value in turn.items()) or "no keys"
    return ConfigError(
        f"message {number} has no role or no content: it has {keys}, not role and content, or from and value",
        hint="fix that row",
    )


def _read_tools(given: Any) -> list[Any] | None:
    """Read the tools of a row: a list of objects, of their JSON texts, or the JSON text of all. None if it has none."""
    if given is None or (isinstance(given, str) and not given.strip()):
        return None
    tools = parse_json(given, "tools") if isinstance(given, str) else given
    if isinstance(tools, list):
        tools = [parse_json(item, "a tool") if isinstance(item, str) else item for item in tools]
    if not isinstance(tools, list) or not all(isinstance(item, Mapping) for item in tools):
        raise ConfigError("its tools are not a list of objects", hint="fix that row, or set data.tools: null")
    return [dict(item) for item in tools]


def parse_json(text: str, what: str) -> Any:
    """Parse JSON text in a row. Raises ConfigError, with the name `what`, if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{what} cannot be read as JSON: {error}", hint="fix that row") from error
