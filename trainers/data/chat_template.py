"""Conversations to tokens by the tokenizer's chat template, with a mask of the tokens that belong to answers.

A template may mark the assistant's text with `{% generation %}`; then its marks are used. Otherwise an answer is the
text between the rendered prompt for it and its end. That requires the rendering of each prefix of a conversation to be
a prefix of the full rendering, which is checked, because some templates rewrite earlier turns.

Templates differ in the forms of messages that they take. A form that this one would write as Python's notation, or
leave out, is converted to one that it takes, or else an error: see `ChatTemplate.adapt`.
"""

import copy
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import groupby, pairwise
from types import MappingProxyType
from typing import Any

from jinja2 import TemplateSyntaxError

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.data.conversation_forms import ASSISTANT, Turn, incomplete_error, parse_json

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = "outlast-probe"
_JSON_PROBE = '{"outlast-probe": "x"}'
Tools = Sequence[Any] | None


def chat_template(tokenizer: Any, tools: Tools = None) -> str:
    """Return the tokenizer's chat template; it may have another one for tools. Raises ConfigError if it has none."""
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:
        raise missing_template_error() from error


def missing_template_error() -> ConfigError:
    """Make the error of a tokenizer without a chat template."""
    return ConfigError(
        "the tokenizer has no chat template, which conversations need",
        hint="set data.chat_template, or use a chat model's tokenizer; with model.task: causal-lm prompts with answers "
        "need none",
    )


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        tokenizer: A tokenizer of transformers that has one.
        arguments: Arguments of the template, such as {enable_thinking: false}.
        name: What errors of its syntax call it.

    Raises ConfigError if there is none, it is no template, or it has no such arguments.
    """

    def __init__(
        self,
        tokenizer: Any,
        arguments: Mapping[str, Any] = MappingProxyType({}),
        name: str = "the tokenizer's chat template",
    ) -> None:
        self.text = f"{chat_template(tokenizer)}\n{chat_template(tokenizer, [])}"
        self._tokenizer, self._arguments = tokenizer, arguments
        for key in arguments:
            if not re.search(rf"\b{re.escape(key)}\b", self.text):
                hint = "leave it out, or check its name"
                raise ConfigError(f"the chat template has no argument {key!r} (data.template_arguments)", hint=hint)
        choices: tuple[Tools, ...] = (None, [{}])
        for tools in choices:
            try:
                self.render([{"role": "user", "content": _PROBE}], tools)
            except ConfigError as error:
                if isinstance(error.__cause__, TemplateSyntaxError):
                    hint = "correct the template, or set data.chat_template to another one"
                    raise ConfigError(f"{name} has a syntax error: {error.__cause__}", hint=hint) from error

    # -- rendering -----------------------------------------------------------------------------------------------------

    def render(self, turns: Sequence[Turn], tools: Tools = None, *, add_generation_prompt: bool = False) -> str:
        """Render messages to text. Raises ConfigError if the template rejects them."""
        return str(self._apply(turns, tools, tokenize=False, add_generation_prompt=add_generation_prompt))

    def prompt(self, turns: Sequence[Turn], tools: Tools) -> Any:
        """Render and tokenize what the model reads before its next answer, as tensors."""
        turns = self.adapt(turns, tools)
        return self._apply(turns, tools, add_generation_prompt=True, return_dict=True, return_tensors="pt")

    def _apply(self, turns: Sequence[Turn], tools: Tools, **options: Any) -> Any:
        given = list(tools) if tools is not None else None
        try:
            return self._tokenizer.apply_chat_template(list(turns), tools=given, **options, **self._arguments)
        except Exception as error:  # the template is the user's program, which may raise anything
            raise ConfigError(f"the chat template rejects the conversation: {error}", hint="fix that row") from error

    # -- forms of messages ---------------------------------------------------------------------------------------------

    def adapt(self, messages: Any, tools: Tools) -> list[Turn]:
        """Convert messages to the forms that the template takes.

        - Keys with value None are absent, as transformers has it.
        - Parts of a content are joined, unless the template takes nothing but parts.
        - The arguments of a tool call are given as JSON text or as an object, whichever the template takes.

        Raises ConfigError if the messages are malformed, or the template writes a content in Python's notation.
        """
        turns = _check_turns(messages)
        for number, turn in enumerate(turns, 1):
            if isinstance(turn.get("content"), list) and _are_parts(turn["content"]):
                turn["content"] = _join_parts(turn["content"], number)
        if self._takes_only_parts:
            for turn in turns:
                if isinstance(turn.get("content"), str):
                    turn["content"] = [{"type": "text", "text": turn["content"]}]
        turns = self._with_arguments(turns, tools)
        others = [turn for turn in turns if isinstance(turn.get("content"), (list, dict)) and not _text_of(turn)]
        if others:
            rendered = self.render(turns, tools)
            for turn in others:
                if turn["content"] and str(turn["content"]) in rendered:
                    shown = str(turn["content"])[:60]
                    raise ConfigError(f"the content {shown} is neither a text nor a list of parts", hint="fix that row")
        return turns

    @cached_property
    def _takes_only_parts(self) -> bool:
        """Whether the template shows a content that is a list of parts, and leaves out one that is a text."""

        def is_shown(content: Any) -> bool:
            try:
                return _PROBE in self.render([{"role": "user", "content": content}])
            except ConfigError:
                return False

        return not is_shown(_PROBE) and is_shown([{"type": "text", "text": _PROBE}])

    def _with_arguments(self, turns: list[Turn], tools: Tools) -> list[Turn]:
        """Give the arguments of tool calls as JSON text, or as objects, as the template takes them."""
        arguments = [function["arguments"] for turn in turns for function in _functions(turn)]
        if any(isinstance(item, str) for item in arguments):
            probes = _map_arguments(turns, lambda item: _JSON_PROBE if isinstance(item, str) else item)
            with suppress(ConfigError):
                if _JSON_PROBE in self.render(probes, tools):
                    return turns
            return _map_arguments(turns, _parse_arguments)
        if any(isinstance(item, dict) and item for item in arguments):
            with suppress(ConfigError):
                rendered = self.render(turns, tools)
                if not any(item and isinstance(item, dict) and str(item) in rendered for item in arguments):
                    return turns
            return _map_arguments(turns, lambda item: json.dumps(item, ensure_ascii=False))
        return turns

    # -- tokens --------------------------------------------------------------------------------------------------------

    def encode(self, messages: Any, tools: Tools = None, *, train_on: str = "all") -> tuple[list[int], list[bool]]:
        """Tokenize a conversation. Returns its tokens, and for each whether it belongs to an answer that is learned.

        Args:
            messages: The conversation. An answer with `weight: 0` or `train: false` is not learned.
            tools: The tools that the template shows.
            train_on: `all` answers, or only the `last` message of the assistant.

        Raises ConfigError if the messages are malformed, have no answer to learn, or the template rejects them or
        shows no part of an answer.
        """
        turns = self.adapt(messages, tools)
        learned = _learned(turns, train_on)
        full = self.render(turns, tools)
        if tools and full == self.render(turns):
            hint = "set data.chat_template to one that shows them, or data.tools: null"
            raise ConfigError("the chat template does not show the tools (data.tools: null leaves them out)", hint=hint)
        if _GENERATION.search(chat_template(self._tokenizer, tools)):
            tokens, mask = self._by_marks(turns, tools, learned)
            shown = dict.fromkeys(learned, full)
        else:
            spans = {number: self._locate(turns, tools, number, full) for number in learned}
            tokens, mask = self._by_spans(full, list(spans.values()))
            shown = {number: full[begin:end] for number, (begin, end) in spans.items()}
        for number, text in shown.items():
            self._check_shown(turns, tools, number, text)
        if not any(mask):
            raise ConfigError("the chat template renders no token of an answer", hint="fix that row or the template")
        return tokens, mask

    def _by_marks(self, turns: list[Turn], tools: Tools, learned: Sequence[int]) -> tuple[list[int], list[bool]]:
        """Tokenize with the template's own marks, without those of the answers that are not learned."""
        tokens, mask = self._marked(turns, tools)
        answers = _answers(turns)
        if len(learned) == len(answers):
            return tokens, mask
        spans = self._spans_by_prefix(turns, tools, tokens, mask) or _runs(mask)
        if len(spans) != len(answers):
            raise ConfigError(
                f"the chat template marks {len(spans)} spans, and the conversation has {len(answers)} messages of the "
                "assistant, so those with weight 0 or before the last one cannot be told apart",
                hint="mark each message by one {% generation %} … {% endgeneration %} in the template",
            )
        kept = {position for number, span in zip(answers, spans, strict=True) if number in learned for position in span}
        return tokens, [position in kept for position in range(len(tokens))]

    def _marked(self, turns: Sequence[Turn], tools: Tools) -> tuple[list[int], list[bool]]:
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = self._apply(turns, tools, **options)
        return list(encoded["input_ids"]), [bool(item) for item in encoded["assistant_masks"]]

    def _spans_by_prefix(
        self, turns: list[Turn], tools: Tools, tokens: list[int], mask: list[bool]
    ) -> list[list[int]] | None:
        """Return the marked tokens of each answer: those that a prefix has more than the prefix before the answer.

        None unless each prefix is rendered as it is in the full conversation; a template may rewrite earlier turns.
        """
        answers, ends = _answers(turns), list[int]()
        for last in [*answers, len(turns)]:
            try:
                head, marks = self._marked(turns[:last], tools) if last else ([], [])
            except ConfigError:  # such as a template that requires a user's message
                return None
            if tokens[: len(head)] != head or mask[: len(head)] != marks:
                return None
            ends.append(len(head))
        return [[position for position in range(begin, end) if mask[position]] for begin, end in pairwise(ends)]

    def _locate(self, turns: list[Turn], tools: Tools, number: int, full: str) -> tuple[int, int]:
        """Return where an answer begins and ends in the full rendering."""
        if number == 0:
            raise ConfigError(f"the first message has the role {ASSISTANT!r} and answers nothing", hint="fix that row")
        begin = self.render(turns[:number], tools, add_generation_prompt=True)
        end = self.render(turns[: number + 1], tools)
        if not (end.startswith(begin) and full.startswith(end)):
            raise ConfigError(
                f"the chat template renders the conversation up to message {number + 1} differently from the full "
                "conversation, so the answer cannot be located",
                hint="put {% generation %} … {% endgeneration %} around the answers in the template, or set "
                "data.train_on: last",
            )
        return len(begin), len(end)

    def _by_spans(self, full: str, answers: Sequence[tuple[int, int]]) -> tuple[list[int], list[bool]]:
        """Tokenize the rendering. A token belongs to an answer if it contains a character of it."""
        encoded = self._tokenizer(full, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        mask = [
            any(start < last and stop > first for first, last in answers) for start, stop in encoded["offset_mapping"]
        ]
        return list(encoded["input_ids"]), mask

    def _check_shown(self, turns: list[Turn], tools: Tools, number: int, shown: str) -> None:
        """Raise ConfigError if an answer, or its tool calls, are left out of the rendering."""
        turn = turns[number]
        text = _text_of(turn).strip()
        if text and text not in shown:
            probes = [dict(item) for item in turns]
            probes[number]["content"] = f"{_text_of(turn)} {_PROBE}"
            if self._takes_only_parts:
                probes[number]["content"] = [{"type": "text", "text": probes[number]["content"]}]
            if _PROBE not in self.render(probes, tools):
                raise ConfigError(
                    f"the chat template does not show the answer in message {number + 1}", hint="fix that row"
                )
        calls = turn.get("tool_calls") or []
        for call in calls if isinstance(calls, list) else [calls]:
            name = (call.get("function") or call).get("name") if isinstance(call, Mapping) else None
            if not isinstance(name, str) or name not in shown:
                raise ConfigError(
                    f"the chat template does not show the tool calls of message {number + 1}",
                    hint="set data.chat_template to one that shows them",
                )


def _check_turns(messages: Any) -> list[Turn]:
    """Return copies of the messages without keys of value None. Raises ConfigError if they are malformed."""
    if not isinstance(messages, Sequence) or not all(isinstance(item, Mapping) for item in messages):
        raise ConfigError("messages are not a list of {role, content}", hint="fix that row")
    turns = [{key: value for key, value in item.items() if value is not None} for item in messages]
    for number, (turn, given) in enumerate(zip(turns, messages, strict=True), 1):
        if not isinstance(turn.get("role"), str) or not ("content" in turn or "tool_calls" in turn):
            raise incomplete_error(given, number)
    return turns


def _answers(turns: Sequence[Turn]) -> list[int]:
    return [number for number, turn in enumerate(turns) if turn["role"] == ASSISTANT]


def _learned(turns: Sequence[Turn], train_on: str) -> list[int]:
    """Return the indices of the messages whose text is learned. Raises ConfigError if there are none."""
    answers = _answers(turns)
    if not answers:
        raise ConfigError(f"no message has the role {ASSISTANT!r}, so there is nothing to learn", hint="fix that row")
    learned = [number for number in answers if _is_learned(turns[number], number + 1)]
    if train_on == "last":
        learned = [number for number in learned if number == answers[-1]]
    for number in learned:
        if _is_empty(turns[number]):
            raise ConfigError(f"message {number + 1} is an answer without text", hint="fix that row")
    if not learned:
        which = "the last answer has" if train_on == "last" else "all answers have"
        raise ConfigError(f"{which} weight 0 or train: false, so there is nothing to learn", hint="fix that row")
    return learned


def _is_empty(turn: Turn) -> bool:
    """Check whether a message has nothing but its role: no text, no calls of tools, nothing else to render."""
    content = turn.get("content")
    has_other_content = bool(content) and not isinstance(content, str) and not _is_text_part(content)
    others = turn.keys() - {"role", "content", "weight", "train", "name"}
    return not (_text_of(turn).strip() or has_other_content or any(turn[key] for key in others))


def _is_text_part(content: Any) -> bool:
    return isinstance(content, list) and len(content) == 1 and isinstance(content[0], Mapping) and "text" in content[0]


def _is_learned(turn: Turn, number: int) -> bool:
    for key in ("weight", "train"):
        if turn.get(key, 1) not in (0, 1):
            raise ConfigError(
                f"message {number} has {key} {turn[key]!r}, which is neither 0 nor 1", hint="fix that row"
            )
    return bool(turn.get("weight", 1)) and bool(turn.get("train", 1))


def _runs(mask: Sequence[bool]) -> list[list[int]]:
    """Return the positions of each contiguous run of marked tokens."""
    groups = groupby(range(len(mask)), key=mask.__getitem__)
    return [list(positions) for is_marked, positions in groups if is_marked]


def _are_parts(content: list[Any]) -> bool:
    return all(isinstance(part, Mapping) and "type" in part for part in content)


def _join_parts(parts: Sequence[Mapping[str, Any]], number: int) -> str:
    for part in parts:
        if part["type"] != "text" or not isinstance(part.get("text"), str):
            raise ConfigError(f"message {number} has a part of type {part['type']!r}, not a text", hint="fix that row")
    return "".join(part["text"] for part in parts)


def _text_of(turn: Turn) -> str:
    """Return the text of a content that is a text or one part; empty for another."""
    content = turn.get("content")
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], Mapping):
        content = content[0].get("text")
    return content if isinstance(content, str) else ""


def answer_text(turn: Turn) -> str:
    """Return a message's text; of one without text its tool calls, as JSON."""
    content = turn.get("content")
    if isinstance(content, list) and _are_parts(content):
        content = "".join(str(part.get("text", "")) for part in content)
    calls = turn.get("tool_calls")
    return str(content or (json.dumps(calls, ensure_ascii=False) if calls else ""))


def _functions(turn: Turn) -> Iterator[dict[str, Any]]:
    """Iterate over the functions that a message calls with arguments."""
    calls = turn.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = (call.get("function") or call) if isinstance(call, dict) else None
        if isinstance(function, dict) and "arguments" in function:
            yield function


def _map_arguments(turns: Sequence[Turn], convert: Callable[[Any], Any]) -> list[Turn]:
    """Return the messages with converted arguments of tool calls."""
    copies = copy.deepcopy(list(turns))
    for turn in copies:
        for function in _functions(turn):
            function["arguments"] = convert(function["arguments"])
    return copies


def _parse_arguments(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    if not given.strip():
        return {}
    return parse_json(given, "the arguments of a tool call, which the chat template needs as an object,")
