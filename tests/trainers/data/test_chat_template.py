"""Conversations: tokens equal the template's own rendering, and only answers have loss."""

from __future__ import annotations

import inspect
import json
from itertools import groupby
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from outlast.checkpointing.errors import ConfigError
from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.chat_template import ChatTemplate
from outlast.trainers.data.conversation_forms import read_conversation
from outlast.trainers.data.tokenizer import train_bpe

PLAIN = """{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant', 'tool'] %}\
{{ raise_exception('a role of its own: ' + m.role) }}{% endif %}<{{ m.role }}>{{ m.content }}<end>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
MARKED = """{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}\
{% generation %}{{ m.content }}<end>{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
FORGETFUL = """{% for m in messages %}<{{ m.role }}>{% if loop.last %}<think>{% endif %}{{ m.content }}<end>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""


#: Shows the thinking of answers after the last question only, as Qwen3's template does.
THINKING = """{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}\
{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<{{ m.role }}>\
{% if m.role == 'assistant' %}{% generation %}{% if loop.index0 < ns.last %}{{ m.content.split('</think>')[-1] }}\
{% else %}{{ m.content }}{% endif %}<end>{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
#: Shows the thinking of the last message only.
LAST_THINKING = THINKING.replace("loop.index0 < ns.last", "not loop.last")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_bpe(iter(["user assistant system think end says hello world, how are you?"] * 20), 400).inner


def chat(*turns: str) -> list[dict[str, Any]]:
    """`chat("user: hi", "assistant: ho")`."""
    return [dict(zip(("role", "content"), turn.split(": ", 1), strict=True)) for turn in turns]


CALLING = """{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ m.tool_calls | tojson if m.tool_calls }}<end>
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""
TWO = chat("system: be kind", "user: hello", "assistant: hello you", "user: how?", "assistant: wörld 🙂")


def answers(tokenizer: Any, template: str, messages: Any) -> list[str]:
    """The texts that have loss; the tokens must equal the library's own rendering."""
    tokenizer.chat_template = template
    tokens, mask = ChatTemplate(tokenizer).encode(messages)
    assert tokens == list(tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"])
    assert len(mask) == len(tokens)
    runs: list[list[int]] = []
    for position, (token, is_answer) in enumerate(zip(tokens, mask, strict=True)):
        if is_answer:
            if not position or not mask[position - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def test_loss_is_on_the_answers(tokenizer: Any) -> None:
    assert answers(tokenizer, PLAIN, TWO) == ["hello you<end>\n", "wörld 🙂<end>\n"]


def test_generation_marks_of_the_template_are_used(tokenizer: Any) -> None:
    assert answers(tokenizer, MARKED, TWO) == ["hello you<end>", "wörld 🙂<end>"]


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), st.text(min_size=1)), min_size=1))
def test_any_text_in_any_order(tokenizer: Any, turns: list[tuple[str, str]]) -> None:
    messages = [*TWO[:1], *({"role": role, "content": content} for role, content in turns)]
    expected = "".join(f"{content}<end>\n" for role, content in turns if role == "assistant")
    if expected:
        assert "".join(answers(tokenizer, PLAIN, messages)) == expected


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(ConfigError, match="up to message 3 differently from the full") as caught:
        ChatTemplate(tokenizer).encode(TWO)
    assert "{% generation %}" in caught.value.hint


def test_keys_without_a_value_are_absent(tokenizer: Any) -> None:
    """As in parquet, where every message has every key."""
    template = PLAIN.replace("{{ m.content }}", "{{ m.content }}{% if m.tool_calls is defined %}TOOL{% endif %}")
    tokenizer.chat_template = template
    filled = [{**turn, "tool_calls": None} for turn in TWO]
    assert ChatTemplate(tokenizer).encode(filled) == ChatTemplate(tokenizer).encode(TWO)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", "not a list of"),
        (["hello"], "not a list of"),
        (None, "not a list of"),
        ([], "nothing to learn"),
        (chat("user: hello"), "nothing to learn"),
        (chat("assistant: hello"), "answers nothing"),
        ([{"role": "user"}, *TWO], "message 1 has no role or no content"),
        ([{"content": "hi"}], "message 1 has no role or no content"),
        (
            [{"role": "user", "content": None}],
            r"message 1 has no role or no content: it has role, content \(null\), not",
        ),
        (chat("user: hello", "assistant: "), "message 2 is an answer without text"),
        (chat("user: hello", "assistant: \n "), "message 2 is an answer without text"),
        (
            [*TWO[:2], {"role": "assistant", "content": [{"type": "text", "text": ""}]}],
            "message 3 is an answer without",
        ),
        ([*TWO[:2], {"role": "assistant", "content": [], "tool_calls": []}], "message 3 is an answer without"),
        ([*TWO, *chat("user: so?", "assistant: ")], "message 7 is an answer without text"),
        ([*TWO, {"role": "critic", "content": "no"}], "rejects the conversation: a role of its own: critic"),
    ],
)
def test_malformed_conversations(messages: Any, message: str, tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN
    with pytest.raises(ConfigError, match=message):
        ChatTemplate(tokenizer).encode(messages)


def test_an_empty_answer_that_is_not_learned_or_calls_a_tool(tokenizer: Any) -> None:
    assert answers(tokenizer, PLAIN, [*chat("user: hello"), {"role": "assistant", "content": "", "weight": 0}, *TWO])
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
    tokenizer.chat_template = PLAIN.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}")
    assert ChatTemplate(tokenizer).encode([*TWO[:2], {"role": "assistant", "content": "", "tool_calls": calls}])


