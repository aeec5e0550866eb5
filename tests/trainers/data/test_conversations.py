"""Conversations of every published form: samples equal plain `apply_chat_template`, and the right turns are learned.

The expected tokens and texts come from transformers alone.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.config.data import DataSettings
from outlast.trainers.config.training_config import TrainingConfig
from outlast.trainers.data.chat_template import ChatTemplate
from outlast.trainers.data.conversation_forms import read_conversation
from outlast.trainers.data.tokenizer import train_bpe
from outlast.trainers.predict import read_records
from outlast.trainers.preparation.prepare import Prepared, prepare
from outlast.trainers.tasks.base import find_task
from tests.support.groups.worker_group import tiny_config

TOOL_TEMPLATE = (
    "{%- if tools %}<sys>{% for t in tools %}{{ t | tojson }}{% endfor %}<end>\n{% endif %}"
    "{%- for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if no_thinking %}<think></think>{% endif %}{% endif %}"
)
#: As templates of DeepSeek: the arguments are a text.
TEXT_ARGUMENTS = TOOL_TEMPLATE.replace(
    "c.function.name }} {{ c.function.arguments | tojson", "c.function.name + ' ' + c.function.arguments"
)
#: As templates of models that see: a content is a list.
ONLY_PARTS = (
    "{%- for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}"
    "{% endfor %}<end>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
NO_TOOLS = (
    "{%- for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{%- for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
    "{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}\n{% endfor %}"
)

TOOLS = [{"type": "function", "function": {"name": "weather", "description": "how it is", "strict": None}}]


def calling(**arguments: Any) -> list[dict[str, Any]]:
    function = {"name": "rm" if "path" in arguments else "weather", "arguments": arguments}
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]}
    return [{"role": "user", "content": "do it"}, called]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_bpe(iter(["user assistant system tool weather path city end says hello world"] * 20), 400).inner


Make = Callable[..., Prepared]


class Chats:
    """Prepares rows with a template, and decodes what is learned."""

    def __init__(self, tokenizer: Any, folder: Path) -> None:
        self.tokenizer, self.folder, self.storage = tokenizer, folder, LocalStorage(folder / "store")

    def config(self, file: Path, template: str, **data: Any) -> TrainingConfig:
        self.tokenizer.chat_template = template
        self.tokenizer.save_pretrained(self.folder / "tokenizer")
        sections = {
            "model": {"task": "chat", "tokenizer": {"path": str(self.folder / "tokenizer")}},
            "data": {"train": str(file), "eval": None, "max_length": 400, **data},
        }
        return tiny_config("chat", self.storage.url, str(file), sections=sections, eval_every=None)

    def write(self, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> Path:
        path = self.folder / name
        if name.endswith(".parquet"):
            parquet.write_table(pa.Table.from_pylist(rows), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    def samples(self, file: Path, template: str, **data: Any) -> list[list[int]]:
        return [ids for ids, _ in self.pairs(file, template, **data)]

    def pairs(self, file: Path, template: str, **data: Any) -> list[tuple[list[int], str]]:
        """The tokens of each sample, and the text that it teaches."""
        self.prepared = prepare(self.config(file, template, **data), self.storage)
        split = self.prepared.split(self.storage, "train")
        found = []
        for sample in split.take(range(len(split))):
            ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
            found.append((ids, self.tokenizer.decode([token for token in labels if token != -100])))
        return found

    def plain(self, messages: list[dict[str, Any]], template: str, **options: Any) -> list[int]:
        return list(self.tokenizer.apply_chat_template(messages, chat_template=template, **options)["input_ids"])


@pytest.fixture
def chats(tokenizer: Any, tmp_path: Path) -> Chats:
    return Chats(tokenizer, tmp_path)


# -- tools -------------------------------------------------------------------------------------------------------------


ROWS = [
    {"messages": calling(path="notes.txt", force=True), "tools": TOOLS},
    {"messages": calling(city="Paris"), "tools": TOOLS},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
]


def as_columns(value: Any) -> Any:
    """What a columnar file cannot tell from a key that is absent."""
    if isinstance(value, dict):
        return {key: as_columns(item) for key, item in value.items() if item is not None}
    return [as_columns(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_tools_and_calls_are_those_of_the_library(chats: Chats, name: str) -> None:
    """A row without tools comes last: columns are found by the first row, and a row may lack them."""
    rows = ROWS if name == "rows.jsonl" else as_columns(ROWS)
    expected = [chats.plain(row["messages"], TOOL_TEMPLATE, tools=row.get("tools")) for row in rows]
    assert chats.samples(chats.write(ROWS, name), TOOL_TEMPLATE) == expected


def test_a_first_row_without_tools_hides_none(chats: Chats) -> None:
    expected = [chats.plain(row["messages"], TOOL_TEMPLATE, tools=row.get("tools")) for row in ROWS[::-1]]
    assert chats.samples(chats.write(ROWS[::-1]), TOOL_TEMPLATE) == expected


def test_json_texts_are_read(chats: Chats) -> None:
    expected = [chats.plain(row["messages"], TOOL_TEMPLATE, tools=row.get("tools")) for row in ROWS[:2]]
    for encode in (json.dumps, lambda tools: [json.dumps(tool) for tool in tools]):
        rows = [{"messages": json.dumps(row["messages"]), "tools": encode(row["tools"])} for row in ROWS[:2]]
        assert chats.samples(chats.write(rows), TOOL_TEMPLATE) == expected


def test_the_tools_can_have_another_name_or_be_left_out(chats: Chats) -> None:
    rows = [{"messages": row["messages"], "functions": row["tools"]} for row in ROWS[:2]]
    expected = [chats.plain(row["messages"], TOOL_TEMPLATE, tools=row["tools"]) for row in ROWS[:2]]
    assert chats.samples(chats.write(rows), TOOL_TEMPLATE, tools="functions") == expected
    later = [{"messages": ROWS[2]["messages"]}, *rows]
    assert chats.samples(chats.write(later), TOOL_TEMPLATE, tools="functions")[1:] == expected
    with pytest.raises(ConfigError, match=r"rows\.jsonl has no column 'function'; it has messages, functions"):
        chats.samples(chats.write(rows), TOOL_TEMPLATE, tools="function")
    expected = [chats.plain(row["messages"], TOOL_TEMPLATE) for row in ROWS]
    assert chats.samples(chats.write(ROWS), TOOL_TEMPLATE, tools=None) == expected


def test_a_null_of_json_stays(chats: Chats) -> None:
    rows = [{"messages": calling(path="notes.txt", force=None)}]
    file = chats.write(rows)
    assert chats.samples(file, TOOL_TEMPLATE) == [chats.plain(rows[0]["messages"], TOOL_TEMPLATE)]
    assert '"force": null' in chats.tokenizer.decode(chats.samples(file, TOOL_TEMPLATE)[0])


def with_text_arguments(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    copied: list[dict[str, Any]] = json.loads(json.dumps(messages))
    for call in copied[-1]["tool_calls"]:
        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    return copied


@pytest.mark.parametrize("given", [calling(path="a"), with_text_arguments(calling(path="a"))])
@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TOOL_TEMPLATE, calling(path="a")),
        (TOOL_TEMPLATE.replace("arguments | tojson", "arguments"), with_text_arguments(calling(path="a"))),
        (TEXT_ARGUMENTS, with_text_arguments(calling(path="a"))),
    ],
)
def test_arguments_have_the_form_that_the_template_takes(
    chats: Chats, template: str, expected: list[dict[str, Any]], given: list[dict[str, Any]]
) -> None:
    """Real data has a text, as the API of OpenAI gives it; most templates take an object, and some only a text."""
    assert chats.samples(chats.write([{"messages": given}]), template) == [chats.plain(expected, template)]


def test_a_content_of_null_is_not_written_as_a_word(chats: Chats) -> None:
    """Releases of transformers before 5.24 would."""
    given = [{**item, "content": item["content"] or None} for item in calling(path="a")]
    assert chats.samples(chats.write([{"messages": given}]), TOOL_TEMPLATE) == [
        chats.plain(calling(path="a"), TOOL_TEMPLATE)
    ]


def test_the_tokenizers_own_template_for_tools_is_used(tokenizer: Any) -> None:
    """Its marks count too."""
    marking = MARKED.replace("{%- for", "{{ tools }}{%- for", 1)
    tokenizer.chat_template = {"default": NO_TOOLS, "tool_use": marking}
    tokens, mask = ChatTemplate(tokenizer).encode(ASKED, TOOLS)
    assert tokens == tokenizer.apply_chat_template(ASKED, tools=TOOLS)["input_ids"]
    assert tokenizer.decode([token for token, is_learned in zip(tokens, mask, strict=True) if is_learned]) == "a<end>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": "[{"}, "tools cannot be read as JSON"),
        ({"tools": [5]}, "holds"),
        ({"tools": "5"}, "tools are not a list of objects"),
    ],
)
def test_tools_that_are_none(chats: Chats, row: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"rows\.jsonl, row 2: .*{message}"):
        chats.samples(chats.write([ROWS[0], {**ROWS[1], **row}]), TOOL_TEMPLATE)


def test_what_the_template_does_not_show_is_named(chats: Chats) -> None:
    with pytest.raises(ConfigError, match=r"row 1: the chat template does not show the tools"):
        chats.samples(chats.write(ROWS), NO_TOOLS)
    with pytest.raises(ConfigError, match=r"row 1: the chat template does not show the tool calls of message 2"):
        chats.samples(chats.write(ROWS), NO_TOOLS, tools=None)
    silent = NO_TOOLS.replace("{{ m.content }}", "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}")
    with pytest.raises(ConfigError, match=r"row 1: the chat template does not show the answer in message 2"):
        chats.samples(chats.write(ROWS[2:]), silent)


def test_an_answer_that_the_template_trims_is_shown(chats: Chats) -> None:
    trimming = NO_TOOLS.replace("m.content", "m.content.split('</think>')[-1].strip()")
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<think>x</think> yes "}]}]
    [(ids, learned)] = chats.pairs(chats.write(rows), trimming)
    assert ids == chats.plain(rows[0]["messages"], trimming)
    assert learned == "yes<end>\n"


# -- parts -------------------------------------------------------------------------------------------------------------


def parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_text_parts_are_joined(chats: Chats, name: str) -> None:
    turns = [
        {"role": "user", "content": parts("hello ", "there")},
        {"role": "assistant", "content": parts("I am fine")},
    ]
    joined = [{"role": "user", "content": "hello there"}, {"role": "assistant", "content": "I am fine"}]
    file = chats.write([{"messages": turns}], name)
    assert chats.pairs(file, NO_TOOLS) == [(chats.plain(joined, NO_TOOLS), "I am fine<end>\n")]
    assert chats.pairs(file, ONLY_PARTS) == [(chats.plain(turns, ONLY_PARTS), "I am fine<end>\n")]
    assert chats.pairs(chats.write([{"messages": joined}]), ONLY_PARTS) == chats.pairs(file, ONLY_PARTS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            [*parts("look"), {"type": "image_url", "image_url": {"url": "x"}}],
            "message 1 has a part of type 'image_url'",
        ),
        ([{"type": "text"}], "message 1 has a part of type 'text', not a text"),
        (["hello", "there"], "neither a text nor a list of parts"),
        ({"text": "hello"}, "neither a text nor a list of parts"),
    ],
)
def test_other_parts_are_a_bad_row(chats: Chats, content: Any, message: str) -> None:
    good = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    bad = [{"role": "user", "content": content}, good[1]]
    with pytest.raises(ConfigError, match=rf"rows\.jsonl, row 2: .*{message}"):
        chats.samples(chats.write([{"messages": good}, {"messages": bad}]), NO_TOOLS)


# -- which turns are learned -------------------------------------------------------------------------------------------


def turns(**of_first: Any) -> list[dict[str, Any]]:
    contents = [("user", "q1"), ("assistant", "wrong"), ("user", "q2"), ("assistant", "right")]
    made = [{"role": role, "content": content} for role, content in contents]
    made[1] |= of_first
    return made


@pytest.mark.parametrize("template", [NO_TOOLS, MARKED])
@pytest.mark.parametrize(
    ("of_first", "data", "learned"),
    [
        ({}, {}, ["wrong", "right"]),
        ({"weight": 0}, {}, ["right"]),
        ({"weight": 1}, {}, ["wrong", "right"]),
        ({"train": False}, {}, ["right"]),
        ({"train": True}, {"train_on": "all"}, ["wrong", "right"]),
        ({}, {"train_on": "last"}, ["right"]),
    ],
)
def test_turns_that_are_learned(
    chats: Chats, of_first: dict[str, Any], data: dict[str, Any], learned: list[str], template: str
) -> None:
    end = "<end>" if template is MARKED else "<end>\n"
    for name in ("rows.jsonl", "rows.parquet"):
        file = chats.write([{"messages": turns(**of_first)}], name)
        assert chats.pairs(file, template, **data) == [
            (chats.plain(turns(), template), "".join(f"{text}{end}" for text in learned))
        ]


@pytest.mark.parametrize(
    ("of_first", "message"),
    [({"weight": 0.5}, "has weight 0.5, which is neither 0 nor 1"), ({"train": "no"}, "has train 'no'")],
)
def test_other_weights_are_a_bad_row(chats: Chats, of_first: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"rows\.jsonl, row 2: message 2 {message}"):
        chats.samples(chats.write([{"messages": turns()}, {"messages": turns(**of_first)}]), NO_TOOLS)


def test_a_row_with_nothing_to_learn_is_bad(chats: Chats) -> None:
    row = {"messages": turns(weight=0)[:2]}
    with pytest.raises(ConfigError, match="all answers have weight 0 or train: false"):
        chats.samples(chats.write([row]), NO_TOOLS)


def test_the_last_answer_is_learned_where_the_template_rewrites_earlier_ones(chats: Chats) -> None:
    forgetful = NO_TOOLS.replace(
        "{{ m.content }}", "{% if loop.last and m.role != 'user' %}<think>{% endif %}{{ m.content }}"
    )
    file = chats.write([{"messages": turns()}])
    with pytest.raises(ConfigError, match="renders the conversation up to message 2 differently") as caught:
        chats.samples(file, forgetful)
    assert "differently" in caught.value.message
    prompting = forgetful.replace("<assistant>{% endif", "<assistant><think>{% endif")
    assert chats.pairs(file, prompting, train_on="last") == [(chats.plain(turns(), prompting), "right<end>\n")]


def test_arguments_of_the_template(chats: Chats) -> None:
    thinking = TOOL_TEMPLATE.replace("<{{ m.role }}>", "<{{ m.role }}>{% if no_thinking %}<think></think>{% endif %}")
    file = chats.write([{"messages": turns()}])
    expected = chats.plain(turns(), thinking, no_thinking=True)
    assert expected != chats.plain(turns(), thinking)
    assert chats.samples(file, thinking, template_arguments={"no_thinking": True}) == [expected]
    with pytest.raises(ConfigError, match="no argument 'no_thinkng'"):
        chats.samples(file, thinking, template_arguments={"no_thinkng": True})


def test_a_syntax_error_is_no_fault_of_a_row(chats: Chats) -> None:
    with pytest.raises(ConfigError, match=r"^data\.chat_template has a syntax error: "):
        chats.samples(chats.write([{"messages": turns()}]), NO_TOOLS, chat_template="{% if %}", max_bad_rows=5)


# -- forms of rows -----------------------------------------------------------------------------------------------------


def sharegpt(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"from": role, "value": text} for role, text in pairs]


ASKED = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SYSTEM = {"role": "system", "content": "s"}
FORMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]], str]] = {
    "sharegpt": ({"conversations": sharegpt(("human", "q"), ("gpt", "a"))}, ASKED, "ShareGPT"),
    "sharegpt-system": (
        {"conversations": sharegpt(("human", "q"), ("gpt", "a")), "system": "s"},
        [SYSTEM, *ASKED],
        "ShareGPT",
    ),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, ASKED, "Alpaca"),
    "alpaca-input": (
        {"instruction": "q", "input": "x", "output": "a"},
        [{"role": "user", "content": "q\nx"}, ASKED[1]],
        "Alpaca",
    ),
    "alpaca-null": ({"instruction": "q", "input": None, "output": "a", "system": "s"}, [SYSTEM, *ASKED], "Alpaca"),
    "completion": ({"prompt": "q", "completion": "a"}, ASKED, "prompt and completion"),
    "completion-turns": ({"prompt": ASKED[:1], "completion": ASKED[1:]}, ASKED, "prompt and completion"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_forms_of_rows_are_recognized_and_reported(chats: Chats, form: str, name: str) -> None:
    row, messages, title = FORMS[form]
    assert chats.pairs(chats.write([row] * 2, name), NO_TOOLS) == [(chats.plain(messages, NO_TOOLS), "a<end>\n")] * 2
    assert any(f"in the form of {title}" in note for note in chats.prepared.notes)


def test_a_prompt_may_look_like_json(chats: Chats) -> None:
    for text in ('[{"a": 1}]', "[{not json", "[ { }, 5]"):
        messages = [{"role": "user", "content": text}, ASKED[1]]
        file = chats.write([{"prompt": text, "completion": "a"}])
        assert chats.samples(file, NO_TOOLS) == [chats.plain(messages, NO_TOOLS)]


@pytest.mark.parametrize(("name", "as_text"), [("rows.csv", json.dumps), ("rows.tsv", json.dumps), ("rows.csv", str)])
def test_conversations_in_a_csv_file(chats: Chats, name: str, as_text: Callable[[Any], str]) -> None:
    """Its fields are texts: a list is given as JSON or as pandas writes it, and an empty field is no value."""
    path = chats.folder / name
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="," if name.endswith("csv") else "\t")
        writer.writerow(["messages", "tools"])
        for row in ROWS:
            writer.writerow([as_text(row["messages"]), json.dumps(row["tools"]) if "tools" in row else ""])
    expected = [chats.plain(row["messages"], TOOL_TEMPLATE, tools=row.get("tools")) for row in ROWS]
    assert chats.samples(path, TOOL_TEMPLATE) == expected


def test_rows_that_lack_what_a_form_may_lack(chats: Chats) -> None:
    rows = [{"instruction": "q", "output": "a"}, {"instruction": "q", "input": "x", "output": "a"}]
    asked = [{"role": "user", "content": "q\nx"}, ASKED[1]]
    expected = [chats.plain(messages, NO_TOOLS) for messages in (ASKED, asked)]
    assert chats.samples(chats.write(rows), NO_TOOLS) == expected


def test_answers_of_a_prompt_are_not_learned(chats: Chats) -> None:
    """As TRL trains on rows of prompt and completion: the loss is on the completion only."""
    row = {"prompt": turns()[:3], "completion": turns()[3:]}
    assert chats.pairs(chats.write([row]), NO_TOOLS) == [(chats.plain(turns(), NO_TOOLS), "right<end>\n")]


def test_other_names_of_columns_and_roles(chats: Chats) -> None:
    file = chats.write([{"question": "q", "reply": "a"}])
    data: dict[str, Any] = {"columns": {"instruction": "question", "output": "reply"}}
    assert chats.pairs(file, NO_TOOLS, **data) == [(chats.plain(ASKED, NO_TOOLS), "a<end>\n")]
    data = {"prompt": "question", "completion": "reply"}
    assert chats.pairs(file, NO_TOOLS, **data) == [(chats.plain(ASKED, NO_TOOLS), "a<end>\n")]
    file = chats.write([{"conversations": sharegpt(("person", "q"), ("bot", "a"))}])
    roles = {"person": "user", "bot": "assistant"}
    assert chats.pairs(file, NO_TOOLS, roles=roles) == [(chats.plain(ASKED, NO_TOOLS), "a<end>\n")]
    file = chats.write([{"messages": [ASKED[0], {**ASKED[1], "role": "bot"}]}])
    assert chats.pairs(file, NO_TOOLS, roles=roles) == [(chats.plain(ASKED, NO_TOOLS), "a<end>\n")]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": sharegpt(("human", "q"), ("bot", "a"))},
        {"conversations": [ASKED[0], {**ASKED[1], "role": "bot"}]},
    ],
)
def test_an_unknown_role_is_a_bad_row(chats: Chats, row: dict[str, Any]) -> None:
    good = {"conversations": sharegpt(("human", "q"), ("gpt", "a"))}
    with pytest.raises(ConfigError, match=r"rows\.jsonl, row 2: message 2 has the unknown role 'bot'.*data\.roles"):
        chats.samples(chats.write([good, row]), NO_TOOLS)


def test_a_role_that_the_template_names_is_known(chats: Chats) -> None:
    naming = NO_TOOLS.replace("<{{ m.role }}>", "<{{ 'OBS' if m.role == 'observation' else m.role }}>")
    messages = [{"role": "observation", "content": "q"}, ASKED[1]]
    assert chats.samples(chats.write([{"messages": messages}]), naming) == [chats.plain(messages, naming)]


def test_rows_for_prediction(chats: Chats) -> None:
    """They have the form of the training rows, without the answer."""
    config = chats.config(chats.write([FORMS["alpaca-input"][0]]), NO_TOOLS)
    task = find_task("chat")(config.data, prepare(config, chats.storage).tokenizer(chats.storage), {})
    [record] = read_records(task, config, str(chats.write([{"instruction": "q", "input": "x"}], "asked.jsonl")))
    assert record == {"instruction": "q", "input": "x", "system": None}


def test_the_template_object_has_the_tokenizers_text(tokenizer: Any) -> None:
    tokenizer.chat_template = NO_TOOLS
    assert ChatTemplate(tokenizer).render(ASKED) == tokenizer.apply_chat_template(ASKED, tokenize=False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(["content", "tool_calls", "weight", "train", "role", "from", "value", "function"])


@given(st.dictionaries(KEYS, JSON, min_size=1), st.one_of(JSON, st.just(TOOLS)), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_message_is_a_sample_or_a_bad_row(
    tokenizer: Any, change: dict[str, Any], tools: Any, is_user: bool
) -> None:
    tokenizer.chat_template = TOOL_TEMPLATE
    messages = json.loads(json.dumps(calling(path="a")))
    messages[0 if is_user else 1] |= change
    data, template = DataSettings(train="none"), ChatTemplate(tokenizer)
    try:
        tokens, mask = template.encode(*read_conversation({"messages": messages, "tools": tools}, data, template.text))
    except ConfigError:
        return
    assert any(mask)
    assert len(mask) == len(tokens)
