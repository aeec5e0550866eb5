"""`outlast validate` and `plan` of what tasks need of the model, the tokenizer and the rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
import yaml

from outlast.cluster.preflight.validate import unverified, validate
from outlast.trainers.data.tokenizer import train_bpe
from outlast.trainers.tasks.seq2seq import Seq2SeqLM
from tests.support.groups.worker_group import tiny_config
from tests.support.tasks.cases import T5, paragraphs


def write_run(folder: Path, rows: list[dict[str, Any]], sections: dict[str, Any]) -> str:
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_config("run", str(folder / "runs"), str(data), sections=sections, eval_every=None)
    (folder / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True)))
    return str(folder / "run.yaml")


def test_a_decoder_without_a_first_token(tmp_path: Path) -> None:
    """T5's own configuration has none: published models of it set it."""
    tokenizer = train_bpe(paragraphs(), 400, Seq2SeqLM.special_tokens, Seq2SeqLM.template).inner
    config = transformers.T5Config(**T5, vocab_size=len(tokenizer))
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"source": text, "target": text[:9]} for text in list(paragraphs())[:8]]
    model = {"path": str(tmp_path / "model"), "config": None, "tokenizer": None, "task": "seq2seq-lm"}
    path = write_run(tmp_path, rows, {"model": model, "data": {"eval": None}})
    [found] = validate(path, deep=True)
    assert "the configuration of the t5 model has no decoder_start_token_id" in found.finding.message
    assert not (tmp_path / "runs/run").exists()


def test_the_form_of_rows_is_reported(tmp_path: Path) -> None:
    rows = [{"prompt": text[:9], "completion": text[9:]} for text in list(paragraphs())[:8]]
    path = write_run(tmp_path, rows, {"data": {"eval": None, "max_length": 32}})
    assert validate(path, deep=True) == []
    assert "rows are read in the form of prompt and completion: columns prompt, completion" in unverified(path)
