"""Conversations become tokens through the tokenizer's own chat template, and loss falls on the answers only.

Where the template marks what the assistant says (`{% generation %}`), its marks count. Where it does not, an answer is
what the rendering gains between the prompt for it and its end; that needs renderings of the beginning of a conversation
to be beginnings of the whole one's, which is checked, because some templates rewrite earlier turns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from outlast.checkpointing.errors import ConfigError

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASSISTANT = "assistant"


def encode_chat(tokenizer: Any, messages: Any) -> tuple[list[int], list[bool]]:
    """The tokens of a conversation, and of each whether it belongs to an answer.

    Args:
        tokenizer: A fast tokenizer of transformers with a chat template.
        messages: Mappings with `role` and `content`. Keys that hold None count as absent, because columnar files have
            every key in every message.

    Raises:
        ConfigError: They are no such thing, hold no answer, or the template refuses them; `message` says which.
    """
    turns = _turns(messages)
    template = chat_template(tokenizer)
    try:
        if _MARKS.search(template):
            made = tokenizer.apply_chat_template(
                turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            tokens, mask = list(made["input_ids"]), [bool(item) for item in made["assistant_masks"]]
        else:
            tokens, mask = _by_prefixes(tokenizer, turns)
    except TemplateError as error:
        raise ConfigError(f"the chat template refuses the conversation: {error}", hint="mend that row") from error
    if not any(mask):
        raise ConfigError("the chat template renders no token of an answer", hint="mend that row, or the template")
    return tokens, mask


def chat_template(tokenizer: Any) -> str:
    """The tokenizer's chat template.

    Raises:
        ConfigError: It has none.
    """
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ConfigError(
            "the tokenizer has no chat template, which conversations need",
            hint="set data.chat_template, or take a chat model's tokenizer",
        ) from error


def _turns(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or not all(isinstance(item, Mapping) for item in messages):
        raise ConfigError("messages are no list of {role, content}", hint="mend that row")
    turns = [{key: value for key, value in item.items() if value is not None} for item in messages]
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn.get("role"), str) or not ("content" in turn or "tool_calls" in turn):
            raise ConfigError(f"message {number} has no role or no content", hint="mend that row")
    if not any(turn["role"] == ASSISTANT for turn in turns):
        raise ConfigError(f"no message has the role {ASSISTANT!r}, so there is nothing to learn", hint="mend that row")
    return turns


def _by_prefixes(tokenizer: Any, turns: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
    """A token is part of an answer when it holds a character of it."""
    if turns[0]["role"] == ASSISTANT:
        raise ConfigError("the conversation begins with an answer, and nothing that it answers", hint="mend that row")
    whole = _rendered(tokenizer, turns)
    answers = []
    for number, turn in enumerate(turns):
        if turn["role"] == ASSISTANT:
            begin = _rendered(tokenizer, turns[:number], add_generation_prompt=True)
            end = _rendered(tokenizer, turns[: number + 1])
            if not (end.startswith(begin) and whole.startswith(end)):
                raise ConfigError(
                    f"the chat template renders message {number + 1} otherwise alone than within the conversation, so "
                    "what belongs to the answer cannot be told",
                    hint="put {% generation %} … {% endgeneration %} around the answers in the template",
                )
            answers.append((len(begin), len(end)))
    made = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask = [any(start < last and stop > first for first, last in answers) for start, stop in made["offset_mapping"]]
    return list(made["input_ids"]), mask


def _rendered(tokenizer: Any, turns: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
    return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=add_generation_prompt))