def read(messages: Any, **data: Any) -> list[dict[str, Any]]:
    return read_conversation({"messages": messages}, DataSettings(train="none", **data), PLAIN)[0]


@pytest.mark.parametrize("is_list", [False, True])
def test_calls_of_sharegpt(tokenizer: Any, is_list: bool) -> None:
    call = {"name": "weather", "arguments": {"city": "Bern"}}
    given = [
        {"from": "human", "value": "how?"},
        {"from": "function_call", "value": json.dumps([call] * 2 if is_list else call)},
        {"from": "observation", "value": "9"},
        {"from": "gpt", "value": "so"},
    ]
    calls = [{"type": "function", "function": call}] * (2 if is_list else 1)
    plain = [
        {"role": "user", "content": "how?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "content": "9"},
        {"role": "assistant", "content": "so"},
    ]
    tokenizer.chat_template = CALLING
    expected = list(tokenizer.apply_chat_template(plain)["input_ids"])
    assert ChatTemplate(tokenizer).encode(read(given))[0] == expected
    assert read(given, roles={"function_call": "assistant"})[1]["content"] == given[1]["value"]


@pytest.mark.parametrize("value", ["no json", "5", "[]", '{"arguments": {}}', None, '{"name": 5}'])
def test_calls_of_sharegpt_that_are_none(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"function call in message 1|message 1 calls a function without a name"):
        read([{"from": "function_call", "value": value}])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [{"speaker": "user", "text": "hi"}],
            "message 1 has no role or no content: it has speaker, text, not role and",
        ),
        (json.dumps([{"speaker": "user", "text": "hi"}]), "message 1 has no role or no content: it has speaker, text,"),
        ([{"from": "human", "text": "hi"}], "message 1 has no role or no content: it has from, text,"),
        ("[{'role': 'user', 'content': array([1])}]", "neither the JSON text of a list nor in Python's notation"),
        ('[{"role": "user"', "neither the JSON text of a list nor in Python's notation"),
    ],
)
def test_messages_of_other_forms(messages: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(messages)


def test_a_tokenizer_without_a_template(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="no chat template") as caught:
        ChatTemplate(tokenizer).encode(TWO)
    assert "data.chat_template" in caught.value.hint


THOUGHT = chat("user: one", "assistant: <think>say so</think>hello", "assistant: you", "user: two", "assistant: world")


@pytest.mark.parametrize(
    ("template", "messages", "unlearned", "train_on", "expected"),
    [
        (THINKING, THOUGHT, (1,), "all", ["you<end>", "world<end>"]),
        (THINKING, THOUGHT, (2,), "all", ["hello<end>", "world<end>"]),
        (THINKING, THOUGHT, (4,), "all", ["hello<end>", "you<end>"]),
        (THINKING, THOUGHT, (), "last", ["world<end>"]),
        (LAST_THINKING, THOUGHT, (1,), "all", ["you<end>", "world<end>"]),
        (LAST_THINKING, THOUGHT[:3], (), "last", ["you<end>"]),
        (MARKED, TWO, (2,), "all", ["wörld 🙂<end>"]),
    ],
)
def test_marks_of_a_template_that_leaves_out_thinking(
    tokenizer: Any, template: str, messages: Any, unlearned: tuple[int, ...], train_on: str, expected: list[str]
) -> None:
    tokenizer.chat_template = template
    weighted = [{**turn, "weight": int(number not in unlearned)} for number, turn in enumerate(messages)]
    tokens, mask = ChatTemplate(tokenizer).encode(weighted, train_on=train_on)
    full = tokenizer.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, tokenizer_kwargs={}
    )
    assert tokens == list(full["input_ids"])
    assert all(marked for marked, learned in zip(full["assistant_masks"], mask, strict=True) if learned)
    runs = [list(run) for learned, run in groupby(range(len(mask)), key=mask.__getitem__) if learned]
    assert [tokenizer.decode([tokens[position] for position in run]) for run in runs] == expected


