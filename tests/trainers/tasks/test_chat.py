"""The chat task: loss on the answers equals the model's own, bad conversations are named, killed and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from outlast.checkpointing.errors import ConfigError
from outlast.checkpointing.fault_injection import FaultAction, FaultPoint
from outlast.checkpointing.storage.local import LocalStorage
from outlast.trainers.attempt import Assignment
from outlast.trainers.config.data import DataSettings
from outlast.trainers.data.columns import choose_columns
from outlast.trainers.data.tokenizer import train_bpe
from outlast.trainers.loop.train_loop import Outcome
from outlast.trainers.models.build import build_model
from outlast.trainers.tasks.base import find_task
from outlast.trainers.tasks.chat import Chat
from tests.support.groups.worker_group import digests, fault, run_group
from tests.support.tasks.cases import GPT2, paragraphs
from tests.trainers.data.test_chat_template import PLAIN


def conversation(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text[:20]}, {"role": "assistant", "content": text[20:]}]


@pytest.fixture
def sections(tmp_path: Path) -> dict[str, Any]:
    tokenizer = train_bpe(paragraphs(), 400).inner
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [json.dumps({"messages": conversation(text)}) for text in paragraphs()]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows) + "\n")
    return {
        "model": {"config": GPT2, "tokenizer": {"path": str(tmp_path / "tokenizer")}, "task": "chat"},
        "data": {"train": str(tmp_path / "chats.jsonl"), "eval": "10%", "max_length": 60},
    }


def test_the_loss_is_the_models_own_on_the_answers(
    sections: dict[str, Any], assign: Callable[..., Assignment], storage: LocalStorage
) -> None:
    assignment = assign("chat-loss", sections=sections)
    config, prepared = assignment.config, assignment.prepared
    task = find_task("chat")(config.data, prepared.tokenizer(storage), prepared.facts)
    model, _ = build_model(config.model, task, task.tokenizer, 3, fresh=True)
    batch = task.collate(prepared.split(storage, "train").take(range(6)), [])
    learned = task.tokenizer.inner.decode(batch["labels"][0][batch["labels"][0] != -100])
    answer = next(text[20:] for text in paragraphs()) + "<end>\n"
    assert answer.startswith(learned)
    assert len(learned) > len(answer) / 2, "but for what max_length cuts off"
    model.eval()
    torch.testing.assert_close(task.loss_sum(model, batch) / task.count(batch), model(**batch).loss)
    with torch.no_grad():
        [prediction] = task.predict(model, [{"messages": "Hello"}])
    assert prediction["messages"] == [{"role": "user", "content": "Hello"}]


@pytest.mark.parametrize(
    ("row", "advice"),
    [
        ({"question": "a", "context": "b", "response": "c"}, "-s data.prompt=question -s data.completion=response"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "is no task yet; to learn the chosen answers: -s data.compl"),
        (
            {"chosen": conversation("a" * 40), "rejected": conversation("b" * 40)},
            "is no task yet; to learn the chosen conversations: -s data.messages=chosen",
        ),
    ],
)
def test_forms_that_are_suggested(row: dict[str, Any], advice: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError) as caught:
        choose_columns(Chat.columns, DataSettings(train=str(tmp_path / "rows.jsonl")), Chat.forms)
    assert advice in caught.value.hint


def test_a_conversation_without_an_answer_is_named(
    sections: dict[str, Any], assign: Callable[..., Assignment], tmp_path: Path
) -> None:
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write(json.dumps({"messages": conversation("x")[:1]}) + "\n")
    sections["data"] |= {"eval": None}
    sections["train"] = {"eval_every": None}
    with pytest.raises(ConfigError, match=r"chats\.jsonl, row \d+: no message has the role 'assistant'"):
        assign("chat-bad", sections=sections)


@pytest.mark.faults
def test_killed_and_resumed_equals_uninterrupted(
    sections: dict[str, Any], assign: Callable[..., Assignment], storage: LocalStorage, tmp_path: Path
) -> None:
    assert run_group(assign("talk", sections=sections), storage, 2)[0].outcome is Outcome.DONE
    injected = fault(FaultPoint.WHILE_WRITING, 6, 1, FaultAction.SIGKILL, tmp_path)
    run_group(assign("talk-killed", sections=sections, faults=(injected,)), storage, 2)
    assert Path(injected.record).exists()
    assert run_group(assign("talk-killed", sections=sections, launch="b"), storage, 2)[0].outcome is Outcome.DONE
    assert digests(storage, "talk-killed") == digests(storage, "talk")
