"""Conversations to tokens by the tokenizer's chat template, with a mask of the tokens that belong to answers.

A template may mark the assistant's text with `{% generation %}`; then its marks are used. Otherwise an answer is the
text between the rendered prompt for it and its end. That requires the rendering of each prefix of a conversation to be
a prefix of the full rendering, which is checked, because some templates rewrite earlier turns.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from outlast.checkpointing.errors import ConfigError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASSISTANT = "assistant"


def encode_chat(tokenizer: Any, messages: Any) -> tuple[list[int], list[bool]]:
    """Tokenize a conversation. Returns its tokens, and for each whether it belongs to an answer.

    Keys of a message with value None count as absent, because columnar files have every key in every message. Raises
    ConfigError if the messages are malformed, have no answer, or the template rejects them.
    """
    turns = _check_turns(messages)
    template = chat_template(tokenizer)
    try:
        if _GENERATION.search(template):
            encoded = tokenizer.apply_chat_template(
                turns, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            tokens, mask = list(encoded["input_ids"]), [bool(item) for item in encoded["assistant_masks"]]
        else:
            tokens, mask = _by_prefixes(tokenizer, turns)
    except TemplateError as error:
        raise ConfigError(f"the chat template rejects the conversation: {error}", hint="fix that row") from error
    if not any(mask):
        raise ConfigError("the chat template renders no token of an answer", hint="fix that row or the template")
    return tokens, mask


def chat_template(tokenizer: Any) -> str:
    """Return the tokenizer's chat template. Raises ConfigError if it has none."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ConfigError(
            "the tokenizer has no chat template, which conversations need",
            hint="set data.chat_template, or use a chat model's tokenizer",
        ) from error


def _check_turns(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, Sequence) or not all(isinstance(item, Mapping) for item in messages):
        raise ConfigError("messages are not a list of {role, content}", hint="fix that row")
    turns = [{key: value for key, value in item.items() if value is not None} for item in messages]
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn.get("role"), str) or not ("content" in turn or "tool_calls" in turn):
            raise ConfigError(f"message {number} has no role or no content", hint="fix that row")
    if not any(turn["role"] == ASSISTANT for turn in turns):
        raise ConfigError(f"no message has the role {ASSISTANT!r}, so there is nothing to learn", hint="fix that row")
    return turns


def _by_prefixes(tokenizer: Any, turns: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[bool]]:
    """Find answers by rendering prefixes. A token belongs to an answer if it contains a character of it."""
    if turns[0]["role"] == ASSISTANT:
        raise ConfigError(f"the first message has the role {ASSISTANT!r} and answers nothing", hint="fix that row")
    full = _render(tokenizer, turns)
    answers = []
    for number, turn in enumerate(turns):
        if turn["role"] == ASSISTANT:
            begin = _render(tokenizer, turns[:number], add_generation_prompt=True)
            end = _render(tokenizer, turns[: number + 1])
            if not (end.startswith(begin) and full.startswith(end)):
                raise ConfigError(
                    f"the chat template renders the conversation up to message {number + 1} differently from the full "
                    "conversation, so the answer cannot be located",
                    hint="put {% generation %} … {% endgeneration %} around the answers in the template",
                )
            answers.append((len(begin), len(end)))
    encoded = tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask = [any(start < last and stop > first for first, last in answers) for start, stop in encoded["offset_mapping"]]
    return list(encoded["input_ids"]), mask


def _render(tokenizer: Any, turns: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = False) -> str:
    return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=add_generation_prompt))