def test_marks_that_belong_to_no_message(tokenizer: Any) -> None:
    """Two marks in one message that is also rewritten: which of the marks belongs to which message is unknown."""
    twice = THINKING.replace("<end>{% endgeneration %}", "{% endgeneration %}|{% generation %}<end>{% endgeneration %}")
    tokenizer.chat_template = twice
    weighted = [{**turn, "weight": 0} if number == 1 else turn for number, turn in enumerate(THOUGHT)]
    with pytest.raises(ConfigError, match="marks 6 spans, and the conversation has 3 messages of the assistant"):
        ChatTemplate(tokenizer).encode(weighted)
    assert sum(ChatTemplate(tokenizer).encode(THOUGHT)[1])
    plain = MARKED.replace("<end>{% endgeneration %}", "{% endgeneration %}|{% generation %}<end>{% endgeneration %}")
    tokenizer.chat_template = plain  # a prefix of this one is rendered as in the full conversation
    tokens, mask = ChatTemplate(tokenizer).encode([{**turn, "weight": int(turn is TWO[4])} for turn in TWO])
    learned = [token for token, is_learned in zip(tokens, mask, strict=True) if is_learned]
    assert tokenizer.decode(learned) == "wörld 🙂<end>"


@pytest.mark.parametrize(
    "statement",
    [
        "{{ 1 / 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% include 'x' %}",
        "{{ messages[0].content + 1 }}",
        "{{ 'x'.encode('latin-1').decode('utf-16') }}",
    ],
)
def test_a_template_that_raises(tokenizer: Any, statement: str) -> None:
    tokenizer.chat_template = PLAIN + statement
    with pytest.raises(ConfigError, match="the chat template rejects the conversation: "):
        ChatTemplate(tokenizer).encode(TWO)


@pytest.mark.parametrize("text", ["{{", "{% for m in messages %}", "{{ m | nothing }}", "{% if %}"])
def test_a_template_with_a_syntax_error(tokenizer: Any, text: str) -> None:
    tokenizer.chat_template = text
    with pytest.raises(ConfigError, match="the tokenizer's chat template has a syntax error: "):
        ChatTemplate(tokenizer)


def test_arguments_that_the_task_gives() -> None:
    given = set(inspect.signature(transformers.PreTrainedTokenizerFast.apply_chat_template).parameters)
    for name in {"messages", *given} - {"self", "documents", "kwargs"}:
        with pytest.raises(ValidationError, match=f"{name} is set by the task; leave it out"):
            DataSettings(train="x", template_arguments={name: True})
